"""Adapters for one layer in half precision, compiled, exported, in threads, in a larger model."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.adapted_layers import BASES, IN, NEAR, OUT, RANK, K, inputs, randomised, xlora
from xlora_core.config import RoutingKnobs
from xlora_core.layer_adapters import LoraLayerAdapter, XLoraLayerAdapter


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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
