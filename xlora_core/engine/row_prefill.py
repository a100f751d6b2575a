"""Reading a prompt in rows: the scaling pass once for all arms, then all other passes at once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from xlora_core.engine.row_arms import RowArm
from xlora_core.engine.row_plan import RowPlan, run_plans
from xlora_core.engine.row_step import RowResult, RowStep
from xlora_core.rows import RowCache


class RowPrefill:
    """Reads a part of a prompt with all arms of a request.

    As long as the prompt lasts, the scaling passes of all routed arms and the base arm read the
    same tokens the same way: the first routed arm's scaling row reads for all of them, and is
    copied at the end. With a ``scaling_pass_value`` other than 0, which knobs act on, every routed
    arm reads for itself.

    Args:
        step: Runs the reads.
        cache: The rows.
        arms: The request's arms.
        shares_scaling_pass: Whether the scaling pass is the base model.
    """

    def __init__(
        self, step: RowStep, cache: RowCache, arms: Sequence[RowArm], *, shares_scaling_pass: bool
    ) -> None:
        self._step = step
        self._cache = cache
        self._arms = arms
        self._routed = [arm for arm in arms if arm.is_routed]
        self._shares = shares_scaling_pass and bool(self._routed)
        # Base arms that need no pass of their own.
        self._riders = [arm for arm in arms if arm.is_base] if self._shares else []
        self._first_result: RowResult | None = None  # of the first routed arm's scaling pass

    @property
    def n_passes(self) -> int:
        """Number of passes over the prompt that run at once."""
        return len(self._arms) - len(self._riders)

    def read(self, start: int, token_ids: list[int]) -> None:
        """Reads a part of the prompt that is not its last."""
        router_logits = self._look_ahead(start, token_ids, is_last=False)
        self._read_main(start, token_ids, router_logits, is_last=False, n_guesses=0)

    def read_last(self, start: int, token_ids: list[int], n_guesses: int) -> list[RowPlan]:
        """Reads the last part of the prompt, and guesses of the first token of the answer.

        Args:
            start: Position of the first token.
            token_ids: The tokens.
            n_guesses: How many guesses a routed arm reads.

        Returns:
            A plan per arm with the logits of the prompt's last token.
        """
        router_logits = self._look_ahead(start, token_ids, is_last=True)
        self._copy_scaling_row(start + len(token_ids))
        plans = self._read_main(start, token_ids, router_logits, is_last=True, n_guesses=n_guesses)
        plans += [RowPlan(arm=arm, main_result=self._first_result) for arm in self._riders]
        return sorted(plans, key=lambda plan: plan.arm.track.index)

    def _look_ahead(
        self, start: int, token_ids: list[int], *, is_last: bool
    ) -> dict[RowArm, Tensor]:
        """Runs the scaling passes; returns the router logits ``[n, L or 1, K]`` of routed arms."""
        readers = self._routed[:1] if self._shares else self._routed
        if not readers:
            return {}
        wanted = None if is_last else 0
        if is_last and self._riders:
            wanted = 1
        results = self._step.run(
            [arm.scaling_read(start, token_ids, n_logits=wanted) for arm in readers]
        )
        self._first_result = results[0]
        of_arm = results * len(self._routed) if self._shares else results
        for arm, result in zip(self._routed, of_arm, strict=True):
            arm.looked_ahead(result)
        return {
            arm: result.router_logits
            for arm, result in zip(self._routed, of_arm, strict=True)
            if result.router_logits is not None
        }

    def _copy_scaling_row(self, n_tokens: int) -> None:
        """Gives the row that read for all to those who go on from there."""
        if not self._shares:
            return
        first, *others = self._routed
        rows = [arm.scaling_row for arm in others if arm.scaling_row is not None]
        rows += [arm.row for arm in self._riders]
        if first.scaling_row is not None:
            self._cache.copy_row(first.scaling_row, rows, n_tokens)

    def _read_main(
        self,
        start: int,
        token_ids: list[int],
        router_logits: dict[RowArm, Tensor],
        *,
        is_last: bool,
        n_guesses: int,
    ) -> list[RowPlan]:
        plans = [
            RowPlan(
                arm=arm,
                main=arm.main_read(start, token_ids, router_logits.get(arm), n_logits=int(is_last)),
                guess=arm.guess_read(n_guesses) if is_last else None,
            )
            for arm in self._arms
            if arm not in self._riders
        ]
        run_plans(self._step, plans)
        for arm, logits in router_logits.items():
            arm.record_routing(start, logits)
        return plans
