"""Training LoRA experts with PEFT on a tiny model."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_models import tiny_base
from tests.training_models import EXPERT, PAD, ROUTER, examples, weights_of
from xlora_core.config import ExpertTrainConfig
from xlora_core.errors import ConfigError
from xlora_core.training.data import by_length, collate
from xlora_core.training.experts import ExpertTrainer, train_expert
from xlora_core.training.log import TrainingLog
from xlora_core.training.losses import answer_columns, column_losses
from xlora_core.training.router import fresh_model


def train(
    out: Path, settings: ExpertTrainConfig = EXPERT, base: Any = None, **options: Any
) -> TrainingLog:
    return train_expert(
        base if base is not None else tiny_base(),
        PAD,
        examples(),
        examples(4),
        out,
        settings,
        base_name="tiny",
        **options,
    )


def test_training_lowers_the_loss_and_writes_a_readable_adapter(tmp_path: Path) -> None:
    base = tiny_base()
    before = weights_of(base)
    log = train(tmp_path / "0", base=base, command="xlora train-expert")
    assert log.heldout_loss[-1][1] < log.heldout_loss[0][1] - 0.01
    assert log.heldout_routing == []
    assert {p.name for p in tmp_path.iterdir()} == {"0"}
    assert {p.name for p in (tmp_path / "0").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
    }
    config = json.loads((tmp_path / "0" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert str(tmp_path) not in json.dumps(config)
    # The base is plain again, and as it was.
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    # Read back, alone and at full weight, it is the model whose loss was logged.
    model = fresh_model(tiny_base(), {"0": str(tmp_path / "0")}, ROUTER)
    losses = []
    for group in by_length(examples(4), 4):
        batch = collate(group, PAD)
        columns = answer_columns(batch.labels)
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            logits_to_keep=columns,
        ).logits
        losses.append(column_losses(logits, batch.labels, columns))
    assert float(torch.cat(losses).detach().mean()) == pytest.approx(
        log.heldout_loss[-1][1], abs=2e-3
    )


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_other_families_are_read_back_by_peft(tmp_path: Path, family: str) -> None:
    train(tmp_path / "0", base=tiny_base(family))
    model = peft.PeftModel.from_pretrained(tiny_base(family), tmp_path / "0")
    ids = torch.tensor([[5, 6, 7]])
    ours = fresh_model(tiny_base(family), {"0": str(tmp_path / "0")}, ROUTER)
    torch.testing.assert_close(
        ours(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_lora_weights_are_float32_over_any_base(
    tmp_path: Path, dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[torch.dtype]] = {"weights": set(), "losses": set()}
    plain = ExpertTrainer.answer_pass

    def watched(self: ExpertTrainer, inputs: Any) -> Any:
        answers = plain(self, inputs)
        seen["weights"] |= {p.dtype for p in self.model.parameters() if p.requires_grad}
        seen["losses"].add(answers.losses.dtype)
        return answers

    monkeypatch.setattr(ExpertTrainer, "answer_pass", watched)
    settings = replace(EXPERT, autocast=autocast, learning_rate=1e-2)
    log = train(tmp_path / "0", settings, base=tiny_base(dtype=dtype))
    assert seen == {"weights": {torch.float32}, "losses": {torch.float32}}
    assert log.heldout_loss[-1][1] < log.heldout_loss[0][1] - 0.1


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_gradient_checkpointing_trains_to_the_same_weights(tmp_path: Path, mode: str) -> None:
    calls: list[bool] = []
    for name in ("off", mode):
        base = tiny_base()
        calls.clear()
        base.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(True))
        settings = replace(EXPERT, gradient_checkpointing=name, eval_every=100)
        train(tmp_path / name, settings, base=base)
        evaluations = 2
        assert len(calls) == evaluations + settings.steps * (1 if name == "off" else 2)
    weights = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("off", mode)]
    assert any(tensor.abs().max() > 1e-4 for n, tensor in weights[0].items() if "lora_B" in n)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-2, atol=1e-4)


def test_missing_peft_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError) as caught:
        train(tmp_path / "0")
    assert caught.value.message == (
        "training LoRA experts needs the package peft, which is not installed"
    )
    assert caught.value.hint == "pip install 'xlora-explorer[train]'"


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"domain": " "}, "domain must be a name, got ' '"),
        ({"domain": "x", "rank": 0}, "rank must be a whole number >= 1, got 0"),
        ({"domain": "x", "dropout": 1}, r"dropout must be in \[0, 1\), got 1"),
        ({"domain": "x", "join_share": -0.1}, r"join_share must be in \[0, 1\], got -0.1"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        ExpertTrainConfig(**values)
