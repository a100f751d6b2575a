"""Checkpoint folders: our own layout, PEFT's, and the original ``xlora`` package's."""

from xlora_core.checkpoint.contents import Checkpoint, Layout, base_identity
from xlora_core.checkpoint.experts import write_adapter
from xlora_core.checkpoint.fitting import check_fits, n_lora_layers, router_shapes
from xlora_core.checkpoint.names_file import NAMES_FILE
from xlora_core.checkpoint.ordering import ORDERING_FILE, read_ordering
from xlora_core.checkpoint.original_layout import (
    ORIGINAL_CLASSIFIER_FILE,
    ORIGINAL_CONFIG_FILE,
    read_original_config,
    write_original,
)
from xlora_core.checkpoint.own_layout import (
    CLASSIFIER_FILE,
    FORMAT,
    HEADER_FILE,
    VERSION,
    write_checkpoint,
)
from xlora_core.checkpoint.peft_layout import peft_notes, read_peft_config, write_peft
from xlora_core.checkpoint.reading import layout_of, read_checkpoint

__all__ = [
    "CLASSIFIER_FILE",
    "FORMAT",
    "HEADER_FILE",
    "NAMES_FILE",
    "ORDERING_FILE",
    "ORIGINAL_CLASSIFIER_FILE",
    "ORIGINAL_CONFIG_FILE",
    "VERSION",
    "Checkpoint",
    "Layout",
    "base_identity",
    "check_fits",
    "layout_of",
    "n_lora_layers",
    "peft_notes",
    "read_checkpoint",
    "read_ordering",
    "read_original_config",
    "read_peft_config",
    "router_shapes",
    "write_adapter",
    "write_checkpoint",
    "write_original",
    "write_peft",
]
