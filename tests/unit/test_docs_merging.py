"""What docs/merging.md tells people to type works, on a tiny model with files of the same names."""

from __future__ import annotations

import gzip
import json
import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.tiny_chat import tiny_chat_base, tiny_chat_xlora, tiny_tokenizer, write_chat_experts
from xlora_core import XLoraConfig, XLoraModel
from xlora_core.cli import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "merging.md"
TEXT = PAGE.read_text(encoding="utf-8")
ROW = {"domain": "math", "id": "1", "user": "the sum of two", "assistant": "numbers and more"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def commands() -> list[str]:
    """Returns the page's ``xlora`` commands, continued lines joined."""
    joined = "\n".join(blocks("sh")).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.startswith("xlora ")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what the page speaks of: a model, and rows to read."""
    monkeypatch.chdir(tmp_path)
    tiny_chat_base().save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    adapters = write_chat_experts(tmp_path / "experts")
    # The demo's experts, so that the page may name them.
    names = dict(zip(("math", "python", "verse"), adapters.values(), strict=True))
    model = XLoraModel.from_base(
        tiny_chat_base(), XLoraConfig(adapters=names, layerwise_scalings=True)
    )
    model.save_pretrained("checkpoint")
    rows = tmp_path / "sample_data" / "rows"
    rows.mkdir(parents=True)
    for name in re.findall(r"sample_data/rows/(\S+\.gz)", TEXT):
        (rows / name).write_bytes(gzip.compress((json.dumps(ROW) + "\n").encode()))
    return tmp_path


def test_the_commands_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    on_tiny = ["--model", "base", "--checkpoint", "checkpoint"]
    lines = commands()
    assert len(lines) > 5
    for line in lines:
        assert main([*shlex.split(line)[1:], *on_tiny]) == 0, line
    written = {path.name for path in folder.iterdir()}
    assert {"math.json", "math-lora", "math-lora-8", "math-model"} <= written
    assert "same top token" in capsys.readouterr().out


def test_the_code_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_chat_xlora(folder / "more")
    model.save_pretrained("routed")
    recorded = next(line for line in commands() if line.startswith("xlora generate"))
    assert main([*shlex.split(recorded)[1:], "--model", "base", "--checkpoint", "routed"]) == 0
    monkeypatch.setattr("xlora_core.demo.load_model", lambda name: (model, tiny_tokenizer()))
    (code,) = blocks("python")
    exec(compile(code, str(PAGE), "exec"), {"__name__": "page"})
    assert AutoModelForCausalLM.from_pretrained("math-model").config.model_type == "llama"
    assert (folder / "math-lora-8" / "adapter_config.json").is_file()
