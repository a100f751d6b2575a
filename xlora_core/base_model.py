"""Reading a base model and its tokenizer from a folder on this machine: safetensors, offline."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from xlora_core.errors import CheckpointError
from xlora_core.placement import Device, device_map, main_device, weights_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def load_base_folder(
    folder: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: Device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the causal language model of a folder, ready to generate, and its tokenizer.

    Nothing is downloaded and no code of the folder is run.

    Args:
        folder: Folder with ``config.json``, ``*.safetensors`` and a tokenizer; or a hub name such
            as ``org/model`` that is in the local Hugging Face cache.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None and ``auto`` are float32 on a CPU
            and bfloat16 on a CUDA device (float16 if the files are; float32 if the device is too
            old for bfloat16).
        device: Where the weights go; None is ``cuda`` if there is one, else ``cpu``. ``auto``
            spreads them over all CUDA devices, what does not fit over memory and disk; a mapping
            of module paths to devices is a ``device_map`` of Hugging Face's.

    Raises:
        CheckpointError: If the folder is missing, is not a base model, has only pickled weights,
            or does not hold all of the model's weights.
        ConfigError: If dtype or device is unknown, or accelerate is missing and needed.
    """
    place, spread = main_device(device), device_map(device)
    folder = local_folder(folder)
    kind = weights_dtype(dtype, place, folder)
    _check_folder(folder)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # Any: transformers' annotation does not know the pair that output_loading_info returns.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=kind,
            device_map=spread,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} cannot be loaded as a base model: {error}",
            hint="the folder must hold a complete Hugging Face causal language model, as "
            "save_pretrained writes it",
        ) from error
    model, loading = loaded
    _check_complete(folder, loading)
    if tokenizer.pad_token is None:  # GPT-2 and others have none; padding is masked anyway
        tokenizer.pad_token = tokenizer.eos_token
    model.eval()
    return model if spread else model.to(place), tokenizer


def local_folder(name: str | Path) -> Path:
    """Returns an existing folder: the given one, or the cached snapshot of a hub name."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(
            f"{folder} is a file, not the folder of a base model",
            hint="give the folder that holds config.json and the *.safetensors files",
        )
    if not _HUB_NAME.fullmatch(str(name)):
        raise CheckpointError(
            f"there is no base model folder {folder}",
            hint="give the path of a Hugging Face model folder, or 'demo'",
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), local_files_only=True))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"there is no base model folder {name}, and no model of that name in the Hugging Face "
            "cache of this machine",
            hint=f"nothing is downloaded on its own; fetch it first: hf download {name}",
        ) from error


def _check_folder(folder: Path) -> None:
    """Raises CheckpointError unless the folder looks like a base model with safetensors."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            fault, hint = "is a LoRA adapter, not a base model", "give it under adapters instead"
        elif (folder / "xlora.json").is_file():
            fault, hint = "is an X-LoRA checkpoint, not a base model", "give it as checkpoint"
        else:
            fault = "is not a base model: it has no config.json"
            hint = "give the folder that holds config.json and the *.safetensors files"
        raise CheckpointError(f"{folder} {fault}", hint=hint)
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds its weights only as {', '.join(pickles)}, a pickle that can run code "
            "when it is opened; it was not opened",
            hint="load it where you trust it, and write it again with "
            "model.save_pretrained(folder), which makes safetensors",
        )
    raise CheckpointError(
        f"{folder} holds no weights: there is no *.safetensors file",
        hint="copy the model's *.safetensors files next to its config.json",
    )


def _check_complete(folder: Path, loading: Mapping[str, Any]) -> None:
    """Raises CheckpointError if transformers had to make up weights that the files lack."""
    missing = sorted(loading["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the model's weights, such as {missing[0]}",
            hint="the download is not complete, or config.json belongs to another model",
        )
