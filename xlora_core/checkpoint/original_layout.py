"""The checkpoint folder of the original ``xlora`` package, which mistral.rs reads, too.

::

    xlora_config.json                "adapters": list of names, or name -> path
    xlora_classifier.safetensors     inner.<i>.weight, last.weight, and the biases
    <adapter name>/                  one PEFT LoRA folder per expert

Source: EricLBuehler/xlora, 3 August 2024 (its last version), and files of earlier ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from xlora_core.adapters import CONFIG_FILE
from xlora_core.checkpoint.config_values import foreign_config_of, foreign_values
from xlora_core.checkpoint.contents import Checkpoint, Layout, base_model_name
from xlora_core.checkpoint.experts import (
    is_harmless_name,
    numbered_folder,
    read_experts,
    with_experts_from,
    write_adapter,
)
from xlora_core.checkpoint.files import (
    is_there,
    read_json_object,
    read_router_tensors,
    require_file,
    write_folder,
    write_json,
)
from xlora_core.checkpoint.fitting import check_in_module_order
from xlora_core.checkpoint.linear_chain import (
    LinearLayer,
    chain_of,
    check_chain,
    check_depth,
    folded,
    tensors_of,
)
from xlora_core.checkpoint.names_file import known_modules, read_names, write_names
from xlora_core.checkpoint.ordering import ORDERING_FILE, Ordering, read_ordering, write_ordering
from xlora_core.config import XLoraConfig
from xlora_core.errors import CheckpointError

ORIGINAL_CONFIG_FILE = "xlora_config.json"
ORIGINAL_CLASSIFIER_FILE = "xlora_classifier.safetensors"
# About the training run or the machine; ``stop_token_id`` is of versions before March 2024.
_IGNORED_KEYS = ("base_model_id", "device", "stop_token_id")
_SOFTMAX_NOTE = (
    "the original package takes the softmax over top-k over all tokens together; here it is per "
    "token, so the numbers differ"
)


@dataclass(frozen=True, kw_only=True)
class OriginalConfig:
    """The original package's config.

    Attributes:
        config: What it has in common with ours, ``xlora_depth`` as in the file.
        activations: ``enable_relu_and_dropout``; False leaves a chain of linear layers.
        bias: ``use_bias``; None if the file does not say, as before that key came.
    """

    config: XLoraConfig
    activations: bool
    bias: bool | None


def read_original_config(
    path: str | Path, overrides: Mapping[str, str | Path] | None = None
) -> OriginalConfig:
    """Returns the contents of ``xlora_config.json``.

    Adapters may be a list of names, a mapping name -> path, or missing. A folder of that name in
    the checkpoint comes before a stored path. Where they are missing, they are the folders with
    an adapter in them, "2" before "10"; or ``overrides``, in order, if these have other names.
    Paths are relative to the checkpoint.

    Raises:
        CheckpointError: If the file is damaged; listing every unknown key, every contradiction
            and every value out of range.
    """
    path = Path(path)
    values = read_json_object(path)
    faults: list[str] = []
    activations = values.pop("enable_relu_and_dropout", True)
    if not isinstance(activations, bool):
        faults.append(f"enable_relu_and_dropout must be true or false, got {activations!r}")
    bias = values.pop("use_bias", None)
    if bias is not None and not isinstance(bias, bool):
        faults.append(f"use_bias must be true or false, got {bias!r}")
    given = values.pop("adapters", None)
    adapters = _adapter_folders(path.parent, given, overrides or {})
    if adapters is None:
        faults.append(f"adapters must be a list of names, or map names to folders, got {given!r}")
    elif not adapters:
        faults.append(
            f"it names no adapters, and {path.parent} has no folder with a LoRA adapter in it"
        )
    values = {key: value for key, value in values.items() if key not in _IGNORED_KEYS}
    config = foreign_config_of(path, values, adapters or {}, faults=faults)
    return OriginalConfig(config=config, activations=activations, bias=bias)


def read_original(
    folder: Path, overrides: Mapping[str, str | Path], ordering: Ordering | None
) -> Checkpoint:
    """Returns the contents of a checkpoint that the original package wrote.

    Args:
        folder: The folder.
        overrides: Adapter name -> folder to read the expert from.
        ordering: The modules and adapters that the classifier's outputs belong to; None takes
            the folder's own ``xlora_ordering.json``, if nothing else names them.

    Raises:
        CheckpointError: If it is damaged, or its classifier is a pickle.
        AdapterError: If an expert cannot be read.
    """
    original = read_original_config(folder / ORIGINAL_CONFIG_FILE, overrides)
    path = require_file(folder, ORIGINAL_CLASSIFIER_FILE)
    names, notes = read_names(folder, path)
    config, classifier, folding = _classifier(path, original)
    own_ordering = folder / ORDERING_FILE
    if ordering is None and names is None and own_ordering.is_file():
        ordering = read_ordering(own_ordering)
    if ordering is not None:
        config = ordering.applied_to(config)
    if names is not None:
        config = names.applied_to(config)
    config = with_experts_from(folder, config, overrides)
    if config.enable_softmax_topk:
        notes = [*notes, _SOFTMAX_NOTE]
    layer_names, base = known_modules(names, ordering)
    return Checkpoint(
        config=config,
        classifier=classifier,
        adapters=read_experts(config),
        layer_names=layer_names,
        base=base,
        layout=Layout.ORIGINAL,
        notes=[*notes, *folding],
    )


def write_original(folder: str | Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint in the original package's layout, with mistral.rs's ordering file.

    Adapters whose names cannot be folder names get numbered ones; all names go into
    ``xlora_names.json``, too. Without module names there is no ordering file.

    Args:
        folder: A new or empty folder.
        checkpoint: Any checkpoint; after ``check_fits`` if an ordering file came with it.

    Raises:
        CheckpointError: If the folder is not empty or cannot be written, or the original package
            has no such router.
    """
    check_in_module_order(checkpoint)
    values = foreign_values(checkpoint.config, package="the original xlora package")
    folders = _folder_names([adapter.name for adapter in checkpoint.adapters])
    base_model_id = base_model_name(checkpoint.adapters) or ""

    def write(staging: Path) -> None:
        for name, adapter in zip(folders, checkpoint.adapters, strict=True):
            write_adapter(staging / name, adapter)
        *inner, last = chain_of(checkpoint.classifier, checkpoint.config)
        tensors = {f"last.{part}": getattr(last, part) for part in LinearLayer._fields}
        for index, layer in enumerate(inner):
            # Each is followed by a ReLU and, even for p = 0, a dropout module.
            tensors |= {
                f"inner.{3 * index}.{part}": getattr(layer, part) for part in LinearLayer._fields
            }
        path = staging / ORIGINAL_CLASSIFIER_FILE
        on_cpu = {k: v.detach().to("cpu").contiguous() for k, v in tensors.items()}
        save_file(on_cpu, path, metadata={"format": "pt"})
        config = {
            "base_model_id": base_model_id,
            "adapters": folders,
            "enable_relu_and_dropout": True,
            "use_bias": True,
            **values,
        }
        write_json(staging / ORIGINAL_CONFIG_FILE, config)
        if checkpoint.layer_names is not None:
            write_ordering(
                staging / ORDERING_FILE,
                layer_names=checkpoint.layer_names,
                adapters=folders,
                base_model_id=base_model_id,
            )
        write_names(staging, path, checkpoint)

    write_folder(folder, write)


def _adapter_folders(
    folder: Path, given: Any, overrides: Mapping[str, str | Path]
) -> dict[str, str] | None:
    """Returns name -> path in the classifier's order; None for something else than names."""
    if given is None:
        found = _expert_folders(folder, "*") or _expert_folders(folder, "adapters/*")
        if overrides and not set(overrides) <= set(found):
            return {name: str(path) for name, path in overrides.items()}
        return found
    if isinstance(given, list):
        if not all(isinstance(name, str) for name in given) or len(set(given)) < len(given):
            return None
        given = dict.fromkeys(given, "")
    if not isinstance(given, dict) or not all(isinstance(path, str) for path in given.values()):
        return None
    return {name: _expert_path(folder, name, path) for name, path in given.items()}


def _expert_path(folder: Path, name: str, stored: str) -> str:
    for place in (name, f"adapters/{name}"):  # the second: early versions
        if is_there(folder / place / CONFIG_FILE):
            return place
    return stored or name


def _expert_folders(folder: Path, pattern: str) -> dict[str, str]:
    """Returns name -> path of the folders that hold an adapter, in natural order."""
    found = [path.parent for path in folder.glob(f"{pattern}/{CONFIG_FILE}")]
    return {
        path.name: path.relative_to(folder).as_posix()
        for path in sorted(found, key=lambda path: _natural(path.name))
    }


def _natural(name: str) -> list[tuple[int, str]]:
    """Returns a sort key under which "2" comes before "10"."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if i % 2 else (0, part) for i, part in enumerate(parts)]


def _classifier(
    path: Path, original: OriginalConfig
) -> tuple[XLoraConfig, dict[str, Tensor], list[str]]:
    """Returns config and classifier in our terms, and a note if layers were folded."""
    config = original.config
    tensors = read_router_tensors(path)
    check_depth(path, config, most=len(tensors))
    step = 3 if original.activations else 1
    layers = [*(f"inner.{step * i}" for i in range(config.xlora_depth - 1)), "last"]
    weights = [f"{layer}.weight" for layer in layers]
    biases = [f"{layer}.bias" for layer in layers]
    bias = original.bias
    if bias is None:
        bias = any(key.endswith(".bias") for key in tensors)
    expected = {*weights, *(biases if bias else ())}
    faults = [
        f"{what} {', '.join(sorted(some))}"
        for what, some in (
            ("it lacks", expected - set(tensors)),
            ("it should not have", set(tensors) - expected),
        )
        if some
    ]
    if faults:
        raise CheckpointError(
            f"{path} does not fit its config (xlora_depth {config.xlora_depth}, "
            f"enable_relu_and_dropout {original.activations}, use_bias {bias}): "
            + "; ".join(faults),
            hint="the classifier belongs to another config, or the file was damaged",
        )
    chain = [_linear(tensors[w], tensors.get(b)) for w, b in zip(weights, biases, strict=True)]
    check_chain(path, layers, chain, config)
    if original.activations or len(chain) == 1:
        return config, tensors_of(chain, config), []
    config = replace(config, xlora_depth=1)
    note = f"{len(chain)} linear layers without ReLU between were folded into the one they equal"
    return config, tensors_of([folded(chain)], config), [note]


def _linear(weight: Tensor, bias: Tensor | None) -> LinearLayer:
    return LinearLayer(weight, torch.zeros_like(weight[:, 0]) if bias is None else bias)


def _folder_names(names: list[str]) -> list[str]:
    """Returns a folder name per adapter: its own if it may be one, else a numbered one."""
    taken: set[str] = {
        ORIGINAL_CONFIG_FILE.casefold(),
        ORIGINAL_CLASSIFIER_FILE.casefold(),
    }
    folders = []
    for index, name in enumerate(names):
        own = is_harmless_name(name) and name.casefold() not in taken
        folder = name if own else numbered_folder(index, name)
        while folder.casefold() in taken:
            folder += "-"
        taken.add(folder.casefold())
        folders.append(folder)
    return folders
