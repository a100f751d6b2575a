"""Which logs and checkpoints are of the same run, those of earlier versions included."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests.training_models import EXPERT, ROUTER
from xlora_core.config.training import TrainConfig
from xlora_core.errors import ConfigError
from xlora_core.training.checkpoints import RUN, TRAINER_STATE_NAME, checkpoint_to_resume
from xlora_core.training.log import TrainingLog, finished_run

HASHES = {"base weights": "a" * 64, "training rows": "b" * 64}


def identity(settings: TrainConfig) -> dict[str, Any]:
    return {"settings": asdict(settings), **HASHES}


def left(folder: Path, settings: TrainConfig, *, without: str) -> Path:
    """Leaves a log and a checkpoint as of a version that did not know a setting."""
    run = identity(settings)
    del run["settings"][without]
    TrainingLog(settings=run["settings"], run=HASHES).write(folder)
    checkpoint = folder / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / RUN).write_text(json.dumps(run))
    (checkpoint / TRAINER_STATE_NAME).write_text("{}")
    return checkpoint


@pytest.mark.parametrize(
    ("settings", "name"),
    [(ROUTER, "label_start_rows"), (ROUTER, "label_steps"), (EXPERT, "join_share")],
)
def test_a_setting_that_came_later_counts_as_its_default(
    tmp_path: Path, settings: TrainConfig, name: str
) -> None:
    checkpoint = left(tmp_path, settings, without=name)
    log = finished_run(tmp_path, identity(settings))
    assert log is not None
    assert name not in log.settings
    assert checkpoint_to_resume(tmp_path, identity(settings)) == checkpoint


def test_with_another_value_of_it_the_run_is_another(tmp_path: Path) -> None:
    left(tmp_path, ROUTER, without="label_start_rows")
    wanted = identity(replace(ROUTER, label_start_rows=40))
    with pytest.raises(ConfigError, match="the result of another training run"):
        finished_run(tmp_path, wanted)
    with pytest.raises(ConfigError, match=r"another run \(label_start_rows was 0, now 40\)"):
        checkpoint_to_resume(tmp_path, wanted)


def test_a_setting_without_a_default_must_be_there(tmp_path: Path) -> None:
    left(tmp_path, EXPERT, without="domain")
    with pytest.raises(ConfigError, match="the result of another training run"):
        finished_run(tmp_path, identity(EXPERT))


def test_a_setting_that_is_gone_makes_the_run_another(tmp_path: Path) -> None:
    settings = asdict(ROUTER) | {"a_setting_of_old": 1}
    TrainingLog(settings=settings, run=HASHES).write(tmp_path)
    with pytest.raises(ConfigError, match="the result of another training run"):
        finished_run(tmp_path, identity(ROUTER))
