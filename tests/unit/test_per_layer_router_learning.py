"""Learning in a model whose layers route themselves: what learns, its gradients, to what end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.gated_models import gated_xlora
from tests.gradients import backward, trainable
from tests.tiny_models import families, tiny_base, tiny_prompt, write_experts
from tests.unit.test_per_layer_router import logits_of
from xlora_core.config import XLoraConfig
from xlora_core.model import XLoraModel

FAMILIES = sorted(families())


def test_only_the_gates_learn(tmp_path: Path) -> None:
    model = gated_xlora(tmp_path).train()
    assert set(trainable(model)) == {
        f"gates.{i}.{part}" for i in range(14) for part in ("weight", "bias")
    }
    _, gradients = backward(model, tiny_prompt())
    assert all(gradient.abs().max() > 1e-6 for gradient in gradients.values())
    learning, _ = model.get_nb_trainable_parameters()
    widths = [layer.gate_features for layer in model.lora_layers]
    assert learning == sum(3 * (width + 1) for width in widths)


def test_gradients_are_right(tmp_path: Path) -> None:
    """Against finite differences of the loss; GPT-2 computes in float64 throughout."""
    model = gated_xlora(tmp_path, "gpt2", dtype=torch.float64)
    ids = tiny_prompt()

    def loss() -> Tensor:
        logits = model(input_ids=ids).logits[:, :-1]  # Hugging Face's own loss is in float32
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    loss().backward()
    for index in (0, len(model.gates) - 1):
        weight = model.gates[index].weight
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[1, 2] += sign * 1e-5
                losses.append(float(loss()))
                weight[1, 2] -= sign * 1e-5
        slope = (losses[0] - losses[1]) / 2e-5
        assert abs(slope) > 1e-5
        assert weight.grad[1, 2].item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("trains_adapters", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_loss_and_no_gradient(
    tmp_path: Path, family: str, trains_adapters: bool, use_reentrant: bool
) -> None:
    model = gated_xlora(
        tmp_path, family, dtype=torch.float64, use_trainable_adapters=trains_adapters
    ).train()
    prompts = (tiny_prompt(), tiny_prompt(seed=1, batch=1, length=5))
    loss, gradients = backward(model, *prompts)
    assert all(gradient.abs().max() > 1e-8 for gradient in gradients.values())
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    model.lora_layers[0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    checkpointed_loss, checkpointed = backward(model, *prompts)
    assert len(calls) == 4  # each prompt's pass, and again inside backward
    assert checkpointed_loss == pytest.approx(loss, abs=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-10, rtol=1e-8)
    scalings = model.get_latest_scalings()
    assert scalings is not None
    assert scalings.shape == (1, 5, len(model.lora_layers), 3)


def test_router_logits_carry_a_gradient(tmp_path: Path) -> None:
    """What losses on the routing itself need."""
    model = gated_xlora(tmp_path, dtype=torch.float64).train()
    gated = model.gated_pass(input_ids=tiny_prompt())
    gated.router_logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.gates.parameters())


def test_it_learns_to_prefer_the_expert_that_helps(tmp_path: Path) -> None:
    """The text is what expert "1" alone writes; the gates start uniform."""
    config = XLoraConfig(adapters=write_experts(tmp_path), router="per_layer")
    model = XLoraModel.from_base(tiny_base(), config)
    alone = torch.tensor([0.0, 1.0, 0.0])
    with torch.no_grad():
        ids = tiny_prompt(batch=8)
        wanted = model.main_pass(input_ids=ids, scalings=alone).logits.softmax(-1)
    optimiser = torch.optim.Adam(model.gates.parameters(), lr=0.05)
    losses = []
    for _ in range(40):
        loss = -(wanted * model(input_ids=ids).logits.log_softmax(-1)).sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    logits_of(model, ids)
    scalings = model.get_latest_scalings()
    assert scalings is not None
    assert scalings[..., 1].mean() > 0.7
