"""How a batch of rows is laid out for forward calls: ``[S, Q]``, a segment per line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xlora_core.layers import TokenScalings
from xlora_core.rows.batch import RowBatch, Segment

# A forward call costs about as much as computing so many tokens more, whatever it computes:
# segments of unlike lengths share one as long as they are padded by less.
PADDING_WORTH_A_CALL = 32


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a grid: a segment, or one of the siblings of a segment.

    Attributes:
        segment: The segment as the line reads it; a lone sibling is one of its own, n = 1.
        first: Index of its first token in the batch.
        place: Where the keys of its first token are stored.
    """

    segment: Segment
    first: int
    place: int


class Grid:
    """Lines side by side, as one forward call takes them. Short ones are padded at the end.

    Args:
        lines: The lines; consecutive rows in order are cheapest.
        device: Where the tensors go.

    Attributes:
        lines: The lines, S of them.
        width: Q, tokens of the longest line.
        n_places: T, the places of a row that any line reads or writes.
        rows: ``[S]`` int64, row of each line.
        positions: ``[S, Q]`` int64, what the tokens' position is to the model; padding repeats
            the line's first token.
        places: ``[S, Q]`` int64, where the tokens' keys are stored.
        tokens: ``[S, Q]`` int64, index in the batch.
    """

    def __init__(self, lines: Sequence[Line], device: torch.device) -> None:
        self.lines = list(lines)
        segments = [line.segment for line in lines]
        self.width = max(segment.n for segment in segments)
        self.n_places = max(segment.stop for segment in segments)
        self.is_padded = any(segment.n < self.width for segment in segments)
        self.has_siblings = any(segment.siblings for segment in segments)
        of_lines = torch.tensor(
            [
                (line.segment.row, line.segment.start, line.place, line.first, line.segment.n)
                for line in lines
            ],
            device=device,
        )
        self.rows, starts, places, first, lengths = of_lines.unbind(1)
        column = torch.arange(self.width, device=device).expand(len(lines), -1)
        if self.is_padded:
            column = torch.where(column < lengths[:, None], column, 0)
        self.tokens = first[:, None] + column
        self.places = places[:, None] + column
        self.positions = starts[:, None] + column
        if self.has_siblings:
            self.are_siblings = torch.tensor([s.siblings for s in segments], device=device)
            self.positions = torch.where(
                self.are_siblings[:, None], starts[:, None], self.positions
            )

    @property
    def row_range(self) -> slice | None:
        """The rows as a slice, None if they do not follow each other."""
        first = self.lines[0].segment.row
        if all(line.segment.row == first + i for i, line in enumerate(self.lines)):
            return slice(first, first + len(self.lines))
        return None

    @property
    def is_ordinary(self) -> bool:
        """Whether an ordinary call with an ordinary cache would read the same.

        All lines are then as long and as far as each other, and a model's own mask is right.
        """
        alike = {(line.segment.start, line.segment.n) for line in self.lines}
        return len(alike) == 1 and not self.has_siblings

    def scalings(self, batch: RowBatch) -> TokenScalings | None:
        """Returns the scalings of the grid's tokens, 0 for those without; None if none has any."""
        adapted = [
            (i, line.first, min(line.segment.n, batch.n_adapted - line.first))
            for i, line in enumerate(self.lines)
            if line.first < batch.n_adapted
        ]
        if batch.scalings is None or not adapted:
            return None
        laid_out = batch.scalings.new_zeros(len(self.lines), self.width, *batch.scalings.shape[1:])
        for i, first, n in adapted:
            laid_out[i, :n] = batch.scalings[first : first + n]
        return TokenScalings(laid_out)

    def collect(self, hidden: Tensor, into: Tensor) -> None:
        """Copies ``[S, Q, H]`` to the tokens' places in ``into`` ``[N, H]``, without padding."""
        for i, line in enumerate(self.lines):
            into[line.first : line.first + line.segment.n] = hidden[i, : line.segment.n]


def side_by_side(batch: RowBatch, boundaries: Sequence[int] = ()) -> list[Grid]:
    """Lays a batch out in as few grids as padding allows.

    Args:
        batch: The batch.
        boundaries: Lengths of text that no grid may have lines on both sides of.
    """
    sides: dict[int, list[Line]] = {}
    for line in _lines(batch):
        segment = line.segment
        length = segment.start + 1 if segment.siblings else segment.stop
        side = sum(length > boundary for boundary in boundaries)
        sides.setdefault(side, []).append(line)
    return [_grid(group, batch) for lines in sides.values() for group in _padded_groups(lines)]


def _padded_groups(lines: list[Line]) -> list[list[Line]]:
    """Parts lines so that those of a group are of about the same length."""
    groups: list[list[Line]] = []
    padding = 0
    for line in sorted(lines, key=lambda line: -line.segment.n):
        if groups:
            padding += groups[-1][0].segment.n - line.segment.n
        if not groups or padding > PADDING_WORTH_A_CALL:
            groups.append([])
            padding = 0
        groups[-1].append(line)
    return groups


def like_with_like(batch: RowBatch) -> list[Grid]:
    """Lays a batch out so that a grid has single tokens, or chunks as long and far as each other.

    Siblings are single tokens.
    """
    singles: list[Line] = []
    chunks: dict[tuple[int, int], list[Line]] = {}
    for line in _lines(batch):
        segment = line.segment
        if segment.n > 1 and not segment.siblings:
            chunks.setdefault((segment.start, segment.n), []).append(line)
            continue
        for i in range(segment.n):
            alone = Segment(row=segment.row, start=segment.start, siblings=segment.siblings)
            singles.append(Line(segment=alone, first=line.first + i, place=line.place + i))
    groups = [singles, *chunks.values()] if singles else list(chunks.values())
    return [_grid(group, batch) for group in groups]


def _lines(batch: RowBatch) -> list[Line]:
    lines, first = [], 0
    for segment in batch.segments:
        lines.append(Line(segment=segment, first=first, place=segment.start))
        first += segment.n
    return lines


def _grid(lines: list[Line], batch: RowBatch) -> Grid:
    # In the order of their rows: only consecutive rows can be read without a copy.
    lines.sort(key=lambda line: (line.segment.row, line.first))
    return Grid(lines, batch.token_ids.device)
