"""Where a model goes, and in which type: what is asked for, and what is best if nothing is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from xlora_core.errors import ConfigError

AUTO = "auto"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# A device, "auto", or module path -> device as Hugging Face's ``device_map`` has it.
Device = str | torch.device | Mapping[str, Any]


def device_map(device: Device | None) -> str | dict[str, Any] | None:
    """Returns what spreads a model over several devices, or None if it goes to a single one.

    Args:
        device: As of ``load_model``.

    Raises:
        ConfigError: If it would be spread, and accelerate is missing.
    """
    if device != AUTO and not isinstance(device, Mapping):
        return None
    if find_spec("accelerate") is None:
        raise ConfigError(
            "a model is spread over devices by accelerate, which is not installed",
            hint="pip install accelerate, or give one device, such as cuda:0",
        )
    return AUTO if isinstance(device, str) else dict(device)


def main_device(device: Device | None) -> torch.device:
    """Returns the device that most of a model computes on.

    Args:
        device: As of ``load_model``.

    Raises:
        ConfigError: If there is no such device.
    """
    if isinstance(device, Mapping):
        fast = next((place for place in device.values() if place not in ("cpu", "disk")), "cpu")
        device = f"cuda:{fast}" if isinstance(fast, int) else str(fast)
    if device is None or device == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"device must be one such as cpu or cuda:0, or auto, got {device!r}"
        ) from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {device!s} does not exist: PyTorch sees {torch.cuda.device_count()} CUDA "
            "devices",
            hint="use device='cpu', or install a CUDA build of PyTorch",
        )
    return place


def weights_dtype(
    dtype: str | torch.dtype | None, place: torch.device, folder: Path
) -> str | torch.dtype:
    """Returns the type of the base weights, as ``from_pretrained`` takes it.

    Args:
        dtype: As of ``load_model``.
        place: The model's main device.
        folder: The base model's; its config names the type of its files.

    Raises:
        ConfigError: If dtype is unknown.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is not None and dtype != AUTO:
        if dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join((AUTO, *DTYPES))}, got {dtype!r}")
        return DTYPES[dtype]
    if place.type == "cpu":
        return torch.float32
    if place.type != "cuda":
        return AUTO
    if _stored_dtype(folder) == "float16":
        return torch.float16
    # Older GPUs only emulate bfloat16, at a fraction of the speed of either other type.
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


def _stored_dtype(folder: Path) -> str | None:
    """Returns the type that the config names for the files, such as ``float16``."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # said in full by what loads the model
    if not isinstance(config, dict):
        return None
    parts = [config, config.get("text_config")]
    named = [part.get("dtype") or part.get("torch_dtype") for part in parts if part]
    return next((str(name) for name in named if name), None)
