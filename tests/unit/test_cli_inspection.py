"""``xlora inspect`` on other routers and other kinds of modules than the usual."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.gated_models import gated_chat
from tests.task_models import TASKS, peft_experts, task_base
from tests.tiny_chat import tiny_chat_base, tiny_tokenizer
from xlora_core import Engine, SamplingParams, XLoraConfig, XLoraModel
from xlora_core.cli import main
from xlora_core.cli.inspection import model_report


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_kind_of_module_is_reported_with_its_size(tmp_path: Path, name: str) -> None:
    model = XLoraModel.from_base(
        task_base(name), XLoraConfig(adapters=peft_experts(tmp_path, name))
    )
    report = model_report(model, name="tiny")
    assert [m["name"] for m in report["modules"]] == model.lora_layer_names
    counted = sum(adapter["n_parameters"] for adapter in report["adapters"])
    matrices = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in model.lora_layers)
    assert counted == matrices


def test_a_per_layer_model_its_checkpoint_and_its_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_chat_base().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model = gated_chat(tmp_path)
    model.save_pretrained(tmp_path / "checkpoint")
    with Engine(model, tiny_tokenizer(), model_id="tiny") as engine:
        engine.run("two", sampling=SamplingParams(max_new_tokens=2)).save(tmp_path / "run")
    n_parameters = sum(p.numel() for p in model.gates.parameters())
    checkpoint, base = str(tmp_path / "checkpoint"), str(tmp_path / "base")
    for arguments in ([checkpoint], ["--model", base, "--checkpoint", checkpoint]):
        assert main(["inspect", *arguments]) == 0
        printed = capsys.readouterr().out
        assert f"{n_parameters:,} parameters, one gate per module" in printed
        assert "scaling pass" not in printed
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert "14, each with a gate of its own" in capsys.readouterr().out
    assert main(["inspect", "--json", str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out)["router"] == "per_layer"
