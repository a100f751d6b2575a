"""Reading LoRA adapters from disk: PEFT's folder format, safetensors only."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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

# An adapter's own name stands in the key only while it is in memory; some tools save it, too.
_LORA_KEY = re.compile(
    r"^(?P<module>.+)\.(?:lora_(?P<side>[AB])(?:\.[^.]+)?\.(?P<part>weight|bias)"
    r"|lora_embedding_(?P<embedding_side>[AB])(?:\.[^.]+)?)$"
)
_SAVED_KEY = re.compile(r"^(?P<module>.+)\.(?P<part>weight|bias)$")
_BASE_KEY = re.compile(rf"^{re.escape(KEY_PREFIX)}(?P<module>.+)\.base_layer\.weight$")
_STRAY_KEY = re.compile(r"(^|\.)internal_xlora_classifier\.")


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
class SavedModule:
    """A module that an adapter trained as a whole (PEFT's ``modules_to_save``).

    Attributes:
        weight: In the base weight's layout.
        bias: ``[out]``, or None.
    """

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LoraAdapter:
    """A LoRA adapter as read from disk.

    Attributes:
        name: The name it was given, not one found on disk.
        config: ``adapter_config.json`` as it stands.
        modules: Module path in the base model -> weights.
        dtype: dtype of the weights on disk.
        saved_modules: Module path -> the module as this adapter trained it, such as the head of
            a sequence classifier.
        base_weights: Module path -> the base model's own weight in it, which PEFT writes beside
            the adapter of an embedding or a head. It must be the model's; it is not mixed.
    """

    name: str
    config: Mapping[str, Any]
    modules: Mapping[str, LoraWeights]
    dtype: torch.dtype
    saved_modules: Mapping[str, SavedModule] = field(default_factory=dict)
    base_weights: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def paths(self) -> list[str]:
        """Paths of all modules that it changes."""
        return [*self.modules, *self.saved_modules]

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
    saved_names = _modules_to_save(name, folder, config)
    lora = {key: tensor for key, tensor in tensors.items() if _is_lora(key)}
    modules = _pair_tensors(name, folder, config, lora)
    base = {m[1]: key for key in tensors if (m := _BASE_KEY.match(key)) and m[1] in modules}
    rest = {k: t for k, t in tensors.items() if k not in lora and k not in base.values()}
    return LoraAdapter(
        name=name,
        config=config,
        modules=modules,
        dtype=next(iter((lora or tensors).values())).dtype,
        saved_modules=_saved_modules(name, folder, saved_names, rest),
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
    # The original xlora package leaves parts of its classifier in every adapter file.
    tensors = {key: t for key, t in tensors.items() if not _STRAY_KEY.search(key)}
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


def _is_lora(key: str) -> bool:
    return ".lora_" in key


def _modules_to_save(name: str, folder: Path, config: Mapping[str, Any]) -> list[str]:
    names = config.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise AdapterError(
            f"adapter {name!r}: {folder / CONFIG_FILE}: modules_to_save must be a list of module "
            f"names, got {names!r}"
        )
    return names


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
    rank = _by_pattern(config, "rank_pattern", config.get("r"), where, module)
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
    alpha = _by_pattern(config, "alpha_pattern", config.get("lora_alpha", 8), where, module)
    if not _is_number(alpha):
        raise AdapterError(f"{where}: lora_alpha must be a finite number, got {alpha!r}")
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return LoraWeights(
        lora_A=lora_A,
        lora_B=lora_B,
        lora_scaling=alpha / divisor,
        bias=bias,
        embedding="embedding" in pair,
    )


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
