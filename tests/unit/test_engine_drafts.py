"""Drafts that may go wrong: none of them reaches what is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sample_data.record.recordings import Recording
from sample_data.record.stage import Stage
from tests.decoders import decoder_xlora, longrope_decoder
from tests.tiny_chat import tiny_chat_xlora, tiny_tokenizer
from xlora_core.config import Arm, SamplingParams
from xlora_core.engine import Engine
from xlora_core.engine.overlap import OverlapMode
from xlora_core.model import XLoraModel
from xlora_core.recording import Run, Track
from xlora_core.rows import RowBatch, RowReader, opening
from xlora_core.rows.llama import LlamaRows
from xlora_core.rows.modules import ModuleRows

TOKENIZER = tiny_tokenizer()
PROMPT = "QUICKFOXES"  # a token per letter, all of them in the tiny decoders' vocabulary
N_NEW = 12
GREEDY = SamplingParams(max_new_tokens=N_NEW)


def in_turn(model: XLoraModel, prompt: str) -> Track:
    """Returns what the model's own passes write."""
    with Engine(model, TOKENIZER, batched=False) as engine:
        return engine.run(prompt, sampling=GREEDY).tracks[0]


def opened(model: XLoraModel, kind: type[RowReader], monkeypatch: pytest.MonkeyPatch) -> RowReader:
    """Returns a reader of this kind, which engines use from here on."""
    with monkeypatch.context() as patch:
        if kind is not LlamaRows:
            patch.setattr(LlamaRows, "fits", lambda _: False)
        reader = opening.open_rows(model)
    assert type(reader) is kind
    monkeypatch.setattr(opening, "open_rows", lambda *_, **__: reader)
    return reader


def run(model: XLoraModel, *arms: Arm) -> Run:
    with Engine(model, TOKENIZER, overlap="on") as engine:
        return engine.run(PROMPT, arms, GREEDY)


def assert_same(track: Track, expected: Track) -> None:
    assert track.token_ids.tolist() == expected.token_ids.tolist()
    np.testing.assert_allclose(track.logprob, expected.logprob, atol=1e-4)
    np.testing.assert_allclose(track.base_logprob, expected.base_logprob, atol=1e-4)


# -------------------------------------------------------------------- positions


@pytest.mark.parametrize("overlap", ["on", "auto"])
def test_no_draft_moves_a_token_over_the_length_at_which_positions_change(
    tmp_path: Path, overlap: OverlapMode
) -> None:
    """Its frequencies are those of a text that ends with it, not of one a draft longer."""
    model = decoder_xlora(tmp_path, longrope_decoder())  # they change at 16
    expected = in_turn(model, PROMPT)
    assert len(PROMPT) < 16 < len(expected.token_ids)
    with Engine(model, TOKENIZER, overlap=overlap) as engine:
        track = engine.run(PROMPT, sampling=GREEDY).tracks[0]
    assert track.n_guessed > 0
    assert_same(track, expected)


def test_recordings_have_no_such_drafts_either(tmp_path: Path) -> None:
    model = decoder_xlora(tmp_path, longrope_decoder())
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    recording = Recording(
        id="long",
        title="Long",
        look_at="the lengths",
        messages=({"role": "user", "content": PROMPT},),
        experts=(None,),
        answer=None,
        arms=(Arm.routed(),),
        sampling=GREEDY,
        changes=(),
        settings="0" * 16,
    )
    run = Stage(model, tokenizer, model_id="tiny").record(recording)
    assert run.tracks[0].n_guessed > 0
    assert_same(run.tracks[0], in_turn(model, PROMPT))


# -------------------------------------------------------------------- NaN


@pytest.mark.parametrize("kind", [LlamaRows, ModuleRows])
@pytest.mark.parametrize("arms", [(Arm.routed(),), (Arm.routed(), Arm.merged())], ids=len)
def test_a_token_that_cannot_be_read_harms_nobody_as_a_draft(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[RowReader],
    arms: tuple[Arm, ...],
) -> None:
    """Its hidden states are NaN, and so are those of the token before, which it is masked for."""
    model = tiny_chat_xlora(tmp_path)
    reader = opened(model, kind, monkeypatch)
    tokens_read: set[int] = set()
    read = reader.read

    def watched(batch: RowBatch) -> torch.Tensor:
        tokens_read.update(batch.token_ids.tolist())
        return read(batch)

    monkeypatch.setattr(reader, "read", watched)
    expected = run(model, *arms)
    written = {token for track in expected.tracks for token in track.token_ids.tolist()}
    drafted = sorted(tokens_read - written)
    assert drafted
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.weight is not head.weight
    with torch.no_grad():
        embedding.weight[drafted] = torch.nan
    tracks = run(model, *arms).tracks
    for track, sound in zip(tracks, expected.tracks, strict=True):
        assert_same(track, sound)


def test_drafts_without_finite_logits_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base model guesses then, as where there are no drafts."""
    model = tiny_chat_xlora(tmp_path)
    reader = opened(model, LlamaRows, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(reader, "records_single_tokens", True)
        expected = run(model, Arm.routed()).tracks[0]
    assert run(model, Arm.routed()).tracks[0].n_hit != expected.n_hit  # as drafts guess
    sizes: list[int] = []
    read, logits = reader.read, reader.logits

    def watched(batch: RowBatch) -> torch.Tensor:
        sizes[:] = [segment.n for segment in batch.segments]
        return read(batch)

    def overflown(hidden: torch.Tensor) -> torch.Tensor:
        values = logits(hidden).clone()
        if sizes == [2, 1]:  # a token and its draft; a guess
            values[1] = torch.inf
        elif sizes == [1, 1]:  # a draft; a token that was not guessed
            values[0] = torch.nan
        return values

    monkeypatch.setattr(reader, "read", watched)
    monkeypatch.setattr(reader, "logits", overflown)
    track = run(model, Arm.routed()).tracks[0]
    assert_same(track, expected)
    assert (track.n_guessed, track.n_hit) == (expected.n_guessed, expected.n_hit)
