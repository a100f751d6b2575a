"""Which of the active requests reads next: prompts in parts, between steps of all the others."""

from __future__ import annotations

from typing import Any

from xlora_core.engine.active import ActiveRequest
from xlora_core.engine.requests import Request
from xlora_core.engine.runner import Runner
from xlora_core.errors import XLoraError

# Tokens of prompts that one run over the weights reads. Fewer while others decode: they stand
# still meanwhile.
PREFILL_TOKENS = 512
PREFILL_TOKENS_BESIDE_OTHERS = 128


class Scheduler:
    """Works on the active requests, a round at a time. Used by the engine's thread alone.

    Args:
        runner: Runs the model.
        tokenizer: The tokenizer.
        stop_ids: Tokens that end an answer.
        context_length: Most tokens, prompt and answer together.
    """

    def __init__(
        self, runner: Runner, tokenizer: Any, *, stop_ids: frozenset[int], context_length: int
    ) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._context_length = context_length
        self._actives: list[ActiveRequest] = []

    @property
    def n_active(self) -> int:
        """Number of requests at work."""
        return len(self._actives)

    def admit(self, request: Request) -> None:
        """Takes a request out of the queue; one that cannot start ends as failed."""
        active = ActiveRequest(
            request,
            self._tokenizer,
            stop_ids=self._stop_ids,
            context_length=self._context_length,
        )
        self._actives.append(active)
        try:
            self._runner.admit(active)
        except Exception as error:  # a request that does not fit fails alone
            self._fail(active, error)

    def round(self) -> None:
        """Reads a part of one prompt, and a token for every arm of all other requests."""
        for active in self._actives:
            if active.request.cancelled:
                active.cancel()
        self._prefill()
        ready = [active for active in self._actives if active.reads_tokens]
        if ready:
            for active, error in self._runner.decode(ready):
                self._fail(active, error)
        for active in [active for active in self._actives if active.ended]:
            self._retire(active)
            active.finish()

    def fail_all(self, error: XLoraError) -> None:
        """Ends all active requests as failed."""
        for active in list(self._actives):
            self._fail(active, error)

    def _prefill(self) -> None:
        waiting = [active for active in self._actives if not active.reads_tokens]
        if not waiting:
            return
        active = waiting[0]
        alone = len(self._actives) == 1
        try:
            self._runner.prefill(active, PREFILL_TOKENS if alone else PREFILL_TOKENS_BESIDE_OTHERS)
        except Exception as error:  # concerns this request; the others go on
            self._fail(active, error)
            return
        # The next part is another prompt's, if one waits.
        self._actives.remove(active)
        self._actives.append(active)
        if active.reads_tokens:
            active.request.enter_decode()

    def _fail(self, active: ActiveRequest, error: Exception) -> None:
        self._retire(active)
        active.fail(error)

    def _retire(self, active: ActiveRequest) -> None:
        self._actives.remove(active)
        self._runner.release(active)
