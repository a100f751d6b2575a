"""Arms and requests that share one run over the weights: the same results as by themselves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.lone_rows import LoneRows
from tests.tiny_chat import tiny_chat_xlora, tiny_tokenizer
from xlora_core.config import Arm, RoutingKnobs, SamplingParams
from xlora_core.engine import (
    ArmFinished,
    Engine,
    Finished,
    RequestHandle,
    TokenEvent,
    scheduler,
)
from xlora_core.engine.admission import MemoryBudget
from xlora_core.engine.identity import ModelIdentity
from xlora_core.engine.overlap import Overlap
from xlora_core.engine.prompts import EncodedPrompt
from xlora_core.engine.requests import Request
from xlora_core.engine.row_runner import RowRunner
from xlora_core.engine.scheduler import Scheduler
from xlora_core.errors import ConfigError, EngineError
from xlora_core.model import XLoraModel
from xlora_core.recording import Run
from xlora_core.rows import RowBatch, opening

TOKENIZER = tiny_tokenizer()
PROMPT = "the quick fox and 你好"
PROMPT_IDS = TOKENIZER(PROMPT)["input_ids"]
N_PROMPT = len(PROMPT_IDS)
N_NEW = 10
GREEDY = SamplingParams(max_new_tokens=N_NEW)
SHORT = SamplingParams(max_new_tokens=3)
SAMPLED = SamplingParams(max_new_tokens=N_NEW, temperature=1.2, top_p=0.9, seed=3)
PENALISED = SamplingParams(max_new_tokens=N_NEW, temperature=0.8, repetition_penalty=1.4, seed=5)
ARMS = (
    Arm.routed(),
    Arm.merged(),
    Arm.base(),
    Arm.expert("code"),
    Arm.routed(RoutingKnobs(top_k=1, temperature=0.4, global_weight=1.5)),
)
PATIENCE = 60


class Steps(LoneRows):
    """Rows whose reads a test may watch, hold, or let fail."""

    before: Callable[[RowBatch], None] | None = None

    def read(self, batch: RowBatch) -> torch.Tensor:
        """Reads, after the test has had its say."""
        if self.before is not None:
            self.before(batch)
        return super().read(batch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> XLoraModel:
    return tiny_chat_xlora(tmp_path_factory.mktemp("experts")).double()


@pytest.fixture
def reader(model: XLoraModel, monkeypatch: pytest.MonkeyPatch) -> Steps:
    """What every engine of a test reads rows with: each alone, so that none can be mixed up."""
    reader = Steps(model)
    monkeypatch.setattr(opening, "open_rows", lambda *_, **__: reader)
    return reader


@pytest.fixture
def engine(model: XLoraModel, reader: Steps) -> Iterator[Engine]:
    with Engine(model, TOKENIZER) as engine:
        yield engine


def in_turn(model: XLoraModel, arms: tuple[Arm, ...], sampling: SamplingParams) -> Run:
    """Returns the run as the model's own passes make it, arm after arm."""
    with Engine(model, TOKENIZER, batched=False) as engine:
        return engine.run(PROMPT, arms, sampling)


def assert_same(run: Run, expected: Run) -> None:
    for track, other in zip(run.tracks, expected.tracks, strict=True):
        assert track.token_ids.tolist() == other.token_ids.tolist()
        assert track.pieces == other.pieces
        assert track.finish_reason == other.finish_reason
        np.testing.assert_allclose(track.logprob, other.logprob, rtol=1e-6)
        np.testing.assert_allclose(track.base_logprob, other.base_logprob, rtol=1e-6)
        np.testing.assert_array_equal(track.alternative_ids, other.alternative_ids)
        assert (track.router_logits is None) == (other.router_logits is None)
        if track.router_logits is not None and other.router_logits is not None:
            assert track.n_routed == len(track.token_ids)
            np.testing.assert_allclose(track.router_logits, other.router_logits, atol=2e-3)
        np.testing.assert_array_equal(track.top_k, other.top_k)
        np.testing.assert_array_equal(track.temperature, other.temperature)


# -------------------------------------------------------------------- the same results


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, PENALISED], ids=["greedy", "top-p", "seen"])
@pytest.mark.parametrize(
    ("overlap", "n_guesses"), [("off", 1), ("on", 1), ("on", 3), ("auto", 2)], ids=str
)
def test_rows_give_what_arms_in_turn_give(
    model: XLoraModel, reader: Steps, sampling: SamplingParams, overlap: str, n_guesses: int
) -> None:
    with Engine(model, TOKENIZER, overlap=overlap, n_guesses=n_guesses) as engine:  # type: ignore[arg-type]  # one of the modes
        run = engine.run(PROMPT, ARMS, sampling)
    assert_same(run, in_turn(model, ARMS, sampling))


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_pass_value": 0.5},
        {"layerwise_scalings": False},
        {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("overlap", ["on", "off"])
def test_under_other_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, object], overlap: str
) -> None:
    model = tiny_chat_xlora(tmp_path, **config).double()
    monkeypatch.setattr(opening, "open_rows", lambda model, **_: Steps(model))
    with Engine(model, TOKENIZER, overlap=overlap) as engine:  # type: ignore[arg-type]  # a mode
        run = engine.run(PROMPT, ARMS, GREEDY)
    assert_same(run, in_turn(model, ARMS, GREEDY))


def test_base_log_probabilities_can_be_left_out(engine: Engine) -> None:
    run = engine.run(PROMPT, [Arm.routed(), Arm.base()], GREEDY, record_base_logprob=False)
    for track in run.tracks:
        assert np.isnan(track.base_logprob).all()


@pytest.mark.parametrize("n_new", [1, 2])
def test_the_shortest_answers(model: XLoraModel, engine: Engine, n_new: int) -> None:
    sampling = SamplingParams(max_new_tokens=n_new)
    assert_same(engine.run(PROMPT, ARMS, sampling), in_turn(model, ARMS, sampling))


def test_an_answer_ends_at_the_stop_token_and_where_the_context_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "open_rows", lambda model, **_: Steps(model))
    model = tiny_chat_xlora(tmp_path, context_length=N_PROMPT + 4).double()
    with Engine(model, TOKENIZER) as engine:
        run = engine.run(PROMPT, ARMS, GREEDY)
    assert {len(track.token_ids) for track in run.tracks} == {N_PROMPT + 4}
    stop = int(run.tracks[0].token_ids[N_PROMPT + 1])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [stop])
    with Engine(model, TOKENIZER) as engine:
        run = engine.run(PROMPT, ARMS, GREEDY)
    assert run.tracks[0].finish_reason == "stop"
    assert_same(run, in_turn(model, ARMS, GREEDY))


def test_a_prompt_read_in_parts(
    model: XLoraModel, engine: Engine, reader: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 12)
    run = engine.run(PROMPT, ARMS, GREEDY)
    assert max(segment.n for batch in reader.batches for segment in batch.segments) == 3
    assert_same(run, in_turn(model, ARMS, GREEDY))


# -------------------------------------------------------------------- what is shared


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


def test_a_request_that_finds_no_room_leaves_nothing_on_the_books(
    model: XLoraModel, reader: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or others would wait for memory that nobody holds."""
    scheduler = Scheduler(
        RowRunner(model, reader, Overlap("on")),
        TOKENIZER,
        stop_ids=frozenset(),
        context_length=2000,
        budget=MemoryBudget(10**9),
    )

    def request(n_tokens: int) -> Request:
        sampling = SamplingParams(max_new_tokens=n_tokens)
        return Request(
            header=ModelIdentity(model, "tiny").header("", sampling),
            prompt=EncodedPrompt(text="", token_ids=[5, 6]),
            arms=(Arm.merged(),),
            sampling=sampling,
            with_base_logprob=False,
        )

    with torch.inference_mode():
        scheduler.admit(request(4))
        held = scheduler._books.used_bytes

        def no_memory(n_rows: int, n_tokens: int) -> None:
            raise MemoryError

        monkeypatch.setattr(reader.cache, "grow", no_memory)
        refused = request(1000)
        scheduler.admit(refused)
        assert refused.state == "failed"
        assert scheduler._books.used_bytes == held
        assert scheduler.n_active == 1


def test_a_broken_text_leaves_nothing_in_its_rows(model: XLoraModel) -> None:
    """0 times NaN is NaN, so a mask would not keep it from the next text in the row."""
    last_rank = model.lora_layers[0].lora_B.detach()[:, -1]  # of the last adapter, verse
    kept = last_rank.clone()
    with Engine(model, TOKENIZER) as engine:
        expected = engine.run(PROMPT, [Arm.expert("math")], GREEDY)
        long = SamplingParams(max_new_tokens=100)
        running = engine.submit(PROMPT, [Arm.base()], long)  # keeps the rows from being freed
        last_rank.fill_(torch.nan)
        try:
            with pytest.raises(EngineError, match="not finite"):
                engine.run(PROMPT * 3, [Arm.expert("verse")], GREEDY)
        finally:
            last_rank.copy_(kept)
        assert_same(engine.run(PROMPT, [Arm.expert("math")], GREEDY), expected)
        assert running.wait(PATIENCE).tracks[0].finish_reason in ("stop", "length")


def test_a_broken_expert_reaches_nobody_elses_rows(tmp_path: Path) -> None:
    """By the real reader: it has base rows at 0 beside adapted ones, and 0 times NaN is NaN."""
    model = tiny_chat_xlora(tmp_path)
    last_rank = model.lora_layers[-1].lora_B.detach()[:, -1]  # of the last adapter, verse
    with Engine(model, TOKENIZER, max_active=2) as engine:
        expected = engine.run(PROMPT, [Arm.base(), Arm.expert("math")], SHORT)
        last_rank.fill_(torch.nan)
        arms = [Arm.base(), Arm.expert("verse"), Arm.expert("math")]
        with pytest.raises(EngineError, match=r"arm 1 \(expert:verse\), after \d+ tokens"):
            engine.run(PROMPT, arms, SHORT)
        bad = engine.submit(PROMPT, [Arm.expert("verse")], SHORT)
        good = engine.submit(PROMPT, [Arm.base()], SHORT)
        with pytest.raises(EngineError, match=r"arm 0 \(expert:verse\)"):
            bad.wait(PATIENCE)
        written = good.wait(PATIENCE).tracks[0].token_ids
    assert written.tolist() == expected.tracks[0].token_ids.tolist()


# -------------------------------------------------------------------- requests side by side


def test_requests_side_by_side_get_what_they_get_alone(model: XLoraModel, reader: Steps) -> None:
    asked = [
        ("the quick", (Arm.routed(), Arm.base()), GREEDY),
        ("lazy dog and user talk about the sum", (Arm.expert("math"),), SAMPLED),
        ("def add(a, b)", (Arm.routed(RoutingKnobs(top_k=2)), Arm.merged()), PENALISED),
        ("你好", ARMS, SAMPLED),
    ]
    with Engine(model, TOKENIZER, max_active=4, max_queue=4) as engine:
        alone = [engine.run(*request) for request in asked]
        handles = [engine.submit(*request) for request in asked]
        for handle, expected in zip(handles, alone, strict=True):
            assert_same(handle.wait(PATIENCE), expected)


def test_events_come_in_order(engine: Engine) -> None:
    events = list(
        engine.stream(PROMPT, [Arm.routed(), Arm.base()], SamplingParams(max_new_tokens=3))
    )
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    assert sorted((e.index, e.arm) for e in tokens) == [(e.index, e.arm) for e in tokens] or (
        [e.index for e in tokens if e.arm == 1] == [N_PROMPT, N_PROMPT + 1, N_PROMPT + 2]
    )
    assert [e.arm for e in tokens[:2]] == [0, 1]
    assert {e.arm: e.reason for e in events if isinstance(e, ArmFinished)} == {
        0: "length",
        1: "length",
    }
    assert isinstance(events[-1], Finished)


# -------------------------------------------------------------------- steering and stopping


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


def test_a_request_that_fails_in_a_shared_read_fails_alone(
    model: XLoraModel, reader: Steps
) -> None:
    poison = TOKENIZER("🙂")["input_ids"]

    def refuse(batch: RowBatch) -> None:
        # Reads of the poisoned request's rows fail from its second read on.
        if any(segment.row in bad_rows and segment.n == 1 for segment in batch.segments):
            raise torch.OutOfMemoryError("CUDA out of memory")
        if batch.token_ids.tolist()[: len(poison)] == poison:
            bad_rows.update(segment.row for segment in batch.segments)

    bad_rows: set[int] = set()
    reader.before = refuse
    with Engine(model, TOKENIZER) as engine:
        good, bad, other = (
            engine.submit(prompt, [Arm.routed(), Arm.merged()], GREEDY)
            for prompt in (PROMPT, "🙂 and more", PROMPT)
        )
        with pytest.raises(EngineError, match="ran out of memory with this request"):
            bad.wait(PATIENCE)
        assert_same(good.wait(PATIENCE), other.wait(PATIENCE))
        assert [t.finish_reason for t in good.run.tracks] == ["length", "length"]
        assert [t.finish_reason for t in bad.run.tracks] == ["error", "error"]


def test_logits_that_are_not_finite_fail_one_request(
    model: XLoraModel, reader: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = model.lora_layers[-1].lora_B
    damaged = weight.detach().clone()
    damaged[:, -1] = torch.nan  # the last adapter, verse
    monkeypatch.setattr(weight, "data", damaged)
    with Engine(model, TOKENIZER) as engine:
        good = engine.submit(PROMPT, [Arm.base()], GREEDY)
        bad = engine.submit(PROMPT, [Arm.base(), Arm.expert("verse")], GREEDY)
        with pytest.raises(EngineError, match=r"arm 1 \(expert:verse\), after \d+ tokens"):
            bad.wait(PATIENCE)
        assert good.wait(PATIENCE).tracks[0].finish_reason == "length"


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


# -------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_active": 0}, "max_active must be a whole number >= 1, got 0"),
        ({"n_guesses": True}, "n_guesses must be a whole number >= 1, got True"),
        ({"overlap": "yes"}, "overlap must be one of auto, on, off, got 'yes'"),
    ],
)
def test_options_out_of_range_are_refused(
    model: XLoraModel, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Engine(model, TOKENIZER, **options)  # type: ignore[arg-type]  # wrong on purpose
