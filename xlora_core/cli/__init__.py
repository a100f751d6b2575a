"""The command line: ``xlora inspect | generate | export | merge``."""

from __future__ import annotations

from xlora_core.cli.main import main

__all__ = ["main"]
