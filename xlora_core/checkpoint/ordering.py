"""mistral.rs's ordering file: which module each output of the classifier belongs to.

::

    {"base_model_id": "...", "order": ["math", "code"],
     "layers": {"model.layers.0.self_attn.q_proj": 0, ...}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from xlora_core.adapters import KEY_PREFIX
from xlora_core.checkpoint.files import read_json_object, write_json
from xlora_core.config import XLoraConfig
from xlora_core.errors import CheckpointError

ORDERING_FILE = "xlora_ordering.json"
_KEYS = {"base_model_id", "order", "layers", "preload_adapters"}


@dataclass(frozen=True, kw_only=True)
class Ordering:
    """The order of a classifier's outputs.

    Attributes:
        path: The file, for messages.
        layer_names: Module paths in the order of the outputs; None leaves it open.
        adapters: Adapter names in the order of the outputs; None leaves it open.
    """

    path: Path
    layer_names: Sequence[str] | None
    adapters: Sequence[str] | None

    def applied_to(self, config: XLoraConfig) -> XLoraConfig:
        """Returns a config with its adapters in the file's order.

        Raises:
            CheckpointError: If the file does not name the same adapters.
        """
        if self.adapters is None:
            return config
        if sorted(self.adapters) != sorted(config.adapters):
            raise CheckpointError(
                f"{self.path}: its order names the adapters {', '.join(self.adapters)}, the "
                f"checkpoint has {', '.join(config.adapters)}",
                hint="use the ordering file that belongs to this checkpoint",
            )
        return replace(config, adapters={name: config.adapters[name] for name in self.adapters})


def read_ordering(path: str | Path) -> Ordering:
    """Returns the contents of an ordering file.

    Raises:
        CheckpointError: If it cannot be read, or its layers are not numbered 0, 1, 2, ...
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"there is no ordering file {path}",
            hint='it is JSON: {"order": [names], "layers": {"model.layers.0.self_attn.q_proj": 0}}',
        )
    values = read_json_object(path)
    unknown = sorted(set(values) - _KEYS)
    faults = [f"unknown keys: {', '.join(map(repr, unknown))}"] if unknown else []
    order = values.get("order")
    if order is not None and (
        not isinstance(order, list)
        or not all(isinstance(name, str) for name in order)
        or len(set(order)) < len(order)
    ):
        faults.append("order must be a list of adapter names that differ")
    layers = values.get("layers")
    if layers is not None and not _is_numbering(layers):
        faults.append("layers must number its modules 0, 1, 2, ..., each number once")
    if order is None and layers is None:
        faults.append("it holds neither order nor layers")
    if faults:
        raise CheckpointError(
            f"{path}: " + "\n".join(faults), hint="this is not a mistral.rs X-LoRA ordering file"
        )
    names = None if layers is None else _by_number(layers)
    return Ordering(path=path, layer_names=names, adapters=order)


def write_ordering(
    path: Path, *, layer_names: Sequence[str], adapters: Sequence[str], base_model_id: str
) -> None:
    """Writes an ordering file for mistral.rs."""
    write_json(
        path,
        {
            "base_model_id": base_model_id,
            "order": list(adapters),
            "layers": {name: index for index, name in enumerate(layer_names)},
        },
    )


def _is_numbering(layers: object) -> bool:
    if not isinstance(layers, Mapping) or not layers:
        return False
    numbers = list(layers.values())
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        return False
    return sorted(numbers) == list(range(len(numbers)))


def _by_number(layers: Mapping[str, int]) -> list[str]:
    names = sorted(layers, key=lambda name: layers[name])
    return [name.removeprefix(KEY_PREFIX) for name in names]
