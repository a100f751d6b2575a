"""The error of the corpus builder."""

from __future__ import annotations

from xlora_core.errors import XLoraError


class CorpusError(XLoraError, RuntimeError):
    """A package cannot be fetched or read, or an environment for a generator cannot be made."""
