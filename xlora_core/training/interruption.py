"""Ctrl-C ends a training run after its step, so that the checkpoint is one of a whole step."""

from __future__ import annotations

import contextlib
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback

from xlora_core.training.progress import Progress


class Interruption(TrainerCallback):
    """Takes Ctrl-C while its ``with`` block runs; a second one stops at once.

    Outside the main thread, where Python handles no signals, and where the process ignores Ctrl-C,
    it does nothing.

    Args:
        progress: Told when the run is about to stop.

    Attributes:
        requested: Whether Ctrl-C came.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> Interruption:
        in_main_thread = threading.current_thread() is threading.main_thread()
        # Whoever started the process with Ctrl-C ignored (nohup, a job in the background) meant it.
        if in_main_thread and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._previous = signal.signal(signal.SIGINT, self._take)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()  # the next one is not ours
        with contextlib.suppress(RuntimeError):  # if it came in the midst of another line
            self.progress.note("stops after this step; Ctrl-C again stops at once, without saving")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Saves and stops, if Ctrl-C came during the step."""
        if self.requested:
            control.should_save = True
            control.should_training_stop = True
