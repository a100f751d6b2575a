"""Layers to adapt, adapters of one layer in which nothing is alike, and the sum they stand for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from xlora_core.layer_adapters import XLoraLayerAdapter

IN, OUT, RANK, K = 12, 7, 4, 3
NEAR = {"atol": 1e-12, "rtol": 0}
BASES: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(IN, OUT, dtype=torch.float64),
    "Linear without bias": lambda: nn.Linear(IN, OUT, bias=False, dtype=torch.float64),
    "Conv1D": lambda: Conv1D(OUT, IN).double(),
}


def randomised(adapter: nn.Module) -> None:
    """Gives every parameter that learns a value at which nothing is zero or alike."""
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.5)


def xlora(base: nn.Module | None = None, **options: object) -> XLoraLayerAdapter:
    """Returns an adapter of ``K`` experts with random weights; ``Linear`` unless told."""
    adapter = XLoraLayerAdapter(base or BASES["Linear"](), K, RANK, 8.0, **options)  # type: ignore[arg-type]  # options are the class's
    randomised(adapter)
    return adapter


def inputs(*leading: int) -> Tensor:
    """Returns random inputs of a layer."""
    return torch.randn(*leading, IN, dtype=torch.float64)


def expected(adapter: XLoraLayerAdapter, x: Tensor, scalings: Tensor) -> Tensor:
    """``base(x) + sum_k s_k * alpha/r * B_k A_k x``, written out."""
    y = adapter.base_layer(x)
    for k, pair in enumerate(adapter.pairs()):
        y = y + scalings[..., k, None] * pair.lora_scaling * (x @ pair.lora_A.T @ pair.lora_B.T)
    return y
