"""Adapters for one layer learn: gradients, steps, and all parameters as one vector."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from tests.adapted_layers import BASES, IN, NEAR, OUT, RANK, K, inputs, xlora
from xlora_core.errors import AdapterError, ModelError
from xlora_core.layer_adapters import XLoraLayerAdapter


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=sorted(BASES))
def base(request: pytest.FixtureRequest) -> nn.Module:
    return BASES[request.param]()


# -------------------------------------------------------------------- learning


def test_gradients_are_right(base: nn.Module) -> None:
    """Against finite differences, to experts, gate, base and input at once."""
    adapter = xlora(base, freeze_base_layer=False)
    names = [name for name, _ in adapter.named_parameters()]
    assert len(names) == len(list(base.parameters())) + 2 * K + 2

    def call(x: Tensor, *values: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(adapter, dict(zip(names, values, strict=True)), (x,))
        return y

    values = [p.detach().clone().requires_grad_() for p in adapter.parameters()]
    assert torch.autograd.gradcheck(call, (inputs(3).requires_grad_(), *values))


def test_a_frozen_base_gets_no_gradient_and_an_unfrozen_one_does(base: nn.Module) -> None:
    for frozen in (True, False):
        adapter = xlora(base, freeze_base_layer=frozen)
        adapter(inputs(5)).square().sum().backward()
        learned = {name for name, p in adapter.named_parameters() if p.grad is not None}
        of_base = {f"base_layer.{name}" for name, _ in base.named_parameters()}
        everything = {name for name, _ in adapter.named_parameters()}
        assert learned == (everything - of_base if frozen else everything)
        assert all(p.grad.abs().max() > 1e-6 for p in adapter.parameters() if p.grad is not None)
        adapter.reset_state()


def test_update_parameters_is_a_step_of_sgd(base: nn.Module) -> None:
    adapter = xlora(base, freeze_base_layer=False)
    reference = copy.deepcopy(adapter)
    x = inputs(5)
    for one in (adapter, reference):
        one(x).square().sum().backward()
    adapter.update_parameters(0.05)
    torch.optim.SGD(reference.parameters(), lr=0.05).step()
    for updated, wanted in zip(adapter.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(updated, wanted, **NEAR)
        assert updated.grad is None
    with pytest.raises(ModelError, match="no parameter of this adapter has a gradient"):
        adapter.update_parameters(0.05)
    with pytest.raises(ModelError, match="learning_rate must be a finite number, got nan"):
        adapter.update_parameters(math.nan)


def test_the_gate_learns_to_tell_inputs_apart() -> None:
    """Two kinds of input want opposite changes: no single expert can serve both."""
    base = nn.Linear(IN, OUT, dtype=torch.float64)
    kinds = torch.randn(2, IN).double() * 2
    changes = torch.randn(OUT, IN).double() * 0.3
    which = torch.arange(64) % 2
    x = kinds[which] + 0.3 * inputs(64)
    sign = torch.where(which == 0, 1.0, -1.0)[:, None]
    with torch.no_grad():
        wanted = base(x) + sign * (x @ changes.T)
    adapter = XLoraLayerAdapter(base, 2, RANK)
    optimiser = torch.optim.Adam([p for p in adapter.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(300):
        loss = (adapter(x) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.02 * losses[0]
    gating = adapter.gating_weights(x)
    apart = (gating[which == 0].mean(0) - gating[which == 1].mean(0)).abs()
    assert apart.min() > 0.5


# -------------------------------------------------------------------- one vector


@pytest.mark.parametrize("frozen", [True, False])
def test_all_parameters_as_one_vector(base: nn.Module, frozen: bool) -> None:
    adapter = xlora(base, freeze_base_layer=frozen)
    vector = adapter.get_parameters()
    assert vector.shape == (adapter.parameter_count,)
    parts = [p for p in base.parameters() if not frozen]
    for pair in adapter.pairs():
        parts += [pair.lora_A, pair.lora_B]
    parts += [adapter.gating_network.weight, adapter.gating_network.bias]
    assert torch.equal(vector, torch.cat([p.detach().flatten() for p in parts]))
    x = inputs(5)
    y = adapter(x)
    adapter.set_parameters(vector * 2)
    assert torch.equal(adapter.get_parameters(), vector * 2)
    assert (adapter(x) - y).abs().max() > 0.1
    vector.zero_()  # it is a copy
    assert adapter.get_parameters().abs().min() > 0


def test_a_vector_that_does_not_fit_changes_nothing() -> None:
    adapter = xlora()
    vector = adapter.get_parameters()
    n = adapter.parameter_count
    for wrong, message in (
        (vector[:-1], f"one floating-point vector of {n} values, got torch.float64 of shape "),
        (vector[None], f"one floating-point vector of {n} values"),
        (vector.long(), "got torch.int64"),
        (torch.cat([vector[:-1], torch.tensor([math.nan])]), "must be finite"),
    ):
        with pytest.raises(AdapterError, match=message.replace("[", r"\[")):
            adapter.set_parameters(wrong)
        assert torch.equal(adapter.get_parameters(), vector)


def test_a_vector_of_mixed_dtypes_rounds_nothing() -> None:
    adapter = xlora(nn.Linear(IN, OUT)).to(torch.bfloat16)
    vector = adapter.get_parameters()
    assert vector.dtype == torch.float32
    before = copy.deepcopy(adapter.state_dict())
    adapter.set_parameters(vector)
    assert all(torch.equal(value, before[name]) for name, value in adapter.state_dict().items())


def test_reset_state_forgets_calls_and_keeps_weights() -> None:
    adapter = xlora()
    vector = adapter.get_parameters()
    adapter(inputs(5)).sum().backward()
    adapter.reset_state()
    assert adapter.get_last_gating_weights() is None
    assert all(p.grad is None for p in adapter.parameters())
    assert torch.equal(adapter.get_parameters(), vector)
