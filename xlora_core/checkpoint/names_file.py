"""What PEFT's and the original layout have no place for, in a file beside theirs.

Adapter names (PEFT needs "0", "1", ...), module names in the classifier's order, and the base
model's identity. Both packages ignore the file; our readers use it if it belongs to the classifier.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xlora_core.checkpoint.contents import Checkpoint
from xlora_core.checkpoint.files import read_json_object, write_json
from xlora_core.checkpoint.ordering import Ordering
from xlora_core.config import XLoraConfig
from xlora_core.errors import CheckpointError

NAMES_FILE = "xlora_names.json"
_FORMAT = "xlora-explorer-names"


@dataclass(frozen=True, kw_only=True)
class Names:
    """What the file says.

    Attributes:
        path: The file, for messages.
        adapters: The adapters' own names in the classifier's order.
        layer_names: Adapted module paths in the classifier's order, or None.
        base: The base model's identity, or None.
    """

    path: Path
    adapters: Sequence[str]
    layer_names: Sequence[str] | None
    base: Mapping[str, Any] | None

    def applied_to(self, config: XLoraConfig) -> XLoraConfig:
        """Returns a config whose adapters carry their own names.

        Raises:
            CheckpointError: If the config has another number of adapters.
        """
        if len(self.adapters) != len(config.adapters):
            raise CheckpointError(
                f"{self.path} names {len(self.adapters)} adapters, the config has "
                f"{len(config.adapters)}",
                hint=f"delete {NAMES_FILE} to go on with the config's names",
            )
        paths = config.adapters.values()
        return replace(config, adapters=dict(zip(self.adapters, paths, strict=True)))


def known_modules(
    names: Names | None, ordering: Ordering | None
) -> tuple[Sequence[str] | None, Mapping[str, Any] | None]:
    """Returns the module names in the classifier's order, and the base's identity, if known.

    An ordering file comes first. Without the base's identity its order is yet to be compared with
    the base model's.
    """
    if ordering is not None and ordering.layer_names is not None:
        return ordering.layer_names, None
    return (None, None) if names is None else (names.layer_names, names.base)


def write_names(folder: Path, classifier_file: Path, checkpoint: Checkpoint) -> None:
    """Writes the file for the classifier that lies in the same folder."""
    names = checkpoint.layer_names
    write_json(
        folder / NAMES_FILE,
        {
            "format": _FORMAT,
            "classifier_sha256": _sha256(classifier_file),
            "adapters": [adapter.name for adapter in checkpoint.adapters],
            "layer_names": None if names is None else list(names),
            "base": None if checkpoint.base is None else dict(checkpoint.base),
        },
    )


def read_names(folder: Path, classifier_file: Path) -> tuple[Names | None, list[str]]:
    """Returns what the file says, and notes for the reader's report.

    A file that was written for another classifier says nothing about this one, as when PEFT
    saved over an export of ours.

    Raises:
        CheckpointError: If there is a file, and it is damaged.
    """
    path = folder / NAMES_FILE
    if not path.is_file():
        return None, []
    values = read_json_object(path)
    # Any: what they are is checked right below.
    adapters: Any
    layers: Any
    base: Any
    adapters, layers, base = (values.get(key) for key in ("adapters", "layer_names", "base"))
    sound = (
        values.get("format") == _FORMAT
        and _are_names(adapters)
        and (layers is None or _are_names(layers))
        and (base is None or isinstance(base, dict))
    )
    if not sound:
        raise CheckpointError(
            f"{path} is damaged",
            hint=f"delete {NAMES_FILE} to go on with the config's names",
        )
    if values.get("classifier_sha256") != _sha256(classifier_file):
        return None, [f"{NAMES_FILE} belongs to another classifier and was not used"]
    return Names(path=path, adapters=adapters, layer_names=layers, base=base), []


def _are_names(value: object) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(name, str) and name.strip() for name in value)
        and len(set(value)) == len(value)
    )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
