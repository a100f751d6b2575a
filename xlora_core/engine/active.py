"""A request that the engine works on, with the arms it consists of."""

from __future__ import annotations

from typing import Any

from xlora_core.engine.faults import as_xlora_error
from xlora_core.engine.requests import Request
from xlora_core.engine.tracks import N_ALTERNATIVES, ArmTrack
from xlora_core.recording import RunRecorder, TrackRecorder


class ActiveRequest:
    """A request taken out of the queue: its record is open, its arms read and write.

    Args:
        request: The request; its record is opened here.
        tokenizer: The tokenizer.
        stop_ids: Tokens that end an answer.
        context_length: Most tokens, prompt and answer together.

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
    ) -> None:
        self.request = request
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
        """Whether the prompt is done with: read to its end, or cancelled."""
        cancelled = any(track.ending == "cancelled" for track in self.tracks)
        return cancelled or self.n_read == len(self.prompt)

    @property
    def ended(self) -> bool:
        """Whether every arm's record is closed."""
        return all(track.finished for track in self.tracks)

    @property
    def limit(self) -> int:
        """Most tokens of an arm, prompt and answer together."""
        return self.tracks[0].limit

    def cancel(self) -> None:
        """Ends all arms; a prompt that is half read is left so."""
        for track in self.tracks:
            track.end("cancelled")

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
    n_rows = min(len(request.prompt.token_ids) + request.sampling.max_new_tokens, context_length)
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
