"""Everything that docs/checkpoints.md tells people to type works, in the order it stands there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.original_checkpoints import write_original_checkpoint
from tests.tiny_chat import tiny_tokenizer
from tests.tiny_models import tiny_base, tiny_prompt, tiny_xlora, write_experts
from xlora_core import XLoraModel
from xlora_core.checkpoint import layout_of, read_checkpoint, write_peft
from xlora_core.cli import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md"


def blocks() -> list[tuple[str, str]]:
    """Returns language and text of the page's code blocks."""
    return re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders that the page names, as the current directory."""
    monkeypatch.chdir(tmp_path)
    tiny_base().save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    for path, name in zip(
        write_experts(tmp_path / "loras").values(), ("math", "code", "verse"), strict=True
    ):
        Path(path).rename(tmp_path / "loras" / name)
    tiny_xlora(tmp_path / "experts").save_pretrained("ours")
    write_peft("peft-xlora", read_checkpoint("ours"))
    Path("peft-xlora/xlora_names.json").unlink()
    break_as_peft_does(Path(shutil.copytree("peft-xlora", "broken-peft")))
    write_original_checkpoint(tmp_path / "original-xlora")
    names = read_checkpoint("ours").layer_names or ()
    Path("ordering.json").write_text(json.dumps({"layers": {n: i for i, n in enumerate(names)}}))
    shutil.rmtree("ours")
    return tmp_path


def break_as_peft_does(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    prefix = "base_model.internal_xlora_classifier."
    strays = {key.replace("layers.0.", "layers."): t for key, t in load_file(path).items()}
    assert set(strays) == {f"{prefix}layers.weight", f"{prefix}layers.bias"}
    (folder / "0").mkdir()
    save_file(strays, folder / "0" / path.name)
    save_file({}, path)


def test_the_page_runs(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for language, text in blocks():
        if language == "python":
            exec(compile(text, PAGE.name, "exec"), names)
        elif language == "sh":
            for line in text.replace("\\\n", " ").splitlines():
                command, *arguments = shlex.split(line)
                assert command == "xlora"
                assert main(arguments) == 0, line
    written = {path.name: str(layout_of(path)) for path in folders.iterdir() if written_here(path)}
    assert written == {
        "whole-peft": "peft",
        "my-xlora": "ours",
        "light": "ours",
        "near": "ours",
        "for-peft": "peft",
        "portable-peft": "peft",
        "for-mistral-rs": "original",
        "from-peft": "ours",
        "named": "ours",
        "from-original": "ours",
        "lightweight": "ours",
    }
    model, theirs = names["model"], names["theirs"]
    assert isinstance(model, XLoraModel)
    assert isinstance(theirs, PeftModel)
    with torch.no_grad():
        expected = model.eval()(input_ids=tiny_prompt()).logits
        found = theirs.eval()(input_ids=tiny_prompt()).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def written_here(path: Path) -> bool:
    given = {
        "base",
        "loras",
        "experts",
        "new-experts",
        "peft-xlora",
        "broken-peft",
        "original-xlora",
    }
    return path.is_dir() and path.name not in given


def test_the_refusal_it_quotes(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (quoted,) = [text for language, text in blocks() if language == "text"]
    shutil.rmtree("broken-peft/0")
    assert main(["convert", "broken-peft", "whole", "--to", "peft"]) == 2
    assert " ".join(quoted.split()) in capsys.readouterr().err


def test_tests_that_it_names_exist() -> None:
    root = PAGE.parents[1]
    named = re.findall(r"`(tests/[\w/]+\.py)`", PAGE.read_text(encoding="utf-8"))
    assert len(named) >= 4
    assert [path for path in named if not (root / path).is_file()] == []
