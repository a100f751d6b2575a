"""What a training run leaves beside its weights: ``training.json``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from xlora_core.errors import ConfigError
from xlora_core.training.identity import with_defaults

LOG_FILE = "training.json"
_PACKAGES = ("torch", "transformers", "accelerate")


@dataclass(kw_only=True)
class TrainingLog:
    """What a training run leaves beside its weights, as ``training.json``.

    Attributes:
        settings: The run's settings.
        command: The exact command, for the reader who wants to repeat it.
        train_loss: ``[step, nats a token]`` of each step's rows.
        heldout_loss: ``[step, nats a token]``; step 0 is before the first step (after a start from
            labels).
        heldout_routing: ``[step, {figure: value}]``: router entropy, mass of each adapter, share
            of tokens whose strongest adapter is the right one. Empty for an expert.
        auxiliary_losses: ``[step, {name: value}]``, before their weights; empty without any.
        seconds: Time spent in training steps.
        run: sha256 of base weights and rows, and of the experts under a router.
        versions: Versions of the libraries in use.
    """

    settings: dict[str, Any]
    command: str = ""
    train_loss: list[list[float]] = field(default_factory=list)
    heldout_loss: list[list[float]] = field(default_factory=list)
    heldout_routing: list[list[Any]] = field(default_factory=list)
    auxiliary_losses: list[list[Any]] = field(default_factory=list)
    seconds: float = 0.0
    run: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(
        default_factory=lambda: {name: version(name) for name in _PACKAGES}
    )

    def write(self, folder: Path, name: str = LOG_FILE) -> None:
        """Writes the log as JSON into a folder, atomically."""
        partial = folder / f"{name}.partial"
        partial.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        partial.replace(folder / name)


def log_of_history(
    history: Sequence[Mapping[str, Any]], *, run: Mapping[str, Any], command: str
) -> TrainingLog:
    """Returns the log of a trainer's history, that of a resumed run's first part included.

    Args:
        history: ``TrainerState.log_history``.
        run: As of ``run_identity``.
        command: The command line.
    """
    other = {name: value for name, value in run.items() if name != "settings"}
    log = TrainingLog(settings=dict(run["settings"]), command=command, run=other)
    for entry in history:
        step = entry["step"]
        if "lm_loss" in entry:
            log.train_loss.append([step, round(entry["lm_loss"], 4)])
            log.seconds += entry["seconds"]
            auxiliary = _with_prefix(entry, "auxiliary:")
            if auxiliary:
                log.auxiliary_losses.append([step, auxiliary])
        if "heldout_loss" in entry:
            log.heldout_loss.append([step, round(entry["heldout_loss"], 4)])
            routing = _with_prefix(entry, "routing:")
            if routing:
                log.heldout_routing.append([step, routing])
    log.seconds = round(log.seconds, 2)
    return log


def _with_prefix(entry: Mapping[str, Any], prefix: str) -> dict[str, float]:
    return {k.removeprefix(prefix): round(v, 4) for k, v in entry.items() if k.startswith(prefix)}


def finished_run(folder: Path, run: Mapping[str, Any]) -> TrainingLog | None:
    """Returns the log that the same run left in a folder, or None if there is no log.

    A log of an earlier version may lack settings; they count as their defaults.

    Raises:
        ConfigError: If the folder holds another run's log, or an unreadable one.
    """
    path = folder / LOG_FILE
    if not path.is_file():
        return None
    try:
        log = TrainingLog(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} is not the log of a training run: {error}", hint="choose another folder"
        ) from error
    if with_defaults({"settings": log.settings, **log.run}) != json.loads(json.dumps(run)):
        raise ConfigError(
            f"{folder} holds the result of another training run: other settings, rows or experts",
            hint="choose another folder, or delete it to train anew",
        )
    return log


def public_command(program: str, arguments: Sequence[str]) -> str:
    """Returns the command for the record, folders outside the project by their last name only."""
    public = []
    for argument in arguments:
        name, equals, value = argument.rpartition("=")
        if value.startswith(("/", "..", "~")):
            value = Path(value).name
        public.append(f"{name}{equals}{value}")
    return f"{program} {shlex.join(public)}"
