"""What docs/training.md tells people to type is taken, and its Python runs on a tiny model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.tiny_models import write_experts
from tests.training_models import row, tiny_base_folder, write_rows
from xlora_core.cli.main import _parser
from xlora_core.demo import load_base
from xlora_core.model import XLoraModel
from xlora_core.training.data import read_rows

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "docs" / "training.md", ROOT / "README.md", ROOT / "sample_data" / "MODEL_CARD.md"]
PAGE = PAGES[0].read_text(encoding="utf-8")
TRAINING = ("train", "train-expert", "eval")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_are_taken(page: Path) -> None:
    lines = re.findall(r"^xlora .*$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    commands = [shlex.split(line)[1:] for line in lines]
    assert {words[0] for words in commands} >= set(TRAINING)
    for words in commands:
        if words[0] in TRAINING:
            _parser().parse_args(words)


def test_the_options_it_names_are_there() -> None:
    parser = _parser()
    named = set(re.findall(r"`[^`]*?(--[a-z][a-z-]+)", PAGE.replace("```", "")))
    known = {
        option
        for action in parser._subparsers._group_actions  # type: ignore[union-attr]
        for name in TRAINING
        for option in action.choices[name]._option_string_actions  # type: ignore[index, call-overload, union-attr]
    }
    assert len(named) > 10
    assert named <= known


def test_its_rows_are_read(tmp_path: Path) -> None:
    (text,) = blocks("json")
    (tmp_path / "rows.jsonl").write_text(text)
    assert [len(r.messages) for r in read_rows(tmp_path / "rows.jsonl")] == [2, 3, 0]


def test_its_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_base_folder(tmp_path / "path/to/base")
    experts = write_experts(tmp_path / "experts", n_adapters=2)
    for folder, domain in zip(experts.values(), ("math", "verse"), strict=True):
        Path(folder).rename(tmp_path / "experts" / domain)
        for split in ("train", "heldout"):
            rows = [vars(row(f"{i}?", "abcd" * (1 + i % 2), domain)) for i in range(12)]
            write_rows(tmp_path / "rows" / f"{domain}.{split}.jsonl", rows)
    (example,) = blocks("python")
    exec(compile(example, "training.md", "exec"), {"__name__": "training"})
    before, after = re.findall(r"\[\d, (\d+\.\d+)\]", capsys.readouterr().out)
    assert float(after) < float(before)
    log = json.loads((tmp_path / "my-xlora" / "training.json").read_text())
    assert log["settings"]["label_loss"] == 0.1
    base, _ = load_base("path/to/base", "float32")
    assert XLoraModel.from_pretrained(base, "my-xlora").adapter_names == ["math", "verse"]
