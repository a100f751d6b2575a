"""Getting back what PEFT's ``save_pretrained`` takes away from an X-LoRA checkpoint.

When PEFT saves an adapter, it drops every tensor whose name has another adapter's name as one of
its parts, and removes the adapter's own name. An X-LoRA's adapters are called "0", "1", ..., and so
are the layers of its classifier, and the blocks of its base model:

- Since PEFT 0.20 the file of the router lacks ``layers.<i>`` for every i below the number of
  adapters. The folder of expert i, which PEFT fills for no use of its own, still has that layer,
  under the name ``layers``.
- Experts that were trained along (``use_trainable_adapters``) are only in these folders, under
  names that PEFT never reads back; and the folder of expert i lacks its weights in every block
  whose number is another expert's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Container, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xlora_core.adapters import CONFIG_FILE, KEY_PREFIX, WEIGHTS_FILE, LoraAdapter, read_adapter
from xlora_core.checkpoint.experts import stored_place
from xlora_core.checkpoint.files import read_router_tensors
from xlora_core.checkpoint.linear_chain import linear_indices
from xlora_core.config import XLoraConfig
from xlora_core.errors import AdapterError, CheckpointError

CLASSIFIER_PREFIX = "base_model.internal_xlora_classifier."
_EXPERT_PREFIX = "base_model.lora_model.model."
_PARTS = ("weight", "bias")


def recover_lost_layers(
    folder: Path, tensors: Mapping[str, Tensor], config: XLoraConfig
) -> tuple[dict[str, Tensor], list[str]]:
    """Returns a whole classifier, its lost layers taken from the experts' folders.

    Args:
        folder: The checkpoint.
        tensors: What the router's file holds, ``layers.<i>.weight`` and ``.bias``.
        config: Says which layers there must be.

    Returns:
        The tensors, and a note on what was recovered, if anything was.

    Raises:
        CheckpointError: Naming every tensor that is missing and nowhere to be found, or that
            there should not be.
    """
    indices = linear_indices(config)
    expected = [f"layers.{index}.{part}" for index in indices for part in _PARTS]
    unexpected = sorted(set(tensors) - set(expected))
    if unexpected:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE}: a classifier of depth {config.xlora_depth} has no "
            f"{', '.join(unexpected)}",
            hint=f"the file and {CONFIG_FILE} do not belong together",
        )
    whole = dict(tensors)
    recovered = []
    for index in indices:
        lost = not any(f"layers.{index}.{part}" in tensors for part in _PARTS)
        if lost and index < len(config.adapters):
            found = _stray_layer(folder, index, tensors)
            whole |= found
            if found:
                recovered.append(f"layers.{index}")
    missing = [name for name in expected if name not in whole]
    if missing:
        raise CheckpointError(
            f"PEFT >= 0.20 saved this incompletely: {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} neither in {folder / WEIGHTS_FILE} nor in "
            "the experts' folders beside it",
            hint="copy the folders 0, 1, ... that PEFT saved with it; without them these weights "
            "are lost, and a router with random ones would be another router",
        )
    # In the classifier's own order, whatever the files' was.
    note = (
        f"recovered {', '.join(recovered)} of the classifier from the experts' folders, where "
        "PEFT >= 0.20 left them"
    )
    return {name: whole[name] for name in expected}, [note] if recovered else []


def _stray_layer(folder: Path, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the layer that the folder of expert ``index`` holds by accident; {} if none."""
    path = folder_of_expert(folder, index) / WEIGHTS_FILE
    if not path.is_file():
        return {}
    strays = read_router_tensors(path, lambda key: key.startswith(CLASSIFIER_PREFIX))
    by_name = {key.removeprefix(CLASSIFIER_PREFIX): tensor for key, tensor in strays.items()}
    for name in by_name.keys() & tensors.keys():
        if not torch.equal(by_name[name], tensors[name]):
            raise CheckpointError(
                f"{path} belongs to another save than {folder / WEIGHTS_FILE}: their {name} differ",
                hint="the lost layers can only be recovered from the folders of the same save",
            )
    return {
        f"layers.{index}.{part}": by_name[f"layers.{part}"]
        for part in _PARTS
        if f"layers.{part}" in by_name
    }


def folder_of_expert(folder: Path, index: int) -> Path:
    """Returns the folder that PEFT saved for an expert, beside the router's files.

    A model that is not called "default" is saved into a folder of its name, its experts next to
    that folder; unless what is around it is a checkpoint itself, with experts of its own.
    """
    inside = folder / str(index)
    around = folder.absolute().parent
    if inside.is_dir() or (around / CONFIG_FILE).is_file():
        return inside
    return around / str(index)


def recover_trained_experts(
    folder: Path, config: XLoraConfig, *, but_for: Container[str]
) -> dict[str, LoraAdapter]:
    """Returns the experts of a ``use_trainable_adapters`` checkpoint as they were trained.

    An expert can be shown to be whole if its folder has weights for the same modules as the
    untrained expert it started from; or if it is the only one, for then nothing was dropped.

    Args:
        folder: The checkpoint.
        config: Its config, adapters in PEFT's numbering.
        but_for: Names of adapters that are read from elsewhere.

    Raises:
        CheckpointError: Naming every expert that PEFT saved incompletely.
    """
    recovered: dict[str, LoraAdapter] = {}
    faults = []
    for index, (name, stored) in enumerate(config.adapters.items()):
        if name in but_for:
            continue
        saved = folder_of_expert(folder, index)
        try:
            trained = _trained_expert(name, saved)
        except AdapterError as error:
            faults.append(f"adapter {name!r}: {error.message}")
            continue
        fault = _gap(trained, stored_place(folder, stored), alone=len(config.adapters) == 1)
        if fault:
            faults.append(f"adapter {name!r}: {saved} {fault}")
        recovered[name] = trained
    if faults:
        raise CheckpointError(
            f"{folder}: its experts were trained with the router (use_trainable_adapters), and "
            "PEFT did not save them whole:\n" + "\n".join(faults),
            hint="PEFT itself goes on with the untrained experts; to do the same on purpose, pass "
            "them: adapters={"
            + ", ".join(f"{name!r}: {path!r}" for name, path in list(config.adapters.items())[:2])
            + "}",
        )
    return recovered


def _gap(trained: LoraAdapter, untrained_folder: Path, *, alone: bool) -> str:
    """Returns what keeps a trained expert from being known as whole; "" if it is whole."""
    try:
        modules = read_adapter(trained.name, untrained_folder).modules
    except (AdapterError, OSError):
        if alone:
            return ""
        return (
            f"cannot be shown to be whole, since the expert it started from is not at "
            f"{untrained_folder}"
        )
    missing = [path for path in modules if path not in trained.modules]
    if not missing:
        return ""
    return f"lacks {len(missing)} of its {len(modules)} modules, such as {missing[0]}"


def _trained_expert(name: str, folder: Path) -> LoraAdapter:
    """Returns the LoRA weights among what PEFT put into an expert's folder."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise AdapterError(f"adapter {name!r}: {folder} has no {WEIGHTS_FILE}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            inner = [
                key.removeprefix(_EXPERT_PREFIX)
                for key in file.keys()  # noqa: SIM118  # not a dict
                if key.startswith(_EXPERT_PREFIX)
            ]
            tensors = {
                KEY_PREFIX + key: file.get_tensor(_EXPERT_PREFIX + key)
                for key in inner
                if ".lora_" in key
            }
        settings = (folder / CONFIG_FILE).read_bytes()
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise AdapterError(f"adapter {name!r}: {folder} cannot be read: {error}") from error
    # Under PEFT's ordinary names it is an ordinary adapter, with all checks of one.
    with tempfile.TemporaryDirectory() as ordinary:
        (Path(ordinary) / CONFIG_FILE).write_bytes(settings)
        save_file(tensors, Path(ordinary) / WEIGHTS_FILE)
        try:
            return read_adapter(name, ordinary)
        except AdapterError as error:
            raise AdapterError(error.message.replace(ordinary, str(folder))) from None
