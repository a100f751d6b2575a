"""Tiny models whose layers route themselves, with gates that differ visibly."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.tiny_chat import tiny_chat_base, write_chat_experts
from tests.tiny_models import tiny_base, write_experts
from xlora_core.config import XLoraConfig
from xlora_core.model import XLoraModel


def gated_xlora(
    folder: Path,
    family: str = "llama",
    *,
    n_adapters: int = 3,
    dtype: torch.dtype = torch.float32,
    gate_scale: float = 1.0,
    **config: object,
) -> XLoraModel:
    """Returns a tiny model with a per-layer router that routes visibly (not near uniform)."""
    model = XLoraModel.from_base(
        tiny_base(family, dtype=dtype),
        XLoraConfig(
            adapters=write_experts(folder, family, n_adapters),
            router="per_layer",
            **config,  # type: ignore[arg-type]  # config is XLoraConfig's
        ),
    )
    randomise_gates(model, gate_scale)
    return model.eval()


def gated_chat(folder: Path, family: str = "llama", **config: object) -> XLoraModel:
    """Returns such a model with the vocabulary of ``tiny_tokenizer``."""
    model = XLoraModel.from_base(
        tiny_chat_base(family),
        XLoraConfig(
            adapters=write_chat_experts(folder, family),
            router="per_layer",
            **config,  # type: ignore[arg-type]  # config is XLoraConfig's
        ),
    )
    randomise_gates(model)
    return model.eval()


def randomise_gates(model: XLoraModel, scale: float = 1.0) -> None:
    """Gives every gate weights of its own; their logits are of about the same size everywhere."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for gate in model.gates:
            width = gate.weight.shape[1]
            weight = torch.randn(gate.weight.shape, generator=generator) * scale / width**0.5
            gate.weight.copy_(weight)
            gate.bias.copy_(torch.randn(gate.bias.shape, generator=generator) * 0.3)
