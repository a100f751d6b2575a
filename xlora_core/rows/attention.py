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
# Tokens of one row for which reading its keys costs more than computing with them.
_FEW_TOKENS = 4


@dataclass(frozen=True)
class _FewTokens:
    """A few tokens of each of one or more rows, which attend in one call, Q queries in each row.

    Attributes:
        tokens: Which tokens of the batch; a slice where their order is the batch's.
        asked: ``[rows * Q]``, which of the tokens each query is of, since in a row with fewer of
            them one asks more than once; None where the queries are the tokens.
        kept: ``[n]``, the query whose answer each token takes; None likewise.
        n_queries: Q.
        rows: Their rows of the cache.
        stop: They see places below it.
        mask: ``[rows, 1, Q, 1, stop]``, -inf where a query does not see a place; None where all
            see all.
    """

    tokens: slice | Tensor
    asked: Tensor | None
    kept: Tensor | None
    n_queries: int
    rows: slice
    stop: int
    mask: Tensor | None

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Returns ``[n, heads, D]`` for queries ``[n, heads, D]`` over a block's whole cache."""
        n_heads, size = queries.shape[1:]
        kv_heads = keys.shape[1]
        n_shared = n_heads // kv_heads
        if self.asked is not None:
            queries = queries[self.asked]
        # The heads that share a key are as good as tokens that see the same places.
        shared = queries.view(-1, self.n_queries, kv_heads, n_shared, size).transpose(1, 2)
        mask = self.mask
        if mask is not None:
            mask = mask.expand(-1, -1, -1, n_shared, -1).flatten(2, 3)
        found = F.scaled_dot_product_attention(
            shared.flatten(2, 3),
            keys[self.rows, :, : self.stop],
            values[self.rows, :, : self.stop],
            attn_mask=mask,
            scale=scale,
        )
        found = found.view(-1, kv_heads, self.n_queries, n_shared, size).transpose(1, 2)
        found = found.reshape(-1, n_heads, size)
        return found if self.kept is None else found[self.kept]


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
        device, dtype = batch.token_ids.device, cache.keys[0].dtype
        rows: list[int] = []
        places: list[int] = []
        positions: list[int] = []
        few: list[tuple[int, Segment]] = []
        self._groups: list[_FewTokens | _Chunk] = []
        for segment in batch.segments:
            first = len(rows)
            of_segment = range(segment.start, segment.stop)
            rows += [segment.row] * segment.n
            places += of_segment
            positions += [segment.start] * segment.n if segment.siblings else of_segment
            if segment.n <= _FEW_TOKENS:
                few.append((first, segment))
            else:
                self._groups.append(_chunk(first, segment, device))
        self._groups += [_few_tokens(run, dtype, device) for run in _runs(few)]
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


def _runs(few: Sequence[tuple[int, Segment]]) -> Iterator[list[tuple[int, Segment]]]:
    """Yields segments of few tokens in runs that one call serves: evenly spaced, alike in length.

    Args:
        few: Number of the first token in the batch, and the segment.
    """
    run: list[tuple[int, Segment]] = []
    for one in sorted(few, key=lambda one: one[1].row):
        if run and not _continues([segment for _, segment in run], one[1]):
            yield run
            run = []
        run.append(one)
    if run:
        yield run


def _continues(run: Sequence[Segment], segment: Segment) -> bool:
    """Whether the run's rows and the segment's are evenly spaced and nearly of one length."""
    if len(run) > 1 and segment.row - run[-1].row != run[1].row - run[0].row:
        return False
    stops = [*(s.stop for s in run), segment.stop]
    longest = max(stops)
    return longest - min(stops) <= max(_SPARE_PLACES, longest // _SPARE_SHARE)


def _few_tokens(
    run: Sequence[tuple[int, Segment]], dtype: torch.dtype, device: torch.device
) -> _FewTokens:
    segments = [segment for _, segment in run]
    tokens = [first + i for first, segment in run for i in range(segment.n)]
    n_queries = max(segment.n for segment in segments)
    # In a row with fewer tokens than another the first of them asks for the missing ones.
    asked, kept = [], []
    n_before = 0
    for i, segment in enumerate(segments):
        kept += [i * n_queries + j for j in range(segment.n)]
        asked += [n_before + (j if j < segment.n else 0) for j in range(n_queries)]
        n_before += segment.n
    is_full = len(tokens) == len(asked)
    in_order = tokens == list(range(tokens[0], tokens[0] + len(tokens)))
    rows = [segment.row for segment in segments]
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    return _FewTokens(
        tokens=slice(tokens[0], tokens[-1] + 1) if in_order else torch.tensor(tokens).to(device),
        asked=None if is_full else torch.tensor(asked).to(device),
        kept=None if is_full else torch.tensor(kept).to(device),
        n_queries=n_queries,
        rows=slice(rows[0], rows[-1] + 1, step),
        stop=max(segment.stop for segment in segments),
        mask=_mask_of_rows(segments, n_queries, dtype, device),
    )


def _mask_of_rows(
    segments: Sequence[Segment], n_queries: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """Returns the mask ``[rows, 1, Q, 1, stop]`` of segments; None if there is nothing to hide."""
    stop = max(segment.stop for segment in segments)
    if n_queries == 1 and all(segment.stop == stop for segment in segments):
        return None
    hidden = torch.zeros(len(segments), 1, n_queries, 1, stop, dtype=torch.bool)
    for i, segment in enumerate(segments):
        for j in range(n_queries):
            own = segment.start + (j if j < segment.n else 0)
            hidden[i, 0, j, 0, own + 1 :] = True
            if segment.siblings:
                hidden[i, 0, j, 0, segment.start : own] = True
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf).to(device)


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
