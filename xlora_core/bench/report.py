"""What every benchmark gives: rows of a table, and all that says where they came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

Cell = float | int | str | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of one benchmark.

    Attributes:
        name: The benchmark.
        method: What was measured and how, in one or two sentences.
        rows: The table; all rows have the same columns. None is a cell that was not measured.
        facts: What the rows depend on: dtype, device, adapters, ranks, number of tokens.
        notes: What a reader has to know beside, one sentence each.
    """

    name: str
    method: str
    rows: Sequence[Mapping[str, Cell]]
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def document(self, machine: Mapping[str, Any], command: str) -> dict[str, Any]:
        """Returns everything as plain JSON types.

        Args:
            machine: As ``machine()`` returns it.
            command: What was called.
        """
        return {
            "benchmark": self.name,
            "command": command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "method": self.method,
            "machine": dict(machine),
            "facts": dict(self.facts),
            "rows": [dict(row) for row in self.rows],
            "notes": list(self.notes),
        }

    def table(self) -> str:
        """Returns the rows as a Markdown table that is aligned on a terminal, too."""
        if not self.rows:
            return "(nothing was measured)"
        columns = list(self.rows[0])
        cells = [[_text(row[column]) for column in columns] for row in self.rows]
        widths = [max(map(len, line)) for line in zip(columns, *cells, strict=True)]
        rule = ["-" * (width - 1) + ":" for width in widths]
        return "\n".join(_line(line, widths) for line in (columns, rule, *cells))


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    return f"| {' | '.join(padded)} |"


def _text(value: Cell) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) < 100 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else value
