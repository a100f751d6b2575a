"""PEFT's keys of an adapter's tensors, read and written."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xlora_core.adapters.config_file import CONFIG_FILE, WEIGHTS_FILE, by_pattern, is_number
from xlora_core.adapters.weights import LoraAdapter, LoraWeights, SavedModule
from xlora_core.errors import AdapterError

KEY_PREFIX = "base_model.model."

# An adapter's own name stands in the key only while it is in memory; some tools save it, too.
_LORA_KEY = re.compile(
    r"^(?P<module>.+)\.(?:lora_(?P<side>[AB])(?:\.[^.]+)?\.(?P<part>weight|bias)"
    r"|lora_embedding_(?P<embedding_side>[AB])(?:\.[^.]+)?)$"
)
_SAVED_KEY = re.compile(r"^(?P<module>.+)\.(?P<part>weight|bias)$")
_BASE_KEY = re.compile(rf"^{re.escape(KEY_PREFIX)}(?P<module>.+)\.base_layer\.weight$")
_STRAY_KEY = re.compile(r"(^|\.)internal_xlora_classifier\.")


def is_stray(key: str) -> bool:
    """Returns whether a tensor is a part of a classifier that was left in an adapter's file."""
    return _STRAY_KEY.search(key) is not None


def lora_adapter(
    name: str,
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    modules_to_save: Sequence[str],
) -> LoraAdapter:
    """Returns the adapter of a file's tensors.

    Args:
        name: The adapter's name.
        folder: Where it was read, for messages.
        config: ``adapter_config.json``.
        tensors: File key -> tensor.
        modules_to_save: Names of the modules that it trained as a whole.

    Raises:
        AdapterError: If a tensor is no part of plain LoRA, or a pair does not fit.
    """
    lora = {key: tensor for key, tensor in tensors.items() if ".lora_" in key}
    modules = _pair_tensors(name, folder, config, lora)
    base = {m[1]: key for key in tensors if (m := _BASE_KEY.match(key)) and m[1] in modules}
    rest = {k: t for k, t in tensors.items() if k not in lora and k not in base.values()}
    return LoraAdapter(
        name=name,
        config=config,
        modules=modules,
        dtype=next(iter((lora or tensors).values())).dtype,
        saved_modules=_saved_modules(name, folder, modules_to_save, rest),
        base_weights={module: tensors[key] for module, key in base.items()},
    )


def adapter_tensors(adapter: LoraAdapter) -> dict[str, Tensor]:
    """Returns an adapter's tensors under PEFT's file keys, on the CPU, in the adapter's dtype."""
    tensors: dict[str, Tensor] = {}
    for module, weights in adapter.modules.items():
        for side, tensor in (("A", weights.lora_A), ("B", weights.lora_B)):
            key = f"lora_embedding_{side}" if weights.embedding else f"lora_{side}.weight"
            tensors[f"{KEY_PREFIX}{module}.{key}"] = tensor
        if weights.bias is not None:
            tensors[f"{KEY_PREFIX}{module}.lora_B.bias"] = weights.bias
    for module, saved in adapter.saved_modules.items():
        tensors[f"{KEY_PREFIX}{module}.weight"] = saved.weight
        if saved.bias is not None:
            tensors[f"{KEY_PREFIX}{module}.bias"] = saved.bias
    # A copy each: safetensors refuses tensors that share memory.
    return {
        key: tensor.detach().to("cpu", adapter.dtype).clone(memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }


def _saved_modules(
    name: str, folder: Path, saved_names: Sequence[str], tensors: Mapping[str, Tensor]
) -> dict[str, SavedModule]:
    """Returns the wholly trained modules; every tensor must belong to one of them."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _SAVED_KEY.match(key.removeprefix(KEY_PREFIX))
        module = match["module"] if match else ""
        named = module in saved_names or any(module.endswith(f".{n}") for n in saved_names)
        if match is None or not key.startswith(KEY_PREFIX) or not named:
            raise AdapterError(
                f"adapter {name!r}: {folder / WEIGHTS_FILE}: tensor {key} is not part of plain "
                f"LoRA; expected {KEY_PREFIX}<module>.lora_A.weight and .lora_B.weight, "
                ".lora_embedding_A and _B, or modules named in modules_to_save",
                hint="adapters that train further parameters cannot be mixed",
            )
        parts.setdefault(module, {})[match["part"]] = tensor
    for module, found in parts.items():
        if "weight" not in found:
            raise AdapterError(
                f"adapter {name!r}, module {module}: the saved module has a bias but no weight, "
                "the file is incomplete"
            )
    if saved_names and not parts:
        raise AdapterError(
            f"adapter {name!r}: modules_to_save names {', '.join(saved_names)}, but the file holds "
            f"none of them ({folder / WEIGHTS_FILE})",
            hint="the file is incomplete; save the adapter again",
        )
    return {m: SavedModule(weight=p["weight"], bias=p.get("bias")) for m, p in parts.items()}


def _pair_tensors(
    name: str, folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, LoraWeights]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _LORA_KEY.match(key)
        if match is None or not key.startswith(KEY_PREFIX):
            raise AdapterError(
                f"adapter {name!r}: {folder / WEIGHTS_FILE}: tensor {key} is not part of plain "
                f"LoRA; expected {KEY_PREFIX}<module>.lora_A.weight and .lora_B.weight, or "
                ".lora_embedding_A and _B",
                hint="only plain LoRA adapters can be mixed",
            )
        module = match["module"].removeprefix(KEY_PREFIX)
        part = match["embedding_side"] or (
            match["side"] if match["part"] == "weight" else f"bias of lora_{match['side']}"
        )
        found = parts.setdefault(module, {})
        if part in found:
            raise AdapterError(
                f"adapter {name!r}: {folder / WEIGHTS_FILE}: module {module} has two tensors "
                f"lora_{part}, expected one",
                hint="the file holds several adapters; save each of them alone",
            )
        found[part] = tensor
        if match["embedding_side"]:
            found["embedding"] = tensor
    return {module: _checked_pair(name, module, config, found) for module, found in parts.items()}


def _checked_pair(
    name: str, module: str, config: Mapping[str, Any], pair: Mapping[str, Tensor]
) -> LoraWeights:
    where = f"adapter {name!r}, module {module}"
    missing = [f"lora_{side}" for side in "AB" if side not in pair]
    if missing:
        raise AdapterError(f"{where}: {missing[0]} is missing, the file is incomplete")
    lora_A, lora_B, bias = pair["A"], pair["B"], pair.get("bias of lora_B")
    rank = by_pattern(config, "rank_pattern", config.get("r"), where, module)
    of_matrices = lora_A.ndim == lora_B.ndim == 2
    of_convolution = lora_A.ndim == lora_B.ndim == 4 and lora_B.shape[2:] == (1, 1)
    if not (of_matrices or of_convolution) or lora_A.shape[0] != lora_B.shape[1]:
        raise AdapterError(
            f"{where}: lora_A must be [r, in] and lora_B [out, r], or [r, in, kh, kw] and "
            f"[out, r, 1, 1] for a convolution, found {list(lora_A.shape)} and "
            f"{list(lora_B.shape)}"
        )
    if "bias of lora_A" in pair:
        raise AdapterError(f"{where}: lora_A has a bias, plain LoRA has none there")
    if bias is not None and bias.shape != lora_B.shape[:1]:
        raise AdapterError(
            f"{where}: the bias of lora_B must be [{lora_B.shape[0]}], found {list(bias.shape)}"
        )
    if isinstance(rank, bool) or lora_A.shape[0] != rank or rank < 1:
        raise AdapterError(
            f"{where}: {CONFIG_FILE} says rank {rank!r}, the tensors have rank {lora_A.shape[0]}"
        )
    alpha = by_pattern(config, "alpha_pattern", config.get("lora_alpha", 8), where, module)
    if not is_number(alpha):
        raise AdapterError(f"{where}: lora_alpha must be a finite number, got {alpha!r}")
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return LoraWeights(
        lora_A=lora_A,
        lora_B=lora_B,
        lora_scaling=alpha / divisor,
        bias=bias,
        embedding="embedding" in pair,
    )
