"""Rows as a Hugging Face cache: the keys and values of a model's layers go to their rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from xlora_core.errors import ModelError
from xlora_core.rows.cache import RowCache
from xlora_core.rows.layout import Grid


class RowCacheView(Cache):
    """A ``RowCache`` as a model's layers see it during one forward call over a grid.

    Args:
        rows: Where keys and values are kept.
    """

    def __init__(self, rows: RowCache) -> None:
        self.rows = rows
        self._grid: Grid | None = None
        self.n_seen = 0
        super().__init__(layers=[_RowLayer(self, block) for block in range(len(rows.keys))])

    @property
    def grid(self) -> Grid:
        """The grid that is being read.

        Raises:
            ModelError: Outside of ``reading``.
        """
        if self._grid is None:
            raise ModelError("rows are read through RowReader.read alone")
        return self._grid

    @contextmanager
    def reading(self, grid: Grid, n_seen: int) -> Iterator[None]:
        """Lets a model's layers write and read a grid for the length of a ``with`` block.

        Args:
            grid: The grid.
            n_seen: What the cache answers to how many tokens it holds.
        """
        self._grid, self.n_seen = grid, n_seen
        try:
            yield
        finally:
            self._grid = None


class _RowLayer(CacheLayerMixin):
    """One block's keys and values."""

    is_sliding = False

    def __init__(self, view: RowCacheView, block: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in transformers
        self._view = view
        self._block = block

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing: the rows are there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores the new keys and values and returns those of the rows.

        Args:
            key_states: ``[S, heads, Q, key_size]``.
            value_states: ``[S, heads, Q, value_size]``.
            args: Ignored.
            kwargs: Ignored.

        Returns:
            ``[S, heads, T, key_size]`` and ``[S, heads, T, value_size]``; what lies after a row's
            last token is to be masked.
        """
        rows, grid = self._view.rows, self._view.grid
        self._write(rows, grid, key_states, value_states)
        return (
            _read(rows.keys[self._block], grid, key_states),
            _read(rows.values[self._block], grid, value_states),
        )

    def _write(self, rows: RowCache, grid: Grid, keys: Tensor, values: Tensor) -> None:
        if grid.width > 1:
            for i, line in enumerate(grid.lines):
                n = line.segment.n
                rows.write(self._block, line.segment, keys[i, :, :n], values[i, :, :n])
            return
        # The decode step: one operation for all rows.
        kept = rows.keys[self._block], rows.values[self._block]
        places = (grid.rows.to(keys.device), slice(None), grid.places[:, 0].to(keys.device))
        for tensor, new in zip(kept, (keys, values), strict=True):
            tensor[places] = new[:, :, 0].to(tensor.dtype)

    def get_seq_length(self) -> int:
        """Returns how many tokens lie before those of the running call."""
        return self._view.n_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns T and the place of the first key, 0."""
        return self._view.grid.n_places, 0

    def get_max_length(self) -> int:
        """Returns -1: rows grow."""
        return -1


def _read(kept: Tensor, grid: Grid, new: Tensor) -> Tensor:
    """Returns ``[S, heads, T, size]`` of a grid's rows, without a copy if they are consecutive."""
    if grid.row_range is not None:
        return kept[grid.row_range, :, : grid.n_places]
    gathered = kept[:, :, : grid.n_places].index_select(0, grid.rows.to(kept.device))
    if grid.has_siblings and grid.width == 1:
        # Lone siblings: each sees itself where the text goes on.
        lines = torch.arange(len(grid.lines), device=kept.device)
        gathered[lines, :, grid.positions[:, 0].to(kept.device)] = new[:, :, 0].to(kept.dtype)
    return gathered
