"""Attention over rows: each segment sees its own row of the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from xlora_core.rows.batch import RowBatch, Segment
from xlora_core.rows.cache import RowCache

# Rows of nearly one length are read in one call, the shorter ones masked at their end. A call
# costs as much as reading some dozens of places; a row may read that much, or an eighth, in vain.
_SPARE_PLACES = 64
_SPARE_SHARE = 8


@dataclass(frozen=True)
class _SingleTokens:
    """Single tokens of one or more rows, which attend in one call.

    Attributes:
        tokens: Which tokens of the batch; a slice where their order is the batch's.
        rows: Their rows of the cache.
        stop: They see places below it.
        mask: ``[n, 1, 1, stop]``, -inf where a row is shorter; None where none is.
    """

    tokens: slice | Tensor
    rows: slice
    stop: int
    mask: Tensor | None

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Returns ``[n, heads, D]`` for queries ``[n, heads, D]`` over a block's whole cache."""
        n_tokens, n_heads, size = queries.shape
        kv_heads = keys.shape[1]
        # The heads that share a key are as good as tokens that see the same places.
        shared = queries.view(n_tokens, kv_heads, n_heads // kv_heads, size)
        mask = self.mask
        if mask is not None:
            mask = mask.expand(-1, -1, shared.shape[2], -1)
        found = F.scaled_dot_product_attention(
            shared,
            keys[self.rows, :, : self.stop],
            values[self.rows, :, : self.stop],
            attn_mask=mask,
            scale=scale,
        )
        return found.reshape(n_tokens, n_heads, size)


@dataclass(frozen=True)
class _Chunk:
    """Several tokens of one row.

    Attributes:
        tokens: Which tokens of the batch.
        rows: The row of the cache.
        stop: They see places below it.
        mask: ``[n, stop]``, True where a token sees a place; None where token i sees places up
            to i.
    """

    tokens: slice
    rows: slice
    stop: int
    mask: Tensor | None

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Returns ``[n, heads, D]`` for queries ``[n, heads, D]`` over a block's whole cache."""
        found = F.scaled_dot_product_attention(
            queries.transpose(0, 1).unsqueeze(0),
            keys[self.rows, :, : self.stop],
            values[self.rows, :, : self.stop],
            attn_mask=self.mask,
            is_causal=self.mask is None,
            scale=scale,
            enable_gqa=keys.shape[1] < queries.shape[1],
        )
        return found[0].transpose(0, 1)


class AttentionPlan:
    """Where the tokens of one batch stand and what they see; the same in every block.

    Args:
        batch: The batch.
        cache: The cache; large enough for it.

    Attributes:
        positions: ``[N]`` int64, for the positional embedding.
    """

    def __init__(self, batch: RowBatch, cache: RowCache) -> None:
        device = batch.token_ids.device
        rows: list[int] = []
        places: list[int] = []
        positions: list[int] = []
        singles: list[tuple[int, Segment]] = []
        self._groups: list[_SingleTokens | _Chunk] = []
        for segment in batch.segments:
            first = len(rows)
            of_segment = range(segment.start, segment.stop)
            rows += [segment.row] * segment.n
            places += of_segment
            positions += [segment.start] * segment.n if segment.siblings else of_segment
            if segment.n == 1:
                singles.append((first, segment))
            else:
                self._groups.append(_chunk(first, segment, device))
        dtype = cache.keys[0].dtype
        self._groups += [_single_tokens(run, dtype, device) for run in _runs(singles)]
        table = torch.tensor([rows, places, positions], device=device)
        self._rows, self._places, self.positions = table.unbind()
        self._cache = cache

    def attend(
        self, block: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        """Stores the tokens' keys and values, and returns what their queries find.

        Args:
            block: The block.
            queries: ``[N, heads, D]``, the last dimension contiguous.
            keys: ``[N, kv_heads, D]``; each serves heads / kv_heads consecutive heads.
            values: ``[N, kv_heads, D]``.
            scale: What query times key is multiplied by.

        Returns:
            ``[N, heads * D]``.
        """
        cached_keys, cached_values = self._cache.keys[block], self._cache.values[block]
        cached_keys[self._rows, :, self._places] = keys
        cached_values[self._rows, :, self._places] = values
        if len(self._groups) == 1 and isinstance(self._groups[0].tokens, slice):
            return self._groups[0].attend(queries, cached_keys, cached_values, scale).flatten(1)
        found = torch.empty_like(queries, memory_format=torch.contiguous_format)
        for group in self._groups:
            of_group = queries[group.tokens]
            found[group.tokens] = group.attend(of_group, cached_keys, cached_values, scale)
        return found.flatten(1)


def _runs(singles: Sequence[tuple[int, Segment]]) -> Iterator[list[tuple[int, Segment]]]:
    """Yields the single tokens in runs that one call serves: rows evenly spaced, alike in length.

    Args:
        singles: Number of the token in the batch, and its segment.
    """
    run: list[tuple[int, Segment]] = []
    for single in sorted(singles, key=lambda single: single[1].row):
        if run and not _continues([segment for _, segment in run], single[1]):
            yield run
            run = []
        run.append(single)
    if run:
        yield run


def _continues(run: Sequence[Segment], segment: Segment) -> bool:
    """Whether the run's rows and the segment's are evenly spaced and nearly of one length."""
    if len(run) > 1 and segment.row - run[-1].row != run[1].row - run[0].row:
        return False
    stops = [*(s.stop for s in run), segment.stop]
    longest = max(stops)
    return longest - min(stops) <= max(_SPARE_PLACES, longest // _SPARE_SHARE)


def _single_tokens(
    run: Sequence[tuple[int, Segment]], dtype: torch.dtype, device: torch.device
) -> _SingleTokens:
    tokens = [token for token, _ in run]
    rows = [segment.row for _, segment in run]
    stops = [segment.stop for _, segment in run]
    longest = max(stops)
    mask = None
    if min(stops) < longest:
        hidden = torch.arange(longest) >= torch.tensor(stops).unsqueeze(1)
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
        mask = mask.to(device)[:, None, None]
    in_order = tokens == list(range(tokens[0], tokens[0] + len(tokens)))
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    return _SingleTokens(
        tokens=slice(tokens[0], tokens[-1] + 1) if in_order else torch.tensor(tokens).to(device),
        rows=slice(rows[0], rows[-1] + 1, step),
        stop=longest,
        mask=mask,
    )


def _chunk(first: int, segment: Segment, device: torch.device) -> _Chunk:
    is_whole_text = segment.start == 0 and not segment.siblings
    return _Chunk(
        tokens=slice(first, first + segment.n),
        rows=slice(segment.row, segment.row + 1),
        stop=segment.stop,
        mask=None if is_whole_text else _mask(segment, device),
    )


def _mask(segment: Segment, device: torch.device) -> Tensor:
    """Returns ``[n, stop]``: True where a token of the segment sees a place of its row."""
    own = torch.ones(segment.n, segment.n, dtype=torch.bool, device=device)
    own = torch.eye(segment.n, dtype=torch.bool, device=device) if segment.siblings else own.tril()
    before = torch.ones(segment.n, segment.start, dtype=torch.bool, device=device)
    return torch.cat([before, own], dim=1)
