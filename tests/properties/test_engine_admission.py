"""The books of memory against a real scheduler: they say what its cache and records really take."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_chat import tiny_chat_xlora, tiny_tokenizer
from xlora_core.config import Arm, RoutingKnobs, SamplingParams
from xlora_core.engine.admission import MemoryBudget
from xlora_core.engine.identity import ModelIdentity
from xlora_core.engine.overlap import Overlap
from xlora_core.engine.prompts import EncodedPrompt
from xlora_core.engine.requests import Request
from xlora_core.engine.row_runner import RowRunner
from xlora_core.engine.scheduler import Scheduler
from xlora_core.model import XLoraModel
from xlora_core.rows import RowReader
from xlora_core.rows.opening import open_rows

TOKENIZER = tiny_tokenizer()
ROUTED = Arm.routed(RoutingKnobs())
ARMS = st.lists(
    st.sampled_from([ROUTED, Arm.merged(), Arm.base(), Arm.expert("math")]), min_size=1, max_size=4
)
# Lengths on both sides of the 256 positions that rows grow by.
REQUESTS = st.tuples(ARMS, st.integers(1, 300), st.integers(1, 300))


@functools.cache
def model() -> XLoraModel:
    return tiny_chat_xlora(Path(tempfile.mkdtemp()), context_length=400)


@functools.cache
def reader() -> RowReader:
    reader = open_rows(model())
    assert reader is not None
    return reader


def request(arms: list[Arm], n_prompt: int, n_new: int) -> Request:
    sampling = SamplingParams(max_new_tokens=n_new)
    return Request(
        header=ModelIdentity(model()).header("", sampling),
        prompt=EncodedPrompt(text="", token_ids=[5] * n_prompt),
        arms=tuple(arms),
        sampling=sampling,
        with_base_logprob=True,
    )


@given(
    asked=st.lists(st.tuples(REQUESTS, st.booleans()), min_size=1, max_size=6),
    n_guesses=st.integers(1, 3),
    budget=st.integers(300_000, 3_000_000),
)
@settings(max_examples=40, deadline=None)
def test_the_books_say_what_is_really_held(asked, n_guesses, budget) -> None:
    scheduler = Scheduler(
        RowRunner(model(), reader(), Overlap("on", n_guesses)),
        TOKENIZER,
        stop_ids=frozenset(),
        context_length=400,
        budget=MemoryBudget(budget),
    )
    running: list[Request] = []
    for what, one_leaves in asked:
        newcomer = request(*what)
        if scheduler.fits(newcomer):
            scheduler.admit(newcomer)
            running.append(newcomer)
        assert scheduler._books.used_bytes == held_bytes(running) <= budget
        if one_leaves and running:
            gone = running.pop(0)
            gone.ask_to_cancel()
            while not gone.ended:
                scheduler.round()
            running = [other for other in running if not other.ended]
            assert scheduler._books.used_bytes == held_bytes(running)
    for left in running:
        left.ask_to_cancel()
    while scheduler.n_active:
        scheduler.round()
    assert scheduler._books.used_bytes == held_bytes([]) == 0


def held_bytes(running: list[Request]) -> int:
    """Returns the bytes of the cache and of the records' arrays."""
    cache = reader().cache
    arrays: list[np.ndarray] = [
        array
        for request in running
        if request._recorder is not None
        for track in request._recorder.tracks
        for array in track._arrays.values()
    ]
    return sum(t.nbytes for t in (*cache.keys, *cache.values)) + sum(a.nbytes for a in arrays)
