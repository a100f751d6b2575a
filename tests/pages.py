"""What a page of the docs says can be typed: its code blocks, and its tables' columns "here"."""

from __future__ import annotations

import re

NOTHING_TO_TYPE = "not needed"


def cells(row: str) -> list[str]:
    """Returns the cells of a table's row."""
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def steps(text: str) -> list[tuple[int, str, str]]:
    """Returns (line number, language, code) of everything to type on a page, from top to bottom.

    A table's column counts if its header says "here"; each of its cells is one span of Python, or
    "not needed".
    """
    found: list[tuple[int, str, str]] = []
    language, block = "", []
    column: int | None = None  # of the table that goes on; -1 where nothing is to be typed
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("```"):
            if language:
                found.append((number - len(block), language, "\n".join(block)))
            language, block = ("" if language else line.removeprefix("```")), []
        elif language:
            block.append(line)
        elif not line.startswith("|"):
            column = None
        elif column is None:
            column = cells(line).index("here") if "here" in cells(line) else -1
        elif column >= 0 and not set(line) <= set("|-: "):
            cell = cells(line)[column]
            code = re.fullmatch(r"`([^`]+)`", cell)
            assert code or cell == NOTHING_TO_TYPE, f"line {number}: nothing to type: {line}"
            if code:
                found.append((number, "python", code[1]))
    return found
