"""What is known of a run before its first token: model, adapters, modules, sampling."""

from __future__ import annotations

import re
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from xlora_core.config import ROUTERS, SamplingParams
from xlora_core.errors import RecordError

FORMAT_VERSION = 3

_LARGEST = sys.float_info.max
# A run id ends up in names of files and in cells of tables.
_RUN_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _new_id() -> str:
    return uuid.uuid4().hex


@dataclass(frozen=True, kw_only=True)
class RunHeader:
    """What a run is a run of. Sequences are stored as tuples, mappings as dicts of their own.

    Attributes:
        run_id: 1 to 64 of ``0-9 A-Z a-z _ -``.
        created: ISO 8601 time with its offset from UTC.
        adapter_names: K names, in the classifier's output order.
        layer_names: L paths of the adapted modules, in ``named_modules()`` order.
        present: ``[L][K]``, False where an adapter has no weights in a module.
        enable_softmax: As in the model's config; so are the next three.
        enable_softmax_topk: Softmax over what top-k kept.
        layerwise: One row of router logits per module, or one for all modules.
        scaling_pass_value: Scaling of every adapter in the scaling pass.
        router: As in the model's config, ``"classifier"`` or ``"per_layer"``. A per-layer router
            is always ``layerwise``, and what a gate says depends on the mixture below it.
        model_id: A name of the model for people.
        base_hash: Fingerprint of the base model's weights.
        adapter_hashes: Adapter name -> fingerprint of its weights.
        sampling: How tokens were picked; holds the seed.
        prompt_text: The prompt as the model read it, chat template included.
        versions: Package -> version of what computed the run.
        format_version: Version of the run file's format that this program knows. Files of older
            versions are converted as they are read.

    Raises:
        RecordError: Listing every field that is malformed or contradicts another.
    """

    run_id: str = field(default_factory=_new_id)
    created: str = field(default_factory=_now)
    adapter_names: Sequence[str]
    layer_names: Sequence[str]
    present: Sequence[Sequence[bool]]
    enable_softmax: bool
    enable_softmax_topk: bool
    layerwise: bool
    scaling_pass_value: float = 0.0
    router: str = "classifier"
    model_id: str = ""
    base_hash: str = ""
    adapter_hashes: Mapping[str, str] = field(default_factory=dict)
    sampling: SamplingParams
    prompt_text: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        faults = _type_faults(self)
        if not faults:
            object.__setattr__(self, "adapter_names", tuple(self.adapter_names))
            object.__setattr__(self, "layer_names", tuple(self.layer_names))
            object.__setattr__(self, "present", tuple(tuple(row) for row in self.present))
            object.__setattr__(self, "adapter_hashes", dict(self.adapter_hashes))
            object.__setattr__(self, "versions", dict(self.versions))
            faults = _value_faults(self)
        if faults:
            raise RecordError("run header: " + "; ".join(faults))

    @property
    def n_adapters(self) -> int:
        """K."""
        return len(self.adapter_names)

    @property
    def n_lora_layers(self) -> int:
        """L, the number of adapted modules."""
        return len(self.layer_names)

    @property
    def n_routed_layers(self) -> int:
        """Rows of router logits per token: L, or 1 when all modules share them."""
        return self.n_lora_layers if self.layerwise else 1


def _type_faults(header: RunHeader) -> list[str]:
    faults = [
        f"{name} must be text, got {type(getattr(header, name)).__name__}"
        for name in ("run_id", "created", "model_id", "base_hash", "prompt_text")
        if not isinstance(getattr(header, name), str)
    ]
    faults += [
        f"{name} must be true or false, got {getattr(header, name)!r}"
        for name in ("enable_softmax", "enable_softmax_topk", "layerwise")
        if not isinstance(getattr(header, name), bool)
    ]
    faults += [
        f"{name} must be a list of texts"
        for name in ("adapter_names", "layer_names")
        if not _is_list_of(getattr(header, name), str)
    ]
    faults += [
        f"{name} must map texts to texts"
        for name in ("adapter_hashes", "versions")
        if not _maps_texts(getattr(header, name))
    ]
    present = header.present
    if not _is_list_of(present, Sequence) or not all(_is_list_of(row, bool) for row in present):
        faults.append("present must be a list of lists of true and false")
    value = header.scaling_pass_value
    # A comparison, since math.isfinite fails on whole numbers that no float can hold.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        faults.append(f"scaling_pass_value must be a finite number, got {value!r}")
    if header.router not in ROUTERS:
        faults.append(f"router must be one of {', '.join(ROUTERS)}, got {repr(header.router)[:80]}")
    sampling: object = header.sampling
    if not isinstance(sampling, SamplingParams):
        faults.append("sampling must be SamplingParams")
    if header.format_version != FORMAT_VERSION:
        faults.append(f"format_version must be {FORMAT_VERSION}, got {header.format_version!r}")
    return faults


def _value_faults(header: RunHeader) -> list[str]:
    faults: list[str] = []
    if not _RUN_ID.fullmatch(header.run_id):
        faults.append(
            f"run_id must be 1 to 64 letters, digits, '_' or '-', got {header.run_id[:80]!r}"
        )
    if not _is_time(header.created):
        faults.append(
            f"created must be an ISO 8601 time with its UTC offset, got {header.created[:60]!r}"
        )
    for name in ("adapter_names", "layer_names"):
        names: Sequence[str] = getattr(header, name)
        if not names:
            faults.append(f"{name} must not be empty")
        if len(set(names)) != len(names):
            faults.append(f"{name} must differ from each other")
    n_layers, n_adapters = header.n_lora_layers, header.n_adapters
    if len(header.present) != n_layers or any(len(row) != n_adapters for row in header.present):
        faults.append(
            f"present must have {n_layers} rows (modules) of {n_adapters} values (adapters)"
        )
    if header.router == "per_layer" and not header.layerwise:
        faults.append("a per-layer router is layerwise, got layerwise false")
    if header.enable_softmax and header.enable_softmax_topk:
        faults.append("enable_softmax and enable_softmax_topk exclude each other")
    return faults


def _is_list_of(value: object, kind: type) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and all(isinstance(item, kind) for item in value)
    )


def _maps_texts(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(k, str) and isinstance(v, str) for k, v in value.items()
    )


def _is_time(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False
