"""The engine thread's work on one request: prefill its arms, then a token each in turn."""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from xlora_core.engine.requests import Request
from xlora_core.engine.tracks import N_ALTERNATIVES, ArmTrack
from xlora_core.errors import EngineError, XLoraError
from xlora_core.recording import RunRecorder, TrackRecorder

if TYPE_CHECKING:
    from xlora_core.model import XLoraModel

logger = logging.getLogger(__name__)


class CancelledError(Exception):
    """The request's owner asked to stop."""


def serve(
    request: Request,
    model: XLoraModel,
    tokenizer: Any,
    *,
    stop_ids: frozenset[int],
    context_length: int,
    check_open: Callable[[], None],
) -> None:
    """Runs a request to its end. Arms advance in turn, a token each.

    Whatever goes wrong ends this request as failed; nothing is raised.

    Args:
        request: The request.
        model: The model.
        tokenizer: The tokenizer.
        stop_ids: Tokens that end an answer.
        context_length: Most tokens, prompt and answer together.
        check_open: Raises if the engine is being closed.
    """
    tracks: list[ArmTrack] = []

    def check() -> None:
        check_open()
        if request.cancelled:
            raise CancelledError

    try:
        try:
            recorders = _start(request, context_length)
            tracks += [
                ArmTrack(
                    index,
                    request,
                    recorder,
                    model,
                    tokenizer,
                    stop_ids=stop_ids,
                    context_length=context_length,
                )
                for index, recorder in enumerate(recorders)
            ]
            _advance(request, tracks, check)
        except CancelledError:
            for track in tracks:
                track.finish("cancelled")
        request.finish()
    except Exception as error:
        # A thread that serves everybody must outlive whatever one request runs into.
        fault = as_xlora_error(error)
        for track in tracks:
            track.abandon("error")
        request.fail(fault)


def _start(request: Request, context_length: int) -> list[TrackRecorder]:
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


def _advance(request: Request, tracks: list[ArmTrack], check: Callable[[], None]) -> None:
    for track in tracks:
        track.prefill(check)
    request.enter_decode()
    while active := [track for track in tracks if not track.finished]:
        for track in active:
            check()
            track.step()


def as_xlora_error(error: Exception) -> XLoraError:
    """Returns an error that a user can read; unexpected ones are logged with their traceback."""
    if isinstance(error, XLoraError):
        fault: XLoraError = error
    elif is_out_of_memory(error):
        fault = EngineError(
            "the model ran out of memory with this request; it was given up, others go on",
            hint="shorten the prompt or max_new_tokens, or compare fewer arms at once",
        )
    else:
        logger.error("a request failed inside the engine", exc_info=error)
        fault = EngineError(
            f"the request failed inside the engine: {type(error).__name__}: {error}",
            hint="the log has the traceback; the engine goes on with the next request",
        )
    if fault is not error:
        fault.__cause__ = error
    # The traceback's frames hold the tensors that did not fit; let go of them.
    traceback.clear_frames(error.__traceback__)
    if is_out_of_memory(error):
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return fault


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or in the process."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        # PyTorch's CPU allocator has no exception class of its own.
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )
