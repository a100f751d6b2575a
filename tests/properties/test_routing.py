"""Laws of routing over random logits: hypothesis looks for counterexamples."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tests.properties.overrides import OVERRIDES
from tests.recorded_runs import ADAPTERS, LAYERS, overridden
from xlora_core import AdapterOverride, RoutingKnobs
from xlora_core.routing import effective_scalings, override_matrix, scalings_from_logits

T, L, K = 3, 2, 4
laws = settings(max_examples=60)


def logits(
    dtype: type[np.floating] = np.float32, *, bound: float = 50.0, k: int = K
) -> st.SearchStrategy[torch.Tensor]:
    elements = st.floats(-bound, bound, width=np.finfo(dtype).bits)
    return npst.arrays(dtype, (T, L, k), elements=elements).map(torch.from_numpy)


temperatures = st.floats(1e-320, 1e300, exclude_min=True)
sane_temperatures = st.floats(0.05, 20.0)


@laws
@given(z=logits(), temperature=temperatures)
def test_scalings_sum_to_1_and_are_shares_at_any_temperature(
    z: torch.Tensor, temperature: float
) -> None:
    scalings = scalings_from_logits(z, enable_softmax=True, temperature=temperature)
    assert ((scalings >= 0) & (scalings <= 1)).all()
    torch.testing.assert_close(scalings.sum(-1), torch.ones(T, L))


@laws
@given(z=logits(np.float16), temperature=temperatures)
def test_float16_logits_give_finite_scalings_that_sum_to_1(
    z: torch.Tensor, temperature: float
) -> None:
    scalings = scalings_from_logits(z, enable_softmax=True, temperature=temperature)
    assert scalings.dtype == torch.float16
    torch.testing.assert_close(scalings.float().sum(-1), torch.ones(T, L), atol=4 * 2**-10, rtol=0)


@laws
@given(z=logits(np.float64), temperature=sane_temperatures)
def test_scalings_are_the_definition(z: torch.Tensor, temperature: float) -> None:
    weights = torch.exp((z - z.max()) / temperature)
    total = weights.sum(-1, keepdim=True)
    rows = (total > 1e-250).expand_as(weights)  # where the definition itself has not underflowed
    scalings = scalings_from_logits(z, enable_softmax=True, temperature=temperature)
    torch.testing.assert_close(scalings[rows], (weights / total)[rows], atol=1e-12, rtol=1e-9)


@laws
@given(z=logits(np.float64), shift=st.floats(-40, 40), temperature=sane_temperatures)
def test_adding_a_constant_to_all_logits_changes_nothing(
    z: torch.Tensor, shift: float, temperature: float
) -> None:
    torch.testing.assert_close(
        scalings_from_logits(z + shift, enable_softmax=True, temperature=temperature),
        scalings_from_logits(z, enable_softmax=True, temperature=temperature),
        atol=1e-10,
        rtol=0,
    )


@laws
@given(z=logits(), temperature=temperatures)
def test_a_larger_logit_never_gets_a_smaller_scaling(z: torch.Tensor, temperature: float) -> None:
    scalings = scalings_from_logits(z, enable_softmax=True, temperature=temperature)
    in_order = scalings.gather(-1, z.argsort(dim=-1))
    assert (in_order.diff(dim=-1) >= 0).all()


@laws
@given(z=logits(np.float64), raise_by=st.floats(0.01, 5.0), temperature=sane_temperatures)
def test_raising_one_logit_raises_its_scaling_and_lowers_the_others(
    z: torch.Tensor, raise_by: float, temperature: float
) -> None:
    before = scalings_from_logits(z, enable_softmax=True, temperature=temperature)
    z = z.clone()
    z[..., 0] += raise_by
    after = scalings_from_logits(z, enable_softmax=True, temperature=temperature)
    assert (after[..., 0] >= before[..., 0]).all()
    assert (after[..., 1:] <= before[..., 1:]).all()


@laws
@given(z=logits())
def test_a_cold_router_picks_the_largest_and_a_hot_one_all_alike(z: torch.Tensor) -> None:
    # Apart by an eighth or equal: a gap smaller than the temperature is no winner.
    z = (z * 8).round() / 8
    largest = z == z.amax(-1, keepdim=True)
    for temperature in (1e-320, 1e-45, 1e-39):
        cold = scalings_from_logits(z, enable_softmax=True, temperature=temperature)
        torch.testing.assert_close(cold, largest / largest.sum(-1, keepdim=True))
    hot = scalings_from_logits(z, enable_softmax=True, temperature=1e300)
    torch.testing.assert_close(hot, torch.full_like(z, 1 / K))


@laws
@given(
    s=logits(bound=3.0),
    k=st.integers(1, K),
    softmax=st.booleans(),
    weight=st.floats(0.1, 4.0),
)
def test_top_k_keeps_exactly_k_and_they_are_the_largest(
    s: torch.Tensor, k: int, softmax: bool, weight: float
) -> None:
    s = s + 4  # no scaling is 0 by itself, so what is 0 was dropped
    effective = effective_scalings(s, top_k=k, enable_softmax_topk=softmax, global_weight=weight)
    kept = effective != 0
    assert (kept.sum(-1) == k).all()
    smallest_kept = s.masked_fill(~kept, torch.inf).amin(-1)
    largest_dropped = s.masked_fill(kept, -torch.inf).amax(-1)
    assert (smallest_kept >= largest_dropped).all()
    if softmax:
        torch.testing.assert_close(effective.sum(-1), torch.full((T, L), weight))
    else:
        torch.testing.assert_close(effective[kept], s[kept] * weight)


@laws
@given(s=logits(bound=3.0), softmax=st.booleans())
def test_top_k_of_all_is_dense(s: torch.Tensor, softmax: bool) -> None:
    assert torch.equal(
        effective_scalings(s, top_k=K, enable_softmax_topk=softmax),
        effective_scalings(s, top_k=None, enable_softmax_topk=softmax),
    )
    if not softmax:
        assert torch.equal(effective_scalings(s, top_k=K), s)


@laws
@given(
    z=logits(),
    top_ks=st.lists(st.integers(0, K), min_size=T, max_size=T),
    temps=st.lists(sane_temperatures, min_size=T, max_size=T),
    weights=st.lists(st.floats(-3, 3, width=32), min_size=T, max_size=T),
    softmax_topk=st.booleans(),
)
def test_knobs_per_token_are_the_single_ones_row_by_row(
    z: torch.Tensor,
    top_ks: list[int],
    temps: list[float],
    weights: list[float],
    softmax_topk: bool,
) -> None:
    """Ties among the scalings included."""
    scalings = scalings_from_logits(
        z, enable_softmax=not softmax_topk, temperature=torch.tensor(temps)
    )
    effective = effective_scalings(
        scalings,
        top_k=torch.tensor(top_ks),
        enable_softmax_topk=softmax_topk,
        global_weight=torch.tensor(weights),
    )
    for t in range(T):
        row = scalings_from_logits(
            z[t : t + 1], enable_softmax=not softmax_topk, temperature=float(np.float32(temps[t]))
        )
        assert torch.equal(scalings[t : t + 1], row)
        expected = effective_scalings(
            row,
            top_k=top_ks[t] or None,
            enable_softmax_topk=softmax_topk,
            global_weight=weights[t],
        )
        assert torch.equal(effective[t : t + 1], expected)


@laws
@given(s=logits(bound=3.0), k=st.integers(1, K))
def test_routing_a_token_does_not_depend_on_its_neighbours(s: torch.Tensor, k: int) -> None:
    together = effective_scalings(s, top_k=k, enable_softmax_topk=True)
    for t in range(T):
        for layer in range(L):
            alone = effective_scalings(
                s[t : t + 1, layer : layer + 1], top_k=k, enable_softmax_topk=True
            )
            assert torch.equal(together[t : t + 1, layer : layer + 1], alone)


@laws
@given(z=logits(k=1), temperature=temperatures)
def test_one_adapter_under_softmax_has_the_scaling_1(z: torch.Tensor, temperature: float) -> None:
    assert torch.equal(
        scalings_from_logits(z, enable_softmax=True, temperature=temperature), torch.ones(T, L, 1)
    )


@laws
@given(
    s=logits(np.float64, bound=3.0, k=len(ADAPTERS)),
    overrides=OVERRIDES,
    k=st.integers(1, len(ADAPTERS)),
    weight=st.floats(-3, 3),
)
def test_overrides_are_the_last_one_that_concerns_each_cell(
    s: torch.Tensor, overrides: tuple[AdapterOverride, ...], k: int, weight: float
) -> None:
    knobs = RoutingKnobs(overrides=overrides)
    matrix = override_matrix(knobs, LAYERS, ADAPTERS, dtype=torch.float64)
    assert (matrix is None) == (not overrides)
    effective = effective_scalings(s, top_k=k, overrides=matrix, global_weight=weight)
    left = effective_scalings(s, top_k=k)
    expected = [
        [
            [
                weight * overridden(knobs, adapter, layer, float(left[t, i, j]))
                for j, adapter in enumerate(ADAPTERS)
            ]
            for i, layer in enumerate(LAYERS)
        ]
        for t in range(T)
    ]
    torch.testing.assert_close(effective, torch.tensor(expected, dtype=torch.float64))
