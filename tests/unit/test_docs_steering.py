"""What docs/steering.md tells people to type works, and gives what the page says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.tiny_chat import tiny_chat_base, tiny_chat_xlora, tiny_tokenizer
from xlora_core import AdapterOverride, RoutingKnobs, XLoraConfig
from xlora_core.cli import main
from xlora_core.model import XLoraModel
from xlora_core.routing import route

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "steering.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> XLoraModel:
    """A model of math, code and verse; its folders lie in the current directory."""
    tiny_chat_base().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model = tiny_chat_xlora(tmp_path / "experts")
    model.save_pretrained(tmp_path / "my-xlora")
    monkeypatch.chdir(tmp_path)
    return model


def test_the_examples_run(model: XLoraModel) -> None:
    names = {"model": model, "tokenizer": tiny_tokenizer()}
    for number, block in enumerate(blocks("python")):
        exec(compile(block, f"steering.md, block {number + 1}", "exec"), names)
    muted = model.get_adapter_overrides()[-1]
    assert muted.module_indices(model.lora_layer_names) == list(range(len(model.lora_layer_names)))


@pytest.mark.usefixtures("model")
def test_the_commands_run(capsys: pytest.CaptureFixture[str]) -> None:
    (script,) = blocks("sh")
    for line in script.splitlines():
        program, *argv = shlex.split(line)
        assert program == "xlora"
        assert main(argv) == 0
    assert "verse muted, math pinned at 0.8 in *.q_proj" in capsys.readouterr().out
    assert "mean_effective_scaling" in pd.read_csv("louder.csv")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (None, "g * s"),
        (AdapterOverride.scale("a", 3.0), "g * f * s"),
        (AdapterOverride.pin("a", 3.0), "g * v"),
        (AdapterOverride.mute("a"), "0"),
    ],
)
def test_the_table_is_the_formula(override: AdapterOverride | None, words: str) -> None:
    assert f"| `{words}` |" in PAGE
    logits = torch.tensor([[[1.0, 2.0]]])
    s = float(torch.softmax(logits, -1)[0, 0, 0])
    knobs = RoutingKnobs(global_weight=2.0, overrides=[override] if override else [])
    names = {"layer_names": ["m"], "adapter_names": ["a", "b"]}
    effective = route(logits, XLoraConfig(), knobs, **names)  # type: ignore[arg-type]  # its own
    expected = eval(words, {"g": 2.0, "s": s, "f": 3.0, "v": 3.0})
    assert float(effective[0, 0, 0]) == pytest.approx(expected)
    assert float(effective[0, 0, 1]) == pytest.approx(2 * (1 - s))
