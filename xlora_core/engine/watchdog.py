"""A watch over the engine's thread: a step that never returns, or a thread that died."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from xlora_core.errors import EngineError

logger = logging.getLogger(__name__)


class Waiter(Protocol):
    """What the watch waits with: a ``threading.Condition``, or a test's stand-in."""

    def __enter__(self) -> object: ...

    def __exit__(self, *exception: object) -> object: ...

    def wait(self, timeout: float | None = None) -> bool:
        """Waits for a notification, or so many seconds."""
        ...

    def notify_all(self) -> None:
        """Wakes whoever waits."""
        ...


class Watchdog:
    """Tells once, from a thread of its own, when the watched thread is stuck or gone.

    It sleeps while nothing runs. While something does it wakes once every ``timeout`` seconds at
    most, so a step costs two looks at the clock and no wake-up.

    Args:
        timeout: Seconds that a step may take; None: as long as it likes.
        on_failure: Called once with what happened, by the watch's thread or the dying one.
        clock: Seconds that only rise.
        condition: What the watch waits with.
    """

    def __init__(
        self,
        timeout: float | None,
        on_failure: Callable[[EngineError], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        condition: Waiter | None = None,
    ) -> None:
        self._timeout = timeout
        self._on_failure = on_failure
        self._clock = clock
        self._changed = condition or threading.Condition()
        self._step_began: float | None = None
        self._asleep = False  # until somebody begins a step
        self._over = False  # nobody is watched any more
        self._thread = threading.Thread(target=self._watch, name="xlora-watchdog", daemon=True)

    def run(self, work: Callable[[], None]) -> None:
        """Does the work of the watched thread, and watches it meanwhile.

        Whatever ends the work other than a return is logged and told as a failure.

        Args:
            work: What the thread is for; its steps run inside ``step``.
        """
        if self._timeout is not None:
            self._thread.start()
        try:
            work()
        except BaseException as error:
            logger.critical("the engine's thread died", exc_info=error)
            if self._end():
                self._on_failure(
                    EngineError(
                        f"the engine's thread died: {type(error).__name__}: {error}",
                        hint="make a new Engine, or start the app again; the log has the traceback",
                    )
                )
        finally:
            self._end()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Watches a step: what happens inside must return in time."""
        with self._changed:
            self._step_began = self._clock()
            if self._asleep:
                self._asleep = False
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._step_began = None

    def _end(self) -> bool:
        """Ends the watch; returns whether it was still on."""
        with self._changed:
            was_on, self._over = not self._over, True
            self._changed.notify_all()
            return was_on

    def _watch(self) -> None:
        """The watch's thread."""
        assert self._timeout is not None  # there is no such thread otherwise
        with self._changed:
            while not self._over:
                began = self._step_began
                if began is None:
                    self._asleep = True
                    self._changed.wait()
                    continue
                left = began + self._timeout - self._clock()
                if left <= 0:
                    self._over = True
                    break
                self._changed.wait(left)
            else:
                return
        self._on_failure(
            EngineError(
                f"the engine's current step has not returned for {self._timeout:g} seconds; it is "
                "taken for stuck",
                hint="make a new Engine, or start the app again; a machine that is really so slow "
                "needs a larger step_timeout",
            )
        )
