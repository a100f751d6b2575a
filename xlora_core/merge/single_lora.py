"""A constant mixture of experts as one LoRA: exact with the ranks added up, or cut to a rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xlora_core.adapters import LoraWeights
from xlora_core.errors import AdapterError, ConfigError
from xlora_core.merge.low_rank import squared_norm, truncate


@dataclass(frozen=True, kw_only=True)
class SingleLora:
    """One LoRA that stands for a constant mixture.

    Modules in which every expert weighs 0 are not in it.

    Attributes:
        modules: Module path -> weights, in order, with ``lora_scaling`` 1.
        squared_norms: Module path -> squared Frobenius norm of the mixture's weight change.
        cut: Module path -> how much of that the truncation took away, 0 where exact.
    """

    modules: Mapping[str, LoraWeights]
    squared_norms: Mapping[str, float]
    cut: Mapping[str, float]

    @property
    def kept(self) -> dict[str, float]:
        """Module path -> share of the squared Frobenius norm that is left, in [0, 1]."""
        return {
            path: 1 - self.cut[path] / norm if norm else 1.0
            for path, norm in self.squared_norms.items()
        }

    @property
    def kept_in_total(self) -> float:
        """Share of all modules' squared Frobenius norm that is left, in [0, 1]."""
        total = sum(self.squared_norms.values())
        return 1 - sum(self.cut.values()) / total if total else 1.0


def single_lora(
    experts: Mapping[str, Mapping[int, LoraWeights]],
    weights: Tensor,
    *,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> SingleLora:
    """Returns one LoRA whose product is the weighted sum of the experts' products.

    Exact means that the factors are the experts' own, one below the other, with weight and
    ``lora_scaling`` in ``lora_B``; the rank is the sum of the ranks of the experts that have a
    weight. A chosen rank gives in each module the nearest matrix of that rank; modules whose
    ranks add up to no more stay exact.

    Args:
        experts: Module path -> adapter index -> weights, L modules in order.
        weights: ``[L, K]``; may be negative.
        rank: Largest rank of a module, >= 1; None is exact.
        dtype: Of the result. The arithmetic is float64.

    Raises:
        ConfigError: If ``rank`` is below 1, or the mixture is zero everywhere.
        AdapterError: For a bias on an embedding's experts, which PEFT's format cannot hold.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"the rank of a LoRA must be at least 1, got {rank}")
    modules: dict[str, LoraWeights] = {}
    squared_norms: dict[str, float] = {}
    cut: dict[str, float] = {}
    for (path, of_module), row in zip(experts.items(), weights.tolist(), strict=True):
        parts = [(part, row[k]) for k, part in of_module.items() if row[k] != 0]
        if not parts:
            continue
        lora_A, lora_B, bias = _stacked(path, parts)
        left, right = lora_B.flatten(1), lora_A.flatten(1)
        squared_norms[path], cut[path] = squared_norm(left, right), 0.0
        if rank is not None and rank < len(lora_A):
            nearest = truncate(left, right, rank)
            cut[path] = float(nearest.singular_values[rank:].square().sum())
            lora_A = nearest.right.reshape(-1, *lora_A.shape[1:])
            lora_B = nearest.left.reshape(len(lora_B), -1, *lora_B.shape[2:])
        modules[path] = LoraWeights(
            lora_A=lora_A.to(dtype),
            lora_B=lora_B.to(dtype),
            lora_scaling=1.0,
            bias=None if bias is None else bias.to(dtype),
            embedding=parts[0][0].embedding,
        )
    if not modules:
        raise ConfigError(
            "the mixture is zero in every module: it is the base model, and there is no LoRA to "
            "write",
            hint="give some adapter a weight other than 0",
        )
    return SingleLora(modules=modules, squared_norms=squared_norms, cut=cut)


def _stacked(
    path: str, parts: Sequence[tuple[LoraWeights, float]]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns ``lora_A [R, in, ...]``, ``lora_B [out, R, ...]`` and the bias ``[out]``, float64."""
    for part, _ in parts:
        if part.embedding and part.bias is not None:
            raise AdapterError(
                f"module {path}: PEFT's format has no bias for the LoRA of an embedding",
                hint="merge into a plain model instead",
            )
    lora_A = torch.cat([part.lora_A.double() for part, _ in parts])
    lora_B = torch.cat(
        [part.lora_B.double() * (weight * part.lora_scaling) for part, weight in parts], dim=1
    )
    biases = [
        part.bias.double() * (weight * part.lora_scaling)
        for part, weight in parts
        if part.bias is not None
    ]
    return lora_A, lora_B, torch.stack(biases).sum(dim=0) if biases else None
