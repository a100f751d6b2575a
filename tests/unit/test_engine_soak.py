"""Hundreds of requests from several threads, cancelled and steered at random: nothing is lost.

In float64, so that which requests happen to share a run over the weights changes no choice.
"""

from __future__ import annotations

import gc
import random
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tests.tiny_chat import tiny_chat_xlora, tiny_tokenizer
from xlora_core import Arm, RoutingKnobs, Run, SamplingParams
from xlora_core.engine import (
    Engine,
    Failed,
    Finished,
    Queued,
    RequestHandle,
    Started,
    TokenEvent,
)
from xlora_core.engine.active import ActiveRequest
from xlora_core.engine.row_runner import RowRunner
from xlora_core.errors import EngineError
from xlora_core.model import XLoraModel
from xlora_core.recording import Track

TOKENIZER = tiny_tokenizer()
PATIENCE = 120  # seconds; only a broken engine ever takes as long
N_THREADS = 4
N_BATCHES = 12
BATCH = 6

KNOBS = [RoutingKnobs(top_k=1), RoutingKnobs(temperature=0.3, global_weight=1.5)]
SAMPLED = SamplingParams(max_new_tokens=5, temperature=1.0, seed=3)
ASKED: list[tuple[str, list[Arm], SamplingParams]] = [
    ("the quick", [Arm.routed()], SamplingParams(max_new_tokens=6)),
    ("the quick", [Arm.routed(KNOBS[0])], SamplingParams(max_new_tokens=6)),
    ("the quick brown fox jumps", [Arm.routed(), Arm.merged()], SamplingParams(max_new_tokens=4)),
    ("def add(a, b)", [Arm.base(), Arm.expert("code")], SAMPLED),
    ("def add(a, b)", [Arm.routed(KNOBS[1]), Arm.routed()], SAMPLED),
    ("你好", [Arm.routed(), Arm.base()], SamplingParams(max_new_tokens=1)),
    ("naïve café and more of the same " * 3, [Arm.routed()], SamplingParams(max_new_tokens=3)),
    ("x", [Arm.expert("verse")], SamplingParams(max_new_tokens=8, temperature=0.7, seed=1)),
]


@dataclass(frozen=True)
class Outcome:
    """A request, and what was done to it."""

    asked: int
    handle: RequestHandle
    cancelled: bool
    steered: bool


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> XLoraModel:
    return tiny_chat_xlora(tmp_path_factory.mktemp("experts")).double()


@pytest.fixture(scope="module")
def alone(model: XLoraModel) -> list[Run]:
    """Each request, run when nobody else does."""
    with Engine(model, TOKENIZER, max_active=1) as engine:
        return [engine.run(*asked) for asked in ASKED]


@pytest.fixture(scope="module")
def outcomes(model: XLoraModel) -> list[Outcome]:
    """What became of all requests of all threads; the engine is idle and closed afterwards."""
    # Memory for a few of them only, so that requests also wait for others to end.
    engine = Engine(model, TOKENIZER, max_active=7, max_queue=64, memory_bytes=1_200_000)
    assert isinstance(engine._scheduler._runner, RowRunner)
    outcomes: list[Outcome] = []
    failures: list[BaseException] = []

    def ask(number: int) -> None:
        try:
            for batch in range(N_BATCHES):
                outcomes.extend(one_batch(engine, random.Random(number * 1_000 + batch), number))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(N_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not failures
    check_idle(engine)
    engine.close()
    return outcomes


def one_batch(engine: Engine, rng: random.Random, number: int) -> list[Outcome]:
    """Submits some requests at once, then meddles with each, then waits for all."""
    client = f"client {number}" if number % 2 else None
    batch = []
    for _ in range(BATCH):
        asked = rng.randrange(len(ASKED))
        batch.append((asked, engine.submit(*ASKED[asked], client=client), rng.random()))
    outcomes = []
    for asked, handle, fate in batch:
        cancelled = fate < 0.35
        steered = 0.35 <= fate < 0.6 and ASKED[asked][1][0].kind == "routed"
        if fate > 0.15:  # others are cancelled wherever they are
            after(handle, rng.randrange(4))
        if cancelled:
            handle.cancel()
        if steered:
            handle.set_knobs(0, rng.choice(KNOBS))
        outcomes.append(Outcome(asked, handle, cancelled, steered))
    for outcome in outcomes:
        assert outcome.handle._request.wait(PATIENCE), "a request never ended"
    return outcomes


def after(handle: RequestHandle, n_tokens: int) -> None:
    """Waits until a request has written some tokens, or has ended."""
    if n_tokens:
        for event in handle.events():
            n_tokens -= isinstance(event, TokenEvent)
            if not n_tokens:
                return


def check_idle(engine: Engine) -> None:
    """Checks that nothing is held for anybody once everybody has what they asked for."""
    # A request has ended for its owner just before the engine's thread looks for more.
    with engine._changed:
        assert engine.n_queued == 0
    assert engine._scheduler.n_active == 0
    assert engine._scheduler._books.used_bytes == 0
    runner = engine._scheduler._runner
    assert isinstance(runner, RowRunner)
    assert runner._arms == {}
    assert runner._free == []
    cache = runner._reader.cache
    assert (cache.n_rows, cache.n_tokens) == (0, 0)


def test_every_request_ends_as_it_should(outcomes: list[Outcome], alone: list[Run]) -> None:
    assert len(outcomes) == N_THREADS * N_BATCHES * BATCH
    assert len({id(outcome.handle._request) for outcome in outcomes}) == len(outcomes)
    for outcome in outcomes:
        assert outcome.handle.error is None
        assert outcome.handle.position == 0
        expected = {"done", "cancelled"} if outcome.cancelled else {"done"}
        assert outcome.handle.state in expected
    # There is something of everything.
    cancelled = [o for o in outcomes if o.handle.state == "cancelled"]
    assert any(not started(o.handle) for o in cancelled)
    assert any(started(o.handle) and n_new(o.handle.run) for o in cancelled)
    assert any(
        len(t.knob_changes()) > 1 for o in outcomes if o.steered for t in o.handle.run.tracks
    )
    assert sum(not o.cancelled and not o.steered for o in outcomes) > len(outcomes) // 4


def started(handle: RequestHandle) -> bool:
    try:
        return handle.run is not None
    except EngineError:
        return False


def n_new(run: Run) -> int:
    return sum(track.n_tokens - track.n_prompt for track in run.tracks)


def test_events_tell_what_was_recorded(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        events = list(outcome.handle.events())
        kinds = [type(event) for event in events]
        assert kinds[0] is Queued
        assert Failed not in kinds
        assert kinds.count(Started) == kinds.count(Finished) == started(outcome.handle)
        if not started(outcome.handle):
            continue
        assert kinds[-1] is Finished
        for index, track in enumerate(outcome.handle.run.tracks):
            told = [e for e in events if isinstance(e, TokenEvent) and e.arm == index]
            written = track.token_ids[track.n_prompt :].tolist()
            assert [event.token_id for event in told] == written
            assert [event.index for event in told] == list(range(track.n_prompt, track.n_tokens))


def test_requests_get_what_they_get_alone(outcomes: list[Outcome], alone: list[Run]) -> None:
    """A cancelled one gets the beginning of it."""
    for outcome in outcomes:
        if outcome.steered or not started(outcome.handle):
            continue
        for track, expected in zip(
            outcome.handle.run.tracks, alone[outcome.asked].tracks, strict=True
        ):
            n = track.n_tokens
            assert track.token_ids.tolist() == expected.token_ids[:n].tolist()
            if outcome.handle.state == "done":
                assert track.finish_reason == expected.finish_reason
                assert n == expected.n_tokens
                assert track.pieces == expected.pieces
            np.testing.assert_allclose(track.logprob, expected.logprob[:n], rtol=1e-6)
            if track.router_logits is not None and expected.router_logits is not None:
                rows = expected.router_logits[: track.n_routed]
                np.testing.assert_allclose(track.router_logits, rows, rtol=2e-3, atol=1e-5)


def test_steered_requests_ran_under_the_knobs_that_they_recorded(
    model: XLoraModel, outcomes: list[Outcome]
) -> None:
    """Read again in one piece, without an engine: same router logits, same log-probabilities."""
    n_checked = 0
    for outcome in outcomes:
        if not outcome.steered:
            continue
        track = outcome.handle.run.tracks[0]
        router_logits, logprobs = read_again(model, track)
        assert track.router_logits is not None
        np.testing.assert_allclose(track.router_logits, router_logits, rtol=2e-3, atol=1e-5)
        np.testing.assert_allclose(track.logprob[track.n_prompt :], logprobs, rtol=1e-5)
        n_checked += len(logprobs)
    assert n_checked > 50


@torch.inference_mode()
def read_again(model: XLoraModel, track: Track) -> tuple[np.ndarray, np.ndarray]:
    """Returns router logits ``[T, L, K]`` and the log-probabilities of the new tokens."""
    token_ids = torch.tensor(track.token_ids[None], dtype=torch.long)
    router_logits = model.scaling_pass(input_ids=token_ids).router_logits
    rows = [model.route(router_logits[:, t : t + 1], track.knobs(t)) for t in range(track.n_routed)]
    logits = model.main_pass(scalings=torch.cat(rows, dim=1), input_ids=token_ids).logits[0]
    chosen = token_ids[0, track.n_prompt :]
    logprobs = logits[track.n_prompt - 1 : -1].log_softmax(-1).gather(1, chosen[:, None])[:, 0]
    return router_logits[0].numpy(), logprobs.numpy()


def test_nothing_of_a_request_stays_with_the_engine(outcomes: list[Outcome]) -> None:
    gc.collect()
    requests = {outcome.handle._request for outcome in outcomes}
    left = [found for found in gc.get_objects() if type(found) is ActiveRequest]
    assert [active for active in left if active.request in requests] == []
