"""The run file: it comes back as it was, and is written at once or not at all."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open

from tests.recorded_runs import ALL_ARMS, assert_same_run, make_run
from xlora_core import RoutingKnobs, Run
from xlora_core.errors import RunFileError

# Pieces that a careless format loses: markup, NUL, halves of characters, a split emoji.
HOSTILE = ["<script>alert(1)</script>", "\x00", "", "😀", "\ud83d\ude00", "\ud800", "a\r\n", '"\\']


@pytest.mark.parametrize("layerwise", [True, False])
def test_a_run_comes_back_as_it_was(tmp_path, layerwise) -> None:
    run = make_run(3, 5, arms=ALL_ARMS, pieces=HOSTILE, layerwise=layerwise, finish="stop")
    run = Run(replace(run.header, prompt_text="\ud83d\ude00\x00<script>"), run.tracks)
    run.save(tmp_path / "run.safetensors")
    loaded = Run.load(tmp_path / "run.safetensors")
    assert_same_run(run, loaded)
    assert_same_run(run, Run.from_bytes(run.to_bytes()))
    knobs = RoutingKnobs(top_k=1, temperature=0.3)
    np.testing.assert_array_equal(loaded.scalings(0, knobs, True), run.scalings(0, knobs, True))
    assert loaded.to_csv_text("position") == run.to_csv_text("position")
    with pytest.raises(ValueError, match="read-only"):
        loaded.tracks[0].token_ids[0] = 1


@pytest.mark.parametrize(
    "run",
    [
        make_run(0, 0, finish="cancelled"),
        make_run(3, 0, finish=None),
        make_run(3, 5, finish="error", n_routed=7),
        make_run(3, 5, finish=None, n_routed=2),
    ],
    ids=["nothing", "prompt only", "failed", "growing"],
)
def test_an_unfinished_run_comes_back_too(run) -> None:
    assert_same_run(run, Run.from_bytes(run.to_bytes()))


def test_the_file_is_plain_safetensors(tmp_path) -> None:
    path = tmp_path / "run.safetensors"
    make_run(arms=ALL_ARMS).save(path)
    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["header"])
        assert header["format_version"] == 1
        assert header["tracks"][0]["arm"]["knobs"] == {
            "top_k": 2,
            "temperature": 1.0,
            "global_weight": 1.0,
        }
        assert file.get_tensor("tracks.0.router_logits").dtype == np.float16
        names = set(file.keys())
    assert "tracks.1.top_k" in names
    assert "tracks.1.router_logits" not in names


def test_saving_replaces_at_once_or_not_at_all(tmp_path, monkeypatch) -> None:
    path = tmp_path / "run.safetensors"
    make_run(seed=1).save(path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(RunFileError, match="cannot write .*No space left on device") as caught:
            make_run(seed=2).save(path)
    assert "has room" in caught.value.hint
    assert path.read_bytes() == before
    make_run(seed=2).save(path)
    assert path.read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


def test_who_reads_the_old_file_is_not_disturbed_by_a_new_one(tmp_path) -> None:
    path = tmp_path / "run.safetensors"
    make_run(seed=1).save(path)
    before = path.read_bytes()
    with path.open("rb") as reader:
        make_run(seed=2).save(path)
        assert reader.read() == before


def test_a_saved_file_has_the_usual_permissions(tmp_path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    make_run().save(tmp_path / "run")
    assert (tmp_path / "run").stat().st_mode == plain.stat().st_mode


def test_saving_where_nothing_can_be_written(tmp_path) -> None:
    with pytest.raises(RunFileError, match=r"cannot write .*No such file or directory"):
        make_run().save(tmp_path / "nowhere" / "run")
    with pytest.raises(RunFileError, match=r"cannot write .*[Dd]irectory"):
        make_run().save(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router_logits": np.full((8, 2, 3), np.nan, np.float16)}, "router_logits: values must"),
        ({"temperature": np.zeros(8, np.float32)}, "temperature: values must be finite and > 0"),
        ({"logprob": np.ones(8, np.float32)}, "logprob: values must be <= 0"),
    ],
)
def test_what_would_be_refused_is_not_saved(changes, message) -> None:
    run = make_run()
    broken = Run(run.header, [replace(run.tracks[0], **changes)])
    with pytest.raises(RunFileError, match=f"the run cannot be saved: track 0: {message}"):
        broken.to_bytes()


def test_names_that_json_would_change_are_not_saved() -> None:
    # One lone surrogate, as in the name of a folder that is not UTF-8, is no problem.
    run = make_run(model_id="caf\udce9")
    assert Run.from_bytes(run.to_bytes()).header.model_id == "caf\udce9"
    with pytest.raises(RunFileError, match="two lone surrogates in a row"):
        make_run(model_id="\ud83d\ude00").to_bytes()
