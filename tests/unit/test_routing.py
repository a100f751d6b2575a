"""Routing by hand-computed numbers. The laws stand in ``tests/properties/test_routing.py``."""

from __future__ import annotations

import math

import pytest
import torch

from xlora_core import routing
from xlora_core.config import RoutingKnobs, XLoraConfig
from xlora_core.errors import ConfigError
from xlora_core.routing import effective_scalings, route, scalings_from_logits


def row(*values: float) -> torch.Tensor:
    """One token, one module: ``[1, 1, K]``."""
    return torch.tensor([[values]], dtype=torch.float64)


def test_softmax_of_logits_over_temperature() -> None:
    scalings = scalings_from_logits(
        row(math.log(1), math.log(4), math.log(16)), enable_softmax=True, temperature=2.0
    )
    torch.testing.assert_close(scalings, row(1, 2, 4) / 7)


def test_without_softmax_the_logits_are_the_scalings_and_temperature_is_without_effect() -> None:
    logits = row(-3.0, 0.0, 5.0)
    assert torch.equal(scalings_from_logits(logits, enable_softmax=False, temperature=0.1), logits)


def test_top_k_keeps_the_largest_signed_values_without_renormalising() -> None:
    assert torch.equal(effective_scalings(row(-0.5, 0.2, -0.1, 0.7), top_k=2), row(0, 0.2, 0, 0.7))
    assert torch.equal(effective_scalings(row(-0.5, -0.2, -0.9), top_k=1), row(0, -0.2, 0))


def test_a_scaling_of_exactly_0_is_not_dropped_by_top_k() -> None:
    """PEFT takes it for one that top-k dropped and leaves it out of the softmax."""
    kept = effective_scalings(row(0.0, -1.0, -2.0), top_k=2, enable_softmax_topk=True)
    e = math.e
    torch.testing.assert_close(kept, row(e / (e + 1), 1 / (e + 1), 0))


def test_softmax_over_all_when_top_k_is_off() -> None:
    scalings = row(0.3, 0.0, -1.0)
    torch.testing.assert_close(
        effective_scalings(scalings, enable_softmax_topk=True), torch.softmax(scalings, -1)
    )


def test_softmax_over_one_is_1() -> None:
    assert torch.equal(
        effective_scalings(row(-7.0, -8.0, -9.0), top_k=1, enable_softmax_topk=True), row(1, 0, 0)
    )


def test_global_weight_multiplies_what_is_kept() -> None:
    assert torch.equal(
        effective_scalings(row(0.25, 0.5, 0.125), top_k=2, global_weight=-2.0), row(-0.5, -1.0, 0)
    )


@pytest.mark.parametrize("top_k", [0, -1, 4])
def test_top_k_outside_1_to_k_is_an_error_that_names_k(top_k: int) -> None:
    with pytest.raises(ConfigError) as caught:
        effective_scalings(row(1, 2, 3), top_k=top_k)
    assert (
        caught.value.message == f"top_k must be from 1 to 3 (the number of adapters), got {top_k}"
    )


def test_a_top_k_of_one_token_outside_1_to_k_is_an_error_too() -> None:
    with pytest.raises(ConfigError, match="from 1 to 3 .*, got 5"):
        effective_scalings(torch.rand(2, 1, 3), top_k=torch.tensor([1, 5]))


def test_knobs_per_token() -> None:
    scalings = torch.tensor([[[0.5, 0.3, 0.2]]]).expand(4, 1, 3)
    effective = effective_scalings(
        scalings,
        top_k=torch.tensor([0, 1, 2, 3]),
        global_weight=torch.tensor([1.0, 2.0, 0.0, -1.0]),
    )
    expected = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0, 0], [0, 0, 0], [-0.5, -0.3, -0.2]])
    torch.testing.assert_close(effective[:, 0], expected)


def test_route_follows_config_and_knobs() -> None:
    logits = row(0.0, math.log(3.0), math.log(4.0))
    knobs = RoutingKnobs(top_k=2, temperature=1.0, global_weight=0.5)
    torch.testing.assert_close(route(logits, XLoraConfig(), knobs), row(0, 3 / 8, 4 / 8) / 2)
    over_kept = XLoraConfig(enable_softmax=False, enable_softmax_topk=True, top_k_lora=1)
    torch.testing.assert_close(route(logits, over_kept, knobs), row(0, 3 / 7, 4 / 7) / 2)
    raw = XLoraConfig(enable_softmax=False)
    torch.testing.assert_close(route(logits, raw, knobs), row(0, math.log(3.0), math.log(4.0)) / 2)


def test_gradient_reaches_the_logits_through_top_k() -> None:
    logits = row(0.0, 1.0, 2.0).requires_grad_()
    scalings = scalings_from_logits(logits, enable_softmax=True, temperature=0.5)
    effective_scalings(scalings, top_k=1)[..., 2].sum().backward()
    p = torch.softmax(row(0.0, 1.0, 2.0) / 0.5, -1)[0, 0]
    assert logits.grad is not None
    # d p2 / d z_j = p2 (1[j = 2] - p_j) / temperature
    expected = p[2] * (torch.tensor([0.0, 0, 1]) - p) / 0.5
    torch.testing.assert_close(logits.grad[0, 0], expected)


# -------------------------------------------------------------------- large tensors

LARGE = (2, 41, 210, 4)


def large(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits of which some are far apart, of the size of a recorded run."""
    logits = torch.randn(LARGE, generator=torch.Generator().manual_seed(0)) * 9
    assert logits.numel() >= routing._MANY_VALUES
    return logits.to(dtype)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 1e-30])
def test_large_tensors_give_torchs_softmax_and_its_gradient(temperature: float) -> None:
    ours, theirs = large().requires_grad_(), large().requires_grad_()
    scalings = scalings_from_logits(ours, enable_softmax=True, temperature=temperature)
    expected = torch.softmax((theirs - theirs.detach().amax(-1, keepdim=True)) / temperature, -1)
    torch.testing.assert_close(scalings, expected, atol=1e-6, rtol=0)
    assert scalings.is_contiguous()
    weights = torch.randn(LARGE, generator=torch.Generator().manual_seed(1)) * temperature
    for result in (scalings, expected):
        (result * weights).sum().backward()
    assert theirs.grad is not None
    assert theirs.grad.abs().max() > 0.01 or temperature < 0.1
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_large_tensors_of_any_dtype_are_small_ones_together(dtype: torch.dtype) -> None:
    logits = large(dtype)
    temperature = torch.linspace(0.2, 3.0, LARGE[1])
    scalings = scalings_from_logits(logits, enable_softmax=True, temperature=temperature)
    assert scalings.dtype == dtype
    rows = [
        scalings_from_logits(logits[:, t : t + 1, :20], enable_softmax=True, temperature=float(x))
        for t, x in enumerate(temperature)
    ]
    torch.testing.assert_close(
        scalings[:, :, :20], torch.cat(rows, 1), atol=torch.finfo(dtype).eps, rtol=1e-3
    )


def test_a_graph_has_one_softmax_for_all_sizes() -> None:
    """An exported router must not depend on the size it was traced with."""

    class Router(torch.nn.Module):
        def forward(self, logits: torch.Tensor) -> torch.Tensor:
            return scalings_from_logits(logits, enable_softmax=True, temperature=0.5)

    tokens = torch.export.Dim("tokens", min=2, max=10**6)
    exported = torch.export.export(
        Router(), (large()[0],), dynamic_shapes={"logits": {0: tokens}}
    ).module()
    few = large()[0, :3]
    torch.testing.assert_close(exported(few), torch.softmax(few / 0.5, -1), atol=1e-6, rtol=0)
