"""``xlora edit``, called in-process on a tiny model on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.tiny_chat import EXPERTS, tiny_chat_base, tiny_chat_xlora, tiny_tokenizer
from tests.tiny_models import write_lora
from xlora_core.cli import main
from xlora_core.editing import DEFAULT_SHARE
from xlora_core.model import XLoraModel

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a base model, a checkpoint for it, and one more adapter."""
    root = tmp_path_factory.mktemp("model")
    base = tiny_chat_base()
    base.save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    tiny_chat_xlora(root / "experts").save_pretrained(root / "xlora")
    write_lora(root / "law", base, ("q_proj", "lm_head"), rank=2, seed=9)
    return root


def edit(root: Path, *options: str, checkpoint: str = "xlora") -> int:
    base = ["--base", str(root / "base")]
    return main(["edit", str(root / checkpoint), *base, *options])


def load(folder: Path) -> XLoraModel:
    return XLoraModel.from_pretrained(tiny_chat_base(), folder)


def test_all_edits_at_once_are_the_methods_in_their_order(
    root: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "edited"
    law = f"math={root / 'law'}"
    options = ["--order", "verse,math,python", "--add", law, "--rename", "code=python"]
    assert edit(root, "--out", str(out), *options, "--share", "0.3", "--remove", "math") == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        "before: math, code, verse on 14 modules\n"
        "after:  verse, math, python on 15 modules\n"
        f"wrote {out}\n"
    )
    expected = load(root / "xlora")
    expected.remove_adapter("math")
    expected.rename_adapter("code", "python")
    expected.add_adapter("math", root / "law", share=0.3)
    expected.reorder_adapters(["verse", "math", "python"])
    found = load(out)
    assert found.adapter_names == expected.adapter_names
    state = expected.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in found.state_dict().items())


def test_json(root: Path, tmp_path: Path, capsys: Capture) -> None:
    out = str(tmp_path / "edited")
    assert edit(root, "--out", out, "--remove", "code", "math", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "checkpoint": str(root / "xlora"),
        "out": out,
        "before": {"adapters": list(EXPERTS), "n_modules": 14},
        "after": {"adapters": ["verse"], "n_modules": 14},
    }


def test_a_checkpoint_may_be_replaced_by_its_edited_self(root: Path, tmp_path: Path) -> None:
    load(root / "xlora").save_pretrained(tmp_path / "mine")
    argv = ["--base", str(root / "base"), "--out", str(tmp_path / "mine"), "--order"]
    assert main(["edit", str(tmp_path / "mine"), *argv, "verse", "math", "code"]) == 0
    assert load(tmp_path / "mine").adapter_names == ["verse", "math", "code"]


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ([], "say what to change: --remove, --rename, --add or --order"),
        (["--share", "0.5", "--remove", "math"], "--share goes with --add"),
        (["--remove", "physics"], "there is no adapter 'physics'\nhint: the adapters are math,"),
        (["--rename", "math=code"], "there is an adapter 'code' already"),
        (["--rename", "math"], "--rename must be of the form NAME=VALUE, got 'math'"),
        (["--add", "law=nowhere"], "adapter 'law': folder nowhere does not exist"),
        (["--order", "verse,code"], "all adapters must be named, once each: 'math' is missing"),
        (["--remove", "math", "code", "verse"], "'verse' is the only adapter"),
    ],
)
def test_what_is_refused_writes_nothing(
    root: Path, tmp_path: Path, capsys: Capture, options: list[str], fault: str
) -> None:
    assert edit(root, "--out", str(tmp_path / "edited"), *options) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("xlora edit: error: ")
    assert fault in said.err
    assert "\nhint: " in said.err
    assert not (tmp_path / "edited").exists()


def test_help_teaches(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["edit", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert f"(default: {DEFAULT_SHARE})" in " ".join(text.split())
    for word in ("examples:", "--remove", "--rename", "--add", "--order", "xlora edit demo"):
        assert word in text
