"""Arms and requests that share one run over the weights: the same results as by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

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
    assert_same,
    in_turn,
    read_by_steps,
)
from xlora_core.config import Arm, RoutingKnobs, SamplingParams
from xlora_core.engine import ArmFinished, Engine, Finished, TokenEvent, scheduler
from xlora_core.errors import ConfigError
from xlora_core.model import XLoraModel
from xlora_core.rows import opening

PENALISED = SamplingParams(max_new_tokens=N_NEW, temperature=0.8, repetition_penalty=1.4, seed=5)


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
