"""All arms of all requests in one run over the weights, scaling passes ahead of main passes."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xlora_core.engine.active import ActiveRequest
from xlora_core.engine.admission import Admission, MemoryBudget, Need
from xlora_core.engine.arms import constant_scalings
from xlora_core.engine.overlap import Guessing, Overlap
from xlora_core.engine.requests import Request
from xlora_core.engine.row_arms import RowArm
from xlora_core.engine.row_plan import RowPlan, run_plans
from xlora_core.engine.row_prefill import RowPrefill
from xlora_core.engine.row_step import RowStep
from xlora_core.engine.runner import Runner, record_bytes
from xlora_core.rows import RowReader

if TYPE_CHECKING:
    from xlora_core.model import XLoraModel

_logger = logging.getLogger(__name__)

# Rows and positions that the cache grows by: growing copies what is there.
_BLOCK = (1, 256)
# Where it stays for good, recorded steps hold its addresses, and growing forgets them all.
_KEPT_BLOCK = (8, 2048)


class RowRunner(Runner):
    """Runs every pass of every arm as a row of one cache.

    A routed arm has two rows. While its main row reads a token, its scaling row reads a guess of
    the next one, and so may the main row, as a draft (see ``Overlap``). If the arm then writes that
    token, its scalings are there already; if not, the scaling row reads the right one in the next
    step, at the same place. Every token is chosen from the main pass over it with its own scalings,
    so guessing changes no result.

    Args:
        model: The model.
        reader: Runs its base over rows.
        overlap: Whether to guess.
        keeps_cache: Whether the cache stays when nobody runs, as recorded steps need it.
    """

    def __init__(
        self, model: XLoraModel, reader: RowReader, overlap: Overlap, *, keeps_cache: bool = False
    ) -> None:
        self._model = model
        self._reader = reader
        self._step = RowStep(model, reader)
        self._overlap = overlap
        self._arms: dict[ActiveRequest, list[RowArm]] = {}
        self._free: list[int] = []
        self._keeps_cache = keeps_cache
        self._row_block, self._token_block = _KEPT_BLOCK if keeps_cache else _BLOCK
        self._told: set[type[Exception]] = set()

    # ---------------------------------------------------------------- rows

    def books(self, budget: MemoryBudget) -> Admission:
        """Returns the books of the one cache that all rows lie in."""
        return Admission(
            budget,
            self._reader.cache.bytes_per_token,
            row_block=self._row_block,
            token_block=self._token_block,
            keeps_block=self._keeps_cache,
        )

    def need(self, request: Request, n_tokens: int) -> Need:
        """Returns the rows of a request's arms; a routed one has two."""
        return Need(
            n_rows=_n_rows(request),
            n_tokens=self._n_places(n_tokens),
            record_bytes=record_bytes(request, n_tokens),
        )

    def _n_places(self, n_tokens: int) -> int:
        """Returns the positions of a row: siblings lie beyond the last token until one is kept."""
        return n_tokens + self._overlap.n_siblings

    def admit(self, active: ActiveRequest) -> None:
        """Takes the rows of a request's arms and makes room for their tokens."""
        n_needed = _n_rows(active.request)
        n_tokens = self._n_places(active.limit)
        cache = self._reader.cache
        n_missing = max(n_needed - len(self._free), 0)
        n_rows = cache.n_rows + _blocks(n_missing, self._row_block)
        new = range(cache.n_rows, n_rows)
        cache.grow(n_rows, _blocks(n_tokens, self._token_block))
        self._free = sorted([*self._free, *new], reverse=True)
        self._arms[active] = [
            RowArm(
                track,
                self._model,
                row=self._free.pop(),
                scaling_row=self._free.pop() if track.is_routed else None,
                constant=self._constant(active, track.index),
                with_base_logprob=active.request.with_base_logprob,
                guesses=self._overlap.mode != "off",
            )
            for track in active.tracks
        ]

    def _constant(self, active: ActiveRequest, index: int) -> Tensor | None:
        values = constant_scalings(active.tracks[index].arm, self._model.adapter_names)
        if values is None:
            return None
        dtype = torch.promote_types(self._model.dtype, torch.float32)
        return torch.tensor(values, dtype=dtype, device=self._model.device).view(1, 1, -1)

    def release(self, active: ActiveRequest) -> None:
        """Gives a request's rows back; with the last one the memory goes, too."""
        rows = [row for arm in self._arms.pop(active, []) for row in arm.rows]
        if self._arms or self._keeps_cache:
            # A NaN that a broken text left behind would reach the next one even through a mask.
            n_read = max(track.n_tokens for track in active.tracks)
            self._reader.cache.erase(rows, self._n_places(n_read))
            self._free += rows
        else:
            self.free_cache()

    def free_cache(self) -> None:
        """Frees all rows."""
        self._free = []
        self._reader.cache.clear()

    def close(self) -> None:
        """Frees the rows and whatever else the reader holds."""
        self._free = []
        self._reader.close()

    # ---------------------------------------------------------------- prompts

    def prefill(self, active: ActiveRequest, n: int | None) -> None:
        """Reads the next part of a prompt; after the last, every arm writes its first token."""
        arms = self._arms[active]
        prefill = RowPrefill(
            self._step,
            self._reader.cache,
            arms,
            shares_scaling_pass=self._model.config_xlora.scaling_pass_value == 0,
        )
        start = active.n_read
        stop = None if n is None else start + max(1, n // prefill.n_passes)
        chunk = list(active.prompt[start:stop])
        for arm in arms:
            arm.track.read_prompt(chunk)
        if start + len(chunk) < len(active.prompt):
            prefill.read(start, chunk)
        else:
            n_guesses = self._overlap.choose(*_counts(arms)).n
            for plan in prefill.read_last(start, chunk, n_guesses):
                self._write(plan)
        active.n_read += len(chunk)

    # ---------------------------------------------------------------- decode

    def decode(self, actives: Sequence[ActiveRequest]) -> list[tuple[ActiveRequest, Exception]]:
        """Reads the last token of every arm at once, and writes the next ones."""
        try:
            return self._decode(actives)
        except Exception as error:  # of the run over all of them
            if len(actives) == 1:
                return [(actives[0], error)]
            self._tell(error)
        # Nothing was written, and reading a token again changes nothing: each goes on alone, and
        # the one that cannot is the one that fails.
        return [failure for active in actives for failure in self.decode([active])]

    def _tell(self, error: Exception) -> None:
        """Logs why requests had to go on one by one, each kind of reason once."""
        if type(error) not in self._told:
            self._told.add(type(error))
            _logger.warning("a step of several requests failed, each goes on alone", exc_info=error)

    def _decode(self, actives: Sequence[ActiveRequest]) -> list[tuple[ActiveRequest, Exception]]:
        started = time.perf_counter()
        arms = [arm for active in actives for arm in self._arms[active]]
        guessing = self._overlap.choose(*_counts([arm for arm in arms if arm.track.writes]))
        plans = {active: self._plans(self._arms[active], guessing) for active in actives}
        n_read = run_plans(self._step, [plan for some in plans.values() for plan in some])
        failed: list[tuple[ActiveRequest, Exception]] = []
        for active, some in plans.items():
            try:
                for plan in some:
                    self._take_in(plan)
            except Exception as error:  # concerns this request; the others go on
                failed.append((active, error))
        if n_read:
            self._overlap.took(n_read, time.perf_counter() - started)
        return failed

    def _plans(self, arms: Sequence[RowArm], guessing: Guessing) -> list[RowPlan]:
        """Returns what the arms of a request read next."""
        plans = []
        for arm in arms:
            track, place = arm.track, arm.track.n_tokens - 1
            if track.finished:
                continue
            if track.unread is None:  # ended before the prompt did
                arm.close()
            elif arm.needs_scaling_pass:
                draft = arm.draft_read(place, track.unread) if guessing.drafts else None
                scaling = arm.scaling_read(place, [track.unread])
                plans.append(RowPlan(arm=arm, scaling=scaling, draft=draft))
            elif track.ending is not None:
                arm.close()
            else:
                guess = arm.guess_read(guessing.n)
                drafts = guessing.drafts and guess is not None
                main = arm.token_read(place, track.unread, drafts=drafts)
                plans.append(RowPlan(arm=arm, main=main, guess=guess))
        return plans

    def _take_in(self, plan: RowPlan) -> None:
        """Goes on with what an arm's reads brought."""
        arm = plan.arm
        if plan.scaling_result is not None:
            arm.looked_ahead(plan.scaling_result, plan.draft_result)
        else:
            arm.record_token_routing()
            self._write(plan)
        if arm.track.ending is not None and not arm.needs_scaling_pass:
            arm.close()

    def _write(self, plan: RowPlan) -> None:
        """Writes an arm's next token, and finds out whether it was guessed."""
        arm, result = plan.arm, plan.main_result
        assert result is not None
        assert result.logits is not None
        arm.write(result.logits[0])
        arm.settle_guess(
            plan.guess,
            plan.guess_result,
            result.logits[1] if len(result.logits) > 1 else None,
            cache=self._reader.cache,
            overlap=self._overlap,
        )


def _counts(arms: Sequence[RowArm]) -> tuple[int, int]:
    """Returns how many arms are routed, and how many are not."""
    n_routed = sum(arm.is_routed for arm in arms)
    return n_routed, len(arms) - n_routed


def _n_rows(request: Request) -> int:
    """Returns the rows of a request's arms; a routed one has two."""
    return sum(2 if arm.kind == "routed" else 1 for arm in request.arms)


def _blocks(n: int, block: int) -> int:
    """Returns the smallest multiple of ``block`` that is not less than n."""
    return -(-n // block) * block
