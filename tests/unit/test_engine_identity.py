"""Fingerprints tell base models and adapters apart, each by its own weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.task_models import peft_experts, task_base
from xlora_core.config import XLoraConfig
from xlora_core.engine.identity import adapter_fingerprints, base_fingerprint
from xlora_core.model import XLoraModel

TASK = "bias on lora_B"


@pytest.fixture
def model(tmp_path: Path) -> XLoraModel:
    return XLoraModel.from_base(
        task_base(TASK), XLoraConfig(adapters=peft_experts(tmp_path, TASK, 2))
    )


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_bias"])
def test_an_experts_weights_are_its_own(model: XLoraModel, part: str) -> None:
    base, adapters = base_fingerprint(model), adapter_fingerprints(model)
    layer = model.lora_layers[0]
    with torch.no_grad():
        stack = getattr(layer, part)
        first = stack[:, : layer.ranks[0]] if part == "lora_B" else stack[: layer.ranks[0]]
        (first[:1] if part == "lora_bias" else first).add_(1)
    assert base_fingerprint(model) == base
    assert adapter_fingerprints(model)["e0"] != adapters["e0"]
    assert adapter_fingerprints(model)["e1"] == adapters["e1"]


def test_a_base_weight_is_the_bases(model: XLoraModel) -> None:
    base, adapters = base_fingerprint(model), adapter_fingerprints(model)
    with torch.no_grad():
        model.lora_layers[0].base_layer.weight.add_(1)
    assert base_fingerprint(model) != base
    assert adapter_fingerprints(model) == adapters
