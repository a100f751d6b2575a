"""The project's own checkpoint folder: classifier, experts, and what they belong to.

::

    xlora.json                 format, version, config, adapter and module names in order,
                               base model identity, sha256 of every expert
    classifier.safetensors     layers.<i>.weight, layers.<i>.bias
    adapters/<n>-<name>/       one PEFT LoRA folder per expert, readable by PEFT itself

The folder is self-contained: paths in it are relative, and nothing outside it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from xlora_core.adapters import (
    CONFIG_FILE,
    DTYPES,
    KEY_PREFIX,
    WEIGHTS_FILE,
    LoraAdapter,
    load_safetensors,
    read_adapter,
    refuse_pickle,
)
from xlora_core.classifier import XLoraClassifier
from xlora_core.config import XLoraConfig
from xlora_core.errors import AdapterError, CheckpointError, ConfigError
from xlora_core.replacing import adapted_paths

FORMAT = "xlora-explorer"
VERSION = 1
HEADER_FILE = "xlora.json"
CLASSIFIER_FILE = "classifier.safetensors"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint folder holds.

    Attributes:
        config: The X-LoRA config; its adapter paths point to where the experts were read.
        classifier: Classifier tensors by name, ``layers.<i>.weight`` and ``.bias``.
        adapters: The experts in the classifier's output order.
        layer_names: Adapted module paths in the classifier's output order.
        base: Identity of the base model, such as ``model_type`` and ``hidden_size``.
    """

    config: XLoraConfig
    classifier: Mapping[str, Tensor]
    adapters: Sequence[LoraAdapter]
    layer_names: Sequence[str]
    base: Mapping[str, Any]


def base_identity(config: Any) -> dict[str, Any]:
    """Returns what tells one base model's shape from another's.

    Args:
        config: The Hugging Face config.
    """
    text = config.get_text_config()
    return {
        "model_type": config.model_type,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "vocab_size": text.vocab_size,
    }


def write_checkpoint(folder: str | Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint folder; an existing checkpoint there is replaced as a whole.

    Raises:
        CheckpointError: If the folder holds something else, or cannot be written.
    """
    folder = Path(folder).resolve()  # a link stays a link to the new version
    if folder.exists() and (not folder.is_dir() or not _is_empty_or_ours(folder)):
        raise CheckpointError(
            f"{folder} exists and is not an X-LoRA checkpoint folder",
            hint="choose a new or empty folder",
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error
    try:
        _write_files(staging, checkpoint)
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


def read_checkpoint(
    folder: str | Path, adapters: Mapping[str, str | Path] | None = None
) -> Checkpoint:
    """Returns the contents of a checkpoint folder.

    Args:
        folder: As ``write_checkpoint`` made it.
        adapters: Adapter name -> other folder to read it from; names as in the checkpoint.

    Raises:
        CheckpointError: For a missing, foreign, newer, incomplete or doctored checkpoint.
        AdapterError: If an expert cannot be read.
    """
    folder = Path(folder)
    header = _read_header(folder)
    try:
        names = [str(entry["name"]) for entry in header["adapters"]]
        hashes = {str(entry["name"]): entry["sha256"] for entry in header["adapters"]}
        paths = {str(e["name"]): _inside(folder, e["path"]) for e in header["adapters"]}
        layer_names = [str(name) for name in header["layer_names"]]
        base = dict(header["base"])
        fields = dict(header["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / HEADER_FILE}: field missing or of the wrong kind: {error}",
            hint="the file was edited or damaged; save the checkpoint again",
        ) from error
    overrides = dict(adapters or {})
    unknown = sorted(set(overrides) - set(names))
    if unknown:
        raise CheckpointError(
            f"{folder}: no adapter named {', '.join(map(repr, unknown))} in this checkpoint",
            hint=f"its adapters are {', '.join(names)}",
        )
    paths |= {name: Path(path) for name, path in overrides.items()}
    try:
        config = XLoraConfig.from_dict(
            fields | {"adapters": [(name, str(paths[name])) for name in names]}
        )
    except ConfigError as error:
        raise CheckpointError(f"{folder / HEADER_FILE}: {error.message}", hint=error.hint) from None
    for name in names:
        if name not in overrides:
            _check_hash(folder, name, paths[name], hashes[name])
    return Checkpoint(
        config=config,
        classifier=_read_classifier(folder),
        adapters=[read_adapter(name, paths[name]) for name in names],
        layer_names=layer_names,
        base=base,
    )


def check_fits(folder: str | Path, checkpoint: Checkpoint, base_model: Any) -> None:
    """Raises unless a checkpoint fits a base model. Changes neither.

    Args:
        folder: Where the checkpoint was read, for the message.
        checkpoint: As ``read_checkpoint`` returned it.
        base_model: A Hugging Face model without experts.

    Raises:
        CheckpointError: If it belongs to another base model, or was edited.
        AdapterError: If an expert does not fit the model.
    """
    found = base_identity(base_model.config)
    if checkpoint.base != found:
        raise CheckpointError(
            f"{folder} belongs to another base model: it was trained on "
            f"{dict(checkpoint.base)}, this one is {found}",
            hint="load the base model the checkpoint was trained on",
        )
    paths = adapted_paths(base_model, checkpoint.adapters)
    if list(checkpoint.layer_names) != paths:
        raise CheckpointError(
            f"{folder}: its adapters fit {len(paths)} modules of this model in another order or "
            f"number than the {len(checkpoint.layer_names)} it was trained with",
            hint="use the experts it was trained with",
        )
    if checkpoint.config.hidden_size is None:
        raise CheckpointError(f"{Path(folder) / HEADER_FILE}: config.hidden_size is missing")
    classifier = XLoraClassifier(
        checkpoint.config,
        n_lora_layers=len(paths),
        n_adapters=len(checkpoint.adapters),
        device=torch.device("meta"),
    )
    expected = {k: list(v.shape) for k, v in classifier.state_dict().items()}
    present = {k: list(v.shape) for k, v in checkpoint.classifier.items()}
    if expected != present:
        raise CheckpointError(
            f"{folder}: the classifier does not fit its config, expected {expected}, "
            f"found {present}",
            hint="the file was edited or damaged; save the checkpoint again",
        )


def write_adapter(folder: Path, adapter: LoraAdapter) -> None:
    """Writes one expert as a PEFT LoRA folder, in the dtype it was read in."""
    folder.mkdir(parents=True)
    config = dict(adapter.config) | {"inference_mode": True}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {}
    for module, weights in adapter.modules.items():
        for side, tensor in (("A", weights.lora_A), ("B", weights.lora_B)):
            key = f"{KEY_PREFIX}{module}.lora_{side}.weight"
            tensors[key] = tensor.to("cpu", adapter.dtype).contiguous()
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def _write_files(folder: Path, checkpoint: Checkpoint) -> None:
    entries = []
    for index, adapter in enumerate(checkpoint.adapters):
        # The name itself may hold anything; in a path only a harmless slug of it appears.
        slug = re.sub(r"[^A-Za-z0-9_-]+", "-", adapter.name)[:40]
        path = Path("adapters") / f"{index:02d}-{slug}"
        write_adapter(folder / path, adapter)
        digest = _expert_hash(folder / path)
        entries.append({"name": adapter.name, "path": path.as_posix(), "sha256": digest})
    fields = checkpoint.config.to_dict()
    del fields["adapters"]
    header = {
        "format": FORMAT,
        "version": VERSION,
        "config": fields,
        "adapters": entries,
        "layer_names": list(checkpoint.layer_names),
        "base": dict(checkpoint.base),
    }
    (folder / HEADER_FILE).write_text(
        json.dumps(header, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    classifier = {k: v.detach().to("cpu").contiguous() for k, v in checkpoint.classifier.items()}
    save_file(classifier, folder / CLASSIFIER_FILE, metadata={"format": "pt"})


def _is_empty_or_ours(folder: Path) -> bool:
    return (folder / HEADER_FILE).is_file() or not any(folder.iterdir())


def _read_header(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        if folder.exists():
            _refuse_pickle_checkpoint(folder)
        raise CheckpointError(
            f"checkpoint folder {folder} does not exist",
            hint=f"give a folder that XLoraModel.save_pretrained wrote (it holds {HEADER_FILE})",
        )
    path = folder / HEADER_FILE
    if not path.is_file():
        for other in sorted(folder.iterdir()):
            _refuse_pickle_checkpoint(other)
        raise CheckpointError(
            f"{folder} is not an X-LoRA checkpoint of this project, it has no {HEADER_FILE}",
            hint="checkpoints of PEFT and of the original xlora package cannot be read yet",
        )
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not an X-LoRA checkpoint header (format {FORMAT!r})")
    version = header.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise CheckpointError(
            f"{path} has format version {version!r}, this program reads up to {VERSION}",
            hint="update xlora-explorer",
        )
    return header


def _refuse_pickle_checkpoint(path: Path) -> None:
    try:
        refuse_pickle(path, what="checkpoint")
    except AdapterError as error:
        raise CheckpointError(error.message, hint=error.hint) from None


def _inside(folder: Path, relative: str) -> Path:
    """Returns ``folder / relative``, refusing paths that leave the folder."""
    path = (folder / relative).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"adapter path {relative!r} leads out of the checkpoint folder")
    return path


def _read_classifier(folder: Path) -> dict[str, Tensor]:
    path = folder / CLASSIFIER_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {CLASSIFIER_FILE}, the checkpoint is incomplete")
    try:
        tensors = load_safetensors(path, what="classifier")
    except AdapterError as error:
        raise CheckpointError(error.message, hint=error.hint) from error
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES or not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{path}: tensor {key} holds NaN, infinite or no floating-point values",
                hint="the router's training diverged; take an earlier checkpoint",
            )
    return tensors


def _check_hash(folder: Path, name: str, path: Path, expected: object) -> None:
    if not (path / WEIGHTS_FILE).is_file() or not (path / CONFIG_FILE).is_file():
        return  # reading the adapter says which file is missing
    if _expert_hash(path) != expected:
        raise CheckpointError(
            f"{folder}: adapter {name!r} is not the one this classifier was trained with "
            f"({WEIGHTS_FILE} or {CONFIG_FILE} has another sha256 than {HEADER_FILE} says)",
            hint="restore the file, or pass adapters={name: folder} to use another one on purpose",
        )


def _expert_hash(folder: Path) -> str:
    """Returns the sha256 of an expert: its weights, and its settings, which scale them."""
    with (folder / WEIGHTS_FILE).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    settings = (folder / CONFIG_FILE).read_bytes()
    # Line ends may change on the way through version control; what they say may not.
    digest.update(b"\n".join(settings.split()))
    return digest.hexdigest()
