"""Holds an engine's model between two reads, so that tests need no sleeping."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from xlora_core.model import XLoraModel

_PATIENCE = 60  # seconds; only a broken engine ever waits this long


class Pacer:
    """Stops the engine's thread at the start of every main pass until it is told to go on.

    Args:
        model: The model; its ``main_pass`` is replaced for the length of the test.
        monkeypatch: Undoes that.
        before_read: Called in the engine's thread with the number of the read, from 0; may raise.
    """

    def __init__(
        self,
        model: XLoraModel,
        monkeypatch: pytest.MonkeyPatch,
        before_read: Callable[[int], None] | None = None,
    ) -> None:
        self._arrived = threading.Semaphore(0)
        self._go = threading.Semaphore(0)
        self._free = False
        self.n_reads = 0
        original = model.main_pass

        def main_pass(**inputs: Any) -> Any:
            if not self._free:
                self._arrived.release()
                assert self._go.acquire(timeout=_PATIENCE), "nobody let the engine go on"
            self.n_reads += 1
            if before_read is not None:
                before_read(self.n_reads - 1)
            return original(**inputs)

        monkeypatch.setattr(model, "main_pass", main_pass)

    def hold(self) -> None:
        """Waits until the engine stands before its next read."""
        assert self._arrived.acquire(timeout=_PATIENCE), "the engine never came to a read"

    def step(self, n: int = 1) -> None:
        """Lets n reads happen and waits until the engine stands before the next."""
        for _ in range(n):
            self._go.release()
            self.hold()

    def release(self) -> None:
        """Lets the engine run freely from here on."""
        self._free = True
        self._go.release()
