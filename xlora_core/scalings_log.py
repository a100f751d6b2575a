"""The log of scalings, one entry per forward call, as PEFT keeps it.

PEFT recomputes the whole text at every step, so its entry for a step holds the rows of all
tokens so far. Here a step adds only its new rows; an entry is a row block and a link to the
entry before it, and the full tensor is put together when somebody asks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LogEntry:
    """The scalings of one forward call: ``rows`` ``[B, T_new, L, K]`` after those of ``before``."""

    rows: Tensor
    before: LogEntry | None = None

    def tensor(self) -> Tensor:
        """Returns ``[B, T, L, K]``, the rows of all tokens up to and including this call."""
        blocks: list[Tensor] = []
        entry: LogEntry | None = self
        while entry is not None:
            blocks.append(entry.rows)
            entry = entry.before
        return torch.cat(blocks[::-1], dim=1)

    def select(self, indices: Tensor) -> LogEntry:
        """Returns the entry of the batch rows ``indices`` (beams change places)."""
        rows = self.tensor()
        return LogEntry(rows.index_select(0, indices.to(rows.device)))


class ScalingsLog:
    """The entries in order of their forward calls; off until enabled."""

    def __init__(self) -> None:
        self.enabled = False
        self.entries: list[LogEntry] = []
        self._last: LogEntry | None = None

    def add(self, entry: LogEntry) -> None:
        """Notes the entry of a forward call; keeps it while enabled."""
        self._last = entry
        if self.enabled:
            self.entries.append(entry)

    def add_nothing(self) -> None:
        """Notes a forward call without scalings: what came before is not the latest any more."""
        self._last = None

    def clear(self) -> None:
        """Forgets all entries, and the latest one."""
        self.entries.clear()
        self._last = None

    def latest(self) -> Tensor | None:
        """Returns ``[B, T, L, K]`` of the last forward call, or None."""
        return None if self._last is None else self._last.tensor()

    def tensors(self) -> list[Tensor]:
        """Returns one detached tensor ``[B, T, L, K]`` per forward call.

        The entries of one generation are views of its last one, so the list costs as much
        memory as the longest text, not the sum over all steps.
        """
        entries = list(self.entries)  # other threads may add more meanwhile
        of_entry: dict[int, Tensor] = {}
        for last in reversed(entries):
            if id(last) in of_entry:
                continue
            whole = last.tensor()
            entry: LogEntry | None = last
            while entry is not None and id(entry) not in of_entry:
                of_entry[id(entry)] = whole
                whole = whole[:, : whole.shape[1] - entry.rows.shape[1]]
                entry = entry.before
        return [of_entry[id(entry)] for entry in entries]

    def bucketed(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """Returns sequence length -> (positions in the log, tensors).

        Source: PEFT 0.21.2, ``get_bucketed_scalings_log``.
        """
        buckets: dict[int, tuple[list[int], list[Tensor]]] = {}
        for position, tensor in enumerate(self.tensors()):
            positions, tensors = buckets.setdefault(tensor.shape[1], ([], []))
            positions.append(position)
            tensors.append(tensor)
        return buckets
