"""Adapters for one layer: their numbers, their surface, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch import Tensor, nn

from tests.adapted_layers import BASES, IN, NEAR, OUT, RANK, K, expected, inputs, randomised, xlora
from xlora_core import routing
from xlora_core.config import AdapterOverride, RoutingKnobs
from xlora_core.errors import AdapterError, ConfigError
from xlora_core.layer_adapters import LoraLayerAdapter, LowRankPair, XLoraLayerAdapter


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=sorted(BASES))
def base(request: pytest.FixtureRequest) -> nn.Module:
    return BASES[request.param]()


# -------------------------------------------------------------------- plain LoRA


def test_plain_lora_is_base_plus_scaled_product(base: nn.Module) -> None:
    adapter = LoraLayerAdapter(base, RANK, alpha=6.0)
    x = inputs(2, 5)
    assert torch.equal(adapter(x), base(x))  # lora_B starts at zero
    assert adapter.lora_layer.lora_A.abs().max() > 0
    randomised(adapter)
    A, B = adapter.lora_layer.lora_A, adapter.lora_layer.lora_B
    assert (A.shape, B.shape) == ((RANK, IN), (OUT, RANK))
    torch.testing.assert_close(adapter(x), base(x) + 6.0 / RANK * (x @ A.T @ B.T), **NEAR)


def test_plain_lora_surface(base: nn.Module) -> None:
    adapter = LoraLayerAdapter(base, RANK)
    assert adapter.base_layer is base
    assert (adapter.rank, adapter.alpha) == (RANK, RANK)
    assert adapter.lora_layer.lora_scaling == 1.0
    assert adapter.is_base_layer_frozen
    assert isinstance(adapter.lora_layer, LowRankPair)
    assert adapter.weight is base.weight
    assert adapter.bias is base.bias
    n_base = sum(p.numel() for p in base.parameters())
    assert adapter.parameter_count == RANK * (IN + OUT)
    thawed = LoraLayerAdapter(base, RANK, freeze_base_layer=False)
    assert not thawed.is_base_layer_frozen
    assert thawed.parameter_count == RANK * (IN + OUT) + n_base


# -------------------------------------------------------------------- the mixture


@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3), (2, 3, 4), (0,)])
def test_mixture_is_the_sum_over_experts(base: nn.Module, leading: tuple[int, ...]) -> None:
    adapter = xlora(base)
    x = inputs(*leading)
    y = adapter(x)
    gating = torch.softmax(adapter.gating_network(x), dim=-1)
    assert y.shape == (*leading, OUT)
    torch.testing.assert_close(y, expected(adapter, x, gating), **NEAR)


def test_each_sample_has_gating_weights_of_its_own() -> None:
    adapter = xlora()
    assert adapter.get_last_gating_weights() is None
    x = inputs(2, 5)
    adapter(x)
    gating = adapter.get_last_gating_weights()
    assert gating is not None
    assert gating.shape == (2, 5, K)
    assert not gating.requires_grad
    torch.testing.assert_close(gating.sum(-1), torch.ones(2, 5).double(), **NEAR)
    assert gating.std(dim=(0, 1)).min() > 0.02
    torch.testing.assert_close(gating, adapter.gating_weights(x), **NEAR)
    alone = adapter.gating_weights(x[1, 3])
    torch.testing.assert_close(alone, gating[1, 3], **NEAR)


def test_knobs_act_as_everywhere(base: nn.Module) -> None:
    adapter = xlora(base)
    x = inputs(6)
    knobs = RoutingKnobs(temperature=0.5, top_k=2, global_weight=1.5)
    gating = torch.softmax(adapter.gating_network(x) / 0.5, dim=-1)
    scalings = routing.effective_scalings(gating, top_k=2, global_weight=1.5)
    assert (scalings == 0).sum() == 6
    torch.testing.assert_close(adapter(x, knobs=knobs), expected(adapter, x, scalings), **NEAR)
    last = adapter.get_last_gating_weights()
    assert last is not None
    torch.testing.assert_close(last, gating, **NEAR)  # before top-k: sums to 1
    held = xlora(base, knobs=knobs)
    held.load_state_dict(adapter.state_dict())
    torch.testing.assert_close(held(x), adapter(x, knobs=knobs), **NEAR)
    assert torch.equal(adapter(x, knobs=RoutingKnobs(global_weight=0.0)), base(x))
    with pytest.raises(ConfigError, match="from 1 to 3"):
        adapter(x, knobs=RoutingKnobs(top_k=4))
    with pytest.raises(ConfigError, match="experts have no names"):
        adapter(x, knobs=RoutingKnobs(overrides=[AdapterOverride.mute("math")]))


def test_a_low_temperature_leaves_the_best_expert_alone() -> None:
    adapter = xlora()
    x = inputs(9)
    best = nn.functional.one_hot(adapter.gating_network(x).argmax(-1), K).double()
    y = adapter(x, knobs=RoutingKnobs(temperature=1e-300))
    torch.testing.assert_close(y, expected(adapter, x, best), **NEAR)


def test_surface_of_the_mixture(base: nn.Module) -> None:
    adapter = XLoraLayerAdapter(base, K, RANK)
    assert adapter.base_layer is base
    assert (adapter.n_experts, len(adapter.experts)) == (K, K)
    assert (adapter.rank, adapter.alpha) == (RANK, RANK)
    assert adapter.is_base_layer_frozen
    assert isinstance(adapter.gating_network, nn.Linear)
    assert adapter.gating_network.weight.shape == (K, IN)
    of_experts, of_gate = K * RANK * (IN + OUT), K * (IN + 1)
    of_base = sum(p.numel() for p in base.parameters())
    assert adapter.parameter_count == of_experts + of_gate
    adapter = XLoraLayerAdapter(base, K, RANK, freeze_base_layer=False)
    assert adapter.parameter_count == of_experts + of_gate + of_base
    assert not adapter.is_base_layer_frozen


def test_a_fresh_mixture_is_the_base_layer_and_gates_uniformly(base: nn.Module) -> None:
    adapter = XLoraLayerAdapter(base, K, RANK)
    x = inputs(5)
    assert torch.equal(adapter(x), base(x))
    last = adapter.get_last_gating_weights()
    assert last is not None
    torch.testing.assert_close(last, torch.full_like(last, 1 / K), **NEAR)


# -------------------------------------------------------------------- diagnostics, refusals


def test_diagnostics_are_the_norms_of_what_is_there(base: nn.Module) -> None:
    adapter = xlora(base)
    found = adapter.diagnostics()
    assert found.base_class == type(base).__name__
    assert (found.in_features, found.out_features) == (IN, OUT)
    assert found.is_base_layer_frozen
    assert found.parameter_count == found.n_trainable == adapter.parameter_count
    assert found.dtype == "float64"
    assert found.base_norm == pytest.approx(float(torch.linalg.norm(base.weight)))
    assert len(found.experts) == K
    for expert, pair in zip(found.experts, adapter.pairs(), strict=True):
        delta = float((pair.lora_scaling * pair.lora_B @ pair.lora_A).detach().norm())
        assert expert.delta_norm == pytest.approx(delta)
        assert expert.relative_delta_norm == pytest.approx(delta / found.base_norm)
        assert (expert.rank, expert.alpha, expert.trainable) == (RANK, 8.0, True)
        assert expert.n_parameters == RANK * (IN + OUT)
    assert found.mean_gating_weights is None
    assert found.mean_entropy is None
    adapter(inputs(4, 5))
    used = adapter.diagnostics()
    gating = adapter.get_last_gating_weights()
    assert gating is not None
    assert used.mean_gating_weights == pytest.approx(gating.mean((0, 1)).tolist())
    entropy = -(gating * gating.log()).sum(-1).mean()
    assert used.mean_entropy == pytest.approx(float(entropy))
    assert json.loads(json.dumps(dataclasses.asdict(used)))["base_class"] == found.base_class
    adapter.experts[1].lora_B.data[0, 0] = math.nan
    assert adapter.diagnostics().has_nonfinite_values
    assert not used.has_nonfinite_values


def test_plain_diagnostics() -> None:
    adapter = LoraLayerAdapter(nn.Linear(IN, OUT), RANK)
    found = adapter.diagnostics()
    assert found.gate_norm is None
    assert [expert.delta_norm for expert in found.experts] == [0.0]
    block = LoraLayerAdapter(nn.Sequential(nn.ReLU()), RANK, in_features=IN, out_features=IN)
    assert math.isnan(block.diagnostics().base_norm)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a whole number >= 1, got 0"),
        ({"rank": 2.0}, "rank must be a whole number >= 1, got 2.0"),
        ({"rank": True}, "rank must be a whole number >= 1, got True"),
        ({"alpha": -1.0}, "alpha must be finite and > 0, got -1.0"),
        ({"alpha": math.inf}, "alpha must be finite and > 0, got inf"),
        ({"in_features": 3}, "in_features is 3, but the base layer .Linear. has 12"),
        ({"n_experts": 0}, "n_experts must be a whole number >= 1, got 0"),
    ],
)
def test_arguments_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        XLoraLayerAdapter(nn.Linear(IN, OUT), **{"n_experts": K, "rank": RANK} | options)  # type: ignore[arg-type]  # the point of the test


def test_layers_that_cannot_be_adapted() -> None:
    with pytest.raises(AdapterError, match="class ReLU does not say its sizes"):
        LoraLayerAdapter(nn.ReLU(), RANK)
    with pytest.raises(ConfigError, match="from 1 to 3"):
        XLoraLayerAdapter(nn.Linear(IN, OUT), K, RANK, knobs=RoutingKnobs(top_k=4))


class _Int8Linear(nn.Module):
    """A stand-in for a quantised layer: integer weight, scale, ``in_features``."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = IN, OUT
        codes = torch.randint(-100, 100, (OUT, IN), dtype=torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", torch.tensor(0.01))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale).T


def test_a_quantised_layer_is_adapted_but_cannot_learn() -> None:
    base = _Int8Linear()
    adapter = XLoraLayerAdapter(base, K, RANK)
    randomised(adapter)
    x = torch.randn(5, IN)
    assert adapter.experts[0].lora_A.dtype == torch.float32
    torch.testing.assert_close(
        adapter(x), expected(adapter, x, adapter.gating_weights(x)), atol=1e-5, rtol=1e-5
    )
    with pytest.raises(AdapterError, match="weight is torch.int8 and cannot learn"):
        XLoraLayerAdapter(base, K, RANK, freeze_base_layer=False)
