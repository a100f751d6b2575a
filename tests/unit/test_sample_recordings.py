"""python -m sample_data.record, on a tiny model; and that the shipped list can be recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sample_data.record import command
from sample_data.record.errors import RecordingError
from sample_data.record.recordings import Recording, paragraphs, read_recordings
from sample_data.record.shelf import Shelf, checkpoint_fingerprint
from sample_data.record.stage import Stage
from tests.recorded_runs import make_run
from tests.tiny_chat import tiny_chat_xlora, tiny_tokenizer
from xlora_core import AdapterOverride, Arm, RoutingKnobs
from xlora_core.engine import Engine
from xlora_core.model import XLoraModel
from xlora_core.recording import Run
from xlora_core.rows import opening
from xlora_core.training import recipes

PROMPT = "the quick brown fox\n\nthe sum of two numbers"
PLAIN = {
    "id": "plain",
    "title": "Plain",
    "look_at": "Nothing.",
    "messages": [{"role": "user", "content": PROMPT}],
    "experts": ["math", None],
    "sampling": {"max_new_tokens": 12},
}
MUTE = {"adapter": "verse", "kind": "mute"}
TURNED = PLAIN | {
    "id": "turned",
    "title": "Turned",
    "arms": [
        {"kind": "routed", "knobs": {"top_k": 2}},
        {"kind": "merged"},
        {"kind": "routed"},
        {"kind": "expert", "adapter": "code"},
    ],
    "changes": [
        {"at": 7, "knobs": {"overrides": [MUTE]}},
        {"at": 1, "knobs": {"global_weight": 0.0}},
        {"at": 3, "arm": 2, "knobs": {"temperature": 0.5}},
    ],
    "sampling": {"max_new_tokens": 10, "temperature": 1.5, "seed": 4},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> XLoraModel:
    """A tiny chat model that never ends an answer by itself."""
    model = tiny_chat_xlora(tmp_path_factory.mktemp("experts"))
    model.config.eos_token_id = model.generation_config.eos_token_id = 0
    return model


@pytest.fixture
def listed(tmp_path: Path) -> Callable[..., Path]:
    """Writes entries to a list."""

    def write(*entries: dict[str, Any]) -> Path:
        path = tmp_path / "recordings.json"
        path.write_text(json.dumps(entries))
        return path

    return write


@pytest.fixture
def plain(listed: Callable[..., Path]) -> Recording:
    return read_recordings(listed(PLAIN))[0]


def without_times(run: Run) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    header = asdict(run.header) | {"created": ""}
    tracks = [
        {name: array.tobytes() for name, array in track.arrays().items() if name != "seconds"}
        | {"pieces": track.pieces, "finish": track.finish_reason, "hits": track.n_hit}
        for track in run.tracks
    ]
    return header, tracks


# ---------------------------------------------------------------- the shipped list


def test_the_shipped_list_is_a_dozen_and_fits_the_experts() -> None:
    recordings = read_recordings()
    assert len(recordings) == 12
    names = {settings.domain for settings in recipes.DEMO_EXPERTS}
    for recording in recordings:
        expected = {*recording.experts, recording.answer} - {None}
        assert expected <= names
        assert expected
        assert len(recording.look_at) < 240
        for arm in recording.arms:
            assert arm.adapter is None or arm.adapter in names
        for change in recording.changes:
            assert change.at < recording.sampling.max_new_tokens
            assert {override.adapter for override in change.knobs.overrides} <= names


def test_the_shipped_list_changes_domain_in_eight_prompts_and_names_every_expert() -> None:
    mixed = [r for r in read_recordings() if len({*r.experts} - {None}) > 1]
    assert len(mixed) == 8
    assert {name for r in mixed for name in r.experts if name} == {
        settings.domain for settings in recipes.DEMO_EXPERTS
    }


# ---------------------------------------------------------------- reading a list


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("one", ["one"]),
        (" one \n \t\n two\nthree \n\n\n\nfour\n", ["one", "two\nthree", "four"]),
        ("a\n\n    b", ["a", "b"]),
    ],
)
def test_blank_lines_part_paragraphs(text: str, expected: list[str]) -> None:
    assert [text[start:end] for start, end in paragraphs(text)] == expected


def test_a_list_is_read_with_its_defaults(plain: Recording) -> None:
    assert plain.arms == (Arm.routed(),)
    assert plain.changes == ()
    assert plain.answer is None
    assert plain.experts == ("math", None)


def test_changes_are_read_in_the_order_they_happen(listed: Callable[..., Path]) -> None:
    (turned,) = read_recordings(listed(TURNED))
    assert [(change.at, change.arm) for change in turned.changes] == [(1, 0), (3, 2), (7, 0)]
    assert turned.changes[2].knobs == RoutingKnobs(overrides=[AdapterOverride.mute("verse")])
    assert turned.arms[3] == Arm.expert("code")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"id": "No Spaces"}, "id must be"),
        ({"title": ""}, "title must be text"),
        ({"look": "x"}, "'look' is not known"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "a role of system, user, assistant"),
        ({"messages": [{"role": "user"}]}, "'content' is missing"),
        ({"experts": ["math"]}, "each of the 2 paragraphs"),
        ({"arms": [{"kind": "oracle"}]}, "kind must be routed, merged, base or expert"),
        ({"arms": [{"kind": "merged", "knobs": {}}]}, "only a routed arm has knobs"),
        ({"arms": [{"kind": "routed", "knobs": {"topk": 1}}]}, "'topk' is not known"),
        ({"changes": [{"at": 0, "knobs": {}}]}, "at must be a token of the answer"),
        ({"changes": [{"at": 2, "arm": 1, "knobs": {}}]}, "the number of a routed arm"),
        ({"changes": [{"at": 2, "knobs": {"temperature": 0}}]}, "temperature must be"),
        (
            {"changes": [{"at": 2, "knobs": {"overrides": [{"adapter": "math"}]}}]},
            "'kind' is missing",
        ),
        ({"sampling": {"max_new_tokens": 0}}, "max_new_tokens must be"),
        ({"sampling": {"beams": 4}}, "'beams' is not known"),
    ],
)
def test_a_malformed_entry_is_refused_by_name(
    listed: Callable[..., Path], change: dict[str, Any], told: str
) -> None:
    with pytest.raises(RecordingError, match=told) as caught:
        read_recordings(listed(PLAIN | change))
    assert "recordings.json[0]" in caught.value.message


def test_names_come_once(listed: Callable[..., Path]) -> None:
    with pytest.raises(RecordingError, match="id 'plain' comes twice"):
        read_recordings(listed(PLAIN, PLAIN | {"title": "Other"}))


def test_only_what_a_run_depends_on_is_in_its_settings(listed: Callable[..., Path]) -> None:
    words = {"title": "T", "look_at": "L", "experts": [None, None], "answer": "code"}
    same, other = read_recordings(
        listed(PLAIN | words, PLAIN | {"id": "b", "sampling": {"max_new_tokens": 13}})
    )
    (plain,) = read_recordings(listed(PLAIN))
    assert same.settings == plain.settings
    assert other.settings != plain.settings


# ---------------------------------------------------------------- recording


def test_a_run_is_what_the_engine_makes_of_the_prompt(model: XLoraModel, plain: Recording) -> None:
    run = Stage(model, tiny_tokenizer(), model_id="tiny").record(plain)
    with Engine(model, tiny_tokenizer(), model_id="tiny") as engine:
        expected = engine.run(plain.messages, plain.arms, plain.sampling)
    assert run.header.run_id == "plain"
    assert run.header.adapter_hashes == expected.header.adapter_hashes
    assert run.header.prompt_text == expected.header.prompt_text
    assert run.tracks[0].token_ids.tolist() == expected.tracks[0].token_ids.tolist()
    assert np.allclose(run.scalings(0), expected.scalings(0), atol=1e-3)
    assert run.tracks[0].finish_reason == "length"


def test_knobs_are_turned_at_the_very_tokens(
    model: XLoraModel, listed: Callable[..., Path]
) -> None:
    (recording,) = read_recordings(listed(TURNED))
    run = Stage(model, tiny_tokenizer(), model_id="tiny").record(recording)
    assert run.arm_labels == ["routed", "merged", "routed#2", "expert:code"]
    n_prompt = run.tracks[0].n_prompt
    assert run.tracks[0].knob_changes() == [0, n_prompt + 1, n_prompt + 7]
    assert run.tracks[2].knob_changes() == [0, n_prompt + 3]
    assert run.tracks[0].knobs(n_prompt) == RoutingKnobs(top_k=2)
    assert run.tracks[0].knobs(n_prompt + 1) == RoutingKnobs(global_weight=0.0)
    last = run.tracks[0].n_tokens - 1
    assert run.tracks[0].knobs(last) == recording.changes[2].knobs
    assert not run.scalings(0, effective=True)[n_prompt + 1 : n_prompt + 7].any()


def test_a_second_run_is_the_same_but_for_the_time(
    model: XLoraModel, listed: Callable[..., Path]
) -> None:
    recordings = read_recordings(listed(PLAIN, TURNED))
    stage = Stage(model, tiny_tokenizer(), model_id="tiny")
    first = [stage.record(recording) for recording in recordings]
    # In the other order, and on another stage: nothing is left over from the run before.
    other = Stage(model, tiny_tokenizer(), model_id="tiny")
    second = [other.record(recording) for recording in reversed(recordings)][::-1]
    for one, two in zip(first, second, strict=True):
        assert without_times(one) == without_times(two)


def test_a_model_that_cannot_share_steps_is_recorded_in_turns(
    model: XLoraModel, listed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "open_rows", lambda *_, **__: None)
    (recording,) = read_recordings(listed(TURNED))
    run = Stage(model, tiny_tokenizer(), model_id="tiny").record(recording)
    n_prompt = run.tracks[0].n_prompt
    assert run.tracks[0].knob_changes() == [0, n_prompt + 1, n_prompt + 7]
    assert run.tracks[0].n_guessed == 0


def test_an_answer_that_ends_before_its_knobs_are_turned_is_refused(
    model: XLoraModel, listed: Callable[..., Path]
) -> None:
    late = PLAIN | {"changes": [{"at": 40, "knobs": {}}]}
    (recording,) = read_recordings(listed(late))
    with pytest.raises(RecordingError, match="ended before token 40"):
        Stage(model, tiny_tokenizer(), model_id="tiny").record(recording)


# ---------------------------------------------------------------- the command


@pytest.fixture
def home(
    tmp_path: Path, model: XLoraModel, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """Stands in for the demo; returns the command's arguments, in folders of this test."""
    model.save_pretrained(tmp_path / "checkpoint")

    def loaded(*_: object, **__: object) -> tuple[XLoraModel, Any]:
        return model, tiny_tokenizer()

    monkeypatch.setattr(command, "load_model", loaded)

    def arguments(*more: str) -> list[str]:
        folders = {"--out": "runs", "--list": "recordings.json", "--checkpoint": "checkpoint"}
        return [part for k, v in folders.items() for part in (k, str(tmp_path / v))] + [*more]

    return arguments


def test_the_command_records_what_is_missing_and_keeps_the_rest(
    tmp_path: Path,
    home: Callable[..., list[str]],
    listed: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    listed(PLAIN, TURNED)
    assert command.main(home("--only", "plain")) == 0
    assert "turned" not in capsys.readouterr().out
    written = (tmp_path / "runs" / "plain.safetensors").read_bytes()
    assert command.main(home()) == 0
    assert "plain: kept" in capsys.readouterr().out
    assert (tmp_path / "runs" / "plain.safetensors").read_bytes() == written
    page = (tmp_path / "runs" / "README.md").read_text()
    assert "with 2 prompts" in page
    assert "[Turned](turned.safetensors)" in page
    assert "routed (top-k 2; turned at 1, 7), merged, routed#2 (turned at 3), expert:code" in page
    assert command.main(home("--force", "--only", "plain")) == 0
    assert (tmp_path / "runs" / "plain.safetensors").read_bytes() != written  # another time


def test_words_are_edited_without_recording_anew(
    tmp_path: Path,
    home: Callable[..., list[str]],
    listed: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    listed(PLAIN, TURNED)
    assert command.main(home()) == 0
    listed(PLAIN | {"look_at": "Look | here."})
    assert command.main(home()) == 0
    assert "plain: kept" in capsys.readouterr().out
    assert "Look \\| here." in (tmp_path / "runs" / "README.md").read_text()
    assert list(json.loads((tmp_path / "runs" / "index.json").read_text())) == ["plain"]


def test_the_check_needs_no_model_and_names_what_is_wrong(
    tmp_path: Path,
    home: Callable[..., list[str]],
    listed: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = PLAIN | {"experts": [None, None]}
    listed(entry)
    assert command.main(home()) == 0
    monkeypatch.delattr(command, "load_model")
    assert command.main(home("--check")) == 0
    assert "all leads as expected" in capsys.readouterr().out
    listed(entry | {"answer": "nobody-of-this-name"}, TURNED)
    (tmp_path / "runs" / "old.safetensors").write_bytes(b"")
    assert command.main(home("--check")) == 1
    told = capsys.readouterr().out
    assert "turned: not recorded" in told
    assert "old.safetensors: no recording has this name" in told
    assert "expected nobody-of-this-name, which leads 0% of 12 tokens" in told


def test_one_that_fails_leaves_the_others_alone(
    tmp_path: Path,
    home: Callable[..., list[str]],
    listed: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    listed(
        PLAIN | {"id": "bad", "title": "Bad", "arms": [{"kind": "expert", "adapter": "x"}]}, PLAIN
    )
    assert command.main(home()) == 2
    told = capsys.readouterr().err
    assert "bad: there is no expert 'x'" in told
    assert "not recorded: bad" in told
    assert (tmp_path / "runs" / "plain.safetensors").is_file()


def test_a_stale_run_stays_out_of_the_page_and_the_check_says_so(
    tmp_path: Path,
    home: Callable[..., list[str]],
    listed: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    listed(PLAIN, TURNED)
    assert command.main(home()) == 0
    messages = [{"role": "user", "content": "the lazy dog\n\nthe quick fox"}]
    listed(PLAIN | {"messages": messages}, TURNED)
    assert command.main(home("--only", "turned")) == 0
    page = (tmp_path / "runs" / "README.md").read_text()
    assert "with 1 prompts" in page
    assert "plain.safetensors" not in page
    assert command.main(home("--check")) == 1
    assert "plain: recorded with other settings" in capsys.readouterr().out


def test_where_nothing_can_be_recorded_there_is_no_page(
    tmp_path: Path, home: Callable[..., list[str]], listed: Callable[..., Path]
) -> None:
    listed(PLAIN | {"arms": [{"kind": "expert", "adapter": "x"}]})
    assert command.main(home()) == 2
    assert not (tmp_path / "runs").exists()


def test_an_unknown_id_is_refused(
    home: Callable[..., list[str]],
    listed: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    listed(PLAIN)
    assert command.main(home("--only", "plane")) == 2
    assert "there is no recording 'plane'\nhint: there are plain" in capsys.readouterr().err


# ---------------------------------------------------------------- the shelf


def test_a_run_is_out_of_date_by_model_settings_or_file(tmp_path: Path, plain: Recording) -> None:
    run = make_run(run_id="plain")
    shelf = Shelf(tmp_path / "runs", "model-1")
    assert shelf.fault(plain) == "not recorded"
    shelf.put(plain, run)
    again = Shelf(tmp_path / "runs", "model-1")
    assert again.fault(plain) is None
    assert again.run(plain).header == run.header
    assert again.fault(replace(plain, settings="other")) == "recorded with other settings"
    assert Shelf(tmp_path / "runs", "model-2").fault(plain) == "recorded from another model"
    make_run(run_id="plain", seed=1).save(again.path(plain))
    assert again.fault(plain) == "the file is not the one that was recorded"
    make_run(run_id="other").save(again.path(plain))
    with pytest.raises(RecordingError, match="holds the run 'other'"):
        again.run(plain)


@pytest.mark.parametrize("text", ["{", "[]", '{"plain": {"sha256": ""}}'])
def test_a_malformed_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(RecordingError, match=r"index\.json") as caught:
        Shelf(tmp_path, "model")
    assert "recorded anew" in caught.value.hint


def test_a_checkpoint_is_known_by_its_weights_and_settings(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "a.safetensors").write_bytes(b"1")
    (tmp_path / "xlora.json").write_bytes(b"2")
    before = checkpoint_fingerprint(tmp_path)
    (tmp_path / "training.json").write_bytes(b"{}")
    assert checkpoint_fingerprint(tmp_path) == before
    (tmp_path / "adapters" / "a.safetensors").write_bytes(b"3")
    after = checkpoint_fingerprint(tmp_path)
    (tmp_path / "xlora.json").write_bytes(b"4")
    assert len({before, after, checkpoint_fingerprint(tmp_path)}) == 3
    with pytest.raises(RecordingError, match="holds no checkpoint"):
        checkpoint_fingerprint(tmp_path / "nowhere")
