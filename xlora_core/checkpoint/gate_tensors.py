"""The tensors of a per-layer router: ``gates.<module>.weight`` and ``gates.<module>.bias``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from xlora_core.errors import CheckpointError
from xlora_core.layers import linear_features

PREFIX = "gates."
_MOST_NAMED = 3
_HINT = (
    "use the experts it was trained with; if these are they, the file was edited or damaged: "
    "save the checkpoint again"
)


def check_gates(
    folder: str | Path, tensors: Mapping[str, Tensor], *, n_lora_layers: int, n_adapters: int
) -> None:
    """Raises ``CheckpointError`` unless there is one whole gate per module.

    How wide a module's input is, only the base model knows: see ``check_gate_widths``.
    """
    expected = {
        f"{PREFIX}{index}.{part}" for index in range(n_lora_layers) for part in ("weight", "bias")
    }
    faults = [f"{name} is missing" for name in sorted(expected - set(tensors))]
    faults += [f"{name} is not known" for name in sorted(set(tensors) - expected)]
    for name in sorted(expected & set(tensors)):
        found = list(tensors[name].shape)
        is_weight = name.endswith(".weight")
        if found[:1] != [n_adapters] or len(found) != 1 + is_weight or 0 in found:
            wanted = f"[{n_adapters}, inputs]" if is_weight else f"[{n_adapters}]"
            faults.append(f"{name} must be {wanted}, found {found}")
    if faults:
        named = faults[:_MOST_NAMED] + (["and more"] if len(faults) > _MOST_NAMED else [])
        raise CheckpointError(
            f"{folder}: the per-layer router does not fit {n_adapters} adapters in "
            f"{n_lora_layers} modules: {'; '.join(named)}",
            hint=_HINT,
        )


def check_gate_widths(
    folder: str | Path, tensors: Mapping[str, Tensor], base_model: Any, paths: Sequence[str]
) -> None:
    """Raises ``CheckpointError`` unless each gate reads as many values as its module gives it.

    Args:
        folder: Where the checkpoint was read, for the message.
        tensors: As ``check_gates`` has passed them, in the order of ``paths``.
        base_model: A Hugging Face model without experts.
        paths: The adapted modules.
    """
    for index, path in enumerate(paths):
        wanted = _gate_features(base_model.get_submodule(path))
        found = tensors[f"{PREFIX}{index}.weight"].shape[1]
        if found != wanted:
            raise CheckpointError(
                f"{folder}: the gate of module {path} reads {found} values, the module's input "
                f"has {wanted}",
                hint=_HINT,
            )


def gates_in_module_order(
    tensors: Mapping[str, Tensor], *, stored: Sequence[str], wanted: Sequence[str]
) -> dict[str, Tensor]:
    """Returns the gates numbered by another order of the same modules.

    Args:
        tensors: The gates.
        stored: Module paths in the order of the gates.
        wanted: The same paths in the order that the gates are to have.
    """
    place = {path: index for index, path in enumerate(stored)}
    return {
        f"{PREFIX}{index}.{part}": tensors[f"{PREFIX}{place[path]}.{part}"]
        for index, path in enumerate(wanted)
        for part in ("weight", "bias")
    }


def _gate_features(module: nn.Module) -> int:
    """Returns the size of what a module's gate reads."""
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    if isinstance(module, nn.Conv2d):
        return module.in_channels
    return linear_features(module)[1]
