"""The gate of one module, and the precision that routers keep."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xlora_core.gate import Gate
from xlora_core.precision import Float32OrWider


def test_it_is_a_linear_layer_that_starts_at_zero() -> None:
    gate = Gate(6, 3)
    assert torch.equal(gate(torch.randn(2, 4, 6)), torch.zeros(2, 4, 3))
    nn.init.normal_(gate.weight)
    nn.init.normal_(gate.bias)
    x = torch.randn(2, 4, 6)
    torch.testing.assert_close(gate(x), x @ gate.weight.T + gate.bias)
    gate.reset_parameters()
    assert not gate.weight.any()
    assert not gate.bias.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_it_computes_in_float32_or_wider(dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    gate = Gate(6, 3, dtype=dtype)
    assert gate.weight.dtype == gate.bias.dtype == wide
    nn.init.normal_(gate.weight)
    weight = gate.weight.detach().clone()
    moved = gate.to(dtype)
    assert moved is gate
    assert gate.weight.dtype == wide
    assert torch.equal(gate.weight, weight)  # not rounded on the way
    x = torch.randn(5, 6).to(dtype)
    assert torch.equal(gate(x), nn.functional.linear(x.to(wide), weight, gate.bias))
    gate.double()
    assert gate.weight.dtype == torch.float64


def test_autocast_leaves_it_alone() -> None:
    gate = Gate(6, 3)
    nn.init.normal_(gate.weight)
    x = torch.randn(5, 6)
    expected = gate(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.functional.linear(x, gate.weight).dtype == torch.bfloat16
        assert torch.equal(gate(x), expected)


def test_gradients_stay_wide_too() -> None:
    """Casting a module casts its gradients with it."""
    gate = Gate(6, 3)
    gate(torch.randn(5, 6)).sum().backward()
    before = gate.weight.grad.clone()
    gate.to(torch.bfloat16)
    assert gate.weight.grad.dtype == torch.float32
    assert torch.equal(gate.weight.grad, before)


def test_inside_a_model_only_the_gate_stays_wide() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gate = nn.Linear(6, 6), Gate(6, 3)

    net = Net().half()
    assert net.layer.weight.dtype == torch.float16
    assert net.gate.weight.dtype == torch.float32
    assert isinstance(net.gate, Float32OrWider)
    assert net.to("meta").gate.weight.device.type == "meta"
