"""One request: its state, shared by the engine's thread and any number of watchers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from xlora_core.config import Arm, RoutingKnobs, SamplingParams
from xlora_core.engine.events import Event, Failed, Finished, Queued, Started
from xlora_core.engine.prompts import EncodedPrompt
from xlora_core.errors import ConfigError, EngineError, XLoraError

if TYPE_CHECKING:
    from xlora_core.recording import Run, RunHeader, RunRecorder

State = Literal["queued", "prefill", "decode", "done", "cancelled", "failed"]
_ENDED = ("done", "cancelled", "failed")


class Request:
    """What a request asks for, and how far it is. Every method may be called by any thread.

    Args:
        header: Identity of the run to be recorded.
        prompt: The encoded prompt.
        arms: The arms; routed ones carry their starting knobs.
        sampling: How tokens are picked.
        with_base_logprob: Whether to record log-probabilities under the base model.
    """

    def __init__(
        self,
        *,
        header: RunHeader,
        prompt: EncodedPrompt,
        arms: tuple[Arm, ...],
        sampling: SamplingParams,
        with_base_logprob: bool,
    ) -> None:
        self.header = header
        self.prompt = prompt
        self.arms = arms
        self.sampling = sampling
        self.with_base_logprob = with_base_logprob
        self._changed = threading.Condition()
        self._state: State = "queued"
        self._events: list[Event] = []
        self._knobs = [arm.knobs for arm in arms]
        self._recorder: RunRecorder | None = None
        self._error: XLoraError | None = None
        self._cancelled = False
        self._dropped = False
        self._n_changes = 0

    def limit(self, context_length: int) -> int:
        """Returns the most tokens of an arm, prompt and answer, in a window of so many."""
        return min(len(self.prompt.token_ids) + self.sampling.max_new_tokens, context_length)

    # ---------------------------------------------------------------- watching

    @property
    def state(self) -> State:
        """How far the request is."""
        with self._changed:
            return self._state

    @property
    def error(self) -> XLoraError | None:
        """Why the request failed; None otherwise."""
        with self._changed:
            return self._error

    @property
    def version(self) -> int:
        """Grows with every change of state and every recorded row."""
        with self._changed:
            recorded = self._recorder.version if self._recorder is not None else 0
            return self._n_changes + recorded

    @property
    def cancelled(self) -> bool:
        """Whether someone asked to stop, or nobody listens any more."""
        with self._changed:
            return self._cancelled or self._dropped

    @property
    def ended(self) -> bool:
        """Whether the request is done, cancelled or failed."""
        with self._changed:
            return self._state in _ENDED

    def wait(self, timeout: float | None) -> bool:
        """Waits for the end; returns False if ``timeout`` seconds passed before it."""
        with self._changed:
            return self._changed.wait_for(lambda: self._state in _ENDED, timeout)

    def events(self) -> Iterator[Event]:
        """Yields every event from the first on, waiting for the next until the request ended."""
        n_seen = 0
        while new := self._events_after(n_seen):
            yield from new
            n_seen += len(new)

    def _events_after(self, n_seen: int) -> list[Event]:
        with self._changed:
            self._changed.wait_for(lambda: len(self._events) > n_seen or self._state in _ENDED)
            return self._events[n_seen:]

    def knobs(self, arm: int) -> RoutingKnobs | None:
        """Returns the knobs that the next token of an arm is read with."""
        with self._changed:
            return self._knobs[arm]

    # ---------------------------------------------------------------- steering

    def set_knobs(self, arm: int, knobs: RoutingKnobs) -> bool:
        """Sets an arm's knobs from its next token on; False if the request has ended.

        Raises:
            ConfigError: If there is no such arm, or it is not a routed one.
        """
        if not 0 <= arm < len(self.arms):
            raise ConfigError(
                f"the request has {len(self.arms)} arms, numbered from 0; there is no arm {arm}"
            )
        if self.arms[arm].kind != "routed":
            raise ConfigError(f"arm {arm} is {self.arms[arm].label!r}; only a routed arm has knobs")
        with self._changed:
            if self._state in _ENDED:
                return False
            self._knobs[arm] = knobs
            return True

    def ask_to_cancel(self) -> None:
        """Asks the engine to stop before the next token."""
        with self._changed:
            self._cancelled = True

    def drop(self) -> None:
        """Asks the same for somebody who is gone: takes no lock.

        The collector may drop an object anywhere, also where its thread holds a lock that another
        one, which holds this lock, waits for.
        """
        self._dropped = True

    # ---------------------------------------------------------------- the engine's side

    def emit(self, event: Event) -> None:
        """Publishes an event; one that comes after the end is dropped."""
        with self._changed:
            if self._events and isinstance(self._events[-1], Finished | Failed):
                return
            self._events.append(event)
            self._n_changes += 1
            self._changed.notify_all()

    def announce_position(self, position: int, expected_seconds: float | None) -> None:
        """Publishes the position in the queue, if it is news, and the wait expected there."""
        with self._changed:
            last = self._events[-1] if self._events else None
            if isinstance(last, Queued) and last.position == position:
                return
            if self._state == "queued":
                self.emit(Queued(position=position, expected_seconds=expected_seconds))

    def leave_queue(self) -> tuple[Arm, ...]:
        """Returns the arms to start with: knobs set while the request waited are in them."""
        with self._changed:
            self._state = "prefill"
            self.arms = tuple(
                replace(arm, knobs=knobs) for arm, knobs in zip(self.arms, self._knobs, strict=True)
            )
            return self.arms

    def start(self, recorder: RunRecorder) -> None:
        """Opens the record."""
        with self._changed:
            self._recorder = recorder
            self.emit(Started(arms=self.arms, n_prompt_tokens=len(self.prompt.token_ids)))

    def enter_decode(self) -> None:
        """Says that all arms have read the prompt."""
        with self._changed:
            if self._state in _ENDED:
                return
            self._state = "decode"
            self._n_changes += 1
            self._changed.notify_all()

    def finish(self) -> None:
        """Ends the request as done, or as cancelled if that was asked for."""
        with self._changed:
            self._end("cancelled" if self.cancelled else "done")

    def finish_as_cancelled(self) -> None:
        """Ends the request as cancelled; one that never started has no run."""
        with self._changed:
            self._cancelled = True
            self._end("cancelled")

    def fail(self, error: XLoraError) -> None:
        """Ends the request as failed."""
        with self._changed:
            if self._state not in _ENDED:
                self._error = error
                self._state = "failed"
                self.emit(Failed(error=error))

    def _end(self, state: State) -> None:
        if self._state in _ENDED:
            return
        self._state = state
        if self._recorder is not None:
            self.emit(Finished(run=self._recorder.snapshot()))
        self._n_changes += 1
        self._changed.notify_all()

    def run(self) -> Run:
        """Returns what is recorded so far.

        Raises:
            EngineError: If the request has not started, or was cancelled before it did.
        """
        with self._changed:
            recorder, state = self._recorder, self._state
        if recorder is not None:
            return recorder.snapshot()
        if state not in _ENDED:
            raise EngineError(
                "the request has not started, there is no run yet",
                hint="wait for its Started event, or call wait()",
            )
        raise EngineError("the request ended before it started, there is no run")
