"""What docs/editing.md tells people to type works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from tests.tiny_chat import tiny_chat_base, tiny_chat_xlora, tiny_tokenizer
from tests.tiny_models import write_lora
from xlora_core.cli import main
from xlora_core.model import XLoraModel

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "editing.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    return found


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> XLoraModel:
    """A model of math, code and verse; its folders lie in the current directory."""
    base = tiny_chat_base()
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    write_lora(tmp_path / "experts" / "law", base, ("q_proj", "lm_head"), seed=9)
    model = tiny_chat_xlora(tmp_path / "first")
    model.save_pretrained(tmp_path / "my-xlora")
    monkeypatch.chdir(tmp_path)
    return model


def test_the_example_runs(model: XLoraModel) -> None:
    exec(compile(block("python"), "editing.md", "exec"), {"model": model})
    again = XLoraModel.from_pretrained(tiny_chat_base(), "edited")
    assert again.adapter_names == ["law", "math", "poetry"]


@pytest.mark.usefixtures("model")
def test_the_command_runs() -> None:
    program, *argv = shlex.split(block("sh"))
    assert program == "xlora"
    assert main(argv) == 0
    again = XLoraModel.from_pretrained(tiny_chat_base(), "edited")
    assert again.adapter_names == ["law", "math", "verse"]


def test_the_numbers_of_the_page(model: XLoraModel) -> None:
    """A new adapter's share of a router without preferences is just what the page says."""
    for parameter in model.classifier.parameters():
        torch.nn.init.zeros_(parameter)
    model.add_adapter("law", "experts/law", share=0.05)
    model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    scalings = model.get_latest_scalings()
    torch.testing.assert_close(scalings[..., -1], torch.full_like(scalings[..., -1], 0.05))
    absent = ~model.present[-1]
    assert absent.tolist() == [True, True, True, False]
    held = scalings[:, :, -1, absent].sum(-1)
    torch.testing.assert_close(held, torch.full_like(held, 0.95))
