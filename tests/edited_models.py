"""Tiny models to edit, one per kind of router, and what is compared before and after."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tests.tiny_models import tiny_base, tiny_prompt, tiny_xlora, write_experts, write_lora
from xlora_core.config import XLoraConfig
from xlora_core.model import XLoraModel

IDS = tiny_prompt()
ROUTERS = ("layerwise", "shared", "deep", "per_layer")
_CLASSIFIERS: dict[str, dict[str, object]] = {
    "layerwise": {},
    "shared": {"layerwise_scalings": False},
    "deep": {"xlora_depth": 3, "xlora_dropout_p": 0.1},
}


def routed_model(folder: Path, router: str = "layerwise", **config: object) -> XLoraModel:
    """Returns a tiny model in float64 whose adapters "0", "1", "2" are routed visibly."""
    if router != "per_layer":
        return tiny_xlora(folder, dtype=torch.float64, **_CLASSIFIERS[router], **config)  # type: ignore[arg-type]  # config is XLoraConfig's
    adapters = write_experts(folder)
    model = XLoraModel.from_base(
        tiny_base(dtype=torch.float64),
        XLoraConfig(adapters=adapters, router="per_layer", **config),  # type: ignore[arg-type]  # as above
    )
    torch.manual_seed(7)
    with torch.no_grad():
        for gate in model.gates:
            nn.init.normal_(gate.weight, std=gate.in_features**-0.5)
            nn.init.normal_(gate.bias)
    return model.eval()


def write_extra(
    folder: Path, targets: tuple[str, ...] = ("q_proj", "up_proj"), **options: object
) -> str:
    """Writes one more adapter, of another rank and other targets; returns its folder."""
    return str(write_lora(folder / "extra", tiny_base(), targets, seed=9, rank=2, **options))  # type: ignore[arg-type]  # options are write_lora's


def router_logits(model: XLoraModel) -> Tensor:
    """Returns ``[B, T, L or 1, K]``."""
    return model.read_router(input_ids=IDS)


@torch.no_grad()
def run(model: XLoraModel, **inputs: object) -> Tensor:
    """Returns the language model's logits of an uncached call."""
    logits: Tensor = model(input_ids=IDS, use_cache=False, **inputs).logits
    return logits


def scalings_of(model: XLoraModel) -> Tensor:
    """Returns ``[B, T, L, K]``."""
    run(model)
    scalings = model.get_latest_scalings()
    assert scalings is not None
    return scalings


def same_tensors(first: nn.Module, second: nn.Module) -> bool:
    """Whether two modules have the same parameters, bit by bit."""
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
