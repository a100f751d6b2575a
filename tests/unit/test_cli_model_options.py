"""Place, type and threads of a model, as every command takes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.commands import refused
from tests.tiny_chat import tiny_chat_base, tiny_chat_xlora, tiny_tokenizer
from xlora_core import placement, threads
from xlora_core.cli import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A base model and a checkpoint on disk, as command-line options."""
    root = tmp_path_factory.mktemp("model")
    tiny_chat_base().save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    tiny_chat_xlora(root / "experts").save_pretrained(root / "xlora")
    return ["--model", str(root / "base"), "--checkpoint", str(root / "xlora")]


@pytest.fixture(autouse=True)
def threads_are_kept() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def answer(capsys: Capture, model: list[str], *options: str) -> str:
    prompt = ["--prompt", "the quick fox", "--max-new-tokens", "6"]
    assert main(["generate", *model, *prompt, *options, "--json"]) == 0
    text: str = json.loads(capsys.readouterr().out)["arms"][0]["text"]
    return text


def test_auto_answers_as_the_default_does(capsys: Capture, model: list[str]) -> None:
    usual = answer(capsys, model, "--device", "cpu")
    assert answer(capsys, model, "--device", "auto", "--dtype", "auto") == usual
    assert usual


def test_threads_are_set(
    capsys: Capture, model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "processors", lambda: {0, 1, 2})
    answer(capsys, model, "--threads", "3")
    assert torch.get_num_threads() == 3


def test_more_threads_than_processors_are_refused(
    capsys: Capture, model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "processors", lambda: {0, 1, 2})
    error = refused(capsys, "inspect", *model, "--threads", 4)
    assert "threads must be a number from 1 to 3, the processors" in error
    assert "got 4" in error


def test_auto_without_accelerate_is_refused(
    capsys: Capture, model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "find_spec", lambda name: None)
    error = refused(capsys, "inspect", *model, "--device", "auto")
    assert "spread over devices by accelerate, which is not installed" in error
    assert "hint: pip install accelerate, or give one device" in error


def test_a_type_that_is_none_is_refused_by_the_parser(capsys: Capture, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", "--model", str(tmp_path), "--dtype", "int8"])
    assert "choose from" in capsys.readouterr().err
