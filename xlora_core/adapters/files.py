"""Safetensors files, read without trust; pickles never."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from xlora_core.errors import AdapterError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def refuse_pickle(path: Path, *, what: str) -> None:
    """Raises ``AdapterError`` if a path names a pickle. Pickles run code when they are read."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise AdapterError(
            f"{what}: {path.name} is a pickle; pickles can run code and are never opened",
            hint="save the weights as safetensors (PEFT: save_pretrained(safe_serialization=True))",
        )


def load_safetensors(path: Path, *, what: str) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file, on the CPU.

    Args:
        path: The file.
        what: Who asks, for the message.

    Raises:
        AdapterError: If the file is truncated or its header does not fit its bytes.
    """
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise AdapterError(
            f"{what}: {path} is not a readable safetensors file: {error}",
            hint="the file is truncated or damaged; copy or save it again",
        ) from error
