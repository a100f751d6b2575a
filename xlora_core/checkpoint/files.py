"""Files and folders of a checkpoint: JSON, safetensors, and folders replaced as a whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xlora_core.adapters import DTYPES, refuse_pickle
from xlora_core.errors import AdapterError, CheckpointError


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds.

    Raises:
        CheckpointError: If it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON: {error}",
            hint="the file was edited or damaged; copy or save it again",
        ) from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object of a file.

    Raises:
        CheckpointError: If it cannot be read, or is not JSON, or not an object.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} must hold a JSON object, found {type(value).__name__}",
            hint="the file was edited or damaged; copy or save it again",
        )
    return value


def is_there(path: Path) -> bool:
    """Whether a path leads to a file or folder; False for one that no system could have."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a NUL in it
        return False


def write_json(path: Path, value: object) -> None:
    """Writes JSON for people and programs; keys keep their order."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_router_tensors(
    path: Path, wanted: Callable[[str], bool] | None = None
) -> dict[str, Tensor]:
    """Returns a router's tensors of a safetensors file, on the CPU.

    Args:
        path: The file.
        wanted: Which keys to read; None reads all. The others are not even loaded.

    Raises:
        CheckpointError: If the file is truncated or damaged, or a tensor is not of floating point
            or holds NaN or infinity.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            keys = [key for key in file.keys() if wanted is None or wanted(key)]  # noqa: SIM118  # not a dict
            tensors = {key: file.get_tensor(key) for key in keys}
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"classifier: {path} is not a readable safetensors file: {error}",
            hint="the file is truncated or damaged; copy or save it again",
        ) from error
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES or not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{path}: tensor {key} holds NaN, infinite or no floating-point values",
                hint="the router's training diverged; take an earlier checkpoint",
            )
    return tensors


def refuse_pickled_checkpoint(path: Path) -> None:
    """Raises ``CheckpointError`` if a path names a pickle, or a folder that holds one."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        try:
            refuse_pickle(file, what="checkpoint")
        except AdapterError as error:
            raise CheckpointError(error.message, hint=error.hint) from None


def require_file(folder: Path, name: str) -> Path:
    """Returns a file of a checkpoint folder.

    Raises:
        CheckpointError: If it is missing; if a pickle is there in its stead, says so.
    """
    path = folder / name
    if not path.is_file():
        refuse_pickled_checkpoint(folder)
        raise CheckpointError(
            f"{folder} has no {name}, the checkpoint is incomplete",
            hint="copy the missing file, or save the checkpoint again",
        )
    return path


def write_folder(
    folder: str | Path,
    write: Callable[[Path], None],
    *,
    may_replace: Callable[[Path], bool] = lambda _: False,
    unless: str = "is not empty",
) -> None:
    """Writes a folder whose contents appear at once or not at all.

    Args:
        folder: The folder to make.
        write: Fills an empty folder, which then takes the place of ``folder``.
        may_replace: Whether an existing folder that is not empty may be replaced.
        unless: What is wrong with one that may not, for the message.

    Raises:
        CheckpointError: If the folder holds something else, or cannot be written.
    """
    folder = Path(folder).resolve()  # a link stays a link to the new version
    if folder.is_dir():
        fault = unless if any(folder.iterdir()) and not may_replace(folder) else ""
    else:
        fault = "is a file" if folder.exists() else ""
    if fault:
        raise CheckpointError(f"{folder} exists and {fault}", hint="choose a new or empty folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error
    try:
        write(staging)
        staging.chmod(0o755)
        _swap_in(staging, folder)
    except (OSError, SafetensorError, UnicodeError) as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _swap_in(staging: Path, folder: Path) -> None:
    """Puts a finished folder in the place of another, which is lost only if that succeeds."""
    aside = staging.with_name(f"{staging.name}.old")
    replaces = folder.exists()
    if replaces:
        os.replace(folder, aside)
    try:
        os.replace(staging, folder)
    except OSError:
        if replaces:
            os.replace(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
