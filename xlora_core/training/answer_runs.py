"""Answers to held-out questions, written by every arm, and what the checks say of them."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xlora_core.config import AdapterOverride, Arm, RoutingKnobs, SamplingParams
from xlora_core.engine import Engine, RequestHandle
from xlora_core.model import XLoraModel
from xlora_core.training.answer_checks import CHECKS, Check, Score, score, score_values
from xlora_core.training.data import Row, encode
from xlora_core.training.progress import Report, silent

_REQUESTS_TOGETHER = 8  # their arms share every run over the weights


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """Which answers are written.

    Attributes:
        rows: Most rows of each domain, >= 1.
        max_new_tokens: Most tokens of an answer, >= 1. Only rows are asked whose own answer fits,
            so that the right answer is never one that is cut.
    """

    rows: int = 16
    max_new_tokens: int = 256


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was written to one question.

    Attributes:
        domain: The row's domain.
        id: The row's id.
        question: Its last question.
        reference: Its own answer.
        texts: Arm -> what it wrote.
        cut: Arms that had not ended when their tokens were used up.
    """

    domain: str
    id: str
    question: str
    reference: str
    texts: dict[str, str]
    cut: list[str]


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What one check found.

    Attributes:
        domain: The domain.
        check: What was checked.
        right_when: When an answer counts as right.
        unit: Of the errors; "" where an answer is only right or wrong.
        rows: Number of answers of each arm.
        arms: Arm -> its score.
        always_median: The score of somebody who always gives the median of the training rows'
            answers; None where answers are no numbers, or without training rows.
    """

    domain: str
    check: str
    right_when: str
    unit: str
    rows: int
    arms: dict[str, Score]
    always_median: Score | None


def checked_rows(
    rows: Mapping[str, Sequence[Row]], tokenizer: Any, settings: AnswerSettings, context: int
) -> dict[str, list[Row]]:
    """Returns rows to ask: those of a check whose own answers fit, some of each domain.

    A domain without checks, or without such rows, is left out.

    Args:
        rows: Domain -> held-out rows.
        tokenizer: The base model's tokenizer.
        settings: How many rows, and how long their answers may be.
        context: Most tokens that the model can read.
    """
    chosen: dict[str, list[Row]] = {}
    for domain, group in rows.items():
        asked = [row for row in group if row.user and _is_checked(row, domain)]
        random.Random(0).shuffle(asked)
        fitting: list[Row] = []
        for row in asked:
            if len(fitting) == settings.rows:
                break
            example = encode([row], tokenizer, context)
            if example is None:
                continue
            n_answer = sum(name != "" for name in example.domains)
            n_prompt = len(example) - n_answer
            if n_answer <= settings.max_new_tokens <= context - n_prompt:
                fitting.append(row)
        if fitting:
            chosen[domain] = fitting
    return chosen


def _is_checked(row: Row, domain: str) -> bool:
    return any(
        check.reference(row.user, row.assistant) is not None for check in CHECKS.get(domain, ())
    )


def write_answers(
    model: XLoraModel,
    tokenizer: Any,
    rows: Mapping[str, Sequence[Row]],
    settings: AnswerSettings,
    *,
    merge_weights: Mapping[str, float] | None = None,
    report: Report = silent,
) -> list[Answer]:
    """Lets every arm answer every row, greedily.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        rows: Domain (an adapter's name) -> rows to ask.
        settings: How long answers may be.
        merge_weights: Expert -> its scaling in the arm ``best_merge``; None leaves it out.
        report: Gets a line per domain.
    """
    sampling = SamplingParams(max_new_tokens=settings.max_new_tokens)
    n_rows = sum(map(len, rows.values()))
    answers: list[Answer] = []
    if not n_rows:
        return answers
    with Engine(
        model, tokenizer, max_queue=n_rows, max_active=_REQUESTS_TOGETHER, overlap="off"
    ) as engine:
        asked: dict[str, list[tuple[Row, RequestHandle]]] = {}
        arms: dict[str, dict[str, Arm]] = {}
        for domain, group in rows.items():
            arms[domain] = _arms(domain, merge_weights)
            asked[domain] = [
                (
                    row,
                    engine.submit(
                        [{"role": role, "content": text} for role, text in row.messages[:-1]],
                        list(arms[domain].values()),
                        sampling,
                        record_base_logprob=False,
                    ),
                )
                for row in group
            ]
        for domain, handles in asked.items():
            n_asked = len(handles)
            while handles:  # a handle keeps the scalings of its whole run
                row, handle = handles.pop(0)
                answers.append(_answer(row, domain, list(arms[domain]), handle))
            report(f"{domain}: {n_asked} questions answered")
    return answers


def _arms(domain: str, merge_weights: Mapping[str, float] | None) -> dict[str, Arm]:
    arms = {"base": Arm.base(), "uniform": Arm.merged()}
    if merge_weights is not None:
        pins = [AdapterOverride.pin(name, weight) for name, weight in merge_weights.items()]
        arms["best_merge"] = Arm.routed(RoutingKnobs(overrides=pins))
    return arms | {"routed": Arm.routed(), "right": Arm.expert(domain)}


def _answer(row: Row, domain: str, arms: Sequence[str], handle: RequestHandle) -> Answer:
    run = handle.wait()
    return Answer(
        domain=domain,
        id=row.id,
        question=row.user,
        reference=row.assistant,
        texts={arm: run.text(index, stop_token=False) for index, arm in enumerate(arms)},
        cut=[arm for index, arm in enumerate(arms) if run.track(index).finish_reason != "stop"],
    )


def check_answers(
    answers: Sequence[Answer], training: Mapping[str, Sequence[Row]]
) -> list[CheckResult]:
    """Scores answers in every check of their domains.

    Args:
        answers: The answers.
        training: Domain -> its training rows, for ``always_median``; may lack domains.
    """
    results = []
    for domain, checks in CHECKS.items():
        for check in checks:
            asked = [
                (answer, check.reference(answer.question, answer.reference))
                for answer in answers
                if answer.domain == domain
            ]
            asked = [(answer, reference) for answer, reference in asked if reference is not None]
            if not asked:
                continue
            references = [reference for _, reference in asked]
            results.append(
                CheckResult(
                    domain=domain,
                    check=check.name,
                    right_when=check.right_when,
                    unit=check.unit,
                    rows=len(asked),
                    arms={
                        arm: score(check, [answer.texts[arm] for answer, _ in asked], references)
                        for arm in asked[0][0].texts
                    },
                    always_median=_always_median(check, training.get(domain, ()), references),
                )
            )
    return results


def _always_median(
    check: Check, training: Sequence[Row], references: Sequence[Any]
) -> Score | None:
    values = [check.reference(row.user, row.assistant) for row in training]
    values = [value for value in values if value is not None]
    if check.error is None or not values:
        return None
    return score_values(check, [statistics.median(values)] * len(references), references)
