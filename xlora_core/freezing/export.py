"""A constant mixture as files that need nothing of this project: a plain model, or one LoRA."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from xlora_core.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    LoraAdapter,
    LoraWeights,
    adapter_tensors,
)
from xlora_core.checkpoint.files import write_folder
from xlora_core.errors import AdapterError, CheckpointError
from xlora_core.merge import MergeWeights, SingleLora, single_lora, weight_matrix
from xlora_core.model import XLoraModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def refuse_existing(folder: str | Path) -> None:
    """Raises ``CheckpointError`` if a path exists and is not an empty folder."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(
            f"{folder} exists and is not empty", hint="choose a new or empty folder"
        )


def save_merged_model(
    model: XLoraModel,
    folder: str | Path,
    weights: MergeWeights = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Writes the base model with a constant mixture baked in, as a plain Hugging Face folder.

    The X-LoRA model is spent afterwards, as after ``merge_and_unload``.

    Args:
        model: The model.
        folder: A new or empty folder.
        weights: As in ``merge_and_unload``, or a ``FrozenMixture``; None is the uniform merge.
        tokenizer: Saved along.

    Raises:
        ConfigError: If the weights do not fit the model.
        CheckpointError: If the folder is not empty, or cannot be written, or the base model is
            quantised.
    """
    refuse_existing(folder)
    if getattr(model.base_model.config, "quantization_config", None) is not None:
        # Its config would make the merged layers quantised again, and the numbers others.
        raise CheckpointError(
            "the base model is quantised; a plain model folder would not hold the merged weights "
            "as they are",
            hint="write one LoRA for the quantised base (--as lora), or load the base without "
            "quantisation",
        )
    matrix = weight_matrix(weights, model.adapter_names, model.lora_layer_names)
    merged = model.merge_and_unload(matrix)

    def write(staging: Path) -> None:
        merged.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)

    _write(folder, write)


def lora_of_mixture(
    model: XLoraModel, weights: MergeWeights = None, *, rank: int | None = None
) -> SingleLora:
    """Returns a constant mixture as one LoRA, see ``single_lora``. The model is not changed.

    Args:
        model: The model.
        weights: As in ``merge_and_unload``, or a ``FrozenMixture``; None is the uniform merge.
        rank: Largest rank of a module; None is exact.

    Raises:
        ConfigError: If the weights do not fit the model, are zero everywhere, or ``rank`` < 1.
        AdapterError: If the mixture has no form in PEFT's format; names the module.
    """
    layers = dict(zip(model.lora_layer_names, model.lora_layers, strict=True))
    # A narrow type would round the product of weight, lora_scaling and lora_B once more.
    dtype = torch.float32
    for layer in layers.values():
        dtype = torch.promote_types(dtype, layer.lora_A.dtype)
    return single_lora(
        {path: layer.experts() for path, layer in layers.items()},
        weight_matrix(weights, model.adapter_names, model.lora_layer_names),
        rank=rank,
        dtype=dtype,
    )


def save_merged_lora(
    model: XLoraModel,
    folder: str | Path,
    weights: MergeWeights = None,
    *,
    rank: int | None = None,
) -> SingleLora:
    """Writes a constant mixture as one LoRA adapter in PEFT's format, and returns it.

    Args:
        model: The model; not changed.
        folder: A new or empty folder.
        weights: As in ``merge_and_unload``, or a ``FrozenMixture``; None is the uniform merge.
        rank: Largest rank of a module; None is exact.

    Raises:
        ConfigError: If the weights do not fit the model, are zero everywhere, or ``rank`` < 1.
        AdapterError: If the mixture has no form in PEFT's format; names the module.
        CheckpointError: If the folder is not empty, or cannot be written.
    """
    refuse_existing(folder)
    lora = lora_of_mixture(model, weights, rank=rank)
    adapter = _as_adapter(model, lora)

    def write(staging: Path) -> None:
        config = json.dumps(dict(adapter.config), indent=2, ensure_ascii=False) + "\n"
        (staging / CONFIG_FILE).write_text(config, encoding="utf-8")
        save_file(adapter_tensors(adapter), staging / WEIGHTS_FILE, metadata={"format": "pt"})

    _write(folder, write)
    return lora


def _write(folder: str | Path, write: Callable[[Path], None]) -> None:
    def write_for_all(staging: Path) -> None:
        write(staging)
        # safetensors writes files that only their owner may read.
        for file in staging.iterdir():
            file.chmod(0o644)

    write_folder(folder, write_for_all, may_replace=lambda _: False)


def _as_adapter(model: XLoraModel, lora: SingleLora) -> LoraAdapter:
    ranks = {path: weights.rank for path, weights in lora.modules.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT reads the keys as patterns for the end of a path; these stand for one path alone.
    others = {f"^{re.escape(path)}": r for path, r in ranks.items() if r != rank}
    base_layers = {
        path: layer.base_layer
        for path, layer in zip(model.lora_layer_names, model.lora_layers, strict=True)
    }
    modules = _with_a_bias_each(lora.modules)
    config = {
        "peft_type": "LORA",
        "task_type": _task_type(model),
        "base_model_name_or_path": _base_name(model),
        "r": rank,
        # Equal to the rank, so that PEFT multiplies by 1.
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "lora_bias": any(weights.bias is not None for weights in modules.values()),
        "bias": "none",
        "fan_in_fan_out": any(isinstance(base_layers[path], Conv1D) for path in ranks),
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    dtype = next(iter(modules.values())).lora_A.dtype
    return LoraAdapter(name="merged", config=config, modules=modules, dtype=dtype)


def _with_a_bias_each(modules: Mapping[str, LoraWeights]) -> Mapping[str, LoraWeights]:
    """Gives every module a bias if one has it: PEFT knows only adapters with all or none."""
    with_bias = [path for path, weights in modules.items() if weights.bias is not None]
    if not with_bias:
        return modules
    embeddings = [path for path, weights in modules.items() if weights.embedding]
    if embeddings:
        raise AdapterError(
            f"the experts have a bias in {with_bias[0]}, which in PEFT's format the embedding "
            f"{embeddings[0]} would need as well, and cannot have",
            hint="merge into a plain model instead",
        )
    return {
        path: replace(weights, bias=torch.zeros_like(weights.lora_B[:, 0].flatten()))
        if weights.bias is None
        else weights
        for path, weights in modules.items()
    }


def _task_type(model: XLoraModel) -> str | None:
    if model.base_model.config.is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if model.base_model.can_generate() else None


def _base_name(model: XLoraModel) -> str | None:
    """Returns the base model's public name; a folder of this machine is nobody else's business."""
    name = str(model.base_model.name_or_path or "")
    return name if name and not Path(name).exists() else None
