"""Every arm answers held-out questions, and the checks say how well."""

from __future__ import annotations

import pytest

from tests.tiny_chat import EXPERTS, tiny_chat_xlora, tiny_tokenizer
from tests.training_models import row
from xlora_core.config import Arm, SamplingParams
from xlora_core.engine import Engine
from xlora_core.model import XLoraModel
from xlora_core.training.answer_runs import (
    Answer,
    AnswerSettings,
    check_answers,
    checked_rows,
    write_answers,
)

SETTINGS = AnswerSettings(rows=3, max_new_tokens=6)
ROWS = {"math": [row(f"{i} + {i}?", str(2 * i)) for i in range(3)]}
ARMS = ["base", "uniform", "best_merge", "routed", "right"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> XLoraModel:
    return tiny_chat_xlora(tmp_path_factory.mktemp("model"))


def written(model: XLoraModel, weights: tuple[float, ...] | None) -> list[Answer]:
    merge = None if weights is None else dict(zip(EXPERTS, weights, strict=True))
    return write_answers(model, tiny_tokenizer(), ROWS, SETTINGS, merge_weights=merge)


def test_every_arm_writes_what_the_engine_writes(model: XLoraModel) -> None:
    answers = written(model, (0.0, 1.0, 0.0))
    assert [answer.id for answer in answers] == [row.id for row in ROWS["math"]]
    arms = [Arm.base(), Arm.merged(), Arm.expert("code"), Arm.routed(), Arm.expert("math")]
    sampling = SamplingParams(max_new_tokens=6)
    with Engine(model, tiny_tokenizer()) as engine:
        run = engine.run([{"role": "user", "content": "1 + 1?"}], arms, sampling)
    assert list(answers[1].texts) == ARMS
    assert list(answers[1].texts.values()) == [run.text(i, stop_token=False) for i in range(5)]
    reasons = [run.track(i).finish_reason for i in range(5)]
    assert answers[1].cut == [
        arm for arm, reason in zip(ARMS, reasons, strict=True) if reason == "length"
    ]


def test_a_merge_of_equal_weights_is_the_uniform_one(model: XLoraModel) -> None:
    for answer in written(model, (1 / 3, 1 / 3, 1 / 3)):
        assert answer.texts["best_merge"] == answer.texts["uniform"]
    assert "best_merge" not in written(model, None)[0].texts


def test_rows_are_chosen_that_are_checked_and_fit(model: XLoraModel) -> None:
    tokenizer = tiny_tokenizer()
    rows = {
        "math": [*ROWS["math"], row("long?", "123456789" * 3), row("", "plain text")],
        "quantum": [row("Predict the HOMO-LUMO gap of C.", "no gap", "quantum")],
        "verse": [row("Sing.", "la la", "verse")],
    }
    chosen = checked_rows(rows, tokenizer, SETTINGS, 128)
    assert list(chosen) == ["math"]
    assert sorted(r.id for r in chosen["math"]) == ["0 + 0?", "1 + 1?", "2 + 2?"]
    assert chosen == checked_rows(rows, tokenizer, SETTINGS, 128)
    one = AnswerSettings(rows=1, max_new_tokens=6)
    assert checked_rows(rows, tokenizer, one, 128)["math"] == chosen["math"][:1]
    assert checked_rows(rows, tokenizer, SETTINGS, 20) == {}  # no room for the prompt
    assert write_answers(model, tokenizer, {}, SETTINGS) == []


def answer(texts: dict[str, str], gap: float) -> Answer:
    question, reference = "Predict the HOMO-LUMO gap of C.", f"gap = {gap} eV"
    return Answer(
        domain="quantum", id="", question=question, reference=reference, texts=texts, cut=[]
    )


def test_checks_score_every_arm_and_the_median() -> None:
    answers = [
        answer({"base": "I do not know.", "routed": "gap = 6.2 eV"}, 6.0),
        answer({"base": "gap = 1 eV", "routed": "gap = 9.0 eV"}, 8.0),
    ]
    training = [row("What is the gap?", f"gap = {gap} eV", "quantum") for gap in (5, 7, 30)]
    (result,) = check_answers(answers, {"quantum": training})
    assert (result.domain, result.check, result.rows) == ("quantum", "HOMO-LUMO gap", 2)
    assert (result.arms["base"].read, result.arms["base"].mean_error) == (1, 7.0)
    assert (result.arms["routed"].read, result.arms["routed"].right) == (2, 1)
    assert result.always_median is not None
    assert result.always_median.mean_error == 1.0
    (without,) = check_answers(answers, {})
    assert without.always_median is None
    assert check_answers([], {"quantum": training}) == []
