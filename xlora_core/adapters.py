"""Reading LoRA adapters from disk: PEFT's folder format, safetensors only."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from xlora_core.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
KEY_PREFIX = "base_model.model."
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_LORA_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight$")


@dataclass(frozen=True, kw_only=True)
class LoraWeights:
    """One adapter's low-rank pair for one module.

    Attributes:
        lora_A: ``[r, in]``; ``[r, in, kh, kw]`` for a convolution.
        lora_B: ``[out, r]``; ``[out, r, 1, 1]`` for a convolution.
        lora_scaling: alpha / r, or alpha / sqrt(r) with rsLoRA.
        bias: ``[out]``, the bias of ``lora_B`` (PEFT's ``lora_bias``), or None.
        embedding: Whether the module is an embedding; then ``in`` counts its rows.
    """

    lora_A: Tensor
    lora_B: Tensor
    lora_scaling: float
    bias: Tensor | None = None
    embedding: bool = False

    @property
    def rank(self) -> int:
        """r."""
        return self.lora_A.shape[0]


@dataclass(frozen=True, kw_only=True)
class LoraAdapter:
    """A LoRA adapter as read from disk.

    Attributes:
        name: The name it was given, not one found on disk.
        config: ``adapter_config.json`` as it stands.
        modules: Module path in the base model -> weights.
        dtype: dtype of the weights on disk.
    """

    name: str
    config: Mapping[str, Any]
    modules: Mapping[str, LoraWeights]
    dtype: torch.dtype

    @property
    def dropout(self) -> float:
        """Dropout on the adapter's input while it trains, in [0, 1)."""
        return float(self.config.get("lora_dropout") or 0.0)


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
    config = _read_config(name, folder)
    tensors = _read_weights(name, folder)
    return LoraAdapter(
        name=name,
        config=config,
        modules=_pair_tensors(name, folder, config, tensors),
        dtype=next(iter(tensors.values())).dtype,
    )


def _read_config(name: str, folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise AdapterError(
            f"adapter {name!r}: folder {folder} does not exist",
            hint=f"give the folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}",
        )
    if not folder.is_dir():
        refuse_pickle(folder, what=f"adapter {name!r}")
        raise AdapterError(
            f"adapter {name!r}: {folder} is a file, a folder was expected",
            hint=f"give the folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}",
        )
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(
            f"adapter {name!r}: {folder} is not a LoRA adapter, it has no {CONFIG_FILE}",
            hint="PEFT's save_pretrained writes such a folder",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"adapter {name!r}: {path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterError(
            f"adapter {name!r}: {path} is not a LoRA, its peft_type is {found!r}, expected 'LORA'",
            hint="an X-LoRA mixes plain LoRA adapters only",
        )
    _refuse_unsupported(name, path, config)
    dropout = config.get("lora_dropout") or 0
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise AdapterError(
            f"adapter {name!r}: {path}: lora_dropout must be in [0, 1), got {dropout!r}"
        )
    return config


def _refuse_unsupported(name: str, path: Path, config: Mapping[str, Any]) -> None:
    """Raises for LoRA variants whose numbers would be silently wrong if read as plain LoRA."""
    variants = {
        "use_dora": "DoRA",
        "lora_bias": "a bias on lora_B",
        "modules_to_save": "fully trained modules (modules_to_save)",
        "trainable_token_indices": "trained token embeddings",
        "target_parameters": "adapted parameters (target_parameters)",
        "layer_replication": "replicated layers",
        "alora_invocation_tokens": "activated LoRA",
        "use_qalora": "QA-LoRA",
        "arrow_config": "an Arrow router",
    }
    found = [what for key, what in variants.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        found.append(f"trained biases (bias={config['bias']!r})")
    if found:
        raise AdapterError(
            f"adapter {name!r}: {path} uses {', '.join(found)}; only plain LoRA can be mixed",
            hint="train the adapter without it, or merge that part into the base model first",
        )


def refuse_pickle(path: Path, *, what: str) -> None:
    """Raises ``AdapterError`` if a path names a pickle. Pickles run code when they are read."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise AdapterError(
            f"{what}: {path.name} is a pickle; pickles can run code and are never opened",
            hint="save the weights as safetensors (PEFT: save_pretrained(safe_serialization=True))",
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


def _pair_tensors(
    name: str, folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, LoraWeights]:
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _LORA_KEY.match(key)
        if match is None or not key.startswith(KEY_PREFIX):
            kind = "an embedding adapter" if "lora_embedding_" in key else "not part of plain LoRA"
            raise AdapterError(
                f"adapter {name!r}: {folder / WEIGHTS_FILE}: tensor {key} is {kind}; expected "
                f"{KEY_PREFIX}<module>.lora_A.weight and .lora_B.weight",
                hint="only adapters on linear layers (Linear, Conv1D) can be mixed",
            )
        module = match["module"].removeprefix(KEY_PREFIX)
        pair = sides.setdefault(module, {})
        if match["side"] in pair:
            raise AdapterError(
                f"adapter {name!r}: {folder / WEIGHTS_FILE}: module {module} has two tensors "
                f"lora_{match['side']}, expected one",
                hint="the file holds several adapters; save each of them alone",
            )
        pair[match["side"]] = tensor
    return {module: _checked_pair(name, module, config, pair) for module, pair in sides.items()}


def _checked_pair(
    name: str, module: str, config: Mapping[str, Any], pair: Mapping[str, Tensor]
) -> LoraWeights:
    where = f"adapter {name!r}, module {module}"
    missing = [f"lora_{side}" for side in "AB" if side not in pair]
    if missing:
        raise AdapterError(f"{where}: {missing[0]} is missing, the file is incomplete")
    lora_A, lora_B = pair["A"], pair["B"]
    rank = _by_pattern(config, "rank_pattern", config.get("r"), where, module)
    if lora_A.ndim != 2 or lora_B.ndim != 2 or lora_A.shape[0] != lora_B.shape[1]:
        raise AdapterError(
            f"{where}: lora_A must be [r, in] and lora_B [out, r], found {list(lora_A.shape)} "
            f"and {list(lora_B.shape)}"
        )
    if isinstance(rank, bool) or lora_A.shape[0] != rank or rank < 1:
        raise AdapterError(
            f"{where}: {CONFIG_FILE} says rank {rank!r}, the tensors have rank {lora_A.shape[0]}"
        )
    alpha = _by_pattern(config, "alpha_pattern", config.get("lora_alpha", 8), where, module)
    if not _is_number(alpha):
        raise AdapterError(f"{where}: lora_alpha must be a finite number, got {alpha!r}")
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return LoraWeights(lora_A=lora_A, lora_B=lora_B, lora_scaling=alpha / divisor)


def _is_number(value: object) -> bool:
    """Whether a JSON value is a finite number that fits a float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max


def _by_pattern(config: Mapping[str, Any], key: str, default: Any, where: str, module: str) -> Any:
    """Returns the value of the first pattern that matches a module's path or its end.

    Source: PEFT 0.21.2, ``get_pattern_key``.
    """
    patterns = config.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise AdapterError(f"{where}: {key} must map patterns to numbers, got {patterns!r}")
    for pattern, value in patterns.items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise AdapterError(f"{where}: {key}: {pattern!r} is not a pattern: {error}") from error
        if matches:
            return value
    return default
