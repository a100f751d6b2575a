"""What one arm of a running request writes: tokens, text, record and events."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from xlora_core.config import RoutingKnobs
from xlora_core.engine.events import ArmFinished, TokenEvent
from xlora_core.engine.requests import Request
from xlora_core.engine.sampling import Sampler, logprob_of
from xlora_core.engine.text import decode_pieces, piece_decoder
from xlora_core.errors import EngineError

if TYPE_CHECKING:
    from torch import Tensor

    from xlora_core.recording import FinishReason, TrackRecorder


N_ALTERNATIVES = 5
# A routed arm needs some knobs to be read with; other arms take no notice of theirs.
_NO_KNOBS = RoutingKnobs()


class ArmTrack:
    """One arm of a running request: sampler, text and record together. It never runs the model.

    Args:
        index: The arm's number in the request.
        request: The request.
        recorder: Where its rows go.
        tokenizer: The tokenizer.
        stop_ids: Tokens that end an answer.
        context_length: Most tokens, prompt and answer together.

    Attributes:
        arm: The arm.
        n_tokens: Tokens known, read by the model or not.
        limit: Most tokens, prompt and answer together.
        unread: The last token written, which the model has yet to read; None before the first.
        ending: Why the arm writes no more, while the routing of its last token is still to be
            recorded.
        finished: Whether the record is closed.
        sampler: Picks its tokens.
    """

    def __init__(
        self,
        index: int,
        request: Request,
        recorder: TrackRecorder,
        tokenizer: Any,
        *,
        stop_ids: frozenset[int],
        context_length: int,
    ) -> None:
        self.index = index
        self.arm = request.arms[index]
        self.is_routed = self.arm.kind == "routed"
        self._request = request
        self._recorder = recorder
        self._stop_ids = stop_ids
        prompt = request.prompt.token_ids
        self.limit = request.limit(context_length)
        self.sampler = Sampler(request.sampling, prompt, n_alternatives=N_ALTERNATIVES)
        self._text = piece_decoder(tokenizer)
        self.n_tokens = 0
        self.unread: int | None = None
        self.ending: FinishReason | None = None
        self.finished = False
        self._started = 0.0

    @property
    def knobs(self) -> RoutingKnobs:
        """The knobs that the next token is read with."""
        return self._request.knobs(self.index) or _NO_KNOBS

    @property
    def writes(self) -> bool:
        """Whether the arm goes on writing tokens."""
        return self.ending is None and not self.finished

    def read_prompt(self, token_ids: Sequence[int]) -> None:
        """Records the next tokens of the prompt."""
        if not self.n_tokens:
            self._started = time.perf_counter()
        self._recorder.append_prompt(token_ids, decode_pieces(self._text, token_ids))
        self.n_tokens += len(token_ids)

    def record_routing(self, row: int, router_logits: Tensor, knobs: RoutingKnobs) -> None:
        """Records the routing of tokens from ``row`` on.

        Args:
            row: The first token.
            router_logits: ``[n, L or 1, K]``, any device.
            knobs: In force for these tokens.
        """
        self._recorder.set_router_logits(row, router_logits.to("cpu"))
        self._recorder.set_knobs(row, router_logits.shape[0], knobs)

    def write_token(self, logits: Tensor, base_logits: Tensor | None, knobs: RoutingKnobs) -> None:
        """Chooses the next token and tells about it.

        Args:
            logits: ``[V]``, the arm's logits after its last token.
            base_logits: ``[V]``, the base model's; None where they are not known.
            knobs: What the last token was read with.

        Raises:
            EngineError: If the logits hold NaN or infinity.
        """
        try:
            choice = self.sampler.choose(logits)
        except EngineError as error:
            raise EngineError(
                f"arm {self.index} ({self.arm.label}), after {self.n_tokens} tokens: "
                f"{error.message}",
                hint=error.hint,
            ) from error
        base_logprob = math.nan
        if base_logits is not None:
            base_logprob = logprob_of(base_logits, choice.token_id)
        self.unread = choice.token_id
        self.n_tokens += 1
        stopped = choice.token_id in self._stop_ids
        last = stopped or self.n_tokens >= self.limit
        piece = self._text.push(choice.token_id, last=last)
        self._recorder.append(
            choice.token_id,
            piece,
            choice.logprob,
            base_logprob,
            alternatives=(choice.alternative_ids, choice.alternative_logprobs),
            seconds=time.perf_counter() - self._started,
        )
        self._request.emit(
            TokenEvent(
                arm=self.index,
                index=self.n_tokens - 1,
                token_id=choice.token_id,
                piece=piece,
                logprob=choice.logprob,
                base_logprob=base_logprob,
                knobs=knobs if self.is_routed else None,
            )
        )
        if last:
            self.end("stop" if stopped else "length")

    def count_guess(self, *, hit: bool) -> None:
        """Records that a guess of the next token was read, and whether it was right."""
        self._recorder.count_guess(hit)

    def end(self, reason: FinishReason) -> None:
        """Writes no more. The record stays open until ``close``: the last token has no row yet."""
        if self.writes:
            self.ending = reason

    def close(self) -> None:
        """Closes the record of an arm that has ended."""
        if self.ending is not None and not self.finished:
            self.finished = True
            self._recorder.finish(self.ending)
            self._request.emit(ArmFinished(arm=self.index, reason=self.ending))

    def abandon(self, reason: FinishReason) -> None:
        """Closes the record as it stands, without a word."""
        if not self.finished:
            self.finished = True
            self._recorder.finish(reason)
