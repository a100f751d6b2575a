"""The project's own checkpoint folder: router, experts, and what they belong to.

::

    xlora.json                 format, version, config, adapter and module names in order,
                               base model identity, sha256 of every expert
    classifier.safetensors     layers.<i>.weight, layers.<i>.bias of the classifier;
                               gates.<module>.weight, gates.<module>.bias of a per-layer router
    adapters/<n>-<name>/       one PEFT LoRA folder per expert, readable by PEFT itself

Version 1 is self-contained: paths in it are relative, and nothing outside it is read. In version 2
the experts are referenced: ``adapters/`` is missing, and the paths are absolute.
"""

from __future__ import annotations

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
VERSION = 2
HEADER_FILE = "xlora.json"
CLASSIFIER_FILE = "classifier.safetensors"
_BUNDLED, _REFERENCED = 1, 2


def write_checkpoint(folder: str | Path, checkpoint: Checkpoint, *, bundle: bool = True) -> None:
    """Writes a checkpoint folder; an existing checkpoint there is replaced as a whole.

    Args:
        folder: A new or empty folder, or a checkpoint of ours.
        checkpoint: With ``layer_names`` and ``base``.
        bundle: Copy the experts into the folder. False stores where they are, and their sha256.

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
    referenced = {} if bundle else _referenced(target, checkpoint)

    def write(staging: Path) -> None:
        _write_files(staging, checkpoint, referenced)

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
        bundled = header["version"] == _BUNDLED
        paths = {
            str(e["name"]): _inside(folder, e["path"]) if bundled else _outside(e["path"])
            for e in entries
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


def _referenced(folder: Path, checkpoint: Checkpoint) -> dict[str, Path]:
    return {
        adapter.name: referenced_folder(folder, adapter, checkpoint.config)
        for adapter in checkpoint.adapters
    }


def _write_files(folder: Path, checkpoint: Checkpoint, referenced: Mapping[str, Path]) -> None:
    entries = []
    for index, adapter in enumerate(checkpoint.adapters):
        if adapter.name in referenced:
            path = referenced[adapter.name]
            stored = path.as_posix()
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
        "version": _REFERENCED if referenced else _BUNDLED,
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


def _inside(folder: Path, relative: str) -> Path:
    """Returns ``folder / relative``, refusing paths that leave the folder."""
    path = (folder / relative).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"adapter path {relative!r} leads out of the checkpoint folder")
    return path


def _outside(stored: str) -> Path:
    path = Path(stored)
    if not path.is_absolute():
        raise ValueError(f"adapter path {stored!r} must be absolute in version {_REFERENCED}")
    return path
