"""Checkpoints of a training run: no pickles, and a resume that is exact to the bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_models import tiny_base, write_experts
from tests.training_models import EXPERT, PAD, ROUTER, CallAt, examples, weights_of
from xlora_core.config import RouterTrainConfig
from xlora_core.errors import CheckpointError, ConfigError
from xlora_core.model import XLoraModel
from xlora_core.training.checkpoints import checkpoint_to_resume
from xlora_core.training.experts import train_expert
from xlora_core.training.log import TrainingLog
from xlora_core.training.router import fit_router, fresh_model

# Dropout draws random numbers in every pass, accumulation has two passes a step.
SETTINGS = replace(
    ROUTER, rows=2, accumulation=2, depth=2, size=8, eval_every=4, learning_rate=1e-2
)
FILES = {
    "weights.safetensors",
    "optimizer.safetensors",
    "optimizer.json",
    "scheduler.json",
    "random.json",
    "run.json",
    "trainer_state.json",
}


class KilledError(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Lets Ctrl-C act: a test run that was started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_experts(tmp_path_factory.mktemp("experts"))


def fit(
    adapters: dict[str, str],
    work: Path,
    settings: RouterTrainConfig = SETTINGS,
    progress: CallAt | None = None,
    seed: int = 0,
) -> tuple[XLoraModel, TrainingLog]:
    torch.manual_seed(seed)  # of the classifier's hidden layer; a resumed run must not need it
    model = fresh_model(tiny_base(), adapters, settings)
    log = fit_router(model, PAD, examples(), examples(4), work, settings, progress=progress)
    return model, log


def raises(error: type[BaseException] | BaseException) -> Any:
    def call(*args: object, **kwargs: object) -> None:
        raise error

    return call


def interrupted() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def same_bits(a: XLoraModel, b: XLoraModel) -> bool:
    ours, theirs = weights_of(a), weights_of(b)
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("router", "train_adapters", "cut_at"),
    [("classifier", False, 1), ("classifier", True, 3), ("per_layer", True, 1)],
)
def test_an_interrupted_run_goes_on_bit_for_bit(
    adapters: dict[str, str], tmp_path: Path, router: str, train_adapters: bool, cut_at: int
) -> None:
    settings = replace(SETTINGS, train_adapters=train_adapters, router=router)
    whole, log = fit(adapters, tmp_path / "whole", settings)
    progress = CallAt(cut_at, interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(adapters, tmp_path / "cut", settings, progress)
    # Ctrl-C came after the step was logged, so the next one was finished, too.
    assert checkpoint_to_resume(tmp_path / "cut", json.loads(run_of(tmp_path / "cut"))) == (
        tmp_path / "cut" / f"checkpoint-{cut_at + 1}"
    )
    assert progress.notes[-1].startswith(f"stopped at step {cut_at + 1} of 6")
    # Another initial classifier: everything that learns must come from the checkpoint.
    resumed, resumed_log = fit(adapters, tmp_path / "cut", settings, seed=5)
    assert same_bits(resumed, whole)
    assert resumed_log.train_loss == log.train_loss
    assert resumed_log.heldout_loss == log.heldout_loss
    assert [step for step, _ in log.heldout_loss] == [0, 4, 6]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def run_of(work: Path) -> str:
    return next(work.glob("checkpoint-*/run.json")).read_text()


def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(
    adapters: dict[str, str], tmp_path: Path
) -> None:
    whole, log = fit(adapters, tmp_path / "whole")
    with pytest.raises(KilledError):
        fit(adapters, tmp_path / "cut", progress=CallAt(5, raises(KilledError)))
    # As if it had been killed while it wrote the next one.
    shutil.copytree(tmp_path / "cut" / "checkpoint-4", tmp_path / "cut" / "checkpoint-5")
    (tmp_path / "cut" / "checkpoint-5" / "trainer_state.json").unlink()
    resumed, resumed_log = fit(adapters, tmp_path / "cut", seed=5)
    assert same_bits(resumed, whole)
    assert resumed_log.train_loss == log.train_loss


def test_a_run_that_was_finished_but_not_saved_is_only_read(
    adapters: dict[str, str], tmp_path: Path
) -> None:
    first, log = fit(adapters, tmp_path)
    again, log_again = fit(adapters, tmp_path, progress=CallAt(6, raises(KilledError)), seed=5)
    assert same_bits(again, first)
    assert log_again.train_loss == log.train_loss


def test_evaluation_and_checkpoints_change_nothing(
    adapters: dict[str, str], tmp_path: Path
) -> None:
    often, _ = fit(adapters, tmp_path / "often", replace(SETTINGS, eval_every=1))
    rarely, _ = fit(adapters, tmp_path / "rarely", replace(SETTINGS, save_every=100))
    assert same_bits(often, rarely)


def test_the_seed_changes_everything(adapters: dict[str, str], tmp_path: Path) -> None:
    one, _ = fit(adapters, tmp_path / "one")
    other, _ = fit(adapters, tmp_path / "other", replace(SETTINGS, seed=1))
    assert not same_bits(one, other)


def test_a_checkpoint_holds_what_learns_and_no_pickle(
    adapters: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, raises(AssertionError("a pickle")))
    with pytest.raises(KilledError):
        fit(adapters, tmp_path, progress=CallAt(5, raises(KilledError)))
    model, _ = fit(adapters, tmp_path)
    folders = list(tmp_path.iterdir())
    assert [folder.name for folder in folders] == ["checkpoint-6"]
    assert {path.name for path in folders[0].iterdir()} == FILES
    assert {path.suffix for path in folders[0].iterdir()} == {".safetensors", ".json"}
    weights = load_file(folders[0] / "weights.safetensors")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(weights)
    moments = load_file(folders[0] / "optimizer.safetensors")
    kinds = ("step", "exp_avg", "exp_avg_sq")
    assert set(moments) == {f"{name}.{kind}" for name in weights for kind in kinds}
    for path in folders[0].glob("*.json"):
        assert str(tmp_path) not in path.read_text()


@pytest.mark.parametrize("cut_at", [1, 4])
def test_an_expert_goes_on_bit_for_bit(tmp_path: Path, cut_at: int) -> None:
    settings = replace(EXPERT, rows=2, accumulation=2, dropout=0.3, save_every=2)

    def train(out: Path, progress: CallAt | None = None) -> dict[str, torch.Tensor]:
        train_expert(
            tiny_base(),
            PAD,
            examples(),
            examples(4),
            out,
            settings,
            base_name="tiny",
            progress=progress,
        )
        assert not out.with_name(f"{out.name}.training").exists()
        return load_file(out / "adapter_model.safetensors")

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", CallAt(cut_at, interrupted))
    (checkpoint,) = (tmp_path / "cut.training").iterdir()
    assert {path.name for path in checkpoint.iterdir()} == FILES
    resumed = train(tmp_path / "cut")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_second_ctrl_c_stops_at_once(adapters: dict[str, str], tmp_path: Path) -> None:
    def twice() -> None:
        interrupted()
        interrupted()

    with pytest.raises(KeyboardInterrupt):
        fit(adapters, tmp_path, progress=CallAt(5, twice))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


@pytest.fixture(scope="module")
def cut_off(adapters: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed after its first checkpoint."""
    work = tmp_path_factory.mktemp("cut") / "work"
    with pytest.raises(KilledError):
        fit(adapters, work, progress=CallAt(5, raises(KilledError)))
    return work


def test_a_checkpoint_of_another_run_is_refused(adapters: dict[str, str], cut_off: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        fit(adapters, cut_off, replace(SETTINGS, learning_rate=1e-3))
    assert "learning_rate was 0.01, now 0.001" in caught.value.message
    assert "delete it to train from the start" in caught.value.hint
    model = fresh_model(tiny_base(), adapters, SETTINGS)
    with pytest.raises(ConfigError, match="other training rows"):
        fit_router(model, PAD, examples(12), examples(4), cut_off, SETTINGS)
    with torch.no_grad():
        model.base_model.lm_head.weight[0, 0] += 1
    with pytest.raises(ConfigError, match=r"another run \(other base weights\)"):
        fit_router(model, PAD, examples(), examples(4), cut_off, SETTINGS)
    model = fresh_model(tiny_base(), adapters, SETTINGS)
    with torch.no_grad():
        model.lora_layers[0].lora_A[-1, -1] += 1
    with pytest.raises(ConfigError, match=r"another run \(other expert weights\)"):
        fit_router(model, PAD, examples(), examples(4), cut_off, SETTINGS)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_damaged_checkpoint_is_refused(
    adapters: dict[str, str], cut_off: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(cut_off, tmp_path / "work")
    path = tmp_path / "work" / "checkpoint-4" / name
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="is not a readable part") as caught:
        fit(adapters, tmp_path / "work")
    assert str(path) in caught.value.message
    assert "delete it to train from the start" in caught.value.hint


def test_a_checkpoint_of_another_model_is_refused(
    adapters: dict[str, str], cut_off: Path, tmp_path: Path
) -> None:
    shutil.copytree(cut_off, tmp_path / "work")
    checkpoint = tmp_path / "work" / "checkpoint-4"
    shutil.copy(checkpoint / "optimizer.safetensors", checkpoint / "weights.safetensors")
    with pytest.raises(CheckpointError, match="holds other weights than this model trains"):
        fit(adapters, tmp_path / "work")


def test_a_process_that_ignores_ctrl_c_goes_on_ignoring_it(
    adapters: dict[str, str], tmp_path: Path
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, log = fit(adapters, tmp_path / "work", progress=CallAt(1, interrupted))
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert log.train_loss[-1][0] == SETTINGS.steps
