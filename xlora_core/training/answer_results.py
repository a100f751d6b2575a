"""What the checks say of written answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xlora_core.training.answer_checks import CHECKS, Check, Score, outright, score
from xlora_core.training.answer_runs import Answer
from xlora_core.training.data import Row

_LONGEST_EXAMPLE = 120  # characters


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Somebody who gives the same value, whatever the question.

    Attributes:
        value: The value.
        score: How it does on the rows that were asked.
    """

    value: str
    score: Score


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What one check found.

    Attributes:
        domain: The domain.
        check: What was checked.
        right_when: When an answer counts as right.
        unit: Of the errors; "" where an answer is only right or wrong.
        rows: Number of answers of each arm.
        question: One of the questions, shortened.
        arms: Arm -> its score.
        cut: Arm -> answers that had not ended when their tokens were used up.
        common: Arm -> its score on the rows in which every arm could be read; empty without any.
        usual: The value that is right for the most training rows; None without training rows,
            or where a constant means nothing.
        constant: The value that is right for the most of these very rows: no constant does better.
    """

    domain: str
    check: str
    right_when: str
    unit: str
    rows: int
    question: str
    arms: dict[str, Score]
    cut: dict[str, int]
    common: dict[str, Score] = field(default_factory=dict)
    usual: Constant | None = None
    constant: Constant | None = None


def check_answers(
    answers: Sequence[Answer], training: Mapping[str, Sequence[Row]]
) -> list[CheckResult]:
    """Scores answers in every check of their domains.

    Args:
        answers: The answers.
        training: Domain -> its training rows, for the usual values; may lack domains.
    """
    results = []
    for domain, checks in CHECKS.items():
        written = [answer for answer in answers if answer.domain == domain]
        known = [outright(row, domain) for row in training.get(domain, ())]
        for check in checks:
            references = [check.reference(answer.question, answer.reference) for answer in written]
            asked = [
                (answer, reference)
                for answer, reference in zip(written, references, strict=True)
                if reference is not None
            ]
            if asked:
                results.append(_result(domain, check, asked, known))
    return results


def _result(
    domain: str, check: Check, asked: Sequence[tuple[Answer, Any]], training: Sequence[Row]
) -> CheckResult:
    references = [reference for _, reference in asked]
    trained = [check.reference(row.user, row.assistant) for row in training]
    values = {
        arm: [
            None if check.at_the_end and arm in answer.cut else check.read(answer.texts[arm])
            for answer, _ in asked
        ]
        for arm in asked[0][0].texts
    }
    common = [
        index for index in range(len(asked)) if all(of[index] is not None for of in values.values())
    ]
    return CheckResult(
        domain=domain,
        check=check.name,
        right_when=check.right_when,
        unit=check.unit,
        rows=len(asked),
        question=_shortened(asked[0][0].question),
        arms={arm: score(check, of_arm, references) for arm, of_arm in values.items()},
        cut={arm: sum(arm in answer.cut for answer, _ in asked) for arm in values},
        common={
            arm: score(check, [of_arm[i] for i in common], [references[i] for i in common])
            for arm, of_arm in values.items()
            if common
        },
        usual=_constant(check, [value for value in trained if value is not None], references),
        constant=_constant(check, references, references),
    )


def _shortened(question: str) -> str:
    """Returns a question on one line, the middle of a long one left out."""
    question = " ".join(question.split())
    half = _LONGEST_EXAMPLE // 2
    return question if len(question) <= 2 * half else f"{question[:half]} … {question[-half:]}"


def _constant(check: Check, known: Sequence[Any], references: Sequence[Any]) -> Constant | None:
    """Scores the value that is right for the most of the known ones."""
    if check.constant is None or not known:
        return None
    value = check.constant(known)
    return Constant(
        value=check.show(value), score=score(check, [value] * len(references), references)
    )
