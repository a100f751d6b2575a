"""What an engine does for many: turns, memory, expected waits, limits, and a watch over itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from tests.pacer import Pacer
from tests.tiny_chat import tiny_chat_xlora, tiny_tokenizer
from xlora_core import Arm, EngineLimits, Run, SamplingParams
from xlora_core.engine import (
    ArmFinished,
    Engine,
    Failed,
    Queued,
    RequestHandle,
    TokenEvent,
    active,
)
from xlora_core.engine.admission import Admission
from xlora_core.engine.row_runner import RowRunner
from xlora_core.errors import ConfigError, EngineError, PromptError, QueueFullError
from xlora_core.model import XLoraModel

TOKENIZER = tiny_tokenizer()
PROMPT = "the quick fox"
N_PROMPT = len(TOKENIZER(PROMPT)["input_ids"])
SHORT = SamplingParams(max_new_tokens=3)
LONG = SamplingParams(max_new_tokens=60)
PATIENCE = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> XLoraModel:
    return tiny_chat_xlora(tmp_path_factory.mktemp("experts"))


@pytest.fixture
def pacer(model: XLoraModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pacer]:
    pacer = Pacer(model, monkeypatch)
    yield pacer
    pacer.release()


def one_at_a_time(model: XLoraModel, **options: object) -> Engine:
    """Returns an engine of one request at a time, whose reads a pacer can hold."""
    return Engine(model, TOKENIZER, batched=False, **{"max_active": 1, **options})


class Clock:
    """The scheduler's clock, which the test moves."""

    def __init__(self, engine: Engine) -> None:
        self.now = 0.0
        engine._scheduler._clock = lambda: self.now


# -------------------------------------------------------------------- turns


def test_clients_take_turns(model: XLoraModel, pacer: Pacer) -> None:
    with one_at_a_time(model) as engine:
        running = engine.submit(PROMPT, sampling=SHORT)
        pacer.hold()
        many = [engine.submit(PROMPT, sampling=SHORT, client="a") for _ in range(3)]
        other = engine.submit(PROMPT, sampling=SHORT, client="b")
        nameless = engine.submit(PROMPT, sampling=SHORT)
        handles = [*many, other, nameless]
        assert [handle.position for handle in handles] == [1, 4, 5, 2, 3]
        pacer.release()
        for handle in [running, *handles]:
            handle.wait(PATIENCE)
    told = [[e.position for e in h.events() if isinstance(e, Queued)] for h in handles]
    # The second of a client's requests moves back when another client comes.
    assert told == [[1], [2, 3, 4, 3, 2, 1], [3, 4, 5, 4, 3, 2, 1], [2, 1], [3, 2, 1]]


def test_one_client_cannot_fill_the_queue(model: XLoraModel, pacer: Pacer) -> None:
    with one_at_a_time(model, max_queue=4) as engine:
        engine.submit(PROMPT, sampling=SHORT)
        pacer.hold()
        for _ in range(2):
            engine.submit(PROMPT, sampling=SHORT, client="a")
        with pytest.raises(QueueFullError, match="2 requests of client 'a' are waiting already"):
            engine.submit(PROMPT, client="a")
        handle = engine.submit(PROMPT, sampling=SHORT, client="b")
        pacer.release()
        assert handle.wait(PATIENCE).tracks[0].finish_reason == "length"


# -------------------------------------------------------------------- memory


def need_of(engine: Engine, *arms: Arm, max_new_tokens: int = 3) -> int:
    """Returns the bytes that a request takes when nobody else runs."""
    handle = engine.submit(PROMPT, arms, SamplingParams(max_new_tokens=max_new_tokens))
    handle.wait(PATIENCE)
    scheduler = engine._scheduler
    books: Admission = scheduler._books
    return books._needed(scheduler._need(handle._request), beside=False)


@pytest.mark.parametrize("batched", [True, False])
def test_a_request_that_never_fits_is_refused_at_once(model: XLoraModel, batched: bool) -> None:
    with Engine(model, TOKENIZER, batched=batched) as engine:
        n_bytes = need_of(engine, Arm.routed())
    with Engine(model, TOKENIZER, batched=batched, memory_bytes=n_bytes) as engine:
        assert engine.run(PROMPT, sampling=SHORT).tracks[0].finish_reason == "length"
        with pytest.raises(ConfigError, match=r"may need .* MiB of memory \(\d rows of") as caught:
            engine.submit(PROMPT, [Arm.routed(), Arm.base()], SHORT)
        assert "memory_bytes" in caught.value.hint
        assert engine.n_queued == 0


def test_a_request_waits_for_memory_though_there_are_places(
    model: XLoraModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = [Arm.routed(), Arm.merged()]
    with one_at_a_time(model) as engine:
        large = need_of(engine, *arms, max_new_tokens=30)
    pacer = Pacer(model, monkeypatch)
    with one_at_a_time(model, max_active=3, memory_bytes=int(large * 1.5)) as engine:
        first = engine.submit(PROMPT, arms, SamplingParams(max_new_tokens=30))
        pacer.hold()
        second = engine.submit(PROMPT, arms, SamplingParams(max_new_tokens=30))
        small = engine.submit(PROMPT, [Arm.base()], SHORT)
        pacer.step(2 + 2)  # a round of two arms, prompt and token; then others are let in
        assert [h.state for h in (first, second, small)] == ["decode", "queued", "prefill"]
        assert second.position == 1
        pacer.release()
        for handle in (first, second, small):
            assert handle.wait(PATIENCE).tracks[0].finish_reason == "length"
        assert engine._scheduler._books.used_bytes == 0


def out_of_memory(*_: object, **__: object) -> None:
    raise MemoryError


def test_a_cache_that_cannot_grow_fails_the_newcomer_alone(
    model: XLoraModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(model, TOKENIZER) as engine:
        runner = engine._scheduler._runner
        assert isinstance(runner, RowRunner)
        cache = runner._reader.cache
        running = engine.submit(PROMPT, sampling=LONG)
        next(event for event in running.events() if isinstance(event, TokenEvent))
        with monkeypatch.context() as patch:
            patch.setattr(cache, "grow", out_of_memory)
            with pytest.raises(EngineError, match="ran out of memory with this request") as caught:
                engine.run(PROMPT, sampling=SHORT)
        assert "compare fewer arms" in caught.value.hint
        assert running.wait(PATIENCE).tracks[0].finish_reason == "length"
        assert engine.run(PROMPT, sampling=SHORT).tracks[0].finish_reason == "length"
        assert (engine._scheduler._books.used_bytes, cache.n_rows) == (0, 0)


def test_a_record_that_cannot_be_opened_fails_its_request_alone(
    model: XLoraModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(model, TOKENIZER) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(active, "TrackRecorder", out_of_memory)
            with pytest.raises(EngineError, match="ran out of memory with this request"):
                engine.run(PROMPT, sampling=SHORT)
        assert engine.run(PROMPT, sampling=SHORT).tracks[0].finish_reason == "length"


def test_memory_must_be_a_number_of_bytes(model: XLoraModel) -> None:
    with pytest.raises(ConfigError) as caught:
        Engine(model, TOKENIZER, memory_bytes=0, step_timeout=0, max_active=-1)
    assert caught.value.faults == [
        "max_active must be a whole number >= 1, got -1",
        "memory_bytes must be a whole number >= 1, got 0",
        "step_timeout must be None or a number > 0, got 0",
    ]


# -------------------------------------------------------------------- expected waits


def test_the_expected_wait_follows_what_steps_take(model: XLoraModel, pacer: Pacer) -> None:
    with one_at_a_time(model) as engine:
        clock = Clock(engine)
        first = engine.submit(PROMPT, sampling=SamplingParams(max_new_tokens=10))
        pacer.hold()
        second = engine.submit(PROMPT, sampling=SamplingParams(max_new_tokens=20))
        assert (first.expected_seconds, second.expected_seconds) == (0, None)
        clock.now += N_PROMPT * 0.5  # what reading the prompt takes
        pacer.step()
        assert second.expected_seconds is None
        clock.now += 2
        pacer.step()
        # Two of ten tokens are written, another is on its way.
        assert second.expected_seconds == pytest.approx(8 * 2)
        third = engine.submit(PROMPT, sampling=SHORT)
        wait = 8 * 2 + N_PROMPT * 0.5 + 20 * 2
        assert third.expected_seconds == pytest.approx(wait)
        [told] = third._request._events
        assert told == Queued(position=2, expected_seconds=pytest.approx(wait))
        second.cancel()
        assert third.expected_seconds == pytest.approx(8 * 2)
        pacer.release()
        third.wait(PATIENCE)
        assert third.expected_seconds == 0


# -------------------------------------------------------------------- limits


def test_requests_beyond_the_limits_are_refused(model: XLoraModel) -> None:
    limits = EngineLimits(max_prompt_tokens=N_PROMPT, max_new_tokens=5, max_arms=2)
    with Engine(model, TOKENIZER, limits=limits) as engine:
        with pytest.raises(PromptError, match=f"tokens, this engine allows {N_PROMPT}"):
            engine.submit(PROMPT * 2, sampling=SHORT)
        with pytest.raises(ConfigError, match="max_new_tokens is 6, this engine allows 5"):
            engine.submit(PROMPT, sampling=SamplingParams(max_new_tokens=6))
        with pytest.raises(ConfigError, match="the request has 3 arms, this engine allows 2"):
            engine.submit(PROMPT, [Arm.base()] * 3, SHORT)
        assert engine.n_queued == 0
        # Who asks for nothing gets what is allowed.
        run = engine.run(PROMPT, [Arm.routed(), Arm.base()])
        assert run.header.sampling.max_new_tokens == 5


def stopped_by_time(handle: RequestHandle) -> Run:
    run = handle.wait(PATIENCE)
    assert handle.state == "done"
    reasons = {e.arm: e.reason for e in handle.events() if isinstance(e, ArmFinished)}
    assert reasons == dict.fromkeys(range(len(run.tracks)), "time")
    assert {track.finish_reason for track in run.tracks} == {"time"}
    assert Run.from_bytes(run.to_bytes()).tracks[0].finish_reason == "time"
    return run


def test_a_request_is_stopped_when_its_time_is_up(model: XLoraModel, pacer: Pacer) -> None:
    with one_at_a_time(model, limits=EngineLimits(max_seconds=10)) as engine:
        clock = Clock(engine)
        handle = engine.submit(PROMPT, [Arm.routed(), Arm.merged()], LONG)
        behind = engine.submit(PROMPT, sampling=SHORT)
        pacer.hold()
        pacer.step(2 + 2)
        clock.now = 9.9
        pacer.step(2)
        clock.now = 10
        pacer.release()
        run = stopped_by_time(handle)
        assert [track.n_tokens for track in run.tracks] == [N_PROMPT + 4] * 2
        assert run.tracks[0].n_routed == run.tracks[0].n_tokens  # the last token has its row
        # The time of who waited begins with its start.
        assert behind.wait(PATIENCE).tracks[0].finish_reason == "length"


@pytest.mark.parametrize("batched", [True, False])
def test_time_may_be_up_before_the_prompt_is_read(model: XLoraModel, batched: bool) -> None:
    limits = EngineLimits(max_seconds=1e-9)
    with Engine(model, TOKENIZER, batched=batched, limits=limits) as engine:
        run = stopped_by_time(engine.submit(PROMPT, [Arm.routed(), Arm.base()], LONG))
        assert [track.n_tokens for track in run.tracks] == [0, 0]


# -------------------------------------------------------------------- threads


def test_an_idle_engine_keeps_no_thread_that_computes(model: XLoraModel) -> None:
    with Engine(model, TOKENIZER) as engine:
        served = []
        for _ in range(2):
            engine.run(PROMPT, sampling=SHORT)
            served.append(engine._serving)
            served[-1].join(PATIENCE)
            assert not served[-1].is_alive()
        assert served[0] is not served[1]
        assert engine._thread.is_alive()


def test_an_engine_serves_by_itself_where_no_thread_is_left(
    model: XLoraModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with Engine(model, TOKENIZER) as engine:
        before = engine.run(PROMPT, sampling=SHORT).text()
        monkeypatch.setattr(threading.Thread, "start", fail)
        assert engine.run(PROMPT, sampling=SHORT).text() == before
        assert engine._serving is engine._thread


# -------------------------------------------------------------------- the watch


def test_a_step_that_does_not_return_is_an_answer_for_everybody(
    model: XLoraModel, pacer: Pacer
) -> None:
    engine = one_at_a_time(model, step_timeout=3600)
    watchdog = engine._watchdog
    running = engine.submit(PROMPT, sampling=LONG)
    pacer.hold()
    waiting = engine.submit(PROMPT, sampling=SHORT)
    with watchdog._changed:
        watchdog._clock = lambda: time.monotonic() + 3600
        watchdog._changed.notify_all()
    for handle in (running, waiting):
        with pytest.raises(EngineError, match="has not returned for 3600 seconds") as caught:
            handle.wait(PATIENCE)
        assert "new Engine" in caught.value.hint
        assert handle.state == "failed"
    with pytest.raises(EngineError, match="has not returned"):
        engine.submit(PROMPT)
    engine.close()  # does not wait for the thread that is stuck
    n_events = len(list(running.events()))
    pacer.release()
    engine._thread.join(PATIENCE)
    assert not engine._thread.is_alive()
    # What the late step brought is told to nobody.
    assert len(list(running.events())) == n_events
    assert isinstance(list(running.events())[-1], Failed)
    model.edit_guard.check()


def test_a_thread_that_dies_is_an_answer_for_everybody(
    model: XLoraModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class DeadError(BaseException):
        """What nothing in the engine catches."""

    def die(number: int) -> None:
        if number == 1:
            raise DeadError("gone")

    pacer = Pacer(model, monkeypatch, die)
    engine = one_at_a_time(model)
    running = engine.submit(PROMPT, sampling=LONG)
    waiting = engine.submit(PROMPT, sampling=SHORT)
    pacer.release()
    for handle in (running, waiting):
        with pytest.raises(EngineError, match="the engine's thread died: DeadError: gone"):
            handle.wait(PATIENCE)
    with pytest.raises(EngineError, match="the engine's thread died"):
        engine.submit(PROMPT)
    assert running.run.tracks[0].n_tokens == N_PROMPT + 1  # what was written stays
    engine.close()
    model.edit_guard.check()
