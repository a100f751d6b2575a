"""The code of docs/hardware.md runs on a tiny model, and its options exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.tiny_chat import tiny_chat_base, tiny_chat_xlora, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_chat_base().save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    tiny_chat_xlora(tmp_path / "experts").save_pretrained("xlora")
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(block, "docs/hardware.md", "exec"), names)
    assert names["model"].adapter_names == ["math", "code", "verse"]  # type: ignore[attr-defined]


def test_the_tests_it_names_exist() -> None:
    named = re.findall(r"`(?:tests/unit/)?(test_\w+\.py)`", PAGE)
    assert len(named) == 6
    assert [name for name in named if not (ROOT / "tests" / "unit" / name).is_file()] == []


def test_the_apps_variables_are_read() -> None:
    client = (ROOT / "app" / "engine_client.py").read_text(encoding="utf-8")
    named = set(re.findall(r"XLORA_APP_\w+", PAGE))
    assert named == {"XLORA_APP_DEVICE", "XLORA_APP_DTYPE", "XLORA_APP_THREADS"}
    assert [name for name in named if name not in client] == []
