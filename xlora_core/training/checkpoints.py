"""The trainer's checkpoints: what learns and nothing else, in safetensors and JSON, no pickles.

A folder ``checkpoint-<step>`` holds ``weights.safetensors``, ``optimizer.safetensors``, and
``optimizer.json``, ``scheduler.json``, ``random.json``, ``run.json`` and ``trainer_state.json``,
which is written last and so marks the folder as whole.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from xlora_core.errors import CheckpointError, ConfigError
from xlora_core.training.identity import with_defaults

WEIGHTS = "weights.safetensors"
MOMENTS = "optimizer.safetensors"
OPTIMIZER = "optimizer.json"
SCHEDULER = "scheduler.json"
RANDOM = "random.json"
RUN = "run.json"
_FOLDER = re.compile(r"checkpoint-(\d+)")
_START_OVER = "delete it to train from the start"


class SafeCheckpoints(Trainer):
    """A ``Trainer`` whose checkpoints hold what it needs to go on bit for bit, without pickles.

    Overrides every method of ``Trainer`` that writes or reads a file of a checkpoint, but the
    trainer state, which is JSON already. For one process.

    Args:
        run: What makes the run what it is (settings, data), plain JSON types; a checkpoint of
            another run is refused.
        kwargs: As of ``Trainer``.
    """

    # Any: Trainer declares them optional, for what it does before they are there.
    model: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(self, *, run: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.run = dict(run)

    # ---------------------------------------------------------------- writing

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the weights that learn, and which run they are of."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: _kept(p) for name, p in trainable(self.model).items()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        _write(folder / RUN, self.run)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint, then deletes the older ones."""
        super()._save_checkpoint(model, trial)
        for path in Path(str(self.args.output_dir)).glob("checkpoint-*"):
            if _step(path) != self.state.global_step:
                shutil.rmtree(path, ignore_errors=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = Path(output_dir)
        state = self.optimizer.state_dict()
        names = list(trainable(self.model))
        moments = {
            f"{names[index]}.{kind}": _kept(value)
            for index, values in state["state"].items()
            for kind, value in values.items()
        }
        save_file(moments, folder / MOMENTS, metadata={"format": "pt"})
        _write(folder / OPTIMIZER, {"lr": [group["lr"] for group in state["param_groups"]]})
        _write(folder / SCHEDULER, self.lr_scheduler.state_dict())

    def _save_rng_state(self, output_dir: str) -> None:
        kind, numbers, *rest = np.random.get_state()
        state: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": [kind, np.asarray(numbers).tolist(), *rest],
            "torch": torch.get_rng_state().tolist(),
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state().tolist()
        _write(Path(output_dir) / RANDOM, state)

    def _save_scaler(self, output_dir: str) -> None:
        """Writes nothing: only float16 has a scaler."""

    # ---------------------------------------------------------------- reading

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        path = Path(resume_from_checkpoint) / WEIGHTS
        weights = _tensors(path)
        parameters = trainable(self.model)
        if {n: p.shape for n, p in parameters.items()} != {n: t.shape for n, t in weights.items()}:
            raise CheckpointError(
                f"{path} holds other weights than this model trains", hint=_START_OVER
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        state = self.optimizer.state_dict()
        index = {name: i for i, name in enumerate(trainable(self.model))}
        moments: dict[int, dict[str, Tensor]] = {}
        try:
            for key, tensor in _tensors(folder / MOMENTS).items():
                name, _, kind = key.rpartition(".")
                moments.setdefault(index[name], {})[kind] = tensor
            for group, rate in zip(
                state["param_groups"], _read(folder / OPTIMIZER)["lr"], strict=True
            ):
                group["lr"] = rate
            self.optimizer.load_state_dict({**state, "state": moments})
            self.lr_scheduler.load_state_dict(_read(folder / SCHEDULER))
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{folder} does not fit this optimiser: {error}", hint=_START_OVER
            ) from error

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        path = Path(checkpoint) / RANDOM
        state = _read(path)
        try:
            version, numbers, gauss = state["python"]
            random.setstate((version, tuple(numbers), gauss))
            kind, numbers, *rest = state["numpy"]
            np.random.set_state((kind, np.array(numbers, dtype=np.uint32), *rest))
            torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
            if "cuda" in state and torch.cuda.is_available():
                torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{path} holds no random states: {error}", hint=_START_OVER
            ) from error

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Reads nothing: only float16 has a scaler."""


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns name -> parameter of those that learn."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def checkpoint_to_resume(folder: Path, run: Mapping[str, Any]) -> Path | None:
    """Returns the newest whole checkpoint of a folder, or None if there is none.

    Args:
        folder: Where a run writes its checkpoints; may be missing.
        run: As of ``SafeCheckpoints``.

    Raises:
        ConfigError: If the checkpoint is of another run; names what differs.
        CheckpointError: If it cannot be read.
    """
    newest = None
    for path in sorted(folder.glob("checkpoint-*"), key=_step):
        # A run that was killed while it wrote leaves a folder without this file.
        if (path / TRAINER_STATE_NAME).is_file():
            newest = path
    if newest is None:
        return None
    _read(newest / TRAINER_STATE_NAME)
    there = with_defaults(_read(newest / RUN))
    wanted = json.loads(json.dumps(run))
    if there != wanted:
        differs = ", ".join(_differences(there, wanted))
        raise ConfigError(
            f"{folder} holds a checkpoint of another run ({differs})",
            hint=f"repeat the command with the old values to go on, or {_START_OVER}",
        )
    return newest


def _step(path: Path) -> int:
    match = _FOLDER.fullmatch(path.name)
    return int(match[1]) if match else -1


def _differences(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Returns ``name was X, now Y`` for settings, and the names of all else that differs."""
    differences = []
    for key in sorted({*there, *wanted}):
        old, new = there.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            differences += _differences(old, new)
        elif old != new:
            is_hash = isinstance(new, str) and len(new) == 64
            differences.append(f"other {key}" if is_hash else f"{key} was {old!r}, now {new!r}")
    return differences


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _write(path: Path, values: object) -> None:
    path.write_text(json.dumps(values) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    return values


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a readable part of a training checkpoint: {error}",
        hint=f"{path.parent} is damaged: {_START_OVER}",
    )
