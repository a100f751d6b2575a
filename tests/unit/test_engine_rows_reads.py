"""What is shared when rows are read: prompts, steps, guesses, and the cache between requests."""

from __future__ import annotations

import threading
from collections.abc import Iterator

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
    SAMPLED,
    TOKENIZER,
    Steps,
    read_by_steps,
)
from xlora_core.config import Arm, RoutingKnobs, SamplingParams
from xlora_core.engine import Engine
from xlora_core.engine.admission import MemoryBudget
from xlora_core.engine.identity import ModelIdentity
from xlora_core.engine.overlap import Overlap
from xlora_core.engine.prompts import EncodedPrompt
from xlora_core.engine.requests import Request
from xlora_core.engine.row_runner import RowRunner
from xlora_core.engine.scheduler import Scheduler
from xlora_core.model import XLoraModel


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> XLoraModel:
    return tiny_chat_xlora(tmp_path_factory.mktemp("experts")).double()


@pytest.fixture
def reader(model: XLoraModel, monkeypatch: pytest.MonkeyPatch) -> Steps:
    return read_by_steps(model, monkeypatch)


@pytest.fixture
def engine(model: XLoraModel, reader: Steps) -> Iterator[Engine]:
    with Engine(model, TOKENIZER) as engine:
        yield engine


def test_the_scaling_pass_of_a_prompt_runs_once_for_all_arms(engine: Engine, reader: Steps) -> None:
    engine.run(PROMPT, ARMS, SamplingParams(max_new_tokens=1))
    prompts = [segment for batch in reader.batches for segment in batch.segments if segment.n > 1]
    # One scaling pass; then two routed arms, merged and expert. The base arm reads nothing.
    assert [segment.n for segment in prompts] == [N_PROMPT] * 5
    assert len({segment.row for segment in prompts}) == 5


def test_a_step_reads_all_arms_of_all_requests(model: XLoraModel, reader: Steps) -> None:
    arms = [Arm.routed(RoutingKnobs(global_weight=0.0)), Arm.merged()]  # every guess is right
    with Engine(model, TOKENIZER, overlap="on") as engine:
        start = threading.Event()
        reader.before = lambda _: None if start.wait(PATIENCE) else pytest.fail("never started")
        handles = [engine.submit(PROMPT, arms, GREEDY) for _ in range(3)]
        start.set()
        for handle in handles:
            handle.wait(PATIENCE)
    # Three routed arms with a guess each, three merged arms.
    assert max(len(batch.segments) for batch in reader.batches) == 9
    for batch in reader.batches:
        assert len({segment.row for segment in batch.segments}) == len(batch.segments)


def test_a_right_guess_saves_a_run_over_the_weights(model: XLoraModel, reader: Steps) -> None:
    """At global weight 0 the mixture is the base model, so every guess is right."""
    arm = Arm.routed(RoutingKnobs(global_weight=0.0))
    n_runs = {}
    for overlap in ("on", "off"):
        reader.batches.clear()
        with Engine(model, TOKENIZER, overlap=overlap) as engine:  # type: ignore[arg-type]  # a mode
            track = engine.run(PROMPT, [arm], SAMPLED).tracks[0]
        n_runs[overlap] = len(reader.batches)
        if overlap == "on":
            assert track.n_guessed == track.n_hit == N_NEW
            assert track.hit_rate == 1.0
    # Prompt: scaling pass, main pass. Then a run per token but the first, or two; without
    # guesses the last token's routing takes one more.
    assert n_runs == {"on": 2 + N_NEW - 1, "off": 2 + 2 * (N_NEW - 1) + 1}


def test_a_draft_is_right_where_scalings_stay_the_same(model: XLoraModel, reader: Steps) -> None:
    """Only the first guess, which the base model makes alone, may be wrong."""
    arm = Arm.routed(RoutingKnobs(temperature=1e9))
    with Engine(model, TOKENIZER, overlap="on") as engine:
        track = engine.run(PROMPT, [arm], GREEDY).tracks[0]
    assert track.n_guessed == N_NEW
    assert track.n_hit >= N_NEW - 1
    # In a step its own row reads its token and the draft; what is read again is a token of each.
    assert {tuple(segment.n for segment in batch.segments) for batch in reader.batches} <= {
        (N_PROMPT,),
        (N_PROMPT, 1),
        (2, 1),
        (1, 1),
        (1,),
    }


def test_steps_that_are_recorded_have_no_drafts(model: XLoraModel, reader: Steps) -> None:
    reader.records_single_tokens = True
    with Engine(model, TOKENIZER, overlap="on") as engine:
        engine.run(PROMPT, sampling=GREEDY)
    assert {segment.n for batch in reader.batches for segment in batch.segments} == {N_PROMPT, 1}


def test_more_guesses_are_right_more_often(model: XLoraModel, reader: Steps) -> None:
    hits = []
    for n_guesses in (1, 4):
        with Engine(model, TOKENIZER, overlap="on", n_guesses=n_guesses) as engine:
            hits.append(engine.run(PROMPT, sampling=GREEDY).tracks[0].n_hit)
    assert hits[0] < hits[1]


def test_only_routed_arms_guess(engine: Engine) -> None:
    run = engine.run(PROMPT, [Arm.merged(), Arm.base()], GREEDY)
    assert [track.n_guessed for track in run.tracks] == [0, 0]
    assert run.tracks[0].hit_rate is None


def test_rows_are_given_back(engine: Engine, reader: Steps) -> None:
    for _ in range(3):
        engine.run(PROMPT, ARMS, SamplingParams(max_new_tokens=2))
    reader_rows = {segment.row for batch in reader.batches for segment in batch.segments}
    assert max(reader_rows) == 6  # two rows for either routed arm, one for the three others
    engine.close()
    assert reader.cache.n_rows == 0


def test_a_kept_cache_stays_until_a_larger_one_needs_its_place(
    model: XLoraModel, reader: Steps
) -> None:
    """Recorded steps hold its addresses."""
    runner = RowRunner(model, reader, Overlap("on"), keeps_cache=True)
    per_token = reader.cache.bytes_per_token
    n_bytes = 8 * 4096 * per_token + 2_000_000  # the larger one, and the records
    scheduler = Scheduler(
        runner,
        TOKENIZER,
        stop_ids=frozenset(),
        context_length=100_000,
        budget=MemoryBudget(n_bytes),
    )

    def run(n_arms: int, n_tokens: int) -> None:
        sampling = SamplingParams(max_new_tokens=n_tokens)
        request = Request(
            header=ModelIdentity(model, "tiny").header("", sampling),
            prompt=EncodedPrompt(text="", token_ids=[5, 6]),
            arms=(Arm.merged(),) * n_arms,
            sampling=sampling,
            with_base_logprob=False,
        )
        assert scheduler.fits(request)
        scheduler.admit(request)
        request.ask_to_cancel()
        while scheduler.n_active:
            scheduler.round()

    with torch.inference_mode():
        run(1, 4)
        keys = reader.cache.keys
        run(5, 4)
        assert reader.cache.keys is keys
        assert reader.cache.n_rows == 8
        run(1, 3000)  # twice as long, which does not fit beside the old block
    assert reader.cache.keys is not keys
    assert reader.cache.n_tokens == 4096
