"""The error of the recorder of sample runs."""

from __future__ import annotations

from xlora_core.errors import XLoraError


class RecordingError(XLoraError, ValueError):
    """The list of recordings is malformed, or a file of the runs is missing or out of date."""
