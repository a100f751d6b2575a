"""Overrides in a record: which were in force at which token, in the file and in every table."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load, save

from tests.recorded_runs import ADAPTERS, LAYERS, assert_same_run, expected_scalings, make_run
from xlora_core import AdapterOverride, Arm, RoutingKnobs, Run
from xlora_core.errors import ConfigError, RecordError, RunFileError
from xlora_core.recording import header_json, run_file, undefuse

pin, scale, mute = AdapterOverride.pin, AdapterOverride.scale, AdapterOverride.mute

FIRST = (mute("math"), pin("verse", 0.5, "*.q_proj"))
SECOND = (scale("code", -2.0),)
CHANGING = [
    RoutingKnobs(
        top_k=[None, 1, 2, 3][t % 4],
        temperature=0.3 + t / 3,
        global_weight=t - 2.5,
        overrides=[(), FIRST, FIRST, SECOND][t % 4],
    )
    for t in range(8)
]
GIVEN = RoutingKnobs(top_k=1, overrides=(pin("code", 1.5), mute("code", LAYERS[0]), mute("verse")))
SOFTMAXES = {"softmax": (True, False), "softmax-topk": (False, True), "none": (False, False)}


@pytest.mark.parametrize(
    ("softmax", "layerwise", "knobs"),
    [*product(SOFTMAXES, (True, False), (None, GIVEN, RoutingKnobs(overrides=SECOND)))],
)
def test_effective_scalings_are_those_of_the_long_way(softmax, layerwise, knobs) -> None:
    enable_softmax, enable_softmax_topk = SOFTMAXES[softmax]
    run = make_run(
        knobs=CHANGING,
        layerwise=layerwise,
        enable_softmax=enable_softmax,
        enable_softmax_topk=enable_softmax_topk,
    )
    effective = run.scalings(0, knobs, effective=True)
    assert effective.shape == (8, 2, 3)
    expected = expected_scalings(run, 0, knobs, effective=True)
    np.testing.assert_allclose(effective, expected, rtol=1e-5, atol=1e-6)
    # What the router says is not touched.
    plain = knobs and replace(knobs, overrides=())
    np.testing.assert_array_equal(run.scalings(0, knobs), run.scalings(0, plain))


def test_one_set_of_overrides_for_all_tokens_is_in_force_at_all() -> None:
    run = make_run(knobs=[RoutingKnobs(overrides=FIRST)] * 8, layerwise=False)
    assert run.tracks[0].override_sets == (FIRST,)
    effective = run.scalings(0, effective=True)
    assert (effective[:, :, 0] == 0).all()
    assert (effective[:, 0, 2] == 0.5).all()
    np.testing.assert_array_equal(effective[:, 1, 2], run.scalings(0)[:, 1, 2])


def test_an_absent_adapter_stays_absent_when_pinned() -> None:
    run = make_run(knobs=[RoutingKnobs(overrides=(pin("code", 3.0),))] * 8)
    assert (run.scalings(0, effective=True)[:, :, 1] == [3.0, 0.0]).all()


def test_each_distinct_set_is_kept_once() -> None:
    track = make_run(knobs=CHANGING).tracks[0]
    assert track.override_sets == (FIRST, SECOND)
    assert track.override_set.tolist() == [0, 1, 1, 2] * 2
    assert [track.overrides(row) for row in (0, 2, 3)] == [(), FIRST, SECOND]
    assert track.knobs(3).overrides == SECOND
    assert track.knob_changes() == list(range(8))
    same = [RoutingKnobs()] * 3 + [RoutingKnobs(overrides=SECOND)] * 2 + [RoutingKnobs(top_k=1)] * 3
    assert make_run(knobs=same).tracks[0].knob_changes() == [0, 3, 5]
    assert make_run(arms=[Arm.merged()]).tracks[0].knob_changes() == []
    assert make_run(0, 0).tracks[0].knob_changes() == []


def test_a_run_whose_overrides_do_not_fit_its_model_is_refused() -> None:
    run = make_run(knobs=CHANGING)
    for sets, message in (
        (((mute("law"),), SECOND), r"override_sets\[0\]: override of 'law': there is no such"),
        ((FIRST, (mute("code", "*.c_attn"),)), r"override_sets\[1\]: .* matches '\*\.c_attn'"),
    ):
        with pytest.raises(RecordError, match=message):
            Run(run.header, [replace(run.tracks[0], override_sets=sets)])
    with pytest.raises(RecordError, match="arm: override of 'law'"):
        Run(
            run.header,
            [replace(run.tracks[0], arm=Arm.routed(RoutingKnobs(overrides=[mute("law")])))],
        )
    with pytest.raises(ConfigError, match="override of 'law': there is no such adapter"):
        run.scalings(0, RoutingKnobs(overrides=[mute("law")]))
    broken = Run(run.header, [replace(run.tracks[0], override_sets=(FIRST,))])
    with pytest.raises(RunFileError, match="override_set: values must be from 0 .none. to 1"):
        broken.to_bytes()


# -------------------------------------------------------------------- the file


def header_of(data: bytes) -> dict[str, object]:
    n_header = int.from_bytes(data[:8], "little")
    header: dict[str, object] = json.loads(
        json.loads(data[8 : 8 + n_header])["__metadata__"]["header"]
    )
    return header


@pytest.mark.parametrize("layerwise", [True, False])
def test_a_run_with_overrides_comes_back_as_it_was(layerwise) -> None:
    arms = [Arm.routed(CHANGING[1]), Arm.merged(), Arm.expert("code")]
    run = make_run(arms=arms, knobs=CHANGING, layerwise=layerwise)
    data = run.to_bytes()
    assert header_of(data)["format_version"] == 2
    loaded = Run.from_bytes(data)
    assert_same_run(run, loaded)
    assert loaded.tracks[0].override_sets == (FIRST, SECOND)
    assert loaded.tracks[0].arm.knobs == CHANGING[1]
    assert header_of(loaded.to_bytes()) == header_of(data)
    np.testing.assert_array_equal(
        loaded.scalings(0, effective=True), run.scalings(0, effective=True)
    )


def test_a_run_without_overrides_is_what_older_programs_read() -> None:
    """Names of version 1, written out: a file of it must never get more, nor less."""
    run = make_run(arms=[Arm.routed(RoutingKnobs(top_k=2))])
    data = run.to_bytes()
    header = header_of(data)
    assert header["format_version"] == 1
    assert header["tracks"] == [
        {
            "arm": {
                "kind": "routed",
                "knobs": {"top_k": 2, "temperature": 1.0, "global_weight": 1.0},
                "adapter": None,
            },
            "n_prompt": 3,
            "finish_reason": "length",
        }
    ]
    fields = "token_ids router_logits top_k temperature global_weight logprob base_logprob "
    fields += "alternative_ids alternative_logprobs seconds piece_bytes piece_ends"
    assert set(load(data)) == {"prompt_text", *(f"tracks.0.{name}" for name in fields.split())}
    loaded = Run.from_bytes(data)
    assert_same_run(run, loaded)
    assert loaded.tracks[0].override_set.tolist() == [0] * 8
    assert loaded.tracks[0].override_sets == ()


def test_only_the_starting_knobs_of_an_arm_that_never_ran_need_the_new_format() -> None:
    run = make_run(0, 0, arms=[Arm.routed(GIVEN)], finish="cancelled")
    data = run.to_bytes()
    assert header_of(data)["format_version"] == 2
    assert_same_run(run, Run.from_bytes(data))


def _override(**changes: object) -> dict[str, object]:
    return {"adapter": "math", "kind": "mute", "value": None, "modules": None} | changes


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (None, r"tracks\[0\]: override_sets must be a list, got None"),
        (["math"], r"override_sets\[0\] must be a list of overrides, got 'math'"),
        ([[3]], r"override_sets\[0\]\[0\] must be a JSON object, got int"),
        ([[{"adapter": "math"}]], r"override_sets\[0\]\[0\]: key 'kind' is missing"),
        ([[_override(more=1)]], r"override_sets\[0\]\[0\]: key 'more' is not known"),
        ([[_override(kind="freeze")]], "kind must be one of pin, scale, mute, got 'freeze'"),
        ([[_override(kind="scale", value=None)]], "value must be a finite number, got None"),
        ([[_override(kind="scale", value="2")]], "value must be a finite number, got '2'"),
        ([[_override(kind="pin", value=10**400)]], "value must be a finite number"),
        ([[_override(kind="pin", value=float("nan"))]], "header is not valid JSON .NaN is no"),
        ([[_override(modules=[3])]], r"modules must be paths or patterns, got \[3\]"),
        ([[_override(modules="*" * 1001)]], "a pattern has at most 1000 characters"),
        ([[_override(adapter="law")]], r"override_sets\[0\]: override of 'law': there is no such"),
        ([[_override(adapter=["math"])]], "adapter must be a name"),
        ([[_override(modules="q_proj")]], "no adapted module matches 'q_proj'"),
        ([[_override()]], r"override_set: values must be from 0 \(none\) to 1"),
    ],
)
def test_a_doctored_header_is_refused_by_field(sets, message) -> None:
    assert_refused(message, sets=sets)


@pytest.mark.parametrize("number", [3, -1, 2**31 - 1, -(2**31)])
def test_a_number_of_no_set_is_refused(number) -> None:
    assert_refused(r"override_set: values must be from 0 \(none\) to 2", number=number)


def test_overrides_in_a_file_of_version_1_are_refused() -> None:
    assert_refused(r"tracks\[0\]: key 'override_sets' is not known", format_version=1)


def test_a_file_whose_patterns_would_take_minutes_is_refused(monkeypatch) -> None:
    assert header_json.MOST_MATCHING < 10**10  # some seconds at a nanosecond a character
    monkeypatch.setattr(header_json, "MOST_MATCHING", 10**6)
    slow = _override(modules=["*" + "a*" * 400 + "b"])
    assert_refused("30 overrides for 2 modules are more than a run file may", sets=[[slow] * 30])


def assert_refused(
    message: str,
    *,
    sets: object = ...,
    number: int | None = None,
    format_version: int = 2,
) -> None:
    data = make_run(arms=[Arm.routed()], knobs=CHANGING).to_bytes()
    n_header = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + n_header])["__metadata__"]
    tensors = {name: array.copy() for name, array in load(data).items()}
    header = json.loads(metadata["header"])
    header["format_version"] = format_version
    if sets is not ...:
        header["tracks"][0]["override_sets"] = sets
    if number is not None:
        tensors["tracks.0.override_set"][1] = number
    metadata["header"] = json.dumps(header)
    metadata["sha256"] = run_file._digest(metadata["header"], tensors)
    with pytest.raises(RunFileError, match=f"^up.bin: .*{message}") as caught:
        Run.from_bytes(save(tensors, metadata=metadata), "up.bin")
    assert caught.value.hint


# -------------------------------------------------------------------- the tables


def test_the_long_table_says_them_in_words() -> None:
    run = make_run(arms=[Arm.routed(), Arm.merged()], knobs=CHANGING)
    table = run.long_table()
    routed, merged = (table[table["arm"] == arm] for arm in ("routed", "merged"))
    words = ["", "math muted; verse pinned at 0.5 in *.q_proj"]
    words = [words[0], words[1], words[1], "code rescaled by -2"]
    assert routed.groupby("token_index")["overrides"].first().tolist() == words * 2
    assert merged["overrides"].isna().all()
    given = run.long_table(GIVEN)
    assert set(given[given["arm"] == "routed"]["overrides"]) == {
        "code pinned at 1.5; code muted in model.layers.0.q_proj; verse muted"
    }
    unread = make_run(3, 2, finish="error", n_routed=4, knobs=CHANGING).long_table()
    assert unread[unread["token_index"] == 4]["overrides"].isna().all()
    assert unread[unread["token_index"] < 4]["overrides"].notna().all()


def test_tables_hold_the_effective_scalings_under_overrides(tmp_path) -> None:
    run = make_run(knobs=CHANGING)
    expected = expected_scalings(run, 0, None, effective=True)
    np.testing.assert_allclose(
        run.long_table()["effective_scaling"], expected.ravel(), rtol=1e-5, atol=1e-6
    )
    bucketed = run.bucketed("position", width=4)
    means = expected.reshape(2, 4, 2, 3).mean(axis=1)
    np.testing.assert_allclose(bucketed["mean_effective_scaling"], means.ravel(), atol=1e-6)
    of_router = run.scalings(0).reshape(2, 4, 2, 3).mean(axis=1)
    np.testing.assert_allclose(bucketed["mean_scaling"], of_router.ravel(), atol=1e-6)
    run.to_csv(tmp_path / "x.csv", "token", knobs=GIVEN)
    read = pd.read_csv(tmp_path / "x.csv")
    np.testing.assert_allclose(
        read["effective_scaling"], run.scalings(0, GIVEN, True).ravel(), rtol=1e-6
    )
    run.to_parquet(tmp_path / "x.parquet", "token")
    of_parquet = pd.read_parquet(tmp_path / "x.parquet")
    assert of_parquet["overrides"].tolist() == run.long_table()["overrides"].tolist()


def test_an_adapter_named_like_a_formula_is_defused() -> None:
    names = ("=1+1", *ADAPTERS[1:])
    knobs = [RoutingKnobs(overrides=[mute("=1+1")])] * 8
    run = make_run(adapter_names=names, knobs=knobs, adapter_hashes={})
    read = pd.read_csv(io.StringIO(run.to_csv_text("token")))
    assert set(read["overrides"]) == {"'=1+1 muted"}
    assert undefuse("'=1+1 muted") == "=1+1 muted"
