"""Whether there is memory for a request, known before anything of it is allocated."""

from __future__ import annotations

import sys
from collections.abc import Hashable
from dataclasses import dataclass

import torch

from xlora_core.engine.free_memory import free_bytes
from xlora_core.errors import ConfigError

_MIB = 2**20
# Of what is free when the engine starts. The rest is for activations, texts, finished runs and
# whoever else lives on the machine; a GPU is mostly ours.
_SHARE = {"cuda": 0.8}
_SHARE_OF_HOST = 0.5


@dataclass(frozen=True)
class MemoryBudget:
    """What caches and records of all running requests may take together.

    Attributes:
        total_bytes: The budget; on a GPU the little that records take of the host's memory counts
            as well.
    """

    total_bytes: int

    @classmethod
    def of_free_memory(cls, device: torch.device) -> MemoryBudget:
        """Returns a share of what is free now: 80 % of a GPU's memory, half of the machine's."""
        return cls(int(_SHARE.get(device.type, _SHARE_OF_HOST) * free_bytes(device)))


UNLIMITED = MemoryBudget(sys.maxsize)


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a request asks for.

    Attributes:
        n_rows: Rows of the cache: two for a routed arm (scaling pass and main pass), one for any
            other.
        n_tokens: Most tokens of a row, prompt and answer.
        record_bytes: Bytes of the recorders' arrays.
    """

    n_rows: int
    n_tokens: int
    record_bytes: int


class Admission:
    """Keeps account of the memory that running requests hold, and says who fits beside them.

    A row cache is one block of rows x positions: every row is as long as the longest request
    needs, rows of ended requests are used again, and it only shrinks (to nothing) when nobody
    runs, or never. While it grows, the old block and the new one are there together. Caches of
    their own simply add up.

    ``check`` may be called by any thread, the rest by the engine's.

    Args:
        budget: What there is.
        bytes_per_token: Bytes of one position of one row.
        row_block: Rows that the block grows by.
        token_block: Positions that rows grow by.
        one_block: Whether all rows lie in one block.
        keeps_block: Whether the block stays when nobody runs.
    """

    def __init__(
        self,
        budget: MemoryBudget,
        bytes_per_token: int,
        *,
        row_block: int = 1,
        token_block: int = 1,
        one_block: bool = True,
        keeps_block: bool = False,
    ) -> None:
        self.budget = budget
        self._bytes_per_token = bytes_per_token
        self._row_block = row_block
        self._token_block = token_block
        self._one_block = one_block
        self._keeps_block = keeps_block
        self._admitted: dict[Hashable, Need] = {}
        self._n_rows = self._n_tokens = 0  # of the block

    @property
    def used_bytes(self) -> int:
        """Bytes that the admitted requests hold."""
        return self._cache_bytes(list(self._admitted.values())) + self._record_bytes()

    def check(self, need: Need) -> None:
        """Checks that a request fits when nobody else runs.

        Raises:
            ConfigError: If it never will; says what it needs and what there is.
        """
        needed = self._needed(need, beside=False)
        if needed <= self.budget.total_bytes:
            return
        raise ConfigError(
            f"the request may need {_mib(needed)} MiB of memory ({need.n_rows} rows of "
            f"{need.n_tokens:,} tokens), more than the {_mib(self.budget.total_bytes)} MiB that "
            "all requests of this engine may take together",
            hint="lower max_new_tokens, shorten the prompt, compare fewer arms (a routed one "
            "takes two rows), or start the engine with a larger memory_bytes",
        )

    def fits(self, need: Need) -> bool:
        """Whether there is room for a request beside those that run."""
        return self._needed(need, beside=True) <= self.budget.total_bytes

    def admit(self, key: Hashable, need: Need) -> None:
        """Books a request."""
        self._n_rows, self._n_tokens = self._grown(need, beside=True)
        self._admitted[key] = need

    def release(self, key: Hashable) -> None:
        """Takes a request off the books; one that is not on them changes nothing."""
        self._admitted.pop(key, None)
        if not self._admitted and not self._keeps_block:
            self.forget_block()

    def forget_block(self) -> None:
        """Takes the block off the books: nobody runs, and it was freed."""
        self._n_rows = self._n_tokens = 0

    def _needed(self, need: Need, *, beside: bool) -> int:
        """Returns the most bytes that are taken at any time once a request is let in."""
        others = list(self._admitted.values()) if beside else []
        records = sum(other.record_bytes for other in others) + need.record_bytes
        if not self._one_block:
            return self._cache_bytes([*others, need]) + records
        n_rows, n_tokens = self._grown(need, beside=beside)
        n_places = n_rows * n_tokens
        n_before = self._n_rows * self._n_tokens if beside else 0
        if n_places > n_before:
            n_places += n_before
        return n_places * self._bytes_per_token + records

    def _grown(self, need: Need, *, beside: bool) -> tuple[int, int]:
        """Returns rows and positions of the block once a request is let in."""
        n_used = sum(other.n_rows for other in self._admitted.values()) if beside else 0
        n_rows, n_tokens = (self._n_rows, self._n_tokens) if beside else (0, 0)
        n_rows_new = -(-(n_used + need.n_rows) // self._row_block) * self._row_block
        n_tokens_new = -(-need.n_tokens // self._token_block) * self._token_block
        return max(n_rows, n_rows_new), max(n_tokens, n_tokens_new)

    def _cache_bytes(self, needs: list[Need]) -> int:
        if self._one_block:
            return self._n_rows * self._n_tokens * self._bytes_per_token
        return sum(need.n_rows * need.n_tokens for need in needs) * self._bytes_per_token

    def _record_bytes(self) -> int:
        return sum(need.record_bytes for need in self._admitted.values())


def _mib(n_bytes: int) -> str:
    """Returns bytes as MiB; never 0 for more than nothing."""
    value = n_bytes / _MIB
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
