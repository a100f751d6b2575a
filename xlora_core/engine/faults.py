"""What a request is told when something went wrong in the engine."""

from __future__ import annotations

import gc
import logging
import traceback

import torch

from xlora_core.errors import EngineError, XLoraError

logger = logging.getLogger(__name__)


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


def closed_error(when: str) -> EngineError:
    """Returns what requests are told that an engine's end cut off."""
    return EngineError(f"the engine was closed {when}", hint="submit it to a new Engine")


def told_anew(failure: EngineError) -> EngineError:
    """Returns the same failure for somebody else: an error keeps the frames it was raised in."""
    return EngineError(failure.message, hint=failure.hint)
