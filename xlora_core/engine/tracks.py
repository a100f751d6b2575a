"""One arm of a running request: it reads, chooses, and records a token at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from xlora_core.config import RoutingKnobs
from xlora_core.engine.arms import ArmDecoder, Reading
from xlora_core.engine.events import ArmFinished, TokenEvent
from xlora_core.engine.requests import Request
from xlora_core.engine.sampling import Sampler, log_softmax, on_cpu
from xlora_core.engine.text import decode_pieces, piece_decoder
from xlora_core.errors import EngineError

if TYPE_CHECKING:
    from torch import Tensor

    from xlora_core.model import XLoraModel
    from xlora_core.recording import FinishReason, TrackRecorder


N_ALTERNATIVES = 5
# Long prompts are read in parts, so that a cancel need not wait for the whole of one.
PREFILL_CHUNK = 512
# A routed arm needs some knobs to be read with; other arms take no notice of theirs.
_NO_KNOBS = RoutingKnobs()


class ArmTrack:
    """One arm of a running request: decoder, sampler, text and record together.

    Args:
        index: The arm's number in the request.
        request: The request.
        recorder: Where its rows go.
        model: The model.
        tokenizer: The tokenizer.
        stop_ids: Tokens that end an answer.
        context_length: Most tokens, prompt and answer together.
    """

    def __init__(
        self,
        index: int,
        request: Request,
        recorder: TrackRecorder,
        model: XLoraModel,
        tokenizer: Any,
        *,
        stop_ids: frozenset[int],
        context_length: int,
    ) -> None:
        self._index = index
        self._request = request
        self._recorder = recorder
        self._stop_ids = stop_ids
        prompt = request.prompt.token_ids
        self._limit = min(len(prompt) + request.sampling.max_new_tokens, context_length)
        self._decoder = ArmDecoder(
            model, request.arms[index], with_base_logits=request.with_base_logprob
        )
        self._sampler = Sampler(request.sampling, prompt, n_alternatives=N_ALTERNATIVES)
        self._text = piece_decoder(tokenizer)
        self._n_tokens = 0  # tokens known, read or not
        self._unread: list[int] = []  # the last token written, which the model has yet to read
        self._started = 0.0
        self.finished = False

    def prefill(self, check: Callable[[], None]) -> None:
        """Reads the prompt and writes the first token.

        Args:
            check: Called before each part; raises to stop.
        """
        self._started = time.perf_counter()
        prompt = self._request.prompt.token_ids
        while True:
            check()
            start = self._n_tokens
            chunk = prompt[start : start + PREFILL_CHUNK]
            self._recorder.append_prompt(chunk, decode_pieces(self._text, chunk))
            self._n_tokens += len(chunk)
            knobs = self._knobs()
            reading = self._read(start, chunk, knobs)
            if self._n_tokens == len(prompt):
                break
        self._write_token(reading, knobs)

    def step(self) -> None:
        """Reads the last token and writes the next one."""
        knobs = self._knobs()
        self._write_token(self._read(self._n_tokens - 1, self._unread, knobs), knobs)

    def finish(self, reason: FinishReason) -> None:
        """Ends the arm. One last scaling pass gives the last token its row, too."""
        if self.finished:
            return
        for token_id in self._unread:
            knobs = self._knobs()
            router_logits = self._decoder.read_router(token_id, knobs)
            self._record_routing(self._n_tokens - 1, router_logits, knobs)
        self.abandon(reason)
        self._request.emit(ArmFinished(arm=self._index, reason=reason))

    def abandon(self, reason: FinishReason) -> None:
        """Ends the arm without touching the model, and frees its caches."""
        if not self.finished:
            self.finished = True
            self._decoder.release()
            self._recorder.finish(reason)

    def _knobs(self) -> RoutingKnobs:
        return self._request.knobs(self._index) or _NO_KNOBS

    def _read(self, row: int, token_ids: list[int], knobs: RoutingKnobs) -> Reading:
        reading = self._decoder.read(token_ids, knobs)
        self._record_routing(row, reading.router_logits, knobs)
        return reading

    def _record_routing(self, row: int, rows: Tensor | None, knobs: RoutingKnobs) -> None:
        if rows is not None:
            self._recorder.set_router_logits(row, rows)
            self._recorder.set_knobs(row, rows.shape[0], knobs)

    def _write_token(self, reading: Reading, knobs: RoutingKnobs) -> None:
        try:
            choice = self._sampler.choose(reading.logits)
        except EngineError as error:
            arm = self._request.arms[self._index]
            raise EngineError(
                f"arm {self._index} ({arm.label}), after {self._n_tokens} tokens: {error.message}",
                hint=error.hint,
            ) from error
        base_logprob = math.nan
        if reading.base_logits is not None:
            base_logprob = float(log_softmax(on_cpu(reading.base_logits))[choice.token_id])
        self._unread = [choice.token_id]
        self._n_tokens += 1
        stopped = choice.token_id in self._stop_ids
        last = stopped or self._n_tokens >= self._limit
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
                arm=self._index,
                index=self._n_tokens - 1,
                token_id=choice.token_id,
                piece=piece,
                logprob=choice.logprob,
                base_logprob=base_logprob,
                knobs=knobs if self._request.arms[self._index].kind == "routed" else None,
            )
        )
        if last:
            self.finish("stop" if stopped else "length")
