"""One line on where a run stands."""

from __future__ import annotations

from app import frames, session
from app.panels.messages import plain
from xlora_core import Run

_ENDINGS = {
    "stop": "ended by itself",
    "length": "reached the limit of new tokens",
    "cancelled": "stopped",
    "error": "failed",
}


def line(show: session.Show, run: Run | None) -> str:
    """Returns the line, as Markdown.

    Args:
        show: The run on the screen.
        run: What is recorded of it so far; None before it started.
    """
    if show.handle is None:
        return _finished(show, run)
    state = show.handle.state
    if state == "queued":
        ahead = max(show.handle.position, 1)
        others = "1 request" if ahead == 1 else f"{ahead} requests"
        return f":orange-badge[Queued] {others} before yours; it starts by itself."
    if run is None or show.request is None or state == "prefill":
        return ":blue-badge[Reading] the prompt"
    written = len(run.tracks[0].token_ids) - run.tracks[0].n_prompt
    limit = show.request.sampling.max_new_tokens
    return f":blue-badge[Writing] token {written} of at most {limit}{_speed(run)}"


def _finished(show: session.Show, run: Run | None) -> str:
    if run is None:
        return ":gray-badge[Stopped] before it started"
    badge = ":green-badge[Finished]"
    if show.source == "file":
        badge = f":gray-badge[From a file] {plain(run.header.model_id)}:"
    track = run.tracks[0]
    written = len(track.token_ids) - track.n_prompt
    ending = _ENDINGS.get(track.finish_reason or "", "not finished")
    return f"{badge} {written} new tokens, {ending}{_speed(run)}"


def _speed(run: Run) -> str:
    """Returns the speed of the first arm; the arms take turns on one engine."""
    speed = frames.tokens_per_second(run, 0)
    turns = len(run.tracks)
    shared = f" ({turns} arms take turns)" if turns > 1 else ""
    return f" · {speed:.1f} tokens/s{shared}" if speed else ""
