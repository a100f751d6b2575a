"""Checkpoint folders: our own layout, PEFT's, and the original ``xlora`` package's."""

from xlora_core.checkpoint.own_layout import (
    CLASSIFIER_FILE,
    FORMAT,
    HEADER_FILE,
    VERSION,
    Checkpoint,
    base_identity,
    check_fits,
    read_checkpoint,
    write_adapter,
    write_checkpoint,
)

__all__ = [
    "CLASSIFIER_FILE",
    "FORMAT",
    "HEADER_FILE",
    "VERSION",
    "Checkpoint",
    "base_identity",
    "check_fits",
    "read_checkpoint",
    "write_adapter",
    "write_checkpoint",
]
