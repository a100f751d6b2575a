"""Answers to held-out questions, written by every arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xlora_core.config import AdapterOverride, Arm, RoutingKnobs, SamplingParams
from xlora_core.engine import Engine, RequestHandle
from xlora_core.model import XLoraModel
from xlora_core.training.answer_questions import AnswerSettings
from xlora_core.training.data import Row
from xlora_core.training.progress import Report, silent

_REQUESTS_TOGETHER = 8  # their arms share every run over the weights


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was written to one question.

    Attributes:
        domain: The row's domain.
        id: The row's id.
        question: Its last question, as it was put.
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
