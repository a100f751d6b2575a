"""The line on where a run stands."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from app import session
from app.panels import status
from tests.app import runs
from xlora_core import Run, SamplingParams


@dataclass
class Handle:
    state: str = "queued"
    position: int = 1
    expected_seconds: float | None = None


def live(run: Run | None = None, **handle: object) -> str:
    request = session.Request("salt", (), SamplingParams(max_new_tokens=9))
    show = session.Show("salt", "engine", request=request, handle=Handle(**handle))
    return status.line(show, run)


def finished(run: Run) -> str:
    return status.line(session.Show("salt", "engine", run=run), run)


def with_guesses(run: Run, n_guessed: int, n_hit: int) -> Run:
    track = replace(run.tracks[0], n_guessed=n_guessed, n_hit=n_hit)
    return replace(run, tracks=[track, *run.tracks[1:]])


@pytest.mark.parametrize(
    ("position", "seconds", "words"),
    [
        (1, None, "1 request before yours; it starts"),
        (2, None, "2 requests before yours; it starts"),
        (2, 11.2, "2 requests before yours, about 12 s; it starts"),
        (1, 0.0, "1 request before yours, about 1 s; it starts"),
        (1, 89.9, "about 90 s"),
        (9, 400.0, "9 requests before yours, about 7 minutes; it starts"),
    ],
)
def test_waiting(position, seconds, words) -> None:
    assert words in live(position=position, expected_seconds=seconds)


def test_hits_are_a_share_of_the_guesses() -> None:
    run = with_guesses(runs.run(finish=None), 4, 3)
    assert live(run, state="decode").endswith("prefetch hits 75%")
    assert finished(with_guesses(runs.run(), 3, 2)).endswith("prefetch hits 67%")
    assert finished(with_guesses(runs.run(), 3, 0)).endswith("prefetch hits 0%")
    assert "prefetch" not in finished(runs.run())


def test_the_figures_are_explained_where_there_are_any() -> None:
    assert status.explanation(None) is None
    assert status.explanation(runs.run()) is None
    text = status.explanation(with_guesses(runs.run(), 3, 2))
    assert text is not None
    assert "The text is the same either way" in text


@pytest.mark.parametrize(
    ("finish", "words"),
    [
        ("stop", "3 new tokens, ended by itself"),
        ("length", "3 new tokens, reached the limit of new tokens"),
        ("time", "3 new tokens, stopped after 2 s (time limit)"),
        ("cancelled", "3 new tokens, stopped"),
        ("error", "3 new tokens, failed"),
    ],
)
def test_endings(finish, words) -> None:
    run = runs.run(finish=finish)
    track = replace(run.tracks[0], seconds=run.tracks[0].seconds * 6)
    assert words in finished(replace(run, tracks=[track]))


def test_arms_side_by_side() -> None:
    assert "tokens/s (2 arms side by side)" in finished(runs.run(other=[" x"]))
