"""Every test that a page of the docs names is one that pytest collects."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.named_tests import exists, named_tests

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_tests_exist(page: Path) -> None:
    named = named_tests(page.read_text(encoding="utf-8"))
    assert [name for name in named if not exists(name)] == []


def test_what_is_not_there_is_noticed() -> None:
    here = "tests/unit/test_docs_named_tests.py"
    own = "tests/parity/test_pefts_own_tests.py"
    assert named_tests(f"`{here}::test_a`, `{here}`") == [f"{here}::test_a", here]
    assert exists(here)
    assert exists(f"{here}::test_named_tests_exist")
    assert exists(f"{own}::TestXlora::test_save_load_functional_pt")
    assert not exists(f"{here}::test_named")
    assert not exists(f"{own}::TestXlora::test_a")
    assert not exists("tests/unit/test_nothing.py")
    assert not exists("tests/named_tests.py")  # a file without tests
