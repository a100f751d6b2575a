"""Bucketed scalings: what a bucket covers, and what its numbers are."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from tests.recorded_runs import ADAPTERS, LAYERS, make_header, make_run, record
from tests.tiny_models import tiny_prompt, tiny_xlora
from xlora_core import Arm, RoutingKnobs, Run
from xlora_core.errors import ConfigError
from xlora_core.recording import RunRecorder

# DESIGN section 7, word for word: other programs read this header.
HEADER = (
    "run_id,arm,bucket_by,bucket,bucket_start,bucket_end,n_tokens,layer_index,layer_name,adapter,"
    "mean_scaling,std_scaling,min_scaling,max_scaling,mean_effective_scaling,share_top1"
)
STATISTICS = HEADER.split(",")[10:]


def bounds(table: pd.DataFrame) -> list[tuple[object, int, int, int]]:
    """Returns (bucket, start, end, n_tokens) of each bucket, in order."""
    columns = ["bucket", "bucket_start", "bucket_end", "n_tokens"]
    return [tuple(row) for row in table[columns].drop_duplicates().to_numpy().tolist()]


def run_of_scalings(values: list[list[float]], n_prompt: int, top_k: int | None = None) -> Run:
    """Returns a run without softmax, whose scalings are the given ``[T][K]`` in both modules."""
    header = make_header(enable_softmax=False, layerwise=False)
    logits = np.array(values)[:, None, :]
    recorder = record(
        header,
        Arm.routed(),
        pieces=["x"] * len(values),
        n_prompt=n_prompt,
        logits=logits,
        knobs=[RoutingKnobs(top_k=top_k, global_weight=2.0)] * len(values),
    )
    return RunRecorder(header, [recorder]).snapshot()


@pytest.mark.parametrize("by", ["position", "segment", "seq_len"])
def test_columns_are_those_of_the_design(by) -> None:
    assert ",".join(make_run().bucketed(by).columns) == HEADER
    assert ",".join(make_run(0, 0).bucketed(by).columns) == HEADER


def test_position_buckets_are_as_wide_as_asked_and_the_last_is_the_rest() -> None:
    table = make_run(3, 7).bucketed("position", width=4)
    assert bounds(table) == [(0, 0, 4, 4), (1, 4, 8, 4), (2, 8, 10, 2)]
    assert bounds(make_run(3, 5).bucketed("position", width=4))[-1] == (1, 4, 8, 4)
    assert bounds(make_run(3, 5).bucketed("position", width=99)) == [(0, 0, 8, 8)]


def test_segment_buckets_are_prompt_and_response() -> None:
    table = make_run(3, 5).bucketed("segment")
    assert bounds(table) == [("prompt", 0, 3, 3), ("response", 3, 8, 5)]
    assert bounds(make_run(3, 0).bucketed("segment")) == [("prompt", 0, 3, 3)]
    assert bounds(make_run(0, 5).bucketed("segment")) == [("response", 0, 5, 5)]


def test_seq_len_buckets_are_the_forward_calls_of_an_uncached_generation() -> None:
    # Five tokens take five calls; the fifth token itself is read by none.
    table = make_run(3, 5).bucketed("seq_len")
    assert bounds(table) == [(s, 0, s, s) for s in (3, 4, 5, 6, 7)]
    assert bounds(make_run(3, 1).bucketed("seq_len")) == [(3, 0, 3, 3)]
    assert bounds(make_run(3, 0).bucketed("seq_len")) == [(3, 0, 3, 3)]


def test_tokens_not_yet_read_are_in_no_bucket() -> None:
    run = make_run(3, 5, finish=None, n_routed=6)
    assert bounds(run.bucketed("position", width=4)) == [(0, 0, 4, 4), (1, 4, 6, 2)]
    assert bounds(run.bucketed("segment"))[-1] == ("response", 3, 6, 3)
    assert bounds(run.bucketed("seq_len"))[-1] == (6, 0, 6, 6)
    early = make_run(3, 5, finish=None, n_routed=2)
    assert bounds(early.bucketed("segment")) == [("prompt", 0, 2, 2)]
    assert bounds(early.bucketed("seq_len")) == []


def test_rows_are_ordered_by_arm_bucket_module_and_adapter() -> None:
    run = make_run(3, 5, arms=[Arm.routed(), Arm.merged()])
    table = run.bucketed("position", width=4)
    keys = list(
        zip(table["arm"], table["bucket"], table["layer_name"], table["adapter"], strict=True)
    )
    assert keys == [
        (arm, bucket, layer, adapter)
        for arm in ("routed", "merged")
        for bucket in (0, 1)
        for layer in LAYERS
        for adapter in ADAPTERS
    ]
    assert table["layer_index"].tolist()[:6] == [0, 0, 0, 1, 1, 1]
    assert set(table["run_id"]) == {run.header.run_id}
    assert set(table["bucket_by"]) == {"position"}


def test_numbers_of_a_bucket_by_hand() -> None:
    run = run_of_scalings([[1, 3, 0], [5, -1, 0], [4, 4, 0], [0, 0, 0]], n_prompt=4, top_k=1)
    table = run.bucketed("segment").set_index(["layer_index", "adapter"])
    first = table.loc[(0, "math"), STATISTICS]
    assert first["mean_scaling"] == 2.5
    assert first["std_scaling"] == pytest.approx(np.std([1, 5, 4, 0]))
    assert (first["min_scaling"], first["max_scaling"]) == (0, 5)
    # Top-k 1 keeps 5 and, of the tie, one 4; the weight is 2.
    kept = [table.loc[(0, name), "mean_effective_scaling"] for name in ("math", "code")]
    assert kept in ([4.5, 1.5], [2.5, 3.5])
    # It leads one of four tokens and half of the tie; nobody leads a token without scalings.
    assert table.loc[0, "share_top1"].tolist() == [0.375, 0.375, 0]
    # The second module has no weights of "code".
    assert table.loc[(1, "code"), "mean_effective_scaling"] == 0
    assert table.loc[(1, "code"), "mean_scaling"] == 1.5


def test_constant_arms_have_no_spread() -> None:
    run = make_run(3, 5, arms=[Arm.merged(), Arm.base(), Arm.expert("code")])
    for by in ("position", "seq_len"):
        table = run.bucketed(by)
        assert (table["std_scaling"] == 0).all()
        assert (table["min_scaling"] == table["max_scaling"]).all()
        merged = table[table["arm"] == "merged"]
        assert merged["mean_scaling"].to_numpy() == pytest.approx(1 / 3)
        assert merged["share_top1"].to_numpy() == pytest.approx(1 / 3)
        assert (table[table["arm"] == "base"]["share_top1"] == 0).all()
        expert = table[table["arm"] == "expert:code"].groupby("adapter", observed=True)
        assert expert["share_top1"].max().to_dict() == {"math": 0, "code": 1, "verse": 0}


def test_one_arm_is_its_part_of_the_whole() -> None:
    run = make_run(arms=[Arm.routed(), Arm.merged(), Arm.routed()])
    whole = run.bucketed("position", width=3)
    part = run.bucketed("position", width=3, arm=2)
    assert set(part["arm"]) == {"routed#2"}
    pd.testing.assert_frame_equal(
        part, whole[whole["arm"] == "routed#2"].reset_index(drop=True), check_exact=True
    )


def test_other_knobs_change_routed_arms_only() -> None:
    run = make_run(arms=[Arm.routed(), Arm.merged()])
    knobs = RoutingKnobs(top_k=1, temperature=0.1)
    recorded, other = run.bucketed("segment"), run.bucketed("segment", knobs=knobs)
    changed = recorded["max_scaling"] != other["max_scaling"]
    assert changed[recorded["arm"] == "routed"].all()
    assert not changed[recorded["arm"] == "merged"].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "token"}, "by must be one of position, segment, seq_len, got 'token'"),
        ({"width": 0}, "width must be a whole number of tokens >= 1, got 0"),
        ({"width": 2.0}, "width must be a whole number of tokens >= 1, got 2.0"),
        ({"width": True}, "width must be a whole number of tokens >= 1, got True"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make_run().bucketed(**arguments)


@pytest.mark.parametrize("layerwise", [True, False])
def test_seq_len_buckets_against_the_log_of_the_model(tmp_path, layerwise) -> None:
    """The model's log is PEFT's (``tests/parity``): its keys and its means are ours."""
    model = tiny_xlora(tmp_path, layerwise_scalings=layerwise)
    prompt = tiny_prompt(batch=1, length=4)
    model.enable_scalings_logging()
    ids = model.generate(
        input_ids=prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
    )
    log = model.get_bucketed_scalings_log()
    model.disable_scalings_logging()
    with torch.no_grad():
        router_logits = model.scaling_pass(
            input_ids=ids, past_key_values=model.new_cache().scaling
        ).router_logits[0]
    header = make_header(
        adapter_names=model.adapter_names,
        layer_names=model.lora_layer_names,
        present=model.present.tolist(),
        layerwise=layerwise,
    )
    recorder = record(
        header,
        Arm.routed(),
        pieces=["x"] * ids.shape[1],
        n_prompt=4,
        logits=router_logits.numpy(),
    )
    table = RunRecorder(header, [recorder]).snapshot().bucketed("seq_len")
    assert table["bucket"].unique().tolist() == sorted(log) == [4, 5, 6, 7, 8, 9]
    for length, (_, (scalings,)) in log.items():
        rows = table[table["bucket"] == length]
        assert scalings.shape[:2] == (1, length)
        # Recorded as float16.
        for column, expected in (
            ("mean_scaling", scalings[0].mean(dim=0)),
            ("std_scaling", scalings[0].std(dim=0, correction=0)),
            ("min_scaling", scalings[0].amin(dim=0)),
            ("max_scaling", scalings[0].amax(dim=0)),
        ):
            np.testing.assert_allclose(rows[column], expected.ravel(), atol=2e-3)
