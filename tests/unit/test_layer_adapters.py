"""Adapters for one layer: their numbers, their surface, and what they refuse."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from xlora_core import routing
from xlora_core.adapters import LoraWeights
from xlora_core.config import AdapterOverride, RoutingKnobs
from xlora_core.errors import AdapterError, ConfigError, ModelError
from xlora_core.layer_adapters import LoraLayerAdapter, LowRankPair, XLoraLayerAdapter

IN, OUT, RANK, K = 12, 7, 4, 3
NEAR = {"atol": 1e-12, "rtol": 0}
BASES: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(IN, OUT, dtype=torch.float64),
    "Linear without bias": lambda: nn.Linear(IN, OUT, bias=False, dtype=torch.float64),
    "Conv1D": lambda: Conv1D(OUT, IN).double(),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=sorted(BASES))
def base(request: pytest.FixtureRequest) -> nn.Module:
    return BASES[request.param]()


def randomised(adapter: nn.Module) -> None:
    """Gives every parameter that learns a value at which nothing is zero or alike."""
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.5)


def xlora(base: nn.Module | None = None, **options: object) -> XLoraLayerAdapter:
    adapter = XLoraLayerAdapter(base or BASES["Linear"](), K, RANK, 8.0, **options)  # type: ignore[arg-type]  # options are the class's
    randomised(adapter)
    return adapter


def inputs(*leading: int) -> Tensor:
    return torch.randn(*leading, IN, dtype=torch.float64)


def expected(adapter: XLoraLayerAdapter, x: Tensor, scalings: Tensor) -> Tensor:
    """``base(x) + sum_k s_k * alpha/r * B_k A_k x``, written out."""
    y = adapter.base_layer(x)
    for k, pair in enumerate(adapter.pairs()):
        y = y + scalings[..., k, None] * pair.lora_scaling * (x @ pair.lora_A.T @ pair.lora_B.T)
    return y


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


def test_plain_lora_merges_into_a_new_layer(base: nn.Module) -> None:
    adapter = LoraLayerAdapter(base, RANK, alpha=3.0)
    randomised(adapter)
    before = copy.deepcopy(base.state_dict())
    merged = adapter.merge_to_original_layer()
    assert type(merged) is type(base)
    assert merged is not base
    x = inputs(4)
    torch.testing.assert_close(merged(x), adapter(x), **NEAR)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_plain_lora_of_finished_weights() -> None:
    weights = LoraWeights(
        lora_A=torch.randn(2, IN),
        lora_B=torch.randn(OUT, 2),
        lora_scaling=0.25,
        bias=torch.randn(OUT),
    )
    base = nn.Linear(IN, OUT)
    adapter = LoraLayerAdapter.from_weights(base, weights)
    assert (adapter.rank, adapter.alpha) == (2, 0.5)
    x = torch.randn(5, IN)
    assert weights.bias is not None
    delta = 0.25 * (x @ weights.lora_A.T @ weights.lora_B.T + weights.bias)
    torch.testing.assert_close(adapter(x), base(x) + delta)
    torch.testing.assert_close(adapter.merge_to_original_layer()(x), adapter(x))
    back = adapter.lora_layer.to_weights()
    assert torch.equal(back.lora_B, weights.lora_B)
    assert back.lora_scaling == 0.25
    adapter.lora_layer.lora_A.data.zero_()
    assert weights.lora_A.abs().max() > 0  # it was copied


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


# -------------------------------------------------------------------- merging


def test_merging_bakes_in_the_average(base: nn.Module) -> None:
    adapter = xlora(base)
    before = copy.deepcopy(base.state_dict())
    merged = adapter.merge_to_original_layer()
    assert type(merged) is type(base)
    x = inputs(5)
    uniform = torch.full((5, K), 1 / K, dtype=torch.float64)
    torch.testing.assert_close(merged(x), expected(adapter, x, uniform), **NEAR)
    assert (merged(x) - adapter(x)).abs().max() > 0.05  # it cannot route
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    weighted = adapter.merge_to_original_layer([0.0, 2.0, 0.0])
    one = torch.tensor([0.0, 2.0, 0.0]).double().expand(5, K)
    torch.testing.assert_close(weighted(x), expected(adapter, x, one), **NEAR)


def test_the_average_as_one_pair() -> None:
    adapter = xlora()
    pair = adapter.lora_layer
    assert pair.rank == K * RANK
    delta = pair.delta_weight() + adapter.base_layer.weight
    torch.testing.assert_close(delta, adapter.merge_to_original_layer().weight, **NEAR)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, math.nan], [[1.0, 1.0, 1.0]]])
def test_merge_weights_that_do_not_fit(weights: list[float]) -> None:
    with pytest.raises(AdapterError, match="one finite number for each of 3 experts"):
        xlora().merge_to_original_layer(weights)


def test_only_linear_layers_take_up_the_experts() -> None:
    block = nn.Sequential(nn.Linear(IN, 5), nn.ReLU(), nn.Linear(5, OUT)).double()
    adapter = xlora(block, in_features=IN, out_features=OUT)
    x = inputs(5)
    torch.testing.assert_close(adapter(x), expected(adapter, x, adapter.gating_weights(x)), **NEAR)
    with pytest.raises(AdapterError, match="base layer of class Sequential cannot take up"):
        adapter.merge_to_original_layer()
    with pytest.raises(AdapterError, match="base layer of class Sequential cannot take up"):
        LoraLayerAdapter(block, 2, in_features=IN, out_features=OUT).merge_to_original_layer()


# -------------------------------------------------------------------- finished experts


def finished(rank: int, lora_scaling: float, *, bias: bool = False) -> LoraWeights:
    return LoraWeights(
        lora_A=torch.randn(rank, IN),
        lora_B=torch.randn(OUT, rank),
        lora_scaling=lora_scaling,
        bias=torch.randn(OUT) if bias else None,
    )


def test_finished_experts_under_a_fresh_gate() -> None:
    base = nn.Linear(IN, OUT)
    weights = [finished(2, 0.5), finished(5, -1.0, bias=True), finished(1, 3.0)]
    adapter = XLoraLayerAdapter.from_adapters(base, weights)
    assert adapter.ranks == [2, 5, 1]
    for name in ("rank", "alpha"):
        with pytest.raises(AdapterError, match=f"no common {name}"):
            getattr(adapter, name)
    nn.init.normal_(adapter.gating_network.weight)
    x = torch.randn(6, IN)
    y = adapter(x)
    gating = adapter.gating_weights(x)
    for k, w in enumerate(weights):
        delta = x @ w.lora_A.T @ w.lora_B.T + (0 if w.bias is None else w.bias)
        y = y - gating[:, k, None] * w.lora_scaling * delta
    torch.testing.assert_close(y, base(x), atol=1e-5, rtol=0)
    y.sum().backward()
    learning = {name for name, p in adapter.named_parameters() if p.grad is not None}
    assert learning == {"gating_network.weight", "gating_network.bias"}
    uniform = XLoraLayerAdapter.from_adapters(base, weights)
    torch.testing.assert_close(
        uniform.merge_to_original_layer()(x), uniform(x), atol=1e-5, rtol=1e-5
    )
    assert all(
        p.requires_grad
        for p in XLoraLayerAdapter.from_adapters(
            base, weights, freeze_experts=False
        ).experts.parameters()
    )


def test_finished_experts_that_do_not_fit() -> None:
    base = nn.Linear(IN, OUT)
    other = LoraWeights(lora_A=torch.randn(2, IN + 1), lora_B=torch.randn(OUT, 2), lora_scaling=1.0)
    with pytest.raises(AdapterError, match="expert 1 was trained on a layer of 13 inputs and 7"):
        XLoraLayerAdapter.from_adapters(base, [finished(2, 1.0), other])
    with pytest.raises(AdapterError, match="in_features is 13, but the base layer .Linear. has 12"):
        XLoraLayerAdapter.from_adapters(base, [other])
    with pytest.raises(AdapterError, match="at least one expert"):
        XLoraLayerAdapter.from_adapters(base, [])
    embedding = dataclasses.replace(finished(2, 1.0), embedding=True)
    with pytest.raises(AdapterError, match="LoRA weights of an embedding"):
        XLoraLayerAdapter.from_adapters(base, [embedding])
    convolution = LoraWeights(
        lora_A=torch.randn(2, IN, 3, 3), lora_B=torch.randn(OUT, 2, 1, 1), lora_scaling=1.0
    )
    with pytest.raises(AdapterError, match="LoRA weights of a convolution"):
        XLoraLayerAdapter.from_adapters(base, [convolution])


# -------------------------------------------------------------------- weights by name


def test_a_state_dict_makes_the_way_through_a_file(tmp_path: Path) -> None:
    adapter = xlora()
    names = {"base_layer.weight", "base_layer.bias", "gating_network.weight", "gating_network.bias"}
    names |= {f"experts.{k}.lora_{side}" for k in range(K) for side in "AB"}
    assert set(adapter.state_dict()) == names
    path = tmp_path / "adapter.safetensors"
    save_file(adapter.state_dict(), path)
    x = inputs(5)
    other = XLoraLayerAdapter(nn.Linear(IN, OUT, dtype=torch.float64), K, RANK, 8.0)
    other.load_weights_by_name(path)
    assert torch.equal(other(x), adapter(x))
    third = XLoraLayerAdapter(nn.Linear(IN, OUT, dtype=torch.float64), K, RANK, 8.0)
    third.load_state_dict(load_file(path))
    assert torch.equal(third(x), adapter(x))


def test_the_adapters_weights_alone_are_enough() -> None:
    adapter = LoraLayerAdapter(nn.Linear(IN, OUT), RANK)
    A, B = torch.randn(RANK, IN), torch.randn(OUT, RANK)
    base = copy.deepcopy(adapter.base_layer.state_dict())
    adapter.load_weights_by_name({"lora_layer.lora_A": A, "lora_layer.lora_B": B})
    assert torch.equal(adapter.lora_layer.lora_A, A)
    assert torch.equal(adapter.lora_layer.lora_B, B)
    assert torch.equal(adapter.base_layer.weight, base["weight"])
    adapter.load_weights_by_name({"lora_layer.lora_A": 2 * A}, allow_missing=True)
    assert torch.equal(adapter.lora_layer.lora_A, 2 * A)


def test_names_of_another_program_are_translated() -> None:
    def rename(name: str) -> str | None:
        if name.endswith("rotary"):
            return None
        return name.replace("base_model.model.q_proj", "lora_layer").removesuffix(".weight")

    adapter = LoraLayerAdapter(nn.Linear(IN, OUT), RANK)
    A, B = torch.randn(RANK, IN), torch.randn(OUT, RANK)
    adapter.load_weights_by_name(
        {
            "base_model.model.q_proj.lora_A.weight": A,
            "base_model.model.q_proj.lora_B.weight": B,
            "base_model.model.rotary": torch.zeros(1),
        },
        rename=rename,
    )
    assert torch.equal(adapter.lora_layer.lora_A, A)
    assert torch.equal(adapter.lora_layer.lora_B, B)
    with pytest.raises(AdapterError, match=r"'x' \(renamed to 'lora_layer.lora_A'\) comes twice"):
        adapter.load_weights_by_name({"y": A, "x": A}, rename=lambda _: "lora_layer.lora_A")


def test_every_fault_of_named_weights_is_listed_and_nothing_is_loaded() -> None:
    adapter = xlora()
    before = copy.deepcopy(adapter.state_dict())
    good = {name: torch.ones_like(value) for name, value in before.items()}
    faulty: dict[str, object] = good | {
        "experts.0.lora_A": torch.ones(RANK, IN + 1),
        "experts.1.lora_A": torch.full((RANK, IN), math.inf),
        "experts.2.lora_A": torch.ones(RANK, IN, dtype=torch.long),
        "experts.2.lora_B": [1.0],
        "experts.9.lora_A": torch.ones(RANK, IN),
    }
    del faulty["gating_network.bias"], faulty["base_layer.weight"]
    with pytest.raises(AdapterError) as caught:
        adapter.load_weights_by_name(faulty)  # type: ignore[arg-type]  # the point of the test
    message = caught.value.message
    for fault in (
        "'experts.0.lora_A' has shape [4, 13], expected [4, 12]",
        "'experts.1.lora_A' holds NaN or infinite values",
        "'experts.2.lora_A' is torch.int64, expected floating point",
        "'experts.2.lora_B' is a list, expected a tensor",
        "'experts.9.lora_A' is not a weight of this adapter",
        "'gating_network.bias' is missing",
    ):
        assert fault in message
    assert "base_layer.weight" not in message  # it may be left out
    assert "gating_network.weight" in caught.value.hint
    assert all(torch.equal(value, before[name]) for name, value in adapter.state_dict().items())


def test_files_that_are_missing_pickled_or_damaged(tmp_path: Path) -> None:
    adapter = xlora()
    with pytest.raises(AdapterError, match="is not a file"):
        adapter.load_weights_by_name(tmp_path / "none.safetensors")
    for name, message in (("weights.pt", "is a pickle"), ("w.safetensors", "not a readable")):
        (tmp_path / name).write_bytes(b"\x80\x04.")
        with pytest.raises(AdapterError, match=message):
            adapter.load_weights_by_name(tmp_path / name)


# -------------------------------------------------------------------- dtypes, compiling, threads


def test_the_gate_computes_in_float32_beside_a_bfloat16_layer() -> None:
    adapter = xlora(nn.Linear(IN, OUT))
    wide = copy.deepcopy(adapter)
    adapter.to(torch.bfloat16)
    gate = adapter.gating_network
    assert (gate.weight.dtype, gate.bias.dtype) == (torch.float32, torch.float32)
    assert torch.equal(gate.weight, wide.gating_network.weight)  # not even rounded and back
    assert adapter.experts[0].lora_A.dtype == torch.bfloat16
    x = torch.randn(20, IN).bfloat16()
    y = adapter(x)
    assert y.dtype == torch.bfloat16
    gating = adapter.get_last_gating_weights()
    assert gating is not None
    assert gating.dtype == torch.float32
    torch.testing.assert_close(gating, wide.gating_weights(x.float()), atol=1e-7, rtol=0)
    torch.testing.assert_close(y.float(), wide(x.float()), atol=0.15, rtol=0.02)
    fresh = XLoraLayerAdapter(nn.Linear(IN, OUT, dtype=torch.bfloat16), K, RANK)
    assert fresh.gating_network.weight.dtype == torch.float32
    assert fresh.experts[0].lora_A.dtype == torch.bfloat16


def test_autocast_leaves_the_gate_alone() -> None:
    adapter = xlora(nn.Linear(IN, OUT))
    x = torch.randn(20, IN)
    gating = adapter.gating_weights(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = adapter(x)
    assert y.dtype == torch.bfloat16
    last = adapter.get_last_gating_weights()
    assert last is not None
    assert torch.equal(last, gating)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_whole_it_computes_the_same(backend: str) -> None:
    torch._dynamo.reset()
    for adapter in (xlora(), LoraLayerAdapter(BASES["Conv1D"](), RANK)):
        randomised(adapter)
        x = inputs(2, 5)
        compiled = torch.compile(adapter, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(x), adapter(x), **NEAR)
        adapter.reset_state()
        compiled(x).square().sum().backward()
        gradients = {n: p.grad.clone() for n, p in adapter.named_parameters() if p.requires_grad}
        if isinstance(adapter, XLoraLayerAdapter):
            last = adapter.get_last_gating_weights()
            assert last is not None
            torch.testing.assert_close(last, adapter.gating_weights(x), **NEAR)
            knobs = RoutingKnobs(top_k=1, temperature=2.0)
            torch.testing.assert_close(compiled(x, knobs=knobs), adapter(x, knobs=knobs), **NEAR)
        adapter.reset_state()
        adapter(x).square().sum().backward()
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                adapter.get_parameter(name).grad, gradient, atol=1e-10, rtol=1e-10
            )
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [True, False])
def test_exported_it_computes_the_same(tmp_path: Path, strict: bool) -> None:
    n = torch.export.Dim("n", min=2)
    for adapter in (xlora(), LoraLayerAdapter(BASES["Linear"](), RANK)):
        randomised(adapter)
        program = torch.export.export(
            adapter, (inputs(3, 4),), strict=strict, dynamic_shapes=({0: n},)
        )
        path = tmp_path / "adapter.pt2"
        torch.export.save(program, path)
        x = inputs(6, 4)  # another size than it was exported with
        torch.testing.assert_close(torch.export.load(path).module()(x), adapter(x), **NEAR)
    assert xlora().get_last_gating_weights() is None


def test_threads_do_not_disturb_each_other() -> None:
    adapter = xlora()
    xs = [inputs(n) for n in range(1, 5)]
    wanted = [adapter(x) for x in xs]
    found: dict[int, list[Tensor]] = {}
    last: list[Tensor | None] = []

    def call(index: int) -> None:
        with torch.no_grad():
            found[index] = [adapter(xs[index]) for _ in range(50)]
        last.append(adapter.get_last_gating_weights())

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, calls in found.items():
        for y in calls:
            torch.testing.assert_close(y, wanted[index], **NEAR)
    whole = [adapter.gating_weights(x) for x in xs]
    assert len(last) == len(xs)
    for gating in last:  # some thread's, and whole
        assert gating is not None
        torch.testing.assert_close(gating, whole[len(gating) - 1], **NEAR)


def test_it_stands_in_a_larger_model() -> None:
    net = nn.Sequential(nn.Linear(IN, IN), nn.ReLU(), nn.Linear(IN, OUT)).double()
    net[2] = XLoraLayerAdapter(net[2], K, RANK)
    randomised(net)
    twin = copy.deepcopy(net)
    x = inputs(3)
    assert torch.equal(twin(x), net(x))
    twin[2].experts[0].lora_B.data.zero_()
    assert (twin(x) - net(x)).abs().max() > 1e-3
    nested = LoraLayerAdapter(net[2], RANK)  # an adapter is a layer, too
    assert torch.equal(nested(inputs(2))[:, :0], inputs(2)[:, :0])
    assert (nested.in_features, nested.out_features) == (IN, OUT)


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
