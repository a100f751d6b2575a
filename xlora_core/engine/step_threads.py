"""How many threads compute a decode step, measured while it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from xlora_core.layers import XLoraLayer
    from xlora_core.model import XLoraModel

# A probe shall be long enough to meet another process on the same core, and short beside a step.
_PROBE_SECONDS = 0.004
_N_PRODUCTS = 32
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MAX_ELEMENTS = 2**20  # of a product's matrix, so that a probe of a large model stays short


class StepThreads:
    """Chooses the number of threads that is fastest just now: 1, 2, 4, ... or all.

    A decode step is hundreds of operations of some 0.1 ms, and after each the threads wait for
    each other. With cores of their own two threads are nearly twice as fast as one. Where another
    process wants one of the cores, each wait can last until the system changes tasks, and the step
    takes ten times as long as with one thread. So a few matrix products are timed now and then.

    Args:
        work: Matrix products as of a step; none of them should take a millisecond. Empty: nothing
            is probed, nothing changed.
        n_threads: The most threads.
        interval: Seconds between probes; doubled up to ``longest`` as long as the choice holds.
        longest: Seconds.
        clock: Seconds that pass.
        thread_clock: Seconds that the calling thread computes.
    """

    def __init__(
        self,
        work: Sequence[Callable[[], object]],
        n_threads: int,
        *,
        interval: float = 0.5,
        longest: float = 4.0,
        clock: Callable[[], float] = time.perf_counter,
        thread_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._work = work
        self._n_threads = n_threads
        self._interval, self._shortest, self._longest = interval, interval, longest
        self._clock, self._thread_clock = clock, thread_clock
        self._n_rounds = 0  # of the work in a probe
        self._next_probe = -float("inf")
        self._chosen = n_threads

    @classmethod
    def of(cls, model: XLoraModel) -> StepThreads:
        """Returns the choice for a model's decode steps; for one on a GPU it changes nothing."""
        return cls(matrix_products(model), torch.get_num_threads())

    @property
    def chosen(self) -> int:
        """The number of threads that the last probe found fastest."""
        return self._chosen

    @contextmanager
    def running(self) -> Iterator[None]:
        """Computes the block with the threads chosen; afterwards all may be used again."""
        if self._n_threads == 1 or not self._work:
            yield
            return
        if self._clock() >= self._next_probe:
            self._choose()
        torch.set_num_threads(self._chosen)
        try:
            yield
        finally:
            torch.set_num_threads(self._n_threads)

    def _choose(self) -> None:
        before = self._chosen
        try:
            fastest, self._chosen = self._seconds_alone(), 1
            for n in _counts(self._n_threads):
                seconds = self._seconds(n, limit=fastest)
                if seconds < fastest:
                    fastest, self._chosen = seconds, n
        finally:
            torch.set_num_threads(self._n_threads)
        same = self._chosen == before
        self._interval = min(2 * self._interval, self._longest) if same else self._shortest
        self._next_probe = self._clock() + self._interval

    def _seconds_alone(self) -> float:
        """Returns how long the probe takes on one thread, in that thread's own time.

        Time that others took from the thread does not count: more threads have to be better than
        one that is left alone. Measured anew each time, since cores are not always equally fast.
        """
        torch.set_num_threads(1)
        if not self._n_rounds:
            self._run_all()  # the first time reads memory and sets things up
        start, seconds, n_rounds = self._thread_clock(), 0.0, 0
        while n_rounds < self._n_rounds or (not self._n_rounds and seconds < _PROBE_SECONDS):
            self._run_all()
            n_rounds += 1
            seconds = self._thread_clock() - start
        self._n_rounds = n_rounds
        return seconds

    def _run_all(self) -> None:
        for multiply in self._work:
            multiply()

    def _seconds(self, n_threads: int, limit: float) -> float:
        """Returns how long the probe takes; stops soon after the limit."""
        torch.set_num_threads(n_threads)
        self._work[0]()  # starts or wakes the threads
        start = self._clock()
        for _ in range(self._n_rounds):
            for multiply in self._work:
                multiply()
                if self._clock() - start > limit:
                    return float("inf")
        return self._clock() - start


def matrix_products(model: XLoraModel) -> list[Callable[[], Tensor]]:
    """Returns products of rows of some of the model's own matrices; none if it is on a GPU.

    Weights that are packed, or rest elsewhere, are left out.
    """
    if model.device.type != "cpu":
        return []
    layers = [layer for layer in model.lora_layers if _is_plain_matrix(layer)]
    return [_product(layer) for layer in layers[:_N_PRODUCTS]]


def _is_plain_matrix(layer: XLoraLayer) -> bool:
    weight = getattr(layer, "weight", None)
    return (
        isinstance(weight, Tensor)
        and weight.dim() == 2
        and weight.device.type == "cpu"
        and weight.dtype in _DTYPES
    )


def _product(layer: XLoraLayer) -> Callable[[], Tensor]:
    n_columns = layer.weight.shape[1]
    n_rows = max(1, _MAX_ELEMENTS // n_columns)
    vectors = layer.weight.new_ones(2, n_columns).t()  # laid out as hidden states are
    # The weight is asked for each time: whoever fuses weights gives the layer another tensor, and
    # the old one must not be kept from being freed.
    return lambda: torch.mm(layer.weight.detach()[:n_rows], vectors)


def _counts(n_threads: int) -> list[int]:
    """Returns 2, 4, 8, ... and the number itself.

    Example:
        >>> _counts(6)
        [2, 4, 6]
    """
    powers = [2**i for i in range(1, n_threads.bit_length()) if 2**i < n_threads]
    return [*powers, n_threads]
