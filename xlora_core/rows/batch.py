"""What one run over the weights reads: tokens of any number of texts, each in a row of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Consecutive tokens of one row of the cache.

    Attributes:
        row: The row of the cache that holds the text's keys and values.
        start: Position of the first token, 0 or more; positions below it have been read before.
            Reading a position again overwrites it.
        n: Number of tokens, at least 1.
        siblings: The tokens do not follow each other but are alternatives for the position
            ``start``: each sees what stands before ``start`` and itself. Their keys and values
            lie at ``start``, ``start + 1``, ... until ``RowCache.keep`` chooses one.
    """

    row: int
    start: int
    n: int = 1
    siblings: bool = False

    @property
    def stop(self) -> int:
        """The first place of the row after this segment."""
        return self.start + self.n


@dataclass(frozen=True, kw_only=True)
class RowBatch:
    """The tokens of one run over the weights, segment after segment.

    Attributes:
        token_ids: ``[N]`` int64, on the model's device.
        segments: Their places; the sizes add up to N, and no row comes twice. Segments with
            adapters come first.
        scalings: ``[M, L or 1, K]``, effective scalings of the first M tokens, M <= N; the others
            run through the base layers alone. None for M = 0.
    """

    token_ids: Tensor
    segments: Sequence[Segment]
    scalings: Tensor | None = None

    @property
    def n_tokens(self) -> int:
        """N."""
        return int(self.token_ids.shape[0])

    @property
    def n_adapted(self) -> int:
        """M."""
        return 0 if self.scalings is None else int(self.scalings.shape[0])
