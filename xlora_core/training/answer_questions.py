"""Which held-out questions are put to the arms."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xlora_core.training.answer_checks import CHECKS, outright
from xlora_core.training.data import Row, encode


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """Which answers are written.

    Attributes:
        rows: Rows of each check, >= 1; a row that asks for two things counts for both.
        max_new_tokens: Most tokens of an answer, >= 1. Only rows are asked whose own answer fits,
            so that the right answer is never one that is cut.
    """

    rows: int = 16
    max_new_tokens: int = 256


def checked_rows(
    rows: Mapping[str, Sequence[Row]], tokenizer: Any, settings: AnswerSettings, context: int
) -> dict[str, list[Row]]:
    """Returns rows to ask: as many of each check as there are, and as the settings allow.

    Their questions are the ones that are put (``outright``). A domain without checks, or without
    rows that ask for anything that is checked, is left out.

    Args:
        rows: Domain -> held-out rows.
        tokenizer: The base model's tokenizer.
        settings: How many rows, and how long their answers may be.
        context: Most tokens that the model can read.
    """
    chosen: dict[str, list[Row]] = {}
    for domain, group in rows.items():
        put = [outright(row, domain) for row in group if row.user]
        random.Random(0).shuffle(put)
        counts: Counter[str] = Counter()
        for row in put:
            checks = [
                check.name
                for check in CHECKS.get(domain, ())
                if check.reference(row.user, row.assistant) is not None
            ]
            wanted = any(counts[name] < settings.rows for name in checks)
            if wanted and _fits(row, tokenizer, settings, context):
                counts.update(checks)
                chosen.setdefault(domain, []).append(row)
    return chosen


def _fits(row: Row, tokenizer: Any, settings: AnswerSettings, context: int) -> bool:
    example = encode([row], tokenizer, context)
    if example is None:
        return False
    n_answer = sum(name != "" for name in example.domains)
    n_prompt = len(example) - n_answer
    return n_answer <= settings.max_new_tokens <= context - n_prompt
