"""Requests that are steered, cancelled or closed between two reads of their rows."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny_chat import tiny_chat_xlora
from tests.watched_rows import (
    ARMS,
    GREEDY,
    N_NEW,
    N_PROMPT,
    PATIENCE,
    PROMPT,
    TOKENIZER,
    Steps,
    read_by_steps,
)
from xlora_core.config import Arm, RoutingKnobs, SamplingParams
from xlora_core.engine import Engine, RequestHandle, scheduler
from xlora_core.errors import EngineError
from xlora_core.model import XLoraModel
from xlora_core.rows import RowBatch, opening


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> XLoraModel:
    return tiny_chat_xlora(tmp_path_factory.mktemp("experts")).double()


@pytest.fixture
def reader(model: XLoraModel, monkeypatch: pytest.MonkeyPatch) -> Steps:
    return read_by_steps(model, monkeypatch)


class Gate:
    """Holds the engine before each of its reads until the test lets it go on."""

    def __init__(self, reader: Steps) -> None:
        self._arrived = threading.Semaphore(0)
        self._go = threading.Semaphore(0)
        self._open = False
        reader.before = self._before

    def _before(self, _: RowBatch) -> None:
        if not self._open:
            self._arrived.release()
            assert self._go.acquire(timeout=PATIENCE), "nobody let the engine go on"

    def hold(self) -> None:
        """Waits until the engine stands before a read."""
        assert self._arrived.acquire(timeout=PATIENCE), "the engine never came to a read"

    def step(self, n: int = 1) -> None:
        """Lets n reads happen, and waits for the engine to stand before the next."""
        for _ in range(n):
            self._go.release()
            self.hold()

    def open(self) -> None:
        """Lets the engine run from here on."""
        self._open = True
        self._go.release()


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_knobs_change_from_the_next_token_on(
    model: XLoraModel, reader: Steps, overlap: str
) -> None:
    gate = Gate(reader)
    after = RoutingKnobs(top_k=1, global_weight=2.0)
    with Engine(model, TOKENIZER, overlap=overlap) as engine:  # type: ignore[arg-type]  # a mode
        handle = engine.submit(PROMPT, [Arm.routed(RoutingKnobs(temperature=0.5))], GREEDY)
        gate.hold()
        gate.step(2)  # scaling pass and main pass of the prompt
        n_read = len(handle.run.tracks[0].token_ids) - 1  # the token written is not read yet
        assert n_read == N_PROMPT
        assert handle.set_knobs(0, after)
        gate.open()
        track = handle.wait(PATIENCE).tracks[0]
    changed = track.top_k.tolist().index(1)
    # A read that was planned when the knobs changed still has those before.
    assert changed in (N_PROMPT, N_PROMPT + 1)
    assert track.top_k.tolist() == [0] * changed + [1] * (N_PROMPT + N_NEW - changed)
    np.testing.assert_array_equal(track.temperature[:changed], np.float32(0.5))
    np.testing.assert_array_equal(track.global_weight[changed:], 2.0)


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_knobs_act_on_the_scaling_pass_that_ran_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: str
) -> None:
    """Of another constant than 0: a token's knobs are those that its scaling pass ran with."""
    model = tiny_chat_xlora(tmp_path, scaling_pass_value=0.5).double()
    reader = Steps(model)
    monkeypatch.setattr(opening, "open_rows", lambda *_, **__: reader)
    weights = iter(0.5 + 0.25 * i for i in range(1000))
    with Engine(model, TOKENIZER, overlap=overlap) as engine:  # type: ignore[arg-type]  # a mode
        handles: list[RequestHandle] = []
        submitted = threading.Event()

        def turn_knobs(_: RowBatch) -> None:  # before every read, so a request that waits for
            submitted.wait(PATIENCE)  # them to rest would never go on
            handles[0].set_knobs(0, RoutingKnobs(global_weight=next(weights)))

        reader.before = turn_knobs
        handles.append(engine.submit(PROMPT, [Arm.routed()], GREEDY))
        submitted.set()
        track = handles[0].wait(PATIENCE).tracks[0]
    assert len(set(track.global_weight.tolist())) >= N_NEW
    assert len(track.token_ids) == N_PROMPT + N_NEW
    # Every token anew, one after another, each pass with the knobs that the record says it had.
    cache = model.new_cache()
    with torch.no_grad():
        places = [(0, N_PROMPT), *((n, n + 1) for n in range(N_PROMPT, N_PROMPT + N_NEW - 1))]
        for start, stop in places:
            assert len(set(track.global_weight[start:stop].tolist())) == 1
            knobs = RoutingKnobs(global_weight=float(track.global_weight[start]))
            ids = torch.tensor([track.token_ids[start:stop].tolist()])
            output = model(input_ids=ids, past_key_values=cache, knobs=knobs)
            assert int(output.logits[0, -1].argmax()) == track.token_ids[stop]


def test_a_cancelled_request_ends_within_a_token(model: XLoraModel, reader: Steps) -> None:
    gate = Gate(reader)
    with Engine(model, TOKENIZER) as engine:
        long = SamplingParams(max_new_tokens=60)
        handle = engine.submit(PROMPT, ARMS, long)
        gate.hold()
        gate.step(4)
        handle.cancel()
        known = [len(track.token_ids) for track in handle.run.tracks]
        gate.open()
        run = handle.wait(PATIENCE)
        assert handle.state == "cancelled"
        for track, n_known in zip(run.tracks, known, strict=True):
            assert track.finish_reason == "cancelled"
            assert n_known <= len(track.token_ids) <= n_known + 1
            assert track.n_routed == len(track.token_ids)  # the last token has its row
        assert engine.run(PROMPT, sampling=GREEDY).tracks[0].finish_reason == "length"


def test_cancel_while_the_prompt_is_read(
    model: XLoraModel, reader: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 4)
    gate = Gate(reader)
    with Engine(model, TOKENIZER) as engine:
        handle = engine.submit("the quick brown fox " * 3, [Arm.routed(), Arm.merged()], GREEDY)
        gate.hold()
        gate.step(2)
        handle.cancel()
        gate.open()
        run = handle.wait(PATIENCE)
    assert handle.state == "cancelled"
    assert [len(track.token_ids) for track in run.tracks] in ([2, 2], [4, 4])
    assert run.tracks[0].n_routed == len(run.tracks[0].token_ids)


def test_closing_while_requests_run(model: XLoraModel, reader: Steps) -> None:
    gate = Gate(reader)
    engine = Engine(model, TOKENIZER, max_active=2)
    handles = [engine.submit(PROMPT, sampling=GREEDY) for _ in range(3)]
    gate.hold()
    gate.step(3)  # two of them run by now
    closing = threading.Thread(target=engine.close)
    closing.start()
    gate.open()
    closing.join(PATIENCE)
    for handle in handles:
        with pytest.raises(EngineError, match="the engine was closed"):
            handle.wait(PATIENCE)
    assert reader.cache.n_rows == 0
