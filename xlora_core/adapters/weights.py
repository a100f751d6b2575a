"""What an adapter is, in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


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


def exact_dtype(weights: Iterable[LoraWeights], dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype to keep weights in: ``dtype`` if it holds them bit by bit, else wider.

    Weights that were trained since they were read have more digits than their file had.
    """
    tensors = [t for w in weights for t in (w.lora_A, w.lora_B, w.bias) if t is not None]
    if all(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in tensors):
        return dtype
    exact = torch.float32
    for tensor in tensors:
        exact = torch.promote_types(exact, tensor.dtype)
    return exact
