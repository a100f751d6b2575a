"""The code of docs/engine.md runs on the demo, and the tests that the page names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.named_tests import exists, named_tests

PAGE = Path(__file__).resolve().parents[2] / "docs" / "engine.md"


def test_the_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        names: dict[str, object] = {}
        exec(compile(block, str(PAGE), "exec"), names)
    assert len(blocks) == 1
    n_prompt = names["run"].tracks[0].n_prompt  # type: ignore[attr-defined]  # a Run
    lengths = re.findall(r"\d+", capsys.readouterr().out.split("]")[0])
    assert [int(length) for length in lengths] == [n_prompt + 8] * 4


def test_the_tests_that_the_page_names_exist() -> None:
    names = named_tests(PAGE.read_text(encoding="utf-8"))
    assert len(names) >= 6
    assert [name for name in names if not exists(name)] == []
