"""Every known quirk of PEFT and of the original package has a row and a test in semantics.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.named_tests import named_tests

PAGE = Path(__file__).resolve().parents[2] / "docs" / "semantics.md"
ROW = re.compile(r"^\| ([A-Z]\d+) \|(.*)\|$", flags=re.MULTILINE)
QUIRKS = {
    # PEFT: performance and architecture, correctness, what it does not take, the rest.
    "A": 11,
    "B": 9,
    "C": 10,
    "E": 9,
    # The original package: broken or missing, different from PEFT, asked for by users.
    "X": 8,
    "D": 13,
    "U": 16,
}


def rows() -> list[tuple[str, str]]:
    return ROW.findall(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("letter", QUIRKS)
def test_every_quirk_has_its_rows_in_order(letter: str) -> None:
    numbers = [int(quirk[1:]) for quirk, _ in rows() if quirk.startswith(letter)]
    assert numbers == sorted(numbers)
    assert sorted(set(numbers)) == list(range(1, QUIRKS[letter] + 1))


def test_every_row_names_a_test() -> None:
    assert [quirk for quirk, row in rows() if not named_tests(row)] == []


def test_every_quirk_test_has_its_row() -> None:
    """A test named after a quirk is named in the row of that quirk."""
    of_row: dict[str, str] = {}
    for quirk, row in rows():
        of_row[quirk] = of_row.get(quirk, "") + row
    parity = Path(__file__).resolve().parents[1] / "parity"
    for file in ("test_peft_quirks.py", "test_xlora_package_quirks.py"):
        for name in re.findall(r"^def (test_\w+)", (parity / file).read_text(), re.MULTILINE):
            quirk = name.split("_")[1].upper()
            assert f"{file}::{name}`" in of_row[quirk], name
