"""Which of the active requests reads next: prompts in parts, between steps of all the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from xlora_core.engine.active import ActiveRequest
from xlora_core.engine.admission import UNLIMITED, MemoryBudget, Need
from xlora_core.engine.faults import as_xlora_error
from xlora_core.engine.requests import Request
from xlora_core.engine.runner import Runner
from xlora_core.engine.waiting import WaitEstimate, Work
from xlora_core.errors import XLoraError

# Tokens of a prompt that one run over the weights reads, all its arms together. Fewer beside
# other requests: they stand still meanwhile.
PREFILL_TOKENS = 512
PREFILL_TOKENS_BESIDE_OTHERS = 128


class Scheduler:
    """Works on the active requests, a round at a time. Used by one thread at a time, unless said.

    Args:
        runner: Runs the model.
        tokenizer: The tokenizer.
        stop_ids: Tokens that end an answer.
        context_length: Most tokens, prompt and answer together.
        budget: Memory that all active requests may take together.
        max_seconds: Seconds that a request may run; None: as long as it likes.
        whole_prompts: Whether a prompt must be read in one part.
        clock: Seconds that only rise.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Any,
        *,
        stop_ids: frozenset[int],
        context_length: int,
        budget: MemoryBudget = UNLIMITED,
        max_seconds: float | None = None,
        whole_prompts: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._context_length = context_length
        self._books = runner.books(budget)
        self._max_seconds = max_seconds
        self._whole_prompts = whole_prompts
        self._clock = clock
        self._estimate = WaitEstimate()
        self._actives: list[ActiveRequest] = []

    # ---------------------------------------------------------------- for any thread

    @property
    def n_active(self) -> int:
        """Number of requests at work."""
        return len(self._actives)

    @property
    def requests(self) -> list[Request]:
        """The requests at work."""
        return [active.request for active in list(self._actives)]

    def check(self, request: Request) -> None:
        """Checks that a request fits into the memory when nobody else runs.

        Raises:
            ConfigError: If it never will.
        """
        self._books.check(self._need(request))

    def expected_seconds(self, waiting: Sequence[Request], *, n_free: int) -> list[float | None]:
        """Returns when each waiting request will start; see ``WaitEstimate``.

        Args:
            waiting: The requests, in the order of service.
            n_free: How many more may run now.
        """
        now = self._clock()
        left = [active.work(now) for active in list(self._actives)]
        ahead = [
            Work(
                n_to_read=len(request.prompt.token_ids),
                n_to_write=request.limit(self._context_length) - len(request.prompt.token_ids),
                most_seconds=self._max_seconds,
            )
            for request in waiting
        ]
        return self._estimate.expected_seconds(left, ahead, n_free=n_free)

    # ---------------------------------------------------------------- for one thread at a time

    def fits(self, request: Request) -> bool:
        """Whether there is memory for a request beside those at work."""
        need = self._need(request)
        if not self._actives and not self._books.fits(need):
            # A block that was kept for nobody stands in the way of the larger one.
            self._runner.free_cache()
            self._books.forget_block()
        return self._books.fits(need)

    def admit(self, request: Request) -> None:
        """Starts a request that was taken out of the queue; one that cannot start fails."""
        seconds = self._max_seconds
        try:
            active = ActiveRequest(
                request,
                self._tokenizer,
                stop_ids=self._stop_ids,
                context_length=self._context_length,
                deadline=None if seconds is None else self._clock() + seconds,
            )
        except Exception as error:  # its record alone may be too large
            request.fail(as_xlora_error(error))
            return
        self._actives.append(active)
        try:
            self._runner.admit(active)
        except Exception as error:  # a request that does not fit fails alone
            self._fail(active, error)
        else:
            self._books.admit(request, self._need(request))

    def round(self) -> None:
        """Reads a part of one prompt, and a token for every arm of all other requests."""
        now = self._clock()
        for active in self._actives:
            active.stop_if_due(now)
        self._prefill()
        ready = [active for active in self._actives if active.reads_tokens]
        if ready:
            self._decode(ready)
        for active in [active for active in self._actives if active.ended]:
            if active.answered:
                self._estimate.ended(active.n_written, active.limit - len(active.prompt))
            self._retire(active)
            active.finish()

    def close(self, error: XLoraError) -> None:
        """Ends all active requests as failed, and frees what the runner holds."""
        for active in list(self._actives):
            self._fail(active, error)
        self._runner.close()

    def _prefill(self) -> None:
        waiting = [active for active in self._actives if not active.reads_tokens]
        if not waiting:
            return
        active = waiting[0]
        n = PREFILL_TOKENS if len(self._actives) == 1 else PREFILL_TOKENS_BESIDE_OTHERS
        started, n_before = self._clock(), active.n_read
        try:
            self._runner.prefill(active, None if self._whole_prompts else n)
        except Exception as error:  # concerns this request; the others go on
            self._fail(active, error)
            return
        self._estimate.read(active.n_read - n_before, self._clock() - started)
        # The next part is another prompt's, if one waits.
        self._actives = [*(other for other in self._actives if other is not active), active]
        if active.reads_tokens:
            active.request.enter_decode()

    def _decode(self, ready: Sequence[ActiveRequest]) -> None:
        started = self._clock()
        n_before = sum(active.n_written for active in ready)
        failed = self._runner.decode(ready)
        n_new = sum(active.n_written for active in ready) - n_before
        self._estimate.stepped(self._clock() - started, n_new / len(ready))
        for active, error in failed:
            self._fail(active, error)

    def _fail(self, active: ActiveRequest, error: Exception) -> None:
        try:
            self._retire(active)
        finally:  # whatever that runs into, nobody is left to wait
            active.fail(error)

    def _retire(self, active: ActiveRequest) -> None:
        self._actives.remove(active)
        self._books.release(active.request)
        self._runner.release(active)

    def _need(self, request: Request) -> Need:
        return self._runner.need(request, request.limit(self._context_length))
