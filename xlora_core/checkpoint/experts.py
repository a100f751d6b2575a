"""The experts of a checkpoint: where they are read from, how they are written, their hash."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from xlora_core.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    LoraAdapter,
    adapter_tensors,
    read_adapter,
)
from xlora_core.checkpoint.files import is_there, write_json
from xlora_core.config import XLoraConfig
from xlora_core.errors import AdapterError, CheckpointError

_HARMLESS_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


def write_adapter(folder: Path, adapter: LoraAdapter) -> None:
    """Writes one expert as a PEFT LoRA folder, in the dtype it was read in."""
    folder.mkdir(parents=True)
    write_json(folder / CONFIG_FILE, dict(adapter.config) | {"inference_mode": True})
    save_file(adapter_tensors(adapter), folder / WEIGHTS_FILE, metadata={"format": "pt"})


def numbered_folder(index: int, name: str) -> str:
    """Returns a folder name for an adapter, whose own name may hold anything.

    Example:
        >>> numbered_folder(3, "../math & more")
        '03-math-more'
    """
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:40]
    return f"{index:02d}-{slug or 'adapter'}"


def is_harmless_name(name: str) -> bool:
    """Whether a name may be a folder's on every system."""
    return bool(_HARMLESS_NAME.fullmatch(name)) and len(name) <= 64


def expert_hash(folder: Path) -> str:
    """Returns the sha256 of an expert: its weights, and its settings, which scale them."""
    with (folder / WEIGHTS_FILE).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    settings = (folder / CONFIG_FILE).read_bytes()
    # Line ends may change on the way through version control; what they say may not.
    digest.update(b"\n".join(settings.split()))
    return digest.hexdigest()


def check_hash(folder: Path, name: str, path: Path, expected: object, *, header: str) -> None:
    """Raises ``CheckpointError`` if an expert is not the one the header was written for."""
    if not is_there(path / WEIGHTS_FILE) or not is_there(path / CONFIG_FILE):
        return  # reading the adapter says which file is missing
    try:
        found = expert_hash(path)
    except OSError as error:
        raise CheckpointError(f"{folder}: adapter {name!r} cannot be read: {error}") from error
    if found != expected:
        raise CheckpointError(
            f"{folder}: adapter {name!r} is not the one this classifier was trained with "
            f"({WEIGHTS_FILE} or {CONFIG_FILE} has another sha256 than {header} says)",
            hint="restore the file, or pass adapters={name: folder} to use another one on purpose",
        )


def check_known_names(
    folder: Path, overrides: Mapping[str, str | Path], names: Sequence[str], *, hint: str = ""
) -> None:
    """Raises ``CheckpointError`` if ``adapters=`` names an adapter that the checkpoint lacks."""
    unknown = sorted(set(overrides) - set(names))
    if unknown:
        raise CheckpointError(
            f"{folder}: no adapter named {', '.join(map(repr, unknown))} in this checkpoint",
            hint=f"its adapters are {', '.join(names)}{hint}",
        )


def stored_place(folder: Path, stored: str) -> Path:
    """Returns the place of an expert that a config names.

    A relative path is one from the checkpoint's folder, where there is something; else it is from
    the current directory, as PEFT takes it.
    """
    inside = folder / stored
    return inside if is_there(inside) or not is_there(Path(stored)) else Path(stored)


def renames_all(config: XLoraConfig, overrides: Mapping[str, str | Path]) -> bool:
    """Whether ``adapters=`` gives names to adapters that are only numbered."""
    return (
        len(overrides) == len(config.adapters)
        and all(name.isdecimal() for name in config.adapters)
        and not set(overrides) & set(config.adapters)
    )


def with_experts_from(
    folder: Path, config: XLoraConfig, overrides: Mapping[str, str | Path]
) -> XLoraConfig:
    """Returns a config whose adapter paths are folders that exist.

    Args:
        folder: The checkpoint.
        config: As the checkpoint's file has it.
        overrides: Adapter name -> folder to read it from instead. If all the checkpoint's names
            are mere numbers, as many other names, in the classifier's order, rename the adapters.

    Raises:
        CheckpointError: For an unknown name, or naming every expert that is nowhere.
    """
    stored = dict(config.adapters)
    if renames_all(config, overrides):
        return replace(config, adapters={name: str(path) for name, path in overrides.items()})
    are_numbers = all(name.isdecimal() for name in stored)
    hint = f"; to name them, give all {len(stored)} folders, in this order" if are_numbers else ""
    check_known_names(folder, overrides, list(stored), hint=hint)
    found = {
        name: Path(overrides[name]) if name in overrides else stored_place(folder, path)
        for name, path in stored.items()
    }
    missing = {n: path for n, path in found.items() if n not in overrides and not is_there(path)}
    if missing:
        listed = "\n".join(f"  {name}: {path}" for name, path in missing.items())
        raise CheckpointError(
            f"{folder}: {len(missing)} of its {len(found)} experts are not where its config says "
            f"(often a path of the machine it was trained on):\n{listed}",
            hint="say where they are: adapters={"
            + ", ".join(f"{name!r}: 'path/to/lora'" for name in list(missing)[:2])
            + (", ...}" if len(missing) > 2 else "}"),
        )
    return replace(config, adapters={name: str(path) for name, path in found.items()})


def read_experts(
    config: XLoraConfig, known: Mapping[str, LoraAdapter] | None = None
) -> list[LoraAdapter]:
    """Returns the adapters of a config, in order.

    Args:
        config: Says where they are.
        known: Adapters that need not be read.

    Raises:
        AdapterError: If one cannot be read.
    """
    known = known or {}
    return [known.get(name) or _read_expert(name, path) for name, path in config.adapters.items()]


def _read_expert(name: str, path: str) -> LoraAdapter:
    try:
        return read_adapter(name, path)
    except OSError as error:
        raise AdapterError(f"adapter {name!r}: {path} cannot be read: {error}") from error


def referenced_folder(target: Path, adapter: LoraAdapter, config: XLoraConfig) -> Path:
    """Returns the folder outside a checkpoint that holds an expert as it is now.

    Args:
        target: The checkpoint that is to point to it.
        adapter: The expert.
        config: Says where it was read.

    Raises:
        CheckpointError: If that folder is not known, lies in ``target``, or holds other weights
            than the adapter, as after training it.
        AdapterError: If it cannot be read any more.
    """
    where = config.adapters.get(adapter.name)
    hint = "save with bundle=True, which copies the experts into the checkpoint"
    if not where:  # empty for one that was added from memory
        raise CheckpointError(
            f"adapter {adapter.name!r} was read from no folder that could be referenced", hint=hint
        )
    path = Path(where).expanduser().resolve()
    if path.is_relative_to(target.resolve()):
        raise CheckpointError(
            f"adapter {adapter.name!r} is read from {path}, which is replaced by this save",
            hint=hint,
        )
    if not _same_weights(adapter, read_adapter(adapter.name, path)):
        raise CheckpointError(
            f"adapter {adapter.name!r} is not the one in {path} any more: it was trained since, "
            "or the file was changed",
            hint=hint,
        )
    return path


def _same_weights(adapter: LoraAdapter, on_disk: LoraAdapter) -> bool:
    """Whether two adapters hold the same, up to the dtype that the first one is kept in."""
    if dict(adapter.config) != dict(on_disk.config):
        return False
    # As read, the weights on disk may be finer than those of a half-precision model.
    coarse = {w.lora_A.dtype for w in adapter.modules.values()} or {adapter.dtype}
    ours = adapter_tensors(replace(adapter, dtype=torch.float64))
    theirs = adapter_tensors(replace(on_disk, dtype=torch.float64))
    if ours.keys() != theirs.keys():
        return False
    dtype = min(coarse, key=lambda d: torch.finfo(d).bits)
    return all(torch.equal(ours[key].to(dtype), theirs[key].to(dtype)) for key in ours)
