"""Attention over rows: each segment sees its own row of the cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from xlora_core.rows.batch import RowBatch, Segment
from xlora_core.rows.cache import RowCache


@dataclass(frozen=True)
class _Group:
    """Tokens that attend in one call.

    Attributes:
        tokens: Which tokens of the batch.
        row: The row of the cache.
        stop: They see places below it.
        mask: ``[n, stop]``, True where a token sees a place; None where all see all.
        causal: Whether, instead of a mask, token i sees places up to i.
    """

    tokens: slice
    row: int
    stop: int
    mask: Tensor | None
    causal: bool


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
        self._groups: list[_Group] = []
        for segment in batch.segments:
            first = len(rows)
            rows += [segment.row] * segment.n
            places += range(segment.start, segment.stop)
            if segment.siblings:
                positions += [segment.start] * segment.n
            else:
                positions += range(segment.start, segment.stop)
            causal = segment.n > 1 and segment.start == 0 and not segment.siblings
            mask = None if segment.n == 1 or causal else _mask(segment, device)
            tokens = slice(first, first + segment.n)
            self._groups.append(_Group(tokens, segment.row, segment.stop, mask, causal))
        table = torch.tensor([rows, places, positions], device=device)
        self._rows, self._places, self.positions = table
        self._cache = cache

    def attend(
        self, block: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        """Stores the tokens' keys and values, and returns what their queries find.

        Args:
            block: The block.
            queries: ``[N, heads, D]``.
            keys: ``[N, kv_heads, D]``; each serves heads / kv_heads consecutive heads.
            values: ``[N, kv_heads, D]``.
            scale: What query times key is multiplied by.

        Returns:
            ``[N, heads * D]``.
        """
        cached_keys, cached_values = self._cache.keys[block], self._cache.values[block]
        cached_keys[self._rows, :, self._places] = keys
        cached_values[self._rows, :, self._places] = values
        n_tokens, n_heads, head_size = queries.shape
        kv_heads = keys.shape[1]
        found = queries.new_empty(n_tokens, n_heads, head_size)
        for group in self._groups:
            row_keys = cached_keys[group.row : group.row + 1, :, : group.stop]
            row_values = cached_values[group.row : group.row + 1, :, : group.stop]
            of_group = queries[group.tokens]
            if of_group.shape[0] == 1:
                # The heads that share a key are as good as tokens that see the same places.
                shared = of_group.reshape(1, kv_heads, -1, head_size)
                seen = F.scaled_dot_product_attention(shared, row_keys, row_values, scale=scale)
                found[group.tokens] = seen.reshape(1, n_heads, head_size)
                continue
            seen = F.scaled_dot_product_attention(
                of_group.transpose(0, 1).unsqueeze(0),
                row_keys,
                row_values,
                attn_mask=group.mask,
                is_causal=group.causal,
                scale=scale,
                enable_gqa=kv_heads < n_heads,
            )
            found[group.tokens] = seen[0].transpose(0, 1)
        return found.flatten(1)


def _mask(segment: Segment, device: torch.device) -> Tensor:
    """Returns ``[n, stop]``: True where a token of the segment sees a place of its row."""
    own = torch.ones(segment.n, segment.n, dtype=torch.bool, device=device)
    own = torch.eye(segment.n, dtype=torch.bool, device=device) if segment.siblings else own.tril()
    before = torch.ones(segment.n, segment.start, dtype=torch.bool, device=device)
    return torch.cat([before, own], dim=1)
