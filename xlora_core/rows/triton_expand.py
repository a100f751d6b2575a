"""The second half of the mixture as one kernel: scale, expand and add, for CUDA.

Needs the package ``triton``, which comes with PyTorch's CUDA builds; import this module only where
it is wanted. It runs on a CPU, too, in Triton's interpreter (``TRITON_INTERPRET=1``), for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# The smallest sizes that tensor cores take; few rows fill no larger ones.
_ROWS = 16
_OUTPUTS = 64
_RANKS = 16


def _scale_expand_add(
    y: Any,
    weights: Any,
    packed: Any,
    tiles: Any,
    n_rows: Any,
    y_stride: Any,
    weights_stride: Any,
    shrunk_at: Any,
    rows_block: tl.constexpr,
    outputs_block: tl.constexpr,
    ranks_block: tl.constexpr,
) -> None:
    """Adds the mixture to one tile of outputs of up to ``rows_block`` rows."""
    tile = tiles + 5 * tl.program_id(0)
    first_output = tl.load(tile)
    n_outputs = tl.load(tile + 1)
    first_rank = tl.load(tile + 2)
    n_ranks = tl.load(tile + 3)
    first_packed = tl.load(tile + 4)
    row = tl.program_id(1) * rows_block + tl.arange(0, rows_block)
    output = tl.arange(0, outputs_block)
    is_row = (row < n_rows)[:, None]
    is_output = output < n_outputs
    mixture = tl.zeros((rows_block, outputs_block), dtype=tl.float32)
    for start in range(0, n_ranks, ranks_block):
        rank = start + tl.arange(0, ranks_block)
        is_rank = rank < n_ranks
        at_y = y + row[:, None] * y_stride + shrunk_at + first_rank + rank[None, :]
        shrunk = tl.load(at_y, mask=is_row & is_rank[None, :], other=0.0)
        at_weights = weights + row[:, None] * weights_stride + first_rank + rank[None, :]
        weight = tl.load(at_weights, mask=is_row & is_rank[None, :], other=0.0)
        at_packed = packed + first_packed + output[None, :] * n_ranks + rank[:, None]
        expand = tl.load(at_packed, mask=is_rank[:, None] & is_output[None, :], other=0.0)
        # Rounded to the experts' dtype as the plain product is; the sum is in float32, which for
        # so few rows costs nothing next to reading.
        scaled = (shrunk.to(tl.float32) * weight.to(tl.float32)).to(expand.dtype)
        mixture += tl.dot(scaled.to(tl.float32), expand.to(tl.float32), input_precision="ieee")
    at_output = y + row[:, None] * y_stride + first_output + output[None, :]
    is_there = is_row & is_output[None, :]
    base = tl.load(at_output, mask=is_there, other=0.0)
    tl.store(at_output, (base.to(tl.float32) + mixture).to(base.dtype), mask=is_there)


_kernel = triton.jit(_scale_expand_add)


class TritonExpand:
    """Adds the experts' mixture to a fused projection's outputs in one launch for all layers.

    Args:
        expands: Each adapted layer's ``lora_B`` ``[out, R]``; they become views of one tensor.
        outputs: Each one's place among the projection's outputs.
        ranks: Each one's place among the projection's ranks.
    """

    def __init__(
        self, expands: Sequence[Tensor], outputs: Sequence[slice], ranks: Sequence[slice]
    ) -> None:
        self._packed = torch.cat([expand.detach().flatten() for expand in expands])
        tiles = []
        start = 0
        for expand, of_outputs, of_ranks in zip(expands, outputs, ranks, strict=True):
            n_outputs, n_ranks = expand.shape
            expand.data = self._packed[start : start + expand.numel()].view_as(expand)
            for first in range(0, n_outputs, _OUTPUTS):
                place = start + first * n_ranks
                size = min(_OUTPUTS, n_outputs - first)
                tiles.append((of_outputs.start + first, size, of_ranks.start, n_ranks, place))
            start += expand.numel()
        self._tiles = torch.tensor(tiles, device=self._packed.device)

    def __call__(self, y: Tensor, weights: Tensor, shrunk_at: int) -> None:
        """Adds the mixture in place.

        Args:
            y: ``[N, out + R]``, row by row in memory: outputs, then what ``A`` made of the input.
            weights: ``[M, R]``, row by row in memory; the mixture is added to the first M rows.
            shrunk_at: Number of outputs.
        """
        n_rows = weights.shape[0]
        if not n_rows:
            return
        _kernel[(len(self._tiles), triton.cdiv(n_rows, _ROWS))](
            y,
            weights,
            self._packed,
            self._tiles,
            n_rows,
            y.stride(0),
            weights.stride(0),
            shrunk_at,
            rows_block=_ROWS,
            outputs_block=_OUTPUTS,
            ranks_block=_RANKS,
        )
