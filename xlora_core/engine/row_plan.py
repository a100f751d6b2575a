"""What arms read in one step, and what came of it, arm by arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xlora_core.engine.row_arms import RowArm
from xlora_core.engine.row_step import RowRead, RowResult, RowStep


@dataclass(kw_only=True)
class RowPlan:
    """The reads of one arm in a step, and their results once it has run.

    Attributes:
        arm: The arm.
        scaling: Its scaling pass over the unread token; nothing but a draft is read then.
        draft: Its own pass over the unread token as a draft.
        main: Its own pass over the unread token, and over the best guess as a draft; or over a part
            of the prompt.
        guess: Its scaling pass over guesses of the token after that.
        scaling_result: What came of ``scaling``.
        draft_result: What came of ``draft``.
        main_result: What came of ``main``.
        guess_result: What came of ``guess``.
    """

    arm: RowArm
    scaling: RowRead | None = None
    draft: RowRead | None = None
    main: RowRead | None = None
    guess: RowRead | None = None
    scaling_result: RowResult | None = None
    draft_result: RowResult | None = None
    main_result: RowResult | None = None
    guess_result: RowResult | None = None


def run_plans(step: RowStep, plans: Sequence[RowPlan]) -> int:
    """Runs the reads of all plans at once and fills in the results.

    Returns:
        The number of tokens read.

    Raises:
        Exception: Whatever went wrong; nothing is filled in then.
    """
    reads = [
        read
        for plan in plans
        for read in (plan.scaling, plan.draft, plan.main, plan.guess)
        if read is not None
    ]
    if not reads:
        return 0
    results = iter(step.run(reads))
    for plan in plans:
        plan.scaling_result = next(results) if plan.scaling is not None else None
        plan.draft_result = next(results) if plan.draft is not None else None
        plan.main_result = next(results) if plan.main is not None else None
        plan.guess_result = next(results) if plan.guess is not None else None
    return sum(read.segment.n for read in reads)
