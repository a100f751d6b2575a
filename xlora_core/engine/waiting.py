"""How long a queued request will wait, from what steps took lately and what is left to do."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

# How much the latest measurement counts.
_WEIGHT = 1 / 8


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is left of a request.

    Attributes:
        n_to_read: Tokens of the prompt that have not been read.
        n_to_write: Most tokens that it may still write.
        most_seconds: Seconds after which it is stopped in any case; None: never.
    """

    n_to_read: int
    n_to_write: int
    most_seconds: float | None = None


class WaitEstimate:
    """Seconds until a queued request starts.

    All running requests share their steps, and write a token each in most of them. A waiting
    request starts when one of those that run has ended. How much of what it may write a request
    really writes is taken from the requests that have ended, and all of it before the first.

    The engine's thread measures; any thread may ask.
    """

    def __init__(self) -> None:
        self._step_seconds: float | None = None
        self._tokens_per_step: float | None = None
        self._seconds_per_prompt_token: float | None = None
        self._written_share: float | None = None

    def stepped(self, seconds: float, tokens_per_request: float = 1) -> None:
        """Notes what a decode step took, and how many tokens it brought each request."""
        self._step_seconds = _mean(self._step_seconds, seconds)
        self._tokens_per_step = _mean(self._tokens_per_step, tokens_per_request)

    def read(self, n_tokens: int, seconds: float) -> None:
        """Notes what reading part of a prompt took."""
        if n_tokens:
            measured = seconds / n_tokens
            self._seconds_per_prompt_token = _mean(self._seconds_per_prompt_token, measured)

    def ended(self, n_written: int, most: int) -> None:
        """Notes how many tokens an answer that ended by itself has, of how many it might have."""
        self._written_share = _mean(self._written_share, n_written / most)

    def expected_seconds(
        self, active: Sequence[Work], waiting: Sequence[Work], *, n_free: int = 0
    ) -> list[float | None]:
        """Returns when each waiting request will start.

        Further back is never sooner, and while running requests write, and steps take what they
        took, the times only fall.

        Args:
            active: What is left of the requests that run.
            waiting: The same of those that wait, in the order of service.
            n_free: How many more may run now.

        Returns:
            Seconds, one per waiting request; 0 for those that may start at once, None as long as
            no step has been measured.
        """
        waits: list[float | None] = [0.0] * min(n_free, len(waiting))
        ends = [self._seconds(work) for work in active]
        # When each place is free again; none are known if one is not.
        places = [0.0] * n_free + [end for end in ends if end is not None]
        if None in ends:
            places = []
        heapq.heapify(places)
        for n, work in enumerate(waiting):
            if n >= n_free:
                waits.append(places[0] if places else None)
            seconds = self._seconds(work)
            if seconds is None:
                places = []
            elif places:
                # It takes the place that is free first, and holds it for so long.
                heapq.heapreplace(places, places[0] + seconds)
        return waits

    def _seconds(self, work: Work) -> float | None:
        """Returns how long a request will run; None if that is not known yet."""
        seconds = 0.0
        if work.n_to_read:
            if self._seconds_per_prompt_token is None:
                return None
            seconds += work.n_to_read * self._seconds_per_prompt_token
        if work.n_to_write:
            if self._step_seconds is None or not self._tokens_per_step:
                return None
            share = 1.0 if self._written_share is None else self._written_share
            n_steps = work.n_to_write * share / self._tokens_per_step
            seconds += n_steps * self._step_seconds
        return seconds if work.most_seconds is None else min(seconds, work.most_seconds)


def _mean(known: float | None, measured: float) -> float:
    """Returns a mean in which the latest measurements count most."""
    return measured if known is None else known + _WEIGHT * (measured - known)
