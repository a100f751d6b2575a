"""Weights that adapters for one layer merge into it, take from finished experts, load by name."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.adapted_layers import BASES, IN, NEAR, OUT, RANK, K, expected, inputs, randomised, xlora
from xlora_core.adapters import LoraWeights
from xlora_core.errors import AdapterError
from xlora_core.layer_adapters import LoraLayerAdapter, XLoraLayerAdapter


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=sorted(BASES))
def base(request: pytest.FixtureRequest) -> nn.Module:
    return BASES[request.param]()


# -------------------------------------------------------------------- merging


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
