"""The trainer that routers and experts share: steps, schedule, limits, settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import bitsandbytes as bnb
import pytest
import torch
from transformers import (
    TrainingArguments,
)

from tests.tiny_models import tiny_base, tiny_xlora, write_experts
from tests.training_models import (
    PAD,
    ROUTER,
    CallAt,
    examples,
    letter_tokenizer,
    row,
)
from xlora_core.config import RouterTrainConfig, TrainConfig
from xlora_core.errors import ConfigError, ModelError
from xlora_core.model import XLoraModel
from xlora_core.training.data import encode_rows
from xlora_core.training.router import (
    RouterTrainer,
    fresh_model,
    train_router,
    work_folder,
)
from xlora_core.training.trainer import learning_rate_share


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_experts(tmp_path_factory.mktemp("experts"))


def trainer_of(model: XLoraModel, folder: Path, settings: RouterTrainConfig) -> RouterTrainer:
    mixed = [*examples(8, "0"), *examples(8, "1")]
    return RouterTrainer(model, PAD, mixed, examples(4), folder, settings)


def test_gradients_are_clipped(adapters: dict[str, str], tmp_path: Path) -> None:
    def first_moment(limit: float) -> float:
        settings = replace(ROUTER, steps=1, max_grad_norm=limit)
        model = fresh_model(tiny_base(), adapters, settings)
        trainer = trainer_of(model, tmp_path / str(limit), settings)
        trainer.fit()
        state = trainer.optimizer.state_dict()["state"]
        # After one step AdamW's first moment is (1 - 0.9) of the gradient.
        return float(torch.cat([s["exp_avg"].flatten() for s in state.values()]).norm() / 0.1)

    assert first_moment(1e-3) == pytest.approx(1e-3, rel=1e-3)
    assert first_moment(0) > 2e-3


def test_a_router_is_trained_over_a_quantised_base(
    adapters: dict[str, str], tmp_path: Path
) -> None:
    """A stand-in for what transformers loads: 8-bit layers, and the marks that Trainer reads."""
    base: Any = tiny_base()
    for path, module in list(base.named_modules()):
        if isinstance(module, torch.nn.Linear) and "layers" in path:
            layer = bnb.nn.Linear8bitLt(
                module.in_features, module.out_features, bias=False, has_fp16_weights=False
            )
            layer.load_state_dict(module.state_dict())
            base.set_submodule(path, layer.to("cpu"))
    base.is_quantized = True
    base.hf_quantizer = SimpleNamespace(
        is_trainable=True, quantization_config=SimpleNamespace(quant_method="8 bits")
    )
    settings = replace(ROUTER, learning_rate=1e-2)
    model = fresh_model(base, adapters, settings)
    log = train_router(model, PAD, examples(), examples(4), tmp_path / "out", settings)
    assert log.heldout_loss[-1][1] < log.heldout_loss[0][1] - 0.01
    base.hf_quantizer.is_trainable = False
    with pytest.raises(ConfigError, match="quantised by 8 bits, which cannot pass gradients on"):
        train_router(model, PAD, examples(), [], tmp_path / "other", settings)


def test_the_loss_of_a_step_is_the_mean_over_its_domains(tmp_path: Path) -> None:
    model = tiny_xlora(tmp_path)
    rows = [row("a", "bcdefgh", "0"), row("c", "d", "1"), row("e", "f", "0"), row("g", "h", "1")]
    train = encode_rows(rows, letter_tokenizer(), 60)
    settings = replace(ROUTER, rows=2, accumulation=2)
    trainer = RouterTrainer(model, PAD, train, [], tmp_path, settings)
    batches, _ = trainer.get_batch_samples(
        iter(trainer.get_train_dataloader()), 2, torch.device("cpu")
    )
    whole = trainer.answer_pass(trainer.collated(train))
    expected = torch.stack([whole.losses[whole.domains == k].mean() for k in (0, 1)]).mean()
    loss = sum(trainer.compute_loss(model, batch) for batch in batches)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_nothing_to_train_is_an_error(adapters: dict[str, str], tmp_path: Path) -> None:
    model = fresh_model(tiny_base(), adapters, ROUTER)
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing can learn"):
        train_router(model, PAD, examples(), [], tmp_path, ROUTER)


def test_several_processes_are_refused(
    adapters: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    model = fresh_model(tiny_base(), adapters, ROUTER)
    with pytest.raises(ConfigError, match="training runs in one process, this is one of 2"):
        train_router(model, PAD, examples(), [], tmp_path, ROUTER)


def test_a_run_that_diverges_says_so(adapters: dict[str, str], tmp_path: Path) -> None:
    model = fresh_model(tiny_base(), adapters, ROUTER)

    def spoil() -> None:
        with torch.no_grad():
            cast("Any", model.classifier.layers[-1]).bias.fill_(float("nan"))

    with pytest.raises(ModelError, match="diverged: the loss of step 4 is nan") as caught:
        train_router(
            model, PAD, examples(), [], tmp_path / "out", ROUTER, progress=CallAt(3, spoil)
        )
    assert "lower learning rate" in caught.value.hint


def test_checkpoints_lie_beside_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert work_folder(Path("a/b/")) == tmp_path / "a" / "b.training"
    assert work_folder(Path()) == tmp_path.with_name(f"{tmp_path.name}.training")


def test_the_learning_rate_warms_up_and_decays() -> None:
    settings = TrainConfig(steps=10, warmup_steps=2)
    shares = [learning_rate_share(step, settings) for step in range(10)]
    assert shares[:3] == [0.5, 1.0, 1.0]
    assert shares[2:] == sorted(shares[2:], reverse=True)
    assert 0.05 < shares[-1] < 0.12
    assert learning_rate_share(10, settings) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("values", "faults"),
    [
        ({"steps": 0, "rows": 2.5}, ["steps must be a whole number >= 1, got 0", "rows must be"]),
        ({"learning_rate": float("nan")}, ["learning_rate must be finite and > 0, got nan"]),
        ({"dtype": "float16"}, ["dtype must be one of bfloat16, float32, got 'float16'"]),
        ({"gradient_checkpointing": "on"}, ["gradient_checkpointing must be one of off, reentr"]),
        ({"mixed_share": 1.5, "label_loss": -1}, ["mixed_share must be in [0, 1]", "label_loss"]),
        ({"label_steps": 0}, ["label_steps must be None or a whole number >= 1, got 0"]),
    ],
)
def test_settings_out_of_range_are_listed(values: dict[str, Any], faults: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        RouterTrainConfig(**values)
    assert len(caught.value.faults) == len(faults)
    for found, expected in zip(caught.value.faults, faults, strict=True):
        assert found.startswith(expected)
