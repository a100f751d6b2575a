"""Laws of buckets: they partition the tokens, and equal a computation token by token."""

from __future__ import annotations

import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.properties.overrides import OVERRIDES
from tests.recorded_runs import expected_scalings, make_run
from xlora_core import RoutingKnobs, Run

KNOBS = st.builds(
    RoutingKnobs,
    top_k=st.sampled_from([None, 1, 2, 3]),
    temperature=st.floats(0.1, 5),
    global_weight=st.floats(-2, 2),
    overrides=OVERRIDES,
)


@st.composite
def runs(draw: st.DrawFn) -> Run:
    n_prompt, n_response = draw(st.integers(0, 6)), draw(st.integers(0, 12))
    n_tokens = n_prompt + n_response
    finished = draw(st.booleans())
    n_routed = n_tokens if finished else draw(st.integers(0, n_tokens))
    softmax, softmax_topk = draw(st.sampled_from([(True, False), (False, True), (False, False)]))
    return make_run(
        n_prompt,
        n_response,
        seed=draw(st.integers(0, 2**31)),
        knobs=draw(st.lists(KNOBS, min_size=n_tokens, max_size=n_tokens)),
        n_routed=n_routed,
        finish="length" if finished else None,
        layerwise=draw(st.booleans()),
        enable_softmax=softmax,
        enable_softmax_topk=softmax_topk,
    )


def buckets(table: pd.DataFrame) -> list[tuple[int, int]]:
    return [tuple(x) for x in table[["bucket_start", "bucket_end"]].drop_duplicates().to_numpy()]


@given(run=runs(), by=st.sampled_from(["position", "segment"]), width=st.integers(1, 9))
@settings(max_examples=60)
def test_buckets_partition_the_tokens(run: Run, by, width: int) -> None:
    table = run.bucketed(by, width=width)
    covered = [t for start, end in buckets(table) for t in range(start, end)]
    assert covered == list(range(run.tracks[0].n_routed))
    assert (table["n_tokens"] == table["bucket_end"] - table["bucket_start"]).all()
    assert (table["n_tokens"] > 0).all()
    if by == "position":
        assert (table["bucket_start"] == table["bucket"] * width).all()


@given(run=runs())
@settings(max_examples=60)
def test_seq_len_buckets_are_the_prefixes_that_were_read(run: Run) -> None:
    track = run.tracks[0]
    # Uncached: the prompt, then once more with every token written, but the last one.
    calls = range(track.n_prompt, track.n_prompt + max(1, track.n_tokens - track.n_prompt))
    expected = [(0, s) for s in calls if 0 < s <= track.n_routed]
    assert buckets(run.bucketed("seq_len")) == expected


@given(
    run=runs(),
    by=st.sampled_from(["position", "segment", "seq_len"]),
    width=st.integers(1, 9),
    knobs=st.none() | KNOBS,
)
@settings(max_examples=100)
def test_numbers_equal_a_computation_token_by_token(run: Run, by, width: int, knobs) -> None:
    raw = expected_scalings(run, 0, knobs, effective=False)
    # Which of two equal scalings top-k keeps is free; float16 logits do tie.
    effective, single = run.scalings(0, knobs, effective=True), run.scalings(0, knobs)
    for row in run.bucketed(by, width=width, knobs=knobs).itertuples():
        adapter = run.header.adapter_names.index(row.adapter)
        tokens = slice(row.bucket_start, row.bucket_end)
        values = raw[tokens, row.layer_index, adapter]
        assert row.n_tokens == len(values)
        np.testing.assert_allclose(row.mean_scaling, values.mean(), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(row.std_scaling, values.std(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(row.min_scaling, values.min(), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(row.max_scaling, values.max(), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(
            row.mean_effective_scaling,
            effective[tokens, row.layer_index, adapter].mean(dtype=np.float64),
            rtol=1e-5,
            atol=1e-9,
        )
        share = 0.0
        for t in range(tokens.start, tokens.stop):
            module = single[t, row.layer_index]
            if module.any() and module[adapter] == max(module):
                share += 1 / sum(value == max(module) for value in module)
        np.testing.assert_allclose(row.share_top1, share / row.n_tokens, rtol=1e-6)
