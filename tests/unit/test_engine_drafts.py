"""Drafts that may go wrong: none of them reaches what is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sample_data.record.recordings import Recording
from sample_data.record.stage import Stage
from tests.decoders import decoder_xlora, longrope_decoder
from tests.tiny_chat import tiny_tokenizer
from xlora_core.config import Arm, SamplingParams
from xlora_core.engine import Engine
from xlora_core.engine.overlap import OverlapMode
from xlora_core.model import XLoraModel
from xlora_core.recording import Track

TOKENIZER = tiny_tokenizer()
PROMPT = "QUICKFOXES"  # a token per letter, all of them in the tiny decoders' vocabulary
N_NEW = 12
GREEDY = SamplingParams(max_new_tokens=N_NEW)


def in_turn(model: XLoraModel, prompt: str) -> Track:
    """Returns what the model's own passes write."""
    with Engine(model, TOKENIZER, batched=False) as engine:
        return engine.run(prompt, sampling=GREEDY).tracks[0]


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
