"""Whether a checkpoint fits a base model, and its router's outputs in that model's order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from xlora_core.checkpoint.contents import Checkpoint, base_identity
from xlora_core.checkpoint.gate_tensors import (
    check_gate_widths,
    check_gates,
    gates_in_module_order,
)
from xlora_core.checkpoint.linear_chain import check_depth, in_module_order, linear_indices
from xlora_core.config import XLoraConfig
from xlora_core.errors import CheckpointError
from xlora_core.replacing import adapted_paths

_MOST_NAMED = 3


def check_fits(folder: str | Path, checkpoint: Checkpoint, base_model: Any) -> Checkpoint:
    """Returns a checkpoint as it belongs to a base model; raises unless it fits.

    The router's outputs follow the modules by name: where the checkpoint knows its modules in
    another order than the base model's, its last layer's rows are put in the model's order.
    Where it does not know them (PEFT's and the original layout), they are in the model's order.

    Args:
        folder: Where the checkpoint was read, for the message.
        checkpoint: As ``read_checkpoint`` returned it; not changed.
        base_model: A Hugging Face model without experts; not changed. Its weights are not read,
            so it may be on the ``meta`` device.

    Returns:
        The checkpoint with ``layer_names`` in the model's order, and ``base`` filled in.

    Raises:
        CheckpointError: If it belongs to another base model, or was edited.
        AdapterError: If an expert does not fit the model.
    """
    found = base_identity(base_model.config)
    if checkpoint.base is not None and dict(checkpoint.base) != found:
        raise CheckpointError(
            f"{folder} belongs to another base model: it was trained on "
            f"{dict(checkpoint.base)}, this one is {found}",
            hint="load the base model the checkpoint was trained on",
        )
    paths = adapted_paths(base_model, checkpoint.adapters)
    stored = paths if checkpoint.layer_names is None else list(checkpoint.layer_names)
    _check_same_modules(folder, stored, paths)
    config = checkpoint.config
    if config.hidden_size is None:
        raise CheckpointError(
            f"{folder}: the config has no hidden_size",
            hint="the file was edited or damaged; save the checkpoint again",
        )
    n_adapters = len(checkpoint.adapters)
    check_router(
        folder, checkpoint.classifier, config, n_lora_layers=len(paths), n_adapters=n_adapters
    )
    if config.router == "per_layer":
        tensors = gates_in_module_order(checkpoint.classifier, stored=stored, wanted=paths)
        check_gate_widths(folder, tensors, base_model, paths)
    else:
        tensors = in_module_order(checkpoint.classifier, config, stored=stored, wanted=paths)
    return replace(checkpoint, classifier=tensors, layer_names=paths, base=found)


def check_router(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    config: XLoraConfig,
    *,
    n_lora_layers: int,
    n_adapters: int,
) -> None:
    """Raises ``CheckpointError`` unless a router has exactly the tensors that its config asks."""
    if config.router == "per_layer":
        check_gates(folder, tensors, n_lora_layers=n_lora_layers, n_adapters=n_adapters)
        return
    check_depth(Path(folder), config, most=len(tensors))
    expected = router_shapes(config, n_lora_layers=n_lora_layers, n_adapters=n_adapters)
    present = {k: list(v.shape) for k, v in tensors.items()}
    if expected != present:
        raise CheckpointError(
            f"{folder}: the classifier does not fit its config, expected {expected} for "
            f"{n_adapters} adapters in {n_lora_layers} modules, found {present}",
            hint="use the experts it was trained with; if these are they, the file was edited or "
            "damaged: save the checkpoint again",
        )


def router_shapes(
    config: XLoraConfig, *, n_lora_layers: int, n_adapters: int
) -> dict[str, list[int]]:
    """Returns the shape of every tensor of a classifier, by name. Builds nothing."""
    shapes: dict[str, list[int]] = {}
    width = config.hidden_size or 0
    indices = linear_indices(config)
    for index in indices:
        is_last = index == indices[-1]
        n_routed_layers = n_lora_layers if config.layerwise_scalings else 1
        rows = n_routed_layers * n_adapters if is_last else config.xlora_size
        shapes |= {f"layers.{index}.weight": [rows, width], f"layers.{index}.bias": [rows]}
        width = rows
    return shapes


def n_lora_layers(checkpoint: Checkpoint) -> int | None:
    """Returns the number L of adapted modules; None if only the base model could tell."""
    config = checkpoint.config
    if checkpoint.layer_names is not None:
        return len(checkpoint.layer_names)
    if not config.layerwise_scalings:
        return None
    last = checkpoint.classifier[f"layers.{linear_indices(config)[-1]}.bias"]
    return len(last) // len(checkpoint.adapters)


def check_in_module_order(checkpoint: Checkpoint) -> None:
    """Raises if a checkpoint may list its modules in another order than the base model.

    PEFT and the original package number the modules as the base model does.

    Raises:
        CheckpointError: If only an ordering file named the modules so far.
    """
    if checkpoint.layer_names is not None and checkpoint.base is None:
        raise CheckpointError(
            "the classifier's outputs are in the order of an ordering file, the base model's own "
            "order is not known here",
            hint="fit the checkpoint to its base model first (check_fits, or --base)",
        )


def _check_same_modules(folder: str | Path, stored: list[str], paths: list[str]) -> None:
    missing = [path for path in stored if path not in set(paths)]
    added = [path for path in paths if path not in set(stored)]
    if not missing and not added and len(stored) == len(paths):
        return
    faults = [
        f"{what} {', '.join(some[:_MOST_NAMED])}{' and more' if len(some) > _MOST_NAMED else ''}"
        for what, some in (("no expert adapts", missing), ("it does not know", added))
        if some
    ] or ["it names a module twice"]
    raise CheckpointError(
        f"{folder}: its adapters fit {len(paths)} modules of this model, it was trained with "
        f"{len(stored)}: {'; '.join(faults)}",
        hint="use the experts it was trained with",
    )
