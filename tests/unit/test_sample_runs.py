"""The shipped runs are whole, small, of the shipped model, and show what the list expects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sample_data.record.pages import misses
from sample_data.record.recordings import Recording, read_recordings
from sample_data.record.shelf import INDEX, Shelf, checkpoint_fingerprint
from sample_data.record.spans import SpanLead, span_leads
from xlora_core.recording import Run

SAMPLE = Path(__file__).resolve().parents[2] / "sample_data"
RUNS = SAMPLE / "runs"
RECORDINGS = read_recordings()
MIXED = [r for r in RECORDINGS if len({*r.experts} - {None}) > 1]


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return Shelf(RUNS, checkpoint_fingerprint(SAMPLE / "demo"))


def ids(recordings: list[Recording]) -> list[str]:
    return [recording.id for recording in recordings]


def leads_in(recording: Recording) -> list[SpanLead]:
    return span_leads(Run.load(RUNS / f"{recording.id}.safetensors"), recording)


def leaders(recording: Recording) -> dict[tuple[str, str], str | None]:
    return {(lead.arm, lead.name): lead.leader for lead in leads_in(recording)}


@pytest.mark.parametrize("recording", RECORDINGS, ids=ids(RECORDINGS))
def test_a_run_opens_and_is_of_the_shipped_model_and_list(
    shelf: Shelf, recording: Recording
) -> None:
    assert shelf.fault(recording) is None
    run = shelf.run(recording)
    config = json.loads((SAMPLE / "demo" / "xlora.json").read_text(encoding="utf-8"))
    assert list(run.header.adapter_names) == [adapter["name"] for adapter in config["adapters"]]
    assert list(run.header.layer_names) == config["layer_names"]
    assert set(run.header.adapter_hashes) == set(run.header.adapter_names)
    assert run.header.model_id == "demo"
    assert run.header.sampling == recording.sampling
    assert [track.arm.kind for track in run.tracks] == [arm.kind for arm in recording.arms]
    assert all(track.finish_reason in ("stop", "length") for track in run.tracks)
    assert all(run.text(arm, stop_token=False).strip() for arm in range(len(run.tracks)))


def test_all_runs_name_the_same_weights() -> None:
    headers = [Run.load(RUNS / f"{recording.id}.safetensors").header for recording in RECORDINGS]
    assert len({json.dumps([h.base_hash, h.adapter_hashes]) for h in headers}) == 1


def test_there_is_nothing_else(shelf: Shelf) -> None:
    assert shelf.strangers(RECORDINGS) == []
    assert list(json.loads((RUNS / INDEX).read_text(encoding="utf-8"))) == ids(RECORDINGS)
    page = (RUNS / "README.md").read_text(encoding="utf-8")
    assert f"with {len(RECORDINGS)} prompts" in page
    for recording in RECORDINGS:
        assert recording.look_at.replace("|", "\\|") in page


def test_runs_and_the_whole_folder_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in RUNS.glob("*.safetensors")}
    assert {name: size for name, size in sizes.items() if size > 1.2e6} == {}
    assert sum(sizes.values()) < 9e6
    everything = [path for path in SAMPLE.rglob("*") if "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in everything if path.is_file()) < 80e6


@pytest.mark.parametrize("recording", MIXED, ids=ids(MIXED))
def test_the_expected_expert_leads_in_every_paragraph_of_a_mixed_prompt(
    recording: Recording,
) -> None:
    missed = misses(recording, leads_in(recording))
    assert not missed, "\n".join(missed)


@pytest.mark.parametrize("recording", MIXED, ids=ids(MIXED))
def test_the_lead_changes_with_the_paragraph(recording: Recording) -> None:
    in_prompt = [lead.leader for lead in leads_in(recording) if "paragraph" in lead.name]
    assert len(set(in_prompt)) > 1


def test_knobs_were_turned_at_the_tokens_of_the_list() -> None:
    for recording in RECORDINGS:
        run = Run.load(RUNS / f"{recording.id}.safetensors")
        for arm, track in enumerate(run.tracks):
            turned = [row - track.n_prompt for row in track.knob_changes()[1:]]
            assert turned == [change.at for change in recording.changes if change.arm == arm]


def test_turned_by_hand_shows_the_base_model_and_an_expert_held_down() -> None:
    (recording,) = [r for r in RECORDINGS if r.id == "turned-by-hand"]
    found = leaders(recording)
    assert found["routed", "answer from 0"] == "verse"
    assert found["routed", "answer from 16"] is None
    assert found["routed", "answer from 32"] == "verse"
    assert found["routed", "answer from 48"] not in (None, "verse")


def test_sharper_mixtures_share_a_token_among_fewer() -> None:
    (recording,) = [r for r in RECORDINGS if r.id == "all-one-or-sharper"]
    sharing = {lead.arm: lead.sharing for lead in leads_in(recording) if lead.name == "answer"}
    assert sharing["routed#2"] == pytest.approx(1)
    assert 1 < sharing["routed#3"] < sharing["routed"]


def test_four_ways_are_four_answers() -> None:
    run = Run.load(RUNS / "four-ways.safetensors")
    assert len({run.text(arm) for arm in range(len(run.tracks))}) == 4
