"""Guesses in a run file: how many there were and how many hit; and arms that ran out of time."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from safetensors.numpy import load, save

from tests.recorded_runs import assert_same_run, make_run
from xlora_core import Arm, Run
from xlora_core.cli.generation import summary
from xlora_core.cli.main import main
from xlora_core.errors import RecordError, RunFileError
from xlora_core.recording import run_file

ARMS = [Arm.routed(), Arm.merged()]


def guessing_run(n_guessed: int = 5, n_hit: int = 4, *, finish: str = "length") -> Run:
    run = make_run(arms=ARMS, finish=finish)
    routed = replace(run.tracks[0], n_guessed=n_guessed, n_hit=n_hit)
    return Run(run.header, [routed, run.tracks[1]])


def header_of(data: bytes) -> dict[str, Any]:
    n_header = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(
        json.loads(data[8 : 8 + n_header])["__metadata__"]["header"]
    )
    return header


def with_header(data: bytes, header: dict[str, Any]) -> bytes:
    tensors, text = load(data), json.dumps(header)
    digest = run_file._digest(text, tensors)
    return save(tensors, metadata={"format": "xlora-run", "header": text, "sha256": digest})


@pytest.mark.parametrize("finish", ["length", "time"])
def test_guesses_come_back_as_they_were(finish) -> None:
    run = guessing_run(finish=finish)
    loaded = Run.from_bytes(run.to_bytes())
    assert_same_run(run, loaded)
    assert loaded.tracks[0].hit_rate == 0.8
    assert loaded.tracks[1].hit_rate is None
    assert {track.finish_reason for track in loaded.tracks} == {finish}


def test_only_a_run_that_needs_it_is_of_version_three() -> None:
    assert header_of(make_run(arms=ARMS).to_bytes())["format_version"] == 1
    for run in (guessing_run(), make_run(arms=ARMS, finish="time", n_routed=6)):
        data = run.to_bytes()
        assert header_of(data)["format_version"] == 3
        assert header_of(Run.from_bytes(data).to_bytes()) == header_of(data)


def test_a_file_of_an_older_version_has_no_guesses() -> None:
    loaded = Run.from_bytes(make_run(arms=ARMS).to_bytes())
    assert [(t.n_guessed, t.n_hit, t.hit_rate) for t in loaded.tracks] == [(0, 0, None)] * 2


@pytest.mark.parametrize(
    ("track", "changes", "message"),
    [
        (0, {"n_hit": 6}, "hits <= guesses <= 8 tokens, got 6 and 5"),
        (0, {"n_hit": -1}, "hits <= guesses <= 8 tokens, got -1 and 5"),
        (0, {"n_guessed": 9}, "hits <= guesses <= 8 tokens, got 4 and 9"),
        (1, {"n_guessed": 2, "n_hit": 1}, "n_guessed: a merged arm has no scalings"),
        (0, {"n_hit": 4.0}, "n_hit must be a whole number, got 4.0"),
        (0, {"n_guessed": True}, "n_guessed must be a whole number, got True"),
        (0, {"n_guessed": None}, "n_guessed must be a whole number, got None"),
    ],
)
def test_counts_that_cannot_be_are_refused(track, changes, message) -> None:
    data = guessing_run().to_bytes()
    header = header_of(data)
    header["tracks"][track] |= changes
    with pytest.raises(RunFileError, match=message) as caught:
        Run.from_bytes(with_header(data, header))
    assert caught.value.hint


def test_a_run_with_impossible_counts_cannot_be_made() -> None:
    with pytest.raises(RecordError, match="got 6 and 5"):
        guessing_run(5, 6)


def test_a_count_that_is_missing_is_refused() -> None:
    data = guessing_run().to_bytes()
    header = header_of(data)
    del header["tracks"][1]["n_hit"]
    with pytest.raises(RunFileError, match=r"tracks\[1\]: key 'n_hit' is missing"):
        Run.from_bytes(with_header(data, header))


def test_older_versions_know_neither_guesses_nor_a_time_limit() -> None:
    data = make_run(arms=ARMS).to_bytes()
    header = header_of(data)
    header["tracks"][0]["finish_reason"] = "time"
    with pytest.raises(RunFileError, match="one of stop, length, cancelled, error, got 'time'"):
        Run.from_bytes(with_header(data, header))
    header = header_of(data)
    header["tracks"][0] |= {"n_guessed": 1, "n_hit": 1}
    with pytest.raises(RunFileError, match=r"tracks\[0\]: key 'n_guessed' is not known"):
        Run.from_bytes(with_header(data, header))


def test_the_summary_and_inspect_tell_the_hits(tmp_path, capsys) -> None:
    run = guessing_run()
    run.save(tmp_path / "run.safetensors")
    assert [(a["n_guessed"], a["n_hit"]) for a in summary(run)["arms"]] == [(5, 4), (0, 0)]
    assert main(["inspect", str(tmp_path / "run.safetensors")]) == 0
    lines = capsys.readouterr().out.splitlines()
    routed = next(line for line in lines if line.startswith("routed:"))
    merged = next(line for line in lines if line.startswith("merged:"))
    assert "length, prefetch hits 4 of 5 (80%); mean scalings" in routed
    assert "prefetch" not in merged
