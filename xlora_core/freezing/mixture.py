"""A frozen mixture: one weight per module and adapter, and the names they belong to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xlora_core.errors import ConfigError
from xlora_core.recording.atomic_file import atomic_file

FORMAT = "xlora-explorer mixture"
VERSION = 1
_FIELDS = ("adapter_names", "layer_names", "weights", "n_tokens", "source", "adapter_hashes")


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenMixture:
    """Merge weights ``[L, K]`` that know which modules and adapters they are for.

    Goes wherever merge weights go; a model with other names refuses it.

    Attributes:
        adapter_names: K names.
        layer_names: L paths of adapted modules.
        weights: ``[L, K]`` float64.
        n_tokens: How many tokens' scalings were averaged; 0 if the weights were chosen.
        source: What they were averaged over, for people.
        adapter_hashes: Adapter name -> fingerprint of the weights it had then, or empty.

    Raises:
        ConfigError: Listing every field that is malformed.
    """

    adapter_names: Sequence[str]
    layer_names: Sequence[str]
    weights: Tensor
    n_tokens: int = 0
    source: str = ""
    adapter_hashes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        faults = [
            f"{name} must be a list of different names"
            for name in ("adapter_names", "layer_names")
            if not _are_names(getattr(self, name))
        ]
        try:
            weights = torch.as_tensor(self.weights, dtype=torch.float64).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            faults.append(f"weights must be numbers: {error}")
        else:
            shape = [len(self.layer_names), len(self.adapter_names)] if not faults else None
            if shape and list(weights.shape) != shape:
                faults.append(
                    f"weights must have shape {shape} (modules, adapters), got "
                    f"{list(weights.shape)}"
                )
            if not torch.isfinite(weights).all():
                faults.append("weights must be finite")
            object.__setattr__(self, "weights", weights)
        faults += _origin_faults(self.n_tokens, self.source, self.adapter_hashes)
        if faults:
            raise ConfigError([f"frozen mixture: {fault}" for fault in faults])
        object.__setattr__(self, "adapter_names", tuple(self.adapter_names))
        object.__setattr__(self, "layer_names", tuple(self.layer_names))
        object.__setattr__(self, "adapter_hashes", dict(self.adapter_hashes))

    def matrix(self, adapter_names: Sequence[str], layer_names: Sequence[str]) -> Tensor:
        """Returns the weights in the order of a model's names, ``[L, K]`` float64.

        Raises:
            ConfigError: If the model has other adapters or modules than the mixture is for.
        """
        faults = [
            *_difference("adapters", self.adapter_names, adapter_names),
            *_difference("modules", self.layer_names, layer_names),
        ]
        if faults:
            raise ConfigError(
                faults, hint="apply it to the model that it was frozen from, or freeze again"
            )
        rows = [self.layer_names.index(name) for name in layer_names]
        columns = [self.adapter_names.index(name) for name in adapter_names]
        return self.weights[rows][:, columns]

    def adapter_means(self) -> dict[str, float]:
        """Returns adapter name -> mean weight over the modules."""
        return dict(zip(self.adapter_names, self.weights.mean(dim=0).tolist(), strict=True))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a JSON file; one of that name is replaced at once or not at all.

        Raises:
            ConfigError: If it cannot be written.
        """
        values: dict[str, Any] = {name: getattr(self, name) for name in _FIELDS}
        values["weights"] = self.weights.tolist()
        text = json.dumps({"format": FORMAT, "version": VERSION} | values, ensure_ascii=False)
        try:
            with atomic_file(Path(path)) as file:
                file.write(text.encode())
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FrozenMixture:
        """Returns the mixture of a file that ``save`` wrote.

        Raises:
            ConfigError: If the file is missing, damaged, of a newer version or something else.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{path} is not a frozen mixture: it is not valid JSON ({error})",
                hint="xlora merge --save-weights FILE writes one",
            ) from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ConfigError(
                f"{path} is not a frozen mixture: its format is not {FORMAT!r}",
                hint="xlora merge --save-weights FILE writes one",
            )
        if values.get("version") != VERSION:
            raise ConfigError(
                f"{path} has format version {values.get('version')!r}, this program reads "
                f"{VERSION}",
                hint="update xlora-explorer",
            )
        missing = [name for name in _FIELDS if name not in values]
        if missing:
            raise ConfigError(f"{path}: field {', '.join(missing)} is missing")
        try:
            return cls(**{name: values[name] for name in _FIELDS})
        except ConfigError as error:
            raise ConfigError([f"{path}: {fault}" for fault in error.faults]) from None


def _are_names(values: object) -> bool:
    return (
        isinstance(values, list | tuple)
        and len(values) > 0
        and all(isinstance(name, str) for name in values)
        and len(set(values)) == len(values)
    )


def _origin_faults(n_tokens: object, source: object, hashes: object) -> list[str]:
    faults = []
    if not isinstance(n_tokens, int) or isinstance(n_tokens, bool) or n_tokens < 0:
        faults.append(f"n_tokens must be a whole number >= 0, got {n_tokens!r}")
    if not isinstance(source, str):
        faults.append(f"source must be text, got {source!r}")
    if not isinstance(hashes, Mapping) or not all(isinstance(h, str) for h in hashes.values()):
        faults.append("adapter_hashes must map names to texts")
    return faults


def _difference(what: str, own: Sequence[str], theirs: Sequence[str]) -> list[str]:
    """Returns a sentence if two sets of names differ; a long list is counted, not listed."""
    lacking = [name for name in own if name not in set(theirs)]
    extra = [name for name in theirs if name not in set(own)]
    parts = [
        f"{label} {', '.join(map(repr, names[:3]))}" + (" and others" if len(names) > 3 else "")
        for label, names in (("it has, the model lacks:", lacking), ("the model has:", extra))
        if names
    ]
    return [f"the frozen mixture is for other {what}: {'; '.join(parts)}"] if parts else []
