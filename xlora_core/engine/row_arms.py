"""An arm whose passes are rows of the shared cache: what it reads next, what it makes of that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xlora_core.config import RoutingKnobs
from xlora_core.engine.overlap import Overlap
from xlora_core.engine.row_step import RowRead, RowResult
from xlora_core.engine.runner import check_router_logits
from xlora_core.engine.tracks import ArmTrack
from xlora_core.rows import Segment

if TYPE_CHECKING:
    from xlora_core.model import XLoraModel
    from xlora_core.rows import RowCache


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """What the scaling pass says about a token that the arm's own pass has not read yet.

    Attributes:
        router_logits: ``[1, L or 1, K]``.
        lm_logits: ``[V]``, the language model's logits of the scaling pass after that token; None
            if nobody wanted them.
        knobs: What the scaling pass ran with.
        draft_logits: ``[V]``, what the arm's own logits after that token would be with the scalings
            of the token before; None if it was not read so.
    """

    router_logits: Tensor
    lm_logits: Tensor | None
    knobs: RoutingKnobs
    draft_logits: Tensor | None = None


class RowArm:
    """One arm, its rows, and what is known ahead of its next read.

    Args:
        track: What the arm writes.
        model: The model, for routing.
        row: Row of the arm's own pass.
        scaling_row: Row of its scaling pass; None for an arm that is not routed.
        constant: ``[1, 1, K]``, what a merged or expert arm holds; None for routed and base.
        with_base_logprob: Whether log-probabilities under the base model are recorded.
        guesses: Whether to guess tokens at all.

    Attributes:
        ahead: Of the unread token; None as long as the scaling pass has not read it.
    """

    def __init__(
        self,
        track: ArmTrack,
        model: XLoraModel,
        *,
        row: int,
        scaling_row: int | None,
        constant: Tensor | None,
        with_base_logprob: bool,
        guesses: bool,
    ) -> None:
        self.track = track
        self.row = row
        self.scaling_row = scaling_row
        self.ahead: Ahead | None = None
        self._model = model
        self._constant = constant
        self._scaling_pass_is_base = model.config_xlora.scaling_pass_value == 0
        self._base_logits_are_known = with_base_logprob and self._scaling_pass_is_base
        self._wants_base_logits = with_base_logprob and track.arm.kind == "base"
        self._may_guess = guesses
        self._knobs = self._scaling_knobs = track.knobs  # of the reads that run
        self._scalings: Tensor | None = None  # [1, L or 1, K], of the last token it has read
        self._guessed: list[int] = []  # for the token after the unread one, best first
        self._is_drafted = False  # whether a draft told them

    @property
    def rows(self) -> list[int]:
        """All rows of the arm."""
        return [self.row] if self.scaling_row is None else [self.row, self.scaling_row]

    @property
    def is_routed(self) -> bool:
        """Whether a scaling pass goes ahead of the arm's own."""
        return self.scaling_row is not None

    @property
    def is_base(self) -> bool:
        """Whether the arm is the base model."""
        return self._constant is None and not self.is_routed

    @property
    def needs_scaling_pass(self) -> bool:
        """Whether the unread token must go through the scaling pass before the arm reads it."""
        return self.is_routed and self.ahead is None

    # ---------------------------------------------------------------- what it reads

    def scaling_read(
        self,
        start: int,
        token_ids: list[int],
        *,
        siblings: bool = False,
        n_logits: int | None = None,
    ) -> RowRead:
        """Returns the scaling pass over tokens from ``start`` on."""
        assert self.scaling_row is not None
        self._scaling_knobs = self.track.knobs
        constant = self._model.scaling_pass_scalings(self._scaling_knobs)
        if n_logits is None:
            wanted = self._may_guess or self._base_logits_are_known
            n_logits = int(wanted and self.track.ending is None)
        return RowRead(
            segment=Segment(row=self.scaling_row, start=start, n=len(token_ids), siblings=siblings),
            token_ids=token_ids,
            scalings=None if constant is None else constant[0],
            routes=True,
            n_logits=n_logits,
        )

    def main_read(
        self,
        start: int,
        token_ids: list[int],
        router_logits: Tensor | None,
        *,
        n_logits: int,
        n_drafts: int = 0,
    ) -> RowRead:
        """Returns the arm's own pass over tokens from ``start`` on.

        Args:
            start: Position of the first.
            token_ids: The n tokens.
            router_logits: ``[n, L or 1, K]`` for a routed arm.
            n_logits: Of how many of its last tokens logits are wanted.
            n_drafts: How many of its last tokens are drafts.
        """
        scalings = self._constant
        if router_logits is not None and self.ahead is not None:
            self._knobs = self._knobs_of(self.ahead)
            scalings = self._model.route(router_logits[None], self._knobs)[0]
            self._scalings = scalings[-1:]
        return RowRead(
            segment=Segment(row=self.row, start=start, n=len(token_ids)),
            token_ids=token_ids,
            scalings=scalings,
            n_logits=n_logits,
            n_drafts=n_drafts,
        )

    def token_read(self, start: int, token_id: int, *, drafts: bool = False) -> RowRead:
        """Returns the arm's own pass over its unread token.

        Args:
            start: Its position.
            token_id: The token.
            drafts: Whether it reads the best guess of the next token, too, as if that had the same
                scalings. When the arm reads the token that it has written by then, it writes over
                what that left in its row.
        """
        router_logits = None if self.ahead is None else self.ahead.router_logits
        draft = self._guessed[:1] if drafts else []
        n_logits = 1 + len(draft)
        return self.main_read(
            start, [token_id, *draft], router_logits, n_logits=n_logits, n_drafts=len(draft)
        )

    def draft_read(self, start: int, token_id: int) -> RowRead | None:
        """Returns the arm's own pass over its unread token with the scalings of the one before.

        None where nothing is guessed from it.
        """
        if self._scalings is None or not self._may_guess or self.track.ending is not None:
            return None
        return RowRead(
            segment=Segment(row=self.row, start=start),
            token_ids=[token_id],
            scalings=self._scalings,
            n_logits=1,
            n_drafts=1,
        )

    def guess_read(self, n: int) -> RowRead | None:
        """Returns the scaling pass over n guesses of the next token; None without any.

        Without a place for another token, or without logits to guess from, there is none.
        """
        self._guessed = []
        track, ahead = self.track, self.ahead
        if not self._may_guess or ahead is None or ahead.lm_logits is None:
            return None
        self._is_drafted = ahead.draft_logits is not None
        logits = ahead.lm_logits if ahead.draft_logits is None else ahead.draft_logits
        # Guessed even if it is not read: whether it would have been right decides when to go on.
        self._guessed = track.sampler.guess(logits, max(n, 1))
        if n == 0 or track.n_tokens >= track.limit:
            return None
        return self.scaling_read(
            track.n_tokens,
            self._guessed,
            siblings=len(self._guessed) > 1,
            n_logits=len(self._guessed),
        )

    def _knobs_of(self, ahead: Ahead) -> RoutingKnobs:
        """Returns the knobs that are in force for the token that was looked ahead at.

        With a ``scaling_pass_value`` other than 0, top-k and global weight act on the scaling
        pass, too, so they are those that it ran with.
        """
        return self.track.knobs if self._scaling_pass_is_base else ahead.knobs

    # ---------------------------------------------------------------- what came of it

    def looked_ahead(self, result: RowResult, draft: RowResult | None = None) -> None:
        """Takes in the scaling pass over the unread token, or over tokens up to it.

        Args:
            result: What came of it.
            draft: What came of ``draft_read``.
        """
        assert result.router_logits is not None
        check_router_logits(result.router_logits)
        draft_logits = None if draft is None or draft.logits is None else draft.logits[-1]
        self.ahead = Ahead(
            router_logits=result.router_logits[-1:],
            lm_logits=None if result.logits is None else result.logits[-1],
            knobs=self._scaling_knobs,
            draft_logits=_sound(draft_logits),
        )

    def record_routing(self, row: int, router_logits: Tensor) -> None:
        """Records the routing of tokens that were read with the knobs of the last read."""
        self.track.record_routing(row, router_logits, self._knobs)

    def record_token_routing(self) -> None:
        """Records the routing of the token that was unread before it is written over."""
        if self.ahead is not None:
            self.record_routing(self.track.n_tokens - 1, self.ahead.router_logits)

    def write(self, logits: Tensor) -> None:
        """Writes the next token; what was known ahead is about the one before."""
        ahead, self.ahead = self.ahead, None
        base_logits = logits if self._wants_base_logits else None
        if self._base_logits_are_known and ahead is not None:
            base_logits = ahead.lm_logits
        self.track.write_token(logits, base_logits, self._knobs)

    def settle_guess(
        self,
        read: RowRead | None,
        result: RowResult | None,
        draft_logits: Tensor | None,
        *,
        cache: RowCache,
        overlap: Overlap,
    ) -> None:
        """Takes in the scaling pass over guesses, after the token was written.

        Args:
            read: What ``guess_read`` returned.
            result: What came of it.
            draft_logits: ``[V]``, what a draft of the best guess brought, if there was one.
            cache: The rows.
            overlap: Is told whether the token was among the guesses.
        """
        if not self._guessed:
            return
        token = self.track.unread
        hit = token in self._guessed
        overlap.guessed(hit=hit, drafted=self._is_drafted)
        if read is not None and result is not None:
            self.track.count_guess(hit=hit)
            if hit and result.router_logits is not None and result.logits is not None:
                which = self._guessed.index(token) if token is not None else 0
                check_router_logits(result.router_logits[which])
                cache.keep(read.segment, which)
                self.ahead = Ahead(
                    router_logits=result.router_logits[which : which + 1],
                    lm_logits=result.logits[which],
                    knobs=self._scaling_knobs,
                    draft_logits=_sound(draft_logits) if which == 0 else None,
                )

    def close(self) -> None:
        """Closes an arm that has ended, with the routing of its last token if it is known."""
        if self.ahead is not None and self.track.unread is not None:
            self._knobs = self._knobs_of(self.ahead)
            self.record_token_routing()
        self.track.close()


def _sound(draft_logits: Tensor | None) -> Tensor | None:
    """Returns a draft's logits ``[V]``; None if they hold NaN or infinity, and tell nothing."""
    if draft_logits is None or not torch.logsumexp(draft_logits, dim=-1).isfinite():
        return None
    return draft_logits
