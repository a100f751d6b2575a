"""A request that the engine works on, with the arms it consists of."""

from __future__ import annotations

from typing import Any

from xlora_core.engine.faults import as_xlora_error
from xlora_core.engine.requests import Request
from xlora_core.engine.tracks import N_ALTERNATIVES, ArmTrack
from xlora_core.engine.waiting import Work
from xlora_core.recording import FinishReason, RunRecorder, TrackRecorder


class ActiveRequest:
    """A request taken out of the queue: its record is open, its arms read and write.

    Args:
        request: The request; its record is opened here.
        tokenizer: The tokenizer.
        stop_ids: Tokens that end an answer.
        context_length: Most tokens, prompt and answer together.
        deadline: When it is stopped in any case, on the scheduler's clock; None: never.

    Attributes:
        request: The request.
        prompt: The prompt's token ids.
        tracks: One per arm.
        n_read: Tokens of the prompt that all arms have read.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Any,
        *,
        stop_ids: frozenset[int],
        context_length: int,
        deadline: float | None = None,
    ) -> None:
        self.request = request
        self._deadline = deadline
        self.prompt = request.prompt.token_ids
        self.n_read = 0
        recorders = _open_record(request, context_length)
        self.tracks = [
            ArmTrack(
                index,
                request,
                recorder,
                tokenizer,
                stop_ids=stop_ids,
                context_length=context_length,
            )
            for index, recorder in enumerate(recorders)
        ]

    @property
    def reads_tokens(self) -> bool:
        """Whether the prompt is done with: read to its end, or given up."""
        given_up = any(track.ending in ("cancelled", "time") for track in self.tracks)
        return given_up or self.n_read == len(self.prompt)

    @property
    def ended(self) -> bool:
        """Whether every arm's record is closed."""
        return all(track.finished for track in self.tracks)

    @property
    def limit(self) -> int:
        """Most tokens of an arm, prompt and answer together."""
        return self.tracks[0].limit

    @property
    def n_written(self) -> int:
        """Tokens of the longest answer so far."""
        return max(max(track.n_tokens - len(self.prompt), 0) for track in self.tracks)

    @property
    def answered(self) -> bool:
        """Whether all arms ended by themselves or at the limit of tokens."""
        return all(track.ending in ("stop", "length") for track in self.tracks)

    def work(self, now: float) -> Work:
        """Returns what is left to do. Any thread may ask."""
        n_tokens = [track.n_tokens for track in self.tracks if track.writes]
        return Work(
            n_to_read=len(self.prompt) - self.n_read,
            n_to_write=max((self.limit - max(n, len(self.prompt)) for n in n_tokens), default=0),
            most_seconds=None if self._deadline is None else max(self._deadline - now, 0.0),
        )

    def stop_if_due(self, now: float) -> None:
        """Stops the arms of a request that was cancelled or is out of time."""
        if self.request.cancelled:
            self._stop("cancelled")
        elif self._deadline is not None and now >= self._deadline:
            self._stop("time")

    def _stop(self, reason: FinishReason) -> None:
        """Ends all arms; a prompt that is half read is left so."""
        for track in self.tracks:
            track.end(reason)

    def finish(self) -> None:
        """Tells that all arms have ended."""
        self.request.finish()

    def fail(self, error: Exception) -> None:
        """Ends the request as failed; what was recorded stays readable."""
        fault = as_xlora_error(error)
        for track in self.tracks:
            track.abandon("error")
        self.request.fail(fault)


def _open_record(request: Request, context_length: int) -> list[TrackRecorder]:
    """Takes the request out of the queue and opens its record; returns one recorder per arm."""
    header = request.header
    arms = request.leave_queue()
    n_rows = request.limit(context_length)
    n_routed_layers = len(header.layer_names) if header.layerwise else 1
    recorders = [
        TrackRecorder(
            arm,
            n_rows,
            n_routed_layers if arm.kind == "routed" else None,
            len(header.adapter_names),
            n_alternatives=N_ALTERNATIVES,
        )
        for arm in arms
    ]
    request.start(RunRecorder(header, recorders))
    return recorders
