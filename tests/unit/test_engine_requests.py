"""Requests: queue, positions, cancel, failures, refusals, the end of an engine."""

from __future__ import annotations

import atexit
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.pacer import Pacer
from tests.tiny_chat import tiny_chat_xlora, tiny_tokenizer
from xlora_core.config import Arm, RoutingKnobs, SamplingParams
from xlora_core.engine import Engine, Failed, Finished, Queued, TokenEvent, scheduler
from xlora_core.engine.engine import stop_token_ids
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
def engine(model: XLoraModel) -> Iterator[Engine]:
    """An engine of one request at a time, whose reads a pacer can hold."""
    with Engine(model, TOKENIZER, max_queue=2, max_active=1, batched=False) as engine:
        yield engine


@pytest.fixture
def pacer(model: XLoraModel, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> Iterator[Pacer]:
    pacer = Pacer(model, monkeypatch)
    yield pacer
    pacer.release()


# -------------------------------------------------------------------- the queue


def test_requests_are_served_in_order_and_know_their_place(engine: Engine, pacer: Pacer) -> None:
    first = engine.submit(PROMPT, sampling=SHORT)
    pacer.hold()
    second, third = (engine.submit(PROMPT, sampling=SHORT) for _ in range(2))
    assert [h.position for h in (first, second, third)] == [0, 1, 2]
    assert [h.state for h in (first, second, third)] == ["prefill", "queued", "queued"]
    assert engine.n_queued == 2
    pacer.step(3)  # the first request's three reads; the second stands before its first
    assert [h.position for h in (first, second, third)] == [0, 0, 1]
    assert [h.state for h in (first, second, third)] == ["done", "prefill", "queued"]
    pacer.release()
    third.wait(PATIENCE)
    positions = [e.position for e in third.events() if isinstance(e, Queued)]
    assert positions == [2, 1]
    assert first.position == second.position == third.position == 0


def test_a_full_queue_refuses_and_keeps_what_waits(engine: Engine, pacer: Pacer) -> None:
    running = engine.submit(PROMPT, sampling=SHORT)
    pacer.hold()
    waiting = [engine.submit(PROMPT, sampling=SHORT) for _ in range(2)]
    with pytest.raises(QueueFullError, match="the queue is full: 2 requests are waiting") as caught:
        engine.submit(PROMPT)
    assert "try again when one of them has finished" in caught.value.hint
    pacer.release()
    assert [h.wait(PATIENCE).tracks[0].finish_reason for h in [running, *waiting]] == ["length"] * 3


def test_many_threads_may_submit(model: XLoraModel) -> None:
    barrier = threading.Barrier(6)
    runs = {}

    def ask(number: int) -> None:
        barrier.wait(PATIENCE)
        runs[number] = engine.run(f"fox {number}", sampling=SHORT)

    with Engine(model, TOKENIZER, max_queue=6) as engine:
        threads = [threading.Thread(target=ask, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    assert {n: run.header.prompt_text for n, run in runs.items()} == {
        n: f"fox {n}" for n in range(6)
    }
    assert len({run.header.run_id for run in runs.values()}) == 6


# -------------------------------------------------------------------- cancel


def test_cancel_while_queued(engine: Engine, pacer: Pacer) -> None:
    engine.submit(PROMPT, sampling=SHORT)
    pacer.hold()
    waiting, behind = (engine.submit(PROMPT, sampling=SHORT) for _ in range(2))
    waiting.cancel()
    assert waiting.state == "cancelled"
    assert waiting.position == 0
    assert behind.position == 1
    assert list(waiting.events()) == [Queued(position=1)]
    with pytest.raises(EngineError, match="ended before it started, there is no run"):
        waiting.wait(PATIENCE)
    pacer.release()
    assert behind.wait(PATIENCE).tracks[0].finish_reason == "length"


def test_cancel_while_decoding_takes_effect_within_a_token(engine: Engine, pacer: Pacer) -> None:
    handle = engine.submit(PROMPT, [Arm.routed(), Arm.merged()], LONG)
    pacer.hold()
    pacer.step(2 + 2)  # both prompts, then a token each
    assert handle.state == "decode"
    handle.cancel()
    n_before = pacer.n_reads
    pacer.release()
    run = handle.wait(PATIENCE)
    assert handle.state == "cancelled"
    assert handle.error is None
    assert pacer.n_reads <= n_before + 2  # the token that both arms are at
    for track in run.tracks:
        assert track.finish_reason == "cancelled"
        assert N_PROMPT + 2 <= len(track.token_ids) <= N_PROMPT + 3
    assert run.tracks[0].n_routed == len(run.tracks[0].token_ids)  # the last token has its row
    last = list(handle.events())[-1]
    assert isinstance(last, Finished)
    assert engine.run(PROMPT, sampling=SHORT).tracks[0].finish_reason == "length"


def test_cancel_while_the_prompt_is_read(
    engine: Engine, pacer: Pacer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 2)
    handle = engine.submit("the quick brown fox " * 3, [Arm.routed(), Arm.base()], LONG)
    pacer.hold()
    pacer.step()
    handle.cancel()
    pacer.release()
    run = handle.wait(PATIENCE)
    assert handle.state == "cancelled"
    assert [len(track.token_ids) for track in run.tracks] == [2, 2]
    assert run.tracks[0].n_routed == 2


def test_closing_a_stream_cancels(engine: Engine, pacer: Pacer) -> None:
    pacer.release()
    with engine.stream(PROMPT, sampling=LONG) as stream:
        next(event for event in stream if isinstance(event, TokenEvent))
    stream.handle.wait(PATIENCE)
    assert stream.handle.state == "cancelled"


def test_leaving_a_loop_over_a_stream_cancels(engine: Engine, pacer: Pacer) -> None:
    stream = engine.stream(PROMPT, sampling=LONG)
    handle = stream.handle
    pacer.hold()
    for event in stream:
        if isinstance(event, Queued):
            break
    del stream, event
    gc.collect()
    pacer.release()
    handle.wait(PATIENCE)
    assert handle.state == "cancelled"


def test_a_stream_that_is_dropped_waits_for_no_lock(engine: Engine, pacer: Pacer) -> None:
    """The collector drops objects wherever it runs, also where another thread holds all locks."""
    running = engine.submit(PROMPT, sampling=SHORT)
    pacer.hold()
    stream = engine.stream(PROMPT, sampling=SHORT)
    handle = stream.handle
    dropped = threading.Thread(target=stream.__del__)
    with engine._changed, handle._request._changed:
        dropped.start()
        dropped.join(PATIENCE)
        assert not dropped.is_alive()
    pacer.release()
    assert running.wait(PATIENCE).tracks[0].finish_reason == "length"
    with pytest.raises(EngineError, match="ended before it started"):
        handle.wait(PATIENCE)
    assert handle.state == "cancelled"


def test_watching_the_events_of_a_handle_cancels_nothing(engine: Engine) -> None:
    handle = engine.submit(PROMPT, sampling=SHORT)
    next(iter(handle.events()))
    assert handle.wait(PATIENCE).tracks[0].finish_reason == "length"
    assert list(handle.events()) == list(handle.events())


def test_cancel_after_the_end_changes_nothing(engine: Engine) -> None:
    handle = engine.submit(PROMPT, sampling=SHORT)
    handle.wait(PATIENCE)
    handle.cancel()
    assert handle.state == "done"


# -------------------------------------------------------------------- failures


def failing_at(read: int, error: BaseException) -> Callable[[int], None]:
    def before_read(number: int) -> None:
        if number == read:
            raise error

    return before_read


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("boom"), "the request failed inside the engine: RuntimeError: boom"),
        (MemoryError(), "the model ran out of memory with this request"),
        (torch.OutOfMemoryError("CUDA"), "the model ran out of memory with this request"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "the model ran out of memory with this request",
        ),
    ],
)
def test_a_failing_request_fails_alone(
    engine: Engine,
    model: XLoraModel,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    message: str,
) -> None:
    pacer = Pacer(model, monkeypatch, failing_at(2, error))
    failing = engine.submit(PROMPT, [Arm.routed(), Arm.base()], LONG)
    pacer.hold()
    behind = engine.submit(PROMPT, sampling=SHORT)
    pacer.release()
    with pytest.raises(EngineError, match=message) as caught:
        failing.wait(PATIENCE)
    assert caught.value.hint
    assert caught.value.__cause__ is error
    assert failing.state == "failed"
    assert failing.error is caught.value
    assert list(failing.events())[-1] == Failed(error=caught.value)
    assert [track.finish_reason for track in failing.run.tracks] == ["error", "error"]
    assert len(failing.run.tracks[0].token_ids) == N_PROMPT + 1  # what was written stays
    assert behind.wait(PATIENCE).tracks[0].finish_reason == "length"


def test_a_stream_raises_the_failure(
    engine: Engine, model: XLoraModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pacer = Pacer(model, monkeypatch, failing_at(0, RuntimeError("boom")))
    stream = engine.stream(PROMPT)
    pacer.release()
    with pytest.raises(EngineError, match="RuntimeError: boom"):
        list(stream)


def test_logits_that_are_not_finite_name_the_arm(
    engine: Engine, model: XLoraModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = model.lora_layers[-1].lora_B
    monkeypatch.setattr(weight, "data", torch.full_like(weight, torch.nan))
    handle = engine.submit(PROMPT, [Arm.base(), Arm.expert("math")], SHORT)
    with pytest.raises(EngineError) as caught:
        handle.wait(PATIENCE)
    assert (
        f"arm 1 (expert:math), after {N_PROMPT} tokens: the model's logits are not finite"
        in str(caught.value)
    )
    assert engine.run(PROMPT, [Arm.base()], SHORT).tracks[0].finish_reason == "length"


def test_router_logits_that_are_not_finite(
    engine: Engine, model: XLoraModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = next(model.classifier.parameters())
    monkeypatch.setattr(weight, "data", torch.full_like(weight, torch.inf))
    with pytest.raises(EngineError, match="the router's logits are not finite"):
        engine.run(PROMPT, sampling=SHORT)


# -------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ([], "a request needs at least one arm"),
        ([Arm.expert("poetry")], "no expert 'poetry' in this model\nhint: .*math, code, verse"),
        (
            [Arm.routed(RoutingKnobs(top_k=4))],
            r"top_k must be None or a whole number from 1 to 3 \(the number of adapters\), got 4",
        ),
    ],
)
def test_arms_that_do_not_fit_are_refused_before_queueing(
    engine: Engine, arms: list[Arm], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        engine.submit(PROMPT, arms)
    assert engine.n_queued == 0


def test_prompts_are_refused_before_queueing(engine: Engine, model: XLoraModel) -> None:
    with pytest.raises(PromptError, match="the prompt is empty"):
        engine.submit("")
    with pytest.raises(PromptError, match=r"has \d+ tokens, the model's context window is 128"):
        engine.submit("fox " * 200)
    assert engine.n_queued == 0


def test_knobs_that_do_not_fit_are_refused(engine: Engine, pacer: Pacer) -> None:
    handle = engine.submit(PROMPT, [Arm.routed(), Arm.base()], SHORT)
    with pytest.raises(ConfigError, match="from 1 to 3"):
        handle.set_knobs(0, RoutingKnobs(top_k=4))
    with pytest.raises(ConfigError, match="arm 1 is 'base'; only a routed arm has knobs"):
        handle.set_knobs(1, RoutingKnobs())
    with pytest.raises(ConfigError, match="has 2 arms, numbered from 0; there is no arm 2"):
        handle.set_knobs(2, RoutingKnobs())
    with pytest.raises(ConfigError, match="there is no arm -1"):
        handle.set_knobs(-1, RoutingKnobs())


@pytest.mark.parametrize("bound", [0, -1, True, 1.5])
def test_a_queue_without_room_is_refused(model: XLoraModel, bound: object) -> None:
    with pytest.raises(ConfigError, match="max_queue must be a whole number >= 1"):
        Engine(model, TOKENIZER, max_queue=bound)  # type: ignore[arg-type]  # wrong on purpose


def test_there_is_no_run_before_the_start(engine: Engine, pacer: Pacer) -> None:
    engine.submit(PROMPT)
    pacer.hold()
    waiting = engine.submit(PROMPT)
    with pytest.raises(EngineError, match="has not started, there is no run yet"):
        _ = waiting.run
    with pytest.raises(TimeoutError, match="has not ended within 0 seconds"):
        waiting.wait(0)


# -------------------------------------------------------------------- the end of an engine


def test_closing_fails_what_runs_and_what_waits(
    model: XLoraModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, TOKENIZER, max_active=1, batched=False)

    def close_at_the_second_read(number: int) -> None:
        if number == 1:
            engine.close()

    pacer = Pacer(model, monkeypatch, close_at_the_second_read)
    running, waiting = (engine.submit(PROMPT, sampling=LONG) for _ in range(2))
    pacer.release()
    with pytest.raises(EngineError, match="the engine was closed while this request ran"):
        running.wait(PATIENCE)
    with pytest.raises(EngineError, match="the engine was closed before this request was served"):
        waiting.wait(PATIENCE)
    assert len(running.run.tracks[0].token_ids) == N_PROMPT + 2  # what was written stays
    with pytest.raises(EngineError, match="the engine is closed"):
        engine.submit(PROMPT)
    engine.close()  # closing twice is no error


def test_an_engine_that_nobody_closed_closes_when_the_process_ends(
    model: XLoraModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    engine = Engine(model, TOKENIZER)
    handle = engine.submit(PROMPT, sampling=LONG)
    (close,) = at_exit
    close()
    assert handle.state in ("done", "failed")
    assert not engine._thread.is_alive()


def test_a_model_in_training_mode_answers_without_dropout(tmp_path: Path) -> None:
    model = tiny_chat_xlora(tmp_path, xlora_depth=2, xlora_size=16, xlora_dropout_p=0.9)
    with Engine(model.train(), TOKENIZER) as engine:
        runs = [engine.run(PROMPT, sampling=SHORT) for _ in range(2)]
    # Which tokens share a read may differ, and with it the last bits.
    assert np.allclose(runs[0].scalings(), runs[1].scalings(), atol=1e-3)


def test_stop_tokens_come_from_the_first_place_that_names_any() -> None:
    class Named:
        def __init__(self, ids: object) -> None:
            self.eos_token_id = ids

    class Model:
        def __init__(self, generation: object, config: object) -> None:
            self.generation_config = Named(generation)
            self.config = Named(config)

    assert stop_token_ids(Model([1, 2], 3), Named(4)) == {1, 2}
    assert stop_token_ids(Model(None, 3), Named(4)) == {3}
    assert stop_token_ids(Model(None, None), Named(4)) == {4}
    assert stop_token_ids(Model(None, None), Named(None)) == frozenset()
