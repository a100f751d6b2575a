"""Steps over single tokens whose inputs lie at fixed addresses, to be recorded once.

A CUDA graph replays the same kernels on the same memory. So what a step depends on, which rows are
read, where they are and with which scalings, must lie in tensors that stay, and no size may
follow the texts: attention sees the rows as one rectangle with a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from xlora_core.rows.batch import RowBatch
from xlora_core.rows.cache import RowCache

# A step is recorded for this many places, or twice as many, and so on.
_FEWEST_PLACES = 256
# Of different numbers of rows and places; each holds the addresses of what it computes.
_MAX_STEPS = 64

Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


class RectanglePlan:
    """Single tokens, each in a row of its own, that attend to the first places of all rows.

    Args:
        rows: ``[N]`` int64, row of each token.
        places: ``[N]`` int64, its place there; it sees the places up to it.
        n_places: How many places of each row are looked at.
        cache: The cache.

    Attributes:
        positions: ``[N]`` int64, for the positional embedding.
    """

    def __init__(self, rows: Tensor, places: Tensor, n_places: int, cache: RowCache) -> None:
        self.positions = places
        self._rows, self._places = rows, places
        self._cache = cache
        self._n_places = n_places
        # A row without a token sees its first place: of nothing, a softmax would be NaN.
        last = torch.zeros(cache.n_rows, dtype=torch.int64, device=rows.device)
        last.index_copy_(0, rows, places)
        hidden = torch.arange(n_places, device=rows.device) > last.unsqueeze(1)
        mask = torch.zeros(hidden.shape, dtype=cache.keys[0].dtype, device=rows.device)
        self._mask = mask.masked_fill_(hidden, -torch.inf)[:, None, None]

    def attend(
        self, block: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        """As ``AttentionPlan.attend``."""
        cached_keys, cached_values = self._cache.keys[block], self._cache.values[block]
        cached_keys[self._rows, :, self._places] = keys
        cached_values[self._rows, :, self._places] = values
        n_tokens, n_heads, size = queries.shape
        kv_heads, n_rows = keys.shape[1], self._cache.n_rows
        by_row = queries.new_zeros(n_rows, kv_heads, n_heads // kv_heads, size)
        by_row.index_copy_(0, self._rows, queries.reshape(n_tokens, kv_heads, -1, size))
        found = F.scaled_dot_product_attention(
            by_row,
            cached_keys[:, :, : self._n_places],
            cached_values[:, :, : self._n_places],
            attn_mask=self._mask.expand(-1, -1, by_row.shape[2], -1),
            scale=scale,
        )
        return found.index_select(0, self._rows).reshape(n_tokens, -1)


class _Step:
    """Inputs of a step at fixed addresses, and the recorded step itself."""

    def __init__(self, batch: RowBatch) -> None:
        self.token_ids = torch.empty_like(batch.token_ids)
        # Rows and places in one, to cross to the device together.
        self.table = torch.empty(2, batch.n_tokens, dtype=torch.int64, device=self.token_ids.device)
        self.scalings = None if batch.scalings is None else torch.empty_like(batch.scalings)
        self.replay: Callable[[], Tensor] | None = None

    def load(self, batch: RowBatch) -> None:
        """Puts a batch's tokens, places and scalings where the step reads them."""
        self.token_ids.copy_(batch.token_ids)
        segments = batch.segments
        self.table.copy_(torch.tensor([[s.row for s in segments], [s.start for s in segments]]))
        if self.scalings is not None and batch.scalings is not None:
            self.scalings.copy_(batch.scalings)


class RecordedSteps:
    """Records a step at its first use for a number of rows and replays it from then on.

    A step is recorded anew for another number of rows or adapted rows, when the texts outgrow a
    power of two, and when the cache has grown: who wants few recordings makes room early.

    Args:
        run: Runs the model over ``(token_ids [N], plan, scalings)`` and returns ``[N, H]``.
        cache: The cache it reads and writes.
        record: Runs a function and returns what runs it again on the same memory.
    """

    def __init__(
        self,
        run: Callable[[Tensor, RectanglePlan, Tensor | None], Tensor],
        cache: RowCache,
        record: Record,
    ) -> None:
        self._run = run
        self._cache = cache
        self._record = record
        self._steps: dict[Sequence[object], _Step] = {}
        self._generation = cache.generation

    @staticmethod
    def takes(batch: RowBatch) -> bool:
        """Whether the batch is one token for each of its rows."""
        return all(segment.n == 1 for segment in batch.segments)

    def read(self, batch: RowBatch) -> Tensor:
        """Returns ``[N, H]``, to be copied before the next call."""
        if self._generation != self._cache.generation:
            self._steps.clear()
            self._generation = self._cache.generation
        n_places = self._places_for(max(segment.stop for segment in batch.segments))
        scalings = batch.scalings
        key = (batch.n_tokens, n_places, None if scalings is None else scalings.shape)
        step = self._steps.get(key)
        if step is None:
            if len(self._steps) >= _MAX_STEPS:
                self._steps.clear()
            step = self._steps[key] = _Step(batch)
        step.load(batch)
        if step.replay is None:
            step.replay = self._record(lambda: self._once(step, n_places))
        return step.replay()

    def _once(self, step: _Step, n_places: int) -> Tensor:
        rows, places = step.table.unbind()
        plan = RectanglePlan(rows, places, n_places, self._cache)
        return self._run(step.token_ids, plan, step.scalings)

    def _places_for(self, n: int) -> int:
        n_places = _FEWEST_PLACES
        while n_places < n:
            n_places *= 2
        return min(n_places, self._cache.n_tokens)


def cuda_recorder(device: torch.device) -> Record:
    """Returns what records CUDA graphs; they share one pool of memory."""
    pool = torch.cuda.graph_pool_handle()

    def record(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        with torch.cuda.device(device):
            # Once outside the graph: libraries allocate and choose kernels at their first call.
            # Reading the same tokens again writes the same keys and values again.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on calling CUDA meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                result = run()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    return record


def compiling_recorder() -> Record:
    """Returns what compiles steps with ``torch.compile``, which fuses their small operations.

    Every number of rows is compiled on its own, all blocks at once: minutes for a model of 30
    blocks. After eight of them the compiler gives up and the others run as they are.
    """

    def record(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        compiled: Callable[[], Tensor] = torch.compile(run, dynamic=False)
        return compiled

    return record
