"""The project's own checkpoint folder: router, experts, and what they belong to.

::

    xlora.json                 format, version, config, adapter and module names in order,
                               base model identity, sha256 of every expert
    classifier.safetensors     layers.<i>.weight, layers.<i>.bias of the classifier;
                               gates.<module>.weight, gates.<module>.bias of a per-layer router
    adapters/<n>-<name>/       one PEFT LoRA folder per expert, readable by PEFT itself

Version 1 is self-contained: paths in it are relative, and nothing outside it is read. In versions
2 and 3 the experts are referenced and ``adapters/`` is missing: by absolute paths in version 2, as
seen from the checkpoint folder in version 3, so that it and they can be moved together.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from xlora_core.checkpoint.config_values import config_of
from xlora_core.checkpoint.contents import Checkpoint
from xlora_core.checkpoint.experts import (
    check_hash,
    check_known_names,
    expert_hash,
    numbered_folder,
    read_experts,
    referenced_folder,
    write_adapter,
)
from xlora_core.checkpoint.files import (
    read_json,
    read_router_tensors,
    require_file,
    write_folder,
    write_json,
)
from xlora_core.checkpoint.fitting import check_router
from xlora_core.errors import CheckpointError

FORMAT = "xlora-explorer"
VERSION = 3
HEADER_FILE = "xlora.json"
CLASSIFIER_FILE = "classifier.safetensors"
_BUNDLED, _REFERENCED, _SEEN_FROM_FOLDER = 1, 2, 3


def write_checkpoint(
    folder: str | Path, checkpoint: Checkpoint, *, bundle: bool = True, relative: bool = False
) -> None:
    """Writes a checkpoint folder; an existing checkpoint there is replaced as a whole.

    Args:
        folder: A new or empty folder, or a checkpoint of ours.
        checkpoint: With ``layer_names`` and ``base``.
        bundle: Copy the experts into the folder. False stores where they are, and their sha256.
        relative: Store where experts are seen from the folder, so that the checkpoint and they
            can be moved together; else it can be moved without them. Matters without ``bundle``.

    Raises:
        CheckpointError: If the folder holds something else, or cannot be written; if module names
            or base are not known; or if an expert to be referenced has changed since it was read.
    """
    if checkpoint.layer_names is None or checkpoint.base is None:
        raise CheckpointError(
            "our layout stores the names of the modules and the base model's identity, which are "
            "not known here",
            hint="fit the checkpoint to its base model first (check_fits, or --base)",
        )
    target = Path(folder)
    version = _BUNDLED if bundle else _SEEN_FROM_FOLDER if relative else _REFERENCED
    referenced = {} if bundle else _referenced(target, checkpoint, relative=relative)

    def write(staging: Path) -> None:
        _write_files(staging, checkpoint, referenced, version)

    write_folder(
        target,
        write,
        may_replace=lambda path: (path / HEADER_FILE).is_file(),
        unless="is not an X-LoRA checkpoint folder",
    )


def read_own(folder: Path, overrides: Mapping[str, str | Path]) -> Checkpoint:
    """Returns the contents of a folder that ``write_checkpoint`` made.

    Args:
        folder: The folder.
        overrides: Adapter name -> other folder to read it from; names as in the checkpoint.

    Raises:
        CheckpointError: For a newer, incomplete or doctored checkpoint.
        AdapterError: If an expert cannot be read.
    """
    header = _read_header(folder)
    path = folder / HEADER_FILE
    try:
        entries = header["adapters"]
        names = [str(entry["name"]) for entry in entries]
        hashes = {str(entry["name"]): entry["sha256"] for entry in entries}
        paths = {
            str(entry["name"]): _expert_folder(folder, entry["path"], header["version"])
            for entry in entries
        }
        layer_names = [str(name) for name in header["layer_names"]]
        base = dict(header["base"])
        values = dict(header["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: field missing or of the wrong kind: {error}",
            hint="the file was edited or damaged; save the checkpoint again",
        ) from error
    check_known_names(folder, overrides, names)
    paths |= {name: Path(other) for name, other in overrides.items()}
    config = config_of(path, values, [(name, str(paths[name])) for name in names])
    for name in names:
        if name not in overrides:
            check_hash(folder, name, paths[name], hashes[name], header=HEADER_FILE)
    classifier = read_router_tensors(require_file(folder, CLASSIFIER_FILE))
    if config.hidden_size is None:
        raise CheckpointError(
            f"{path}: config.hidden_size is missing",
            hint="the file was edited or damaged; save the checkpoint again",
        )
    check_router(folder, classifier, config, n_lora_layers=len(layer_names), n_adapters=len(names))
    return Checkpoint(
        config=config,
        classifier=classifier,
        adapters=read_experts(config),
        layer_names=layer_names,
        base=base,
    )


def _referenced(
    folder: Path, checkpoint: Checkpoint, *, relative: bool
) -> dict[str, tuple[Path, str]]:
    """Returns of each expert: the folder that holds it, and how the header names that folder."""
    paths = {
        adapter.name: referenced_folder(folder, adapter, checkpoint.config)
        for adapter in checkpoint.adapters
    }
    if not relative:
        return {name: (path, path.as_posix()) for name, path in paths.items()}
    return {name: (path, _seen_from(folder, name, path)) for name, path in paths.items()}


def _seen_from(folder: Path, name: str, path: Path) -> str:
    """Returns the relative path from a checkpoint folder to an expert's; both without links."""
    try:
        return Path(os.path.relpath(path, folder.resolve())).as_posix()
    except ValueError as error:  # two drives of Windows
        raise CheckpointError(
            f"adapter {name!r} in {path} cannot be seen from {folder}: {error}",
            hint="save with bundle=True, which copies the experts, or with relative=False",
        ) from error


def _write_files(
    folder: Path,
    checkpoint: Checkpoint,
    referenced: Mapping[str, tuple[Path, str]],
    version: int,
) -> None:
    entries = []
    for index, adapter in enumerate(checkpoint.adapters):
        if adapter.name in referenced:
            path, stored = referenced[adapter.name]
        else:
            stored = f"adapters/{numbered_folder(index, adapter.name)}"
            path = folder / stored
            write_adapter(path, adapter)
        entries.append({"name": adapter.name, "path": stored, "sha256": expert_hash(path)})
    values = checkpoint.config.to_dict()
    del values["adapters"]
    header = {
        "format": FORMAT,
        # The lowest version that can say it, so that older programs read it, too.
        "version": version,
        "config": values,
        "adapters": entries,
        "layer_names": list(checkpoint.layer_names or ()),
        "base": dict(checkpoint.base or {}),
    }
    write_json(folder / HEADER_FILE, header)
    classifier = {k: v.detach().to("cpu").contiguous() for k, v in checkpoint.classifier.items()}
    save_file(classifier, folder / CLASSIFIER_FILE, metadata={"format": "pt"})


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / HEADER_FILE
    header = read_json(path)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not an X-LoRA checkpoint header (format {FORMAT!r})")
    version = header.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= VERSION:
        raise CheckpointError(
            f"{path} has format version {version!r}, this program reads up to {VERSION}",
            hint="update xlora-explorer",
        )
    return header


def _expert_folder(folder: Path, stored: str, version: int) -> Path:
    """Returns the folder that a path in the header means.

    Raises:
        ValueError: If a path leaves a checkpoint that has its experts inside, or is relative
            where it must be absolute, or the other way round.
    """
    path = (folder / stored).resolve()
    if version == _BUNDLED and not path.is_relative_to(folder.resolve()):
        raise ValueError(f"adapter path {stored!r} leads out of the checkpoint folder")
    if version != _BUNDLED and Path(stored).is_absolute() != (version == _REFERENCED):
        kind = "absolute" if version == _REFERENCED else "relative"
        raise ValueError(f"adapter path {stored!r} must be {kind} in version {version}")
    return path
