"""Timings of a model on this machine, each against something else in the same run.

Every benchmark is a module with a ``measure`` that returns a ``Report``. Nothing here needs
anything that the package itself does not.
"""

from __future__ import annotations

from xlora_core.bench.report import Report

__all__ = ["Report"]
