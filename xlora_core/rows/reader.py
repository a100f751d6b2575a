"""What reads rows: a model of which many texts share one run over the weights."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from xlora_core.rows.batch import RowBatch
from xlora_core.rows.cache import RowCache


class RowReader(ABC):
    """Runs a model's base over batches of rows, and keeps their keys and values.

    For one thread at a time. Results are those of ``XLoraModel``'s passes over each text alone,
    up to rounding.

    Attributes:
        cache: The rows' keys and values; who reads makes room with ``cache.grow``.
        records_single_tokens: Whether a batch of one token for each row is recorded and replayed,
            and so read much faster than others.
    """

    cache: RowCache
    records_single_tokens: bool = False

    def close(self) -> None:
        """Frees what it holds beside the model; nothing is read afterwards."""
        self.cache.clear()

    @abstractmethod
    def read(self, batch: RowBatch) -> Tensor:
        """Reads the tokens of a batch and stores their keys and values.

        Args:
            batch: The tokens, their places and scalings.

        Returns:
            ``[N, H]``, the last hidden state of every token (after the final norm), which is what
            the classifier reads.
        """

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Returns the language model's logits ``[n, V]`` of hidden states ``[n, H]``."""
