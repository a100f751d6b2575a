"""The KV cache of many texts: one tensor per block, a row per text, each at its own position."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xlora_core.errors import ModelError
from xlora_core.rows.batch import Segment


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """What one block of the model caches per token.

    Attributes:
        n_heads: Heads of keys and values.
        key_size: Size of a key.
        value_size: Size of a value.
        device: Where they lie; None is where the others do.
    """

    n_heads: int
    key_size: int
    value_size: int
    device: torch.device | None = None


class RowCache:
    """Keys and values by block, row and position.

    A row is one text as one pass reads it: main pass and scaling pass of the same text are two
    rows. Nothing here knows how far a row is; whoever reads says so in a ``Segment``.

    Args:
        blocks: Shape of each block's keys and values.
        dtype: dtype of the keys and values.
        device: Where they lie, unless a block says otherwise.

    Attributes:
        keys: Block -> ``[R, heads, T, key_size]``.
        values: Block -> ``[R, heads, T, value_size]``.
        generation: Changes whenever keys and values become other tensors.
    """

    def __init__(
        self,
        blocks: Sequence[BlockShape],
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self._blocks = list(blocks)
        self._dtype = dtype
        self._device = device
        self.n_rows = 0
        self.n_tokens = 0
        self.generation = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.grow(0, 0)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one position of one row, over all blocks."""
        n_values = sum(b.n_heads * (b.key_size + b.value_size) for b in self._blocks)
        return n_values * self._dtype.itemsize

    def grow(self, n_rows: int, n_tokens: int) -> None:
        """Makes room for at least so many rows and positions; what is there stays.

        The tensors are new ones if anything grew.
        """
        n_rows, n_tokens = max(n_rows, self.n_rows), max(n_tokens, self.n_tokens)
        if self.keys and (n_rows, n_tokens) == (self.n_rows, self.n_tokens):
            return
        keys = [self._empty(b, n_rows, n_tokens, b.key_size) for b in self._blocks]
        values = [self._empty(b, n_rows, n_tokens, b.value_size) for b in self._blocks]
        for old, new in zip([*self.keys, *self.values], [*keys, *values], strict=False):
            new[: self.n_rows, :, : self.n_tokens] = old
        self.keys, self.values = keys, values
        self.n_rows, self.n_tokens = n_rows, n_tokens
        self.generation += 1

    def clear(self) -> None:
        """Forgets all rows and frees their memory."""
        self.keys, self.values = [], []
        self.n_rows = self.n_tokens = 0
        self.grow(0, 0)

    def _empty(self, block: BlockShape, n_rows: int, n_tokens: int, size: int) -> Tensor:
        # Zeros, so that a masked position never brings a NaN into a product with 0.
        shape = (n_rows, block.n_heads, n_tokens, size)
        device = torch.device(block.device or self._device)
        if device.type != "cpu" or 0 in shape:
            return torch.zeros(shape, dtype=self._dtype, device=device)
        # From the system, which gives out pages of zeros when they are first written to. PyTorch
        # would write them all: seconds, and gigabytes that a short answer never uses.
        n_bytes = math.prod(shape) * self._dtype.itemsize
        return torch.from_numpy(np.zeros(n_bytes, np.uint8)).view(self._dtype).view(shape)

    def check_room(self, segments: Iterable[Segment]) -> None:
        """Raises unless there is a place for every token.

        Raises:
            ModelError: If a segment lies outside of the cache.
        """
        for segment in segments:
            inside = 0 <= segment.row < self.n_rows and segment.start >= 0
            if not inside or segment.n < 1 or segment.stop > self.n_tokens:
                raise ModelError(
                    f"a segment of {segment.n} tokens at position {segment.start} of row "
                    f"{segment.row} lies outside of the cache of {self.n_rows} rows with "
                    f"{self.n_tokens} positions",
                    hint="make room first: reader.cache.grow(n_rows, n_tokens)",
                )

    def write(self, block: int, segment: Segment, keys: Tensor, values: Tensor) -> None:
        """Stores the keys and values of a segment's tokens.

        Args:
            block: The block.
            segment: Where.
            keys: ``[heads, n, key_size]``.
            values: ``[heads, n, value_size]``.
        """
        places = slice(segment.start, segment.stop)
        self.keys[block][segment.row, :, places] = keys
        self.values[block][segment.row, :, places] = values

    def copy_row(self, source: int, targets: Iterable[int], n_tokens: int) -> None:
        """Copies the first positions of a row to other rows."""
        for target in targets:
            for tensor in (*self.keys, *self.values):
                tensor[target, :, :n_tokens] = tensor[source, :, :n_tokens]

    def erase(self, rows: Sequence[int], n_tokens: int) -> None:
        """Zeros rows whose text is at an end.

        What a text leaves behind is masked for the next one in its row; but a NaN that it left,
        times the 0 of the mask, is NaN.

        Args:
            rows: The rows.
            n_tokens: How many positions they may have used.
        """
        for tensor in (*self.keys, *self.values):
            for row in rows:
                tensor[row, :, :n_tokens] = 0

    def keep(self, segment: Segment, which: int) -> None:
        """Makes one of a segment's siblings the token at ``segment.start``.

        Args:
            segment: A segment that was read with ``siblings``.
            which: Which of its n tokens, from 0.
        """
        if which == 0:
            return
        row, source = segment.row, segment.start + which
        for tensor in (*self.keys, *self.values):
            tensor[row, :, segment.start] = tensor[row, :, source]
