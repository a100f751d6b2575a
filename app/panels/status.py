"""One line on where a run stands."""

from __future__ import annotations

import math

from app import frames, session
from app.panels.messages import plain
from xlora_core import Run

_ENDINGS = {
    "stop": "ended by itself",
    "length": "reached the limit of new tokens",
    "cancelled": "stopped",
    "error": "failed",
}
_HITS = (
    "**Prefetch hits.** While the model reads one token, it already works out the adapters' "
    "scalings for the next one, on a guess of what that will be. "
    "A right guess is a hit, and the token costs one run over the model's weights instead of two. "
    "A wrong one is thrown away and worked out again. The text is the same either way; hits only "
    "make it faster."
)


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
        wait = _about(show.handle.expected_seconds)
        return f":orange-badge[Queued] {others} before yours{wait}; it starts by itself."
    if run is None or show.request is None or state == "prefill":
        return ":blue-badge[Reading] the prompt"
    written = len(run.tracks[0].token_ids) - run.tracks[0].n_prompt
    limit = show.request.sampling.max_new_tokens
    return f":blue-badge[Writing] token {written} of at most {limit}{_speed(run)}{_hits(run)}"


def explanation(run: Run | None) -> str | None:
    """Returns what the line's figures mean, as Markdown; None if they speak for themselves."""
    return _HITS if run is not None and frames.guesses(run)[0] else None


def _finished(show: session.Show, run: Run | None) -> str:
    if run is None:
        return ":gray-badge[Stopped] before it started"
    badge = ":green-badge[Finished]"
    if show.source == "file":
        badge = f":gray-badge[From a file] {plain(run.header.model_id)}:"
    track = run.tracks[0]
    written = len(track.token_ids) - track.n_prompt
    return f"{badge} {written} new tokens, {_ending(run)}{_speed(run)}{_hits(run)}"


def _ending(run: Run) -> str:
    reason = run.tracks[0].finish_reason or ""
    if reason == "time":
        return f"stopped after {frames.seconds(run, 0):.0f} s (time limit)"
    return _ENDINGS.get(reason, "not finished")


def _about(seconds: float | None) -> str:
    """Returns an expected wait in words; nothing while it is not known."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f", about {max(math.ceil(seconds), 1)} s"
    return f", about {seconds / 60:.0f} minutes"


def _speed(run: Run) -> str:
    """Returns the speed of the first arm; the arms share the engine."""
    speed = frames.tokens_per_second(run, 0)
    n_arms = len(run.tracks)
    shared = f" ({n_arms} arms side by side)" if n_arms > 1 else ""
    return f" · {speed:.1f} tokens/s{shared}" if speed else ""


def _hits(run: Run) -> str:
    n_guessed, n_hit = frames.guesses(run)
    return f" · prefetch hits {n_hit / n_guessed:.0%}" if n_guessed else ""
