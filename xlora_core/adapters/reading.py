"""Reading LoRA adapters from disk: PEFT's folder format, safetensors only."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from xlora_core.adapters.config_file import WEIGHTS_FILE, modules_to_save, read_config
from xlora_core.adapters.files import DTYPES, load_safetensors, refuse_pickle
from xlora_core.adapters.tensors import is_stray, lora_adapter
from xlora_core.adapters.weights import LoraAdapter
from xlora_core.errors import AdapterError


def read_adapter(name: str, folder: str | Path) -> LoraAdapter:
    """Returns the LoRA adapter of a PEFT folder.

    Args:
        name: The adapter's name from here on; any non-empty string.
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        AdapterError: For a missing folder or file, a pickle, a truncated or doctored file, a
            method other than plain LoRA, an unpaired or misshapen tensor, NaN or infinity.
    """
    folder = Path(folder)
    config = read_config(name, folder)
    tensors = _read_weights(name, folder)
    return lora_adapter(
        name, folder, config, tensors, modules_to_save=modules_to_save(name, folder, config)
    )


def _read_weights(name: str, folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        for other in sorted(folder.iterdir()):
            refuse_pickle(other, what=f"adapter {name!r}")
        raise AdapterError(
            f"adapter {name!r}: {folder} has no {WEIGHTS_FILE}",
            hint="PEFT's save_pretrained writes it",
        )
    tensors = load_safetensors(path, what=f"adapter {name!r}")
    # The original xlora package leaves parts of its classifier in every adapter file.
    tensors = {key: tensor for key, tensor in tensors.items() if not is_stray(key)}
    if not tensors:
        raise AdapterError(f"adapter {name!r}: {path} holds no tensors")
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise AdapterError(
                f"adapter {name!r}: {path}: tensor {key} is {tensor.dtype}, expected one of "
                f"{', '.join(map(str, DTYPES))}"
            )
        if not torch.isfinite(tensor).all():
            raise AdapterError(
                f"adapter {name!r}: {path}: tensor {key} holds NaN or infinite values",
                hint="its training diverged, or the file was damaged; take an earlier checkpoint",
            )
    return tensors
