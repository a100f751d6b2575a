"""The checks compare every arm on the same rows, and with somebody who does not look at them."""

from __future__ import annotations

import pytest

from tests.training_models import row
from xlora_core.training.answer_results import CheckResult, check_answers
from xlora_core.training.answer_runs import Answer

QUESTION = "Predict the HOMO-LUMO gap of C."


def gap_answer(texts: dict[str, str], gap: float, cut: tuple[str, ...] = ()) -> Answer:
    return Answer(
        domain="quantum",
        id="",
        question=QUESTION,
        reference=f"gap = {gap} eV",
        texts=texts,
        cut=list(cut),
    )


def found(*answers: Answer, training: tuple[float, ...] = ()) -> CheckResult:
    rows = [row("QM9 properties for CC:", f"gap = {gap} eV", "quantum") for gap in training]
    (result,) = check_answers(answers, {"quantum": rows})
    return result


def test_every_arm_is_scored_and_what_was_cut_is_counted() -> None:
    result = found(
        gap_answer({"base": "I do not know.", "routed": "gap = 6.2 eV"}, 6.0, cut=("base",)),
        gap_answer({"base": "gap = 1 eV", "routed": "gap = 9.0 eV"}, 8.0),
    )
    assert (result.domain, result.check, result.rows) == ("quantum", "HOMO-LUMO gap", 2)
    assert result.question == QUESTION
    assert (result.arms["base"].read, result.arms["base"].mean_error) == (1, 7.0)
    assert (result.arms["routed"].read, result.arms["routed"].right) == (2, 1)
    assert result.cut == {"base": 1, "routed": 0}


def test_arms_are_compared_on_the_rows_that_all_were_read_in() -> None:
    result = found(
        gap_answer({"base": "I do not know.", "routed": "gap = 6.0 eV"}, 6.0),
        gap_answer({"base": "gap = 7 eV", "routed": "gap = 8.2 eV"}, 8.0),
    )
    assert {arm: of_arm.rows for arm, of_arm in result.common.items()} == {"base": 1, "routed": 1}
    assert result.common["routed"].median_error == pytest.approx(0.2)
    assert found(gap_answer({"base": "?", "routed": "gap = 6 eV"}, 6.0)).common == {}


def test_constants_are_scored_on_the_rows_that_were_asked() -> None:
    answers = [gap_answer({"base": ""}, gap) for gap in (5.0, 5.8, 9.0)]
    result = found(*answers, training=(8.8, 9.0, 9.2, 5.0, 3.0))
    assert result.usual is not None
    assert (result.usual.value, result.usual.score.right) == ("9", 1)
    assert result.constant is not None
    assert (result.constant.value, result.constant.score.right) == ("5.4", 2)
    assert found(*answers).usual is None
    assert check_answers([], {}) == []


def test_a_calculation_that_was_cut_has_no_final_answer() -> None:
    answer = Answer(
        domain="math",
        id="",
        question="1 + 1?",
        reference="2",
        texts={"base": "= 2 = 2 = 2", "routed": "2"},
        cut=["base"],
    )
    (result,) = check_answers([answer], {})
    assert (result.arms["base"].read, result.arms["routed"].right) == (0, 1)
    assert result.constant is not None
    assert result.constant.value == "2"


def test_long_questions_are_shortened() -> None:
    answer = Answer(
        domain="math",
        id="",
        question="How much\nis " + "1 + " * 99 + "1?",
        reference="100",
        texts={"base": "100"},
        cut=[],
    )
    (result,) = check_answers([answer], {})
    assert result.question.startswith("How much is 1 + 1")
    assert result.question.endswith("+ 1?")
    assert len(result.question) < 130
