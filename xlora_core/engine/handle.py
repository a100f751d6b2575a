"""What the submitter of a request holds: to watch it, steer it and stop it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from xlora_core.config import Arm, RoutingKnobs
from xlora_core.engine.events import Event, Failed
from xlora_core.engine.requests import Request, State
from xlora_core.errors import XLoraError

if TYPE_CHECKING:
    from xlora_core.recording import Run


class RequestHandle:
    """A submitted request, for the one who submitted it. Safe to use from any thread.

    Made by ``Engine.submit``.
    """

    def __init__(
        self,
        request: Request,
        *,
        position: Callable[[Request], int],
        expected_seconds: Callable[[Request], float | None],
        cancel: Callable[[Request], None],
        check_knobs: Callable[[RoutingKnobs], RoutingKnobs],
    ) -> None:
        self._request = request
        self._position = position
        self._expected_seconds = expected_seconds
        self._cancel = cancel
        self._check_knobs = check_knobs

    @property
    def position(self) -> int:
        """Place in the queue, 1 is the next to run; 0 if the request runs or has ended."""
        return self._position(self._request)

    @property
    def expected_seconds(self) -> float | None:
        """Seconds until it starts, from what steps took lately and what those ahead may write.

        None if nothing has been measured yet; 0 if the request runs or has ended.
        """
        return self._expected_seconds(self._request)

    @property
    def state(self) -> State:
        """How far it is: queued, prefill, decode; or at its end: done, cancelled, failed."""
        return self._request.state

    @property
    def error(self) -> XLoraError | None:
        """Why the request failed; None otherwise."""
        return self._request.error

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms, with their starting knobs."""
        return self._request.arms

    @property
    def n_prompt_tokens(self) -> int:
        """Tokens of the prompt, chat template included."""
        return len(self._request.prompt.token_ids)

    @property
    def version(self) -> int:
        """Grows with every change: compare it to know whether ``run`` has news."""
        return self._request.version

    @property
    def run(self) -> Run:
        """A snapshot of the record, at any time after the start.

        Raises:
            EngineError: If the request has not started, or was cancelled before it did.
        """
        return self._request.run()

    def cancel(self) -> None:
        """Stops the request within one token; a queued one leaves the queue at once."""
        self._cancel(self._request)

    def drop(self) -> None:
        """Stops the request as ``cancel`` does, at the engine's next step; never waits."""
        self._request.drop()

    def set_knobs(self, arm: int, knobs: RoutingKnobs) -> bool:
        """Sets a routed arm's knobs from the next token that the model reads.

        Returns:
            False if the request has ended, so that nothing was left to change.

        Raises:
            ConfigError: If the knobs do not fit the model, or the arm is not a routed one.
        """
        return self._request.set_knobs(arm, self._check_knobs(knobs))

    def wait(self, timeout: float | None = None) -> Run:
        """Waits for the end and returns the run; also of a request cancelled after its start.

        Args:
            timeout: Seconds; None waits for as long as it takes.

        Raises:
            XLoraError: The request's own error, if it failed.
            EngineError: If it was cancelled while it was queued, so that there is no run.
            TimeoutError: If it has not ended in time; it goes on.
        """
        if not self._request.wait(timeout):
            raise TimeoutError(f"the request has not ended within {timeout} seconds")
        error = self._request.error
        if error is not None:
            raise error
        return self._request.run()

    def events(self) -> Iterator[Event]:
        """Yields all events from the first on, until the request has ended.

        Several watchers may iterate; stopping to iterate cancels nothing.
        """
        return self._request.events()


class EventStream(Iterator[Event]):
    """The events of a request that lives as long as somebody listens.

    Closing the stream, leaving its ``with`` block or dropping it cancels the request. A failure
    is raised instead of yielded.

    Attributes:
        handle: The request, to steer it meanwhile.
    """

    def __init__(self, handle: RequestHandle) -> None:
        self.handle = handle
        self._events = handle.events()

    def __iter__(self) -> EventStream:
        return self

    def __next__(self) -> Event:
        event = next(self._events)
        if isinstance(event, Failed):
            raise event.error
        return event

    def close(self) -> None:
        """Cancels the request, if it has not ended."""
        self.handle.cancel()

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.handle.drop()
