"""Which adapter leads in which part of a recorded run, against what the list expects."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sample_data.record import pages
from sample_data.record.errors import RecordingError
from sample_data.record.recordings import Recording
from sample_data.record.spans import span_leads
from tests.recorded_runs import make_run
from xlora_core import Arm, RoutingKnobs
from xlora_core.recording import Run


def led(run: Run, *leaders: str | None) -> Run:
    """Returns the run with one adapter far ahead at every token, in every module; None: a tie."""
    (track,) = run.tracks
    logits = np.zeros_like(track.router_logits)
    for row, name in enumerate(leaders):
        if name is not None:
            logits[row, :, run.header.adapter_names.index(name)] = 9
    return replace(run, tracks=[replace(track, router_logits=logits)])


PIECES = ["<user>", "the quick", " fox", "\n", "\n", "the", " sum", "<end>", "a", "b", "<stop>"]
TEXT = "the quick fox\n\nthe sum"


def recorded(**changes: Any) -> tuple[Run, Recording]:
    run = make_run(
        8, 3, pieces=PIECES, finish="stop", present=((True,) * 3,) * 2, layerwise=True, **changes
    )
    recording = Recording(
        id="x",
        title="X",
        look_at="Look.",
        messages=({"role": "user", "content": f" {TEXT}\n"},),
        experts=("math", "code"),
        answer="verse",
        arms=(Arm.routed(),),
        changes=(),
        sampling=run.header.sampling,
        settings="",
    )
    return run, recording


def test_parts_are_the_paragraphs_and_the_answer_without_its_stop() -> None:
    run, recording = recorded()
    run = led(run, "code", "math", "math", *["verse"] * 2, "math", "code", *["verse"] * 3, "math")
    first, second, answer = span_leads(run, recording)
    assert (first.text, second.text, answer.text) == ("the quick fox", "the sum", "ab")
    assert (first.leader, first.n_tokens, first.expected) == ("math", 2, "math")
    assert second.shares == {"math": 0.5, "code": 0.5, "verse": 0.0}
    assert (answer.leader, answer.shares["verse"], answer.is_miss) == ("verse", 1.0, False)
    assert first.sharing < 1.1


def test_an_answer_is_cut_where_knobs_were_turned() -> None:
    run, recording = recorded(knobs=[*[RoutingKnobs()] * 9, *[RoutingKnobs(global_weight=0)] * 2])
    leads = span_leads(run, recording)
    assert [lead.name for lead in leads[2:]] == ["answer from 0", "answer from 1"]
    assert leads[3].leader is None
    assert leads[3].is_miss
    assert leads[3].sharing == 0


def test_a_run_of_another_prompt_is_refused() -> None:
    run, recording = recorded()
    other = replace(recording, messages=({"role": "user", "content": "the slow fox\n\nx"},))
    with pytest.raises(RecordingError, match="not the one of recordings.json"):
        span_leads(run, other)


def test_every_miss_is_told_with_both_shares() -> None:
    run, recording = recorded()
    run = led(run, None, "code", "math", *[None] * 2, "verse", "verse", None, "math", "verse")
    (told,) = pages.misses(recording, span_leads(run, recording)[1:2])
    assert told == (
        "x, routed, paragraph 2 ('the sum'): expected code, which leads 0% of 2 tokens; verse 100%"
    )
