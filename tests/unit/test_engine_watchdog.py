"""The watch over the engine's thread, with a clock and a condition that the test moves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from xlora_core.engine.watchdog import Watchdog
from xlora_core.errors import EngineError


class Script:
    """A clock, and a condition of one thread: what happens while it waits is written down."""

    def __init__(self, *happenings: Callable[[], object]) -> None:
        self.now = 100.0
        self.waits: list[float | None] = []
        self.n_notified = 0
        self._happenings = list(happenings)

    def clock(self) -> float:
        return self.now

    def __enter__(self) -> None: ...

    def __exit__(self, *exception: object) -> None: ...

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout)
        self._happenings.pop(0)()
        return True

    def notify_all(self) -> None:
        self.n_notified += 1

    def then(self, *happenings: Callable[[], object]) -> None:
        self._happenings += happenings


class Scene:
    """A watchdog whose watch runs in the test's own thread."""

    def __init__(self, timeout: float = 10) -> None:
        self.script = Script()
        self.failures: list[EngineError] = []
        self.dog = Watchdog(
            timeout, self.failures.append, clock=self.script.clock, condition=self.script
        )
        self._step = ExitStack()

    def begin(self) -> None:
        self._step.enter_context(self.dog.step())

    def end(self) -> None:
        self._step.close()

    def pass_time(self, seconds: float) -> None:
        self.script.now += seconds

    def finish(self) -> None:
        self.dog._end()

    def watch(self, *happenings: Callable[[], object]) -> list[float | None]:
        self.script.then(*happenings)
        self.dog._watch()
        return self.script.waits


def test_it_sleeps_while_nothing_runs() -> None:
    scene = Scene()
    assert scene.watch(lambda: None, scene.finish) == [None, None]
    assert scene.failures == []


def test_a_step_that_does_not_return_is_told_once() -> None:
    scene = Scene(timeout=10)
    waits = scene.watch(scene.begin, lambda: scene.pass_time(10))
    assert waits == [None, 10]
    [failure] = scene.failures
    assert "has not returned for 10 seconds" in failure.message
    assert "step_timeout" in failure.hint
    scene.end()
    assert not scene.dog._end(), "the watch is over"


def test_it_wakes_once_per_timeout_however_many_steps_there_are() -> None:
    scene = Scene(timeout=10)

    def many_steps() -> None:
        for _ in range(9):
            scene.begin()
            scene.pass_time(1)
            scene.end()
        scene.begin()
        scene.pass_time(1)

    waits = scene.watch(scene.begin, lambda: (scene.end(), many_steps()), scene.finish)
    # After the first ten seconds the step under way is one second old.
    assert waits == [None, 10, 9]
    assert scene.script.n_notified == 1 + 1  # out of the sleep, and at the end


def test_a_wake_up_before_time_is_no_failure() -> None:
    scene = Scene(timeout=10)
    waits = scene.watch(
        scene.begin, lambda: scene.pass_time(4), lambda: scene.pass_time(5.5), scene.finish
    )
    assert waits == [None, 10, 6, 0.5]
    assert scene.failures == []


def test_between_steps_nothing_is_overdue() -> None:
    scene = Scene(timeout=10)
    waits = scene.watch(
        scene.begin,
        lambda: (scene.end(), scene.pass_time(1_000)),
        scene.begin,
        lambda: scene.pass_time(10),
    )
    assert waits == [None, 10, None, 10]
    assert len(scene.failures) == 1


def test_a_thread_that_dies_is_told_at_once(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()
    dog = Watchdog(None, scene.failures.append)

    def die() -> None:
        with dog.step():
            raise SystemExit(3)

    dog.run(die)
    assert "the engine's thread died" in caplog.messages
    [failure] = scene.failures
    assert failure.message == "the engine's thread died: SystemExit: 3"
    assert "new Engine" in failure.hint


def test_a_thread_that_returns_is_no_failure() -> None:
    failures: list[EngineError] = []
    dog = Watchdog(60, failures.append)
    dog.run(lambda: None)
    dog._thread.join(timeout=10)
    assert not dog._thread.is_alive()
    assert failures == []


def test_a_real_thread_that_is_stuck_is_told_and_its_late_death_is_not() -> None:
    failures: list[EngineError] = []
    told = threading.Event()

    def on_failure(error: EngineError) -> None:
        failures.append(error)
        told.set()

    dog = Watchdog(0.01, on_failure)

    def be_stuck() -> None:
        with dog.step():
            assert told.wait(timeout=30)
        raise RuntimeError("late")

    dog.run(be_stuck)
    [failure] = failures
    assert "has not returned for 0.01 seconds" in failure.message
