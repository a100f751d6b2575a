"""LoRA adapters in PEFT's folder format: read and validated, safetensors only."""

from xlora_core.adapters.config_file import CONFIG_FILE, WEIGHTS_FILE
from xlora_core.adapters.files import DTYPES, PICKLE_SUFFIXES, load_safetensors, refuse_pickle
from xlora_core.adapters.reading import read_adapter
from xlora_core.adapters.tensors import KEY_PREFIX, adapter_tensors
from xlora_core.adapters.weights import LoraAdapter, LoraWeights, SavedModule, exact_dtype

__all__ = [
    "CONFIG_FILE",
    "DTYPES",
    "KEY_PREFIX",
    "PICKLE_SUFFIXES",
    "WEIGHTS_FILE",
    "LoraAdapter",
    "LoraWeights",
    "SavedModule",
    "adapter_tensors",
    "exact_dtype",
    "load_safetensors",
    "read_adapter",
    "refuse_pickle",
]
