"""The optimisation loop that experts and routers share: AdamW, warm-up, cosine, checkpoints.

Not ``transformers.Trainer``: its checkpoints hold the whole base model, of which nothing changes
here, and the experts learn in float32 masters of bfloat16 weights, which it does not know.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from xlora_core.errors import CheckpointError
from xlora_core.training.data import Batch

CHECKPOINT = "checkpoint.safetensors"
_NOTES = "training"  # key of the JSON in the checkpoint's metadata
Report = Callable[[str], None]  # gets a line of progress
_FLOOR = 0.05  # the cosine ends at this share of the peak


def silent(line: str) -> None:
    """Reports nothing."""


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What every training run has.

    Attributes:
        steps: Optimiser steps.
        rows: Rows of a step.
        max_length: Longest row in tokens.
        learning_rate: Peak of AdamW's learning rate, after the warm-up.
        warmup_steps: Linear warm-up; then a cosine decay to 5 % of the peak.
        dtype: ``"bfloat16"`` or ``"float32"`` for the base weights and the forward pass.
        seed: Seed of the initial weights and of the order of rows.
        eval_every: Steps between the points of the held-out curve, and between checkpoints.
    """

    steps: int = 80
    rows: int = 8
    max_length: int = 320
    learning_rate: float = 1e-3
    warmup_steps: int = 8
    dtype: str = "bfloat16"
    seed: int = 0
    eval_every: int = 20


@dataclass(kw_only=True)
class TrainingLog:
    """What a training run leaves beside its weights, as ``training.json``.

    Attributes:
        settings: The run's settings.
        command: The exact command, for the reader who wants to repeat it.
        train_loss: ``[step, nats a token]`` of each step's batch.
        heldout_loss: ``[step, nats a token]``; step 0 is before training.
        seconds: Time spent in training steps.
        versions: Versions of the libraries in use.
    """

    settings: dict[str, Any]
    command: str = ""
    train_loss: list[list[float]] = field(default_factory=list)
    heldout_loss: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    versions: dict[str, str] = field(
        default_factory=lambda: {name: version(name) for name in ("torch", "transformers")}
    )

    def write(self, path: Path) -> None:
        """Writes the log as JSON, atomically."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        partial.replace(path)


def learning_rate_at(step: int, settings: LoopSettings) -> float:
    """Returns the learning rate of a step (from 0): linear warm-up, then cosine decay."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * (
        _FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))
    )


def optimise(
    live: Mapping[str, nn.Parameter],
    loss: Callable[[Batch], Tensor],
    heldout: Callable[[], float],
    stream: Iterator[Batch],
    settings: LoopSettings,
    log: TrainingLog,
    out: Path,
    *,
    report: Report = silent,
) -> dict[str, Tensor]:
    """Trains parameters in place.

    Goes on from ``out/checkpoint.safetensors`` when a run with the same settings was cut off there.

    Args:
        live: Name -> the parameter that the forward pass uses, of any floating dtype.
        loss: A batch's loss, a scalar with gradient.
        heldout: The held-out loss, in nats a token.
        stream: Batches, deterministic; a resumed run skips those it has seen.
        settings: How to train.
        log: Filled as the run goes.
        out: Folder of the checkpoint.
        report: Gets a line at each step.

    Returns:
        Name -> the float32 master of each parameter.
    """
    masters = {name: p.detach().float().clone() for name, p in live.items()}
    optimizer = torch.optim.AdamW(
        list(masters.values()), lr=settings.learning_rate, weight_decay=0.0
    )
    first = _resume(out / CHECKPOINT, settings, masters, optimizer, log)
    _copy(masters, live)
    for _ in range(first):
        next(stream)
    if first == 0:
        log.heldout_loss.append([0, round(heldout(), 4)])
    for step in range(first, settings.steps):
        started = time.perf_counter()
        value = loss(next(stream))
        value.backward()
        for name, master in masters.items():
            grad = live[name].grad
            master.grad = None if grad is None else grad.float()
            live[name].grad = None
        nn.utils.clip_grad_norm_(list(masters.values()), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, settings)
        optimizer.step()
        _copy(masters, live)
        seconds = time.perf_counter() - started
        log.seconds = round(log.seconds + seconds, 2)
        log.train_loss.append([step + 1, round(value.item(), 4)])
        report(f"step {step + 1}/{settings.steps}  loss {value.item():.3f}  {seconds:.1f} s")
        if (step + 1) % settings.eval_every == 0 or step + 1 == settings.steps:
            log.heldout_loss.append([step + 1, round(heldout(), 4)])
            report(f"step {step + 1}/{settings.steps}  held-out {log.heldout_loss[-1][1]:.3f}")
            _save(out / CHECKPOINT, step + 1, settings, masters, optimizer, log)
    return masters


def _copy(masters: Mapping[str, Tensor], live: Mapping[str, nn.Parameter]) -> None:
    with torch.no_grad():
        for name, master in masters.items():
            live[name].copy_(master)


def _save(
    path: Path,
    step: int,
    settings: LoopSettings,
    masters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    log: TrainingLog,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    tensors = {f"master.{name}": master.detach() for name, master in masters.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{kind}": value for kind, value in moments.items()}
    notes = {"step": step, "settings": asdict(settings), "log": asdict(log)}
    save_file(tensors, partial, metadata={_NOTES: json.dumps(notes)})
    partial.replace(path)


def _resume(
    path: Path,
    settings: LoopSettings,
    masters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    log: TrainingLog,
) -> int:
    """Restores a cut-off run of the same settings; returns the number of steps done."""
    if not path.is_file():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            notes = json.loads(file.metadata()[_NOTES])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a readable training checkpoint: {error}",
            hint="delete it to train from the start",
        ) from error
    if notes["settings"] != asdict(settings):
        return 0
    moments: dict[int, dict[str, Tensor]] = {}
    with torch.no_grad():
        for name, master in masters.items():
            master.copy_(tensors[f"master.{name}"])
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, kind = key.split(".")
            moments.setdefault(int(index), {})[kind] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    log.train_loss, log.heldout_loss = notes["log"]["train_loss"], notes["log"]["heldout_loss"]
    log.seconds = notes["log"]["seconds"]
    return int(notes["step"])
