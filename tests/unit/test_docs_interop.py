"""What docs/interop.md says runs: its "here" column and its blocks, from top to bottom."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import peft
import pytest
from peft.tuners.xlora.model import XLoraModel as PeftXLoraModel

from tests.pages import cells, steps
from tests.tiny_chat import tiny_chat_base, tiny_tokenizer
from tests.tiny_models import write_lora
from xlora_core.cli import main
from xlora_core.layers import XLoraLayer
from xlora_core.recording import Run

PAGE = Path(__file__).resolve().parents[2] / "docs" / "interop.md"

# The public calls of the original package: other systems' own list, which does not change any more.
XLORA_PACKAGE = (
    "add_xlora_to_model",
    "from_pretrained",
    "load_model",
    "enable_scalings_logging",
    "disable_scalings_logging",
    "clear_scalings_log",
    "get_scalings_log",
    "flush_log_scalings",
    "load_scalings_log",
    "print_scalings_predictions",
    "get_latest_scalings",
    "set_scaling_pass_value",
    "set_global_scaling_weight",
    "get_global_scaling_weight",
    "set_topk_lora",
    "get_topk_lora",
    "get_nb_trainable_parameters",
    "print_trainable_parameters",
    "set_use_trainable_adapters",
    "get_use_trainable_adapters",
    "save_pretrained",
)
# What users call on PEFT's wrapper around its X-LoRA model.
PEFT_WRAPPER = (
    "get_peft_model",
    "from_pretrained",
    "save_pretrained",
    "disable_adapter",
    "get_base_model",
    "set_adapter",
    "add_adapter",
    "load_adapter",
    "delete_adapter",
    "get_layer_status",
    "get_model_status",
    "get_nb_trainable_parameters",
    "print_trainable_parameters",
    "merge_and_unload",
    "unload",
    "peft_config",
)


def left_of(heading: str) -> str:
    """Returns everything but the right columns of a section: what the other package offers."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}")[1].split("\n## ")[0]
    lines = section.splitlines()
    return "\n".join(cells(line)[0] if line.startswith("|") else line for line in lines)


def names(calls: Any, text: str) -> list[str]:
    return [name for name in calls if not re.search(rf"\b{name}\b", text)]


def test_every_line_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_chat_base()
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("math", "law", "chemistry")):
        write_lora(tmp_path / "loras" / name, base, ("q_proj", "v_proj"), seed=seed)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "interop"}
    ran = steps(PAGE.read_text(encoding="utf-8"))
    assert len(ran) > 60
    for line, language, code in ran:
        if language == "sh":
            for command in code.splitlines():
                program, *arguments = shlex.split(command)
                assert (program, main(arguments)) == ("xlora", 0), command
        else:
            # The line numbers of an error are those of the page.
            exec(compile("\n" * (line - 1) + code, str(PAGE), "exec"), namespace)
    assert "trainable params:" in capsys.readouterr().out
    assert namespace["other"].adapter_names == ["math", "law"]
    # The prompt and 8 more tokens, the last of which is never read: PEFT's buckets.
    n_prompt = namespace["inputs"]["input_ids"].shape[1]
    assert list(namespace["buckets"]) == list(range(n_prompt, n_prompt + 8))
    assert [t.shape[1] for t in namespace["log"]] == list(namespace["buckets"])
    assert not any(isinstance(m, XLoraLayer) for m in namespace["merged"].modules())
    assert Run.load(tmp_path / "run.safetensors").scalings(arm=0).shape[1:] == (4, 2)
    assert (tmp_path / "scalings.csv").read_text(encoding="utf-8").count("\n") > 8


def test_every_call_of_pefts_model_has_its_line() -> None:
    own = [name for name in vars(PeftXLoraModel) if not name.startswith("_")]
    # The wrapper's users call the model itself for this.
    own.remove("forward")
    text = left_of("PEFT\n")
    assert names(own, text) == []
    assert names(PEFT_WRAPPER, text) == []
    assert all(hasattr(peft.PeftModel, n) or hasattr(peft, n) or n in text for n in PEFT_WRAPPER)


def test_every_call_of_the_original_package_has_its_line() -> None:
    assert names(XLORA_PACKAGE, left_of("The original")) == []
