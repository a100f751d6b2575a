"""Fused projections: layers side by side with their experts, as one product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from xlora_core.adapters import LoraWeights
from xlora_core.layers import ActiveScalings, XLoraLinear
from xlora_core.rows.norm import rms_norm
from xlora_core.rows.projection import FusedProjection, RankWeights, plain_layer
from xlora_core.rows.skinny import linear_rows

K = 4
ACTIVE = ActiveScalings()


def linear(n_in: int, n_out: int, *, bias: bool = False, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias=bias, dtype=dtype).requires_grad_(False)


def adapted(base: nn.Linear, ranks: dict[int, int], layer_index: int) -> XLoraLinear:
    """Returns experts of the given ranks over a layer; adapter index -> rank."""
    dtype = base.weight.dtype
    experts = {
        k: LoraWeights(
            lora_A=torch.randn(rank, base.in_features, dtype=dtype),
            lora_B=torch.randn(base.out_features, rank, dtype=dtype),
            lora_scaling=0.5 + k,
        )
        for k, rank in ranks.items()
    }
    return XLoraLinear(
        base,
        layer_index=layer_index,
        n_adapters=K,
        experts=experts,
        dropouts={},
        active=ACTIVE,
        dtype=dtype,
    )


def layers(dtype: torch.dtype) -> list[nn.Linear | XLoraLinear]:
    """Returns layers over the same 24 inputs: with and without experts, with and without bias."""
    torch.manual_seed(0)
    return [
        adapted(linear(24, 12, dtype=dtype), {0: 2, 1: 3, 3: 1}, 0),
        linear(24, 5, bias=True, dtype=dtype),
        adapted(linear(24, 7, bias=True, dtype=dtype), {2: 4}, 1),
    ]


def expected(layers: list[nn.Linear | XLoraLinear], x: Tensor, scalings: Tensor) -> Tensor:
    """Returns what the layers themselves make of ``x`` ``[N, in]`` and scalings ``[M, L, K]``."""
    n_adapted = len(scalings)
    outputs = []
    for layer in layers:
        with ACTIVE.hold(scalings[None]):
            mixed = layer(x[None, :n_adapted])[0]
        outputs.append(torch.cat([mixed, layer(x[n_adapted:])]))
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("n_adapted", [0, 1, 3, "all"])
@pytest.mark.parametrize("n_rows", [1, 2, 4, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_the_layers_side_by_side(
    dtype: torch.dtype, n_rows: int, n_adapted: int | str
) -> None:
    n_adapted = n_rows if n_adapted == "all" else min(int(n_adapted), n_rows)
    linears = layers(dtype)
    x = torch.randn(n_rows, 24, dtype=dtype)
    scalings = torch.rand(n_adapted, 2, K, dtype=dtype)
    with torch.no_grad():
        own = expected(linears, x, scalings)
        fused = FusedProjection(linears)
        (weights,) = RankWeights([fused], dtype).of(scalings, n_rows)
        near = {"atol": 1e-12 if dtype == torch.float64 else 2e-5, "rtol": 0}
        torch.testing.assert_close(fused(x, weights), own, **near)
        torch.testing.assert_close(expected(linears, x, scalings), own, **near)


def test_without_scalings_it_is_the_base_layers() -> None:
    linears = layers(torch.float64)
    x = torch.randn(3, 24, dtype=torch.float64)
    own = torch.cat([layer(x) for layer in linears], dim=1)
    torch.testing.assert_close(FusedProjection(linears)(x, None), own, atol=1e-12, rtol=0)


def test_weights_of_ranks_are_rounded_once_from_float32() -> None:
    """As the layer itself rounds them: the product of scaling and lora_scaling, not its factors."""
    layer = adapted(linear(8, 8, dtype=torch.bfloat16), {0: 1, 1: 2}, 0)
    layer.lora_scaling.copy_(torch.tensor([1.003, 2.001, 2.001]))
    scalings = torch.tensor([[[0.333, 0.667, 0.0, 0.0]]])
    (weights,) = RankWeights([FusedProjection([layer])], torch.bfloat16).of(scalings, 1)
    exact = torch.tensor([[0.333 * 1.003, 0.667 * 2.001, 0.667 * 2.001]])
    assert torch.equal(weights, exact.to(torch.bfloat16))


@pytest.mark.parametrize("shared", [False, True])
def test_every_module_gets_its_own_scalings(shared: bool) -> None:
    first = adapted(linear(4, 4, dtype=torch.float64), {1: 2}, 1)
    second = adapted(linear(4, 4, dtype=torch.float64), {0: 1, 3: 1}, 0)
    plain = linear(4, 4, dtype=torch.float64)
    projections = [FusedProjection([first]), FusedProjection([plain]), FusedProjection([second])]
    scalings = torch.rand(5, 1 if shared else 2, K, dtype=torch.float64)
    found = RankWeights(projections, torch.float64).of(scalings, 5)
    of_first, of_second = scalings[:, 0 if shared else 1], scalings[:, 0]
    assert torch.equal(found[0], of_first[:, [1, 1]] * 1.5)
    assert found[1].shape == (5, 0)
    assert torch.equal(found[2], of_second[:, [0, 3]] * torch.tensor([0.5, 3.5]).double())


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("width", [16, 800, 2100])
@pytest.mark.parametrize("n_rows", [1, 2, 3, 4, 8, 9])
def test_few_rows_are_the_linear_layer(n_rows: int, width: int, with_bias: bool) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(6, width), torch.randn(6) if with_bias else None
    # Not row by row in memory either.
    x = torch.randn(width, n_rows).t()
    own = nn.functional.linear(x.double(), weight.double(), bias if bias is None else bias.double())
    y = linear_rows(x, weight, bias)
    assert y.shape == (n_rows, 6)
    torch.testing.assert_close(y.double(), own, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_norm_is_hugging_faces(dtype: torch.dtype, scale: float) -> None:
    """Small inputs show epsilon, all of them the order of rounding."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    module = LlamaRMSNorm(48, eps=1e-5)
    nn.init.normal_(module.weight)
    module = module.to(dtype)
    x = (torch.randn(7, 48) * scale).to(dtype)
    tolerance = {"rtol": {torch.bfloat16: 1e-2, torch.float32: 2e-6, torch.float64: 0}[dtype]}
    with torch.no_grad():
        mine, own = rms_norm(module)(x), module(x)
    assert mine.dtype == dtype
    torch.testing.assert_close(mine, own, atol=0, **tolerance)


def test_what_was_fused_before_is_not_fused_again() -> None:
    """Two engines over one model share the matrix."""
    parts = layers(torch.float32)
    first = FusedProjection(parts)
    assert FusedProjection(parts).weight.data_ptr() == first.weight.data_ptr()
    assert torch.equal(FusedProjection(parts).weight, first.weight)
    assert FusedProjection(parts[1:]).weight.data_ptr() != first.weight.data_ptr()


def test_weights_fused_in_inference_mode_can_be_trained_beside() -> None:
    parts = layers(torch.float32)
    with torch.inference_mode():
        FusedProjection(parts)
    for part in parts:
        x = torch.ones(2, part.in_features, dtype=part.weight.dtype, requires_grad=True)
        plain_layer(part)(x).sum().backward()
        assert x.grad is not None
        assert x.grad.any()
