"""What fails in one request's rows, and that it reaches nobody else's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny_chat import tiny_chat_xlora
from tests.watched_rows import (
    GREEDY,
    PATIENCE,
    PROMPT,
    TOKENIZER,
    Steps,
    assert_same,
    read_by_steps,
)
from xlora_core.config import Arm, SamplingParams
from xlora_core.engine import Engine
from xlora_core.engine.admission import MemoryBudget
from xlora_core.engine.identity import ModelIdentity
from xlora_core.engine.overlap import Overlap
from xlora_core.engine.prompts import EncodedPrompt
from xlora_core.engine.requests import Request
from xlora_core.engine.row_runner import RowRunner
from xlora_core.engine.scheduler import Scheduler
from xlora_core.errors import EngineError
from xlora_core.model import XLoraModel
from xlora_core.rows import RowBatch

SHORT = SamplingParams(max_new_tokens=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> XLoraModel:
    return tiny_chat_xlora(tmp_path_factory.mktemp("experts")).double()


@pytest.fixture
def reader(model: XLoraModel, monkeypatch: pytest.MonkeyPatch) -> Steps:
    return read_by_steps(model, monkeypatch)


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
