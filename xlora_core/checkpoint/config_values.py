"""The X-LoRA config of a checkpoint's JSON file, every fault in it told at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from xlora_core.config import XLoraConfig
from xlora_core.errors import CheckpointError, ConfigError

# The fields that PEFT and the original package have, too. The others are our own.
SHARED_FIELDS = (
    "hidden_size",
    "enable_softmax",
    "enable_softmax_topk",
    "layerwise_scalings",
    "xlora_depth",
    "xlora_size",
    "xlora_dropout_p",
    "use_trainable_adapters",
    "softmax_temperature",
    "top_k_lora",
    "scaling_pass_value",
    "global_scaling_weight",
)


def config_of(path: Path, values: Mapping[str, Any], adapters: object) -> XLoraConfig:
    """Returns the config of a file of our own layout.

    Args:
        path: The file, for the message.
        values: Field -> value, without the adapters.
        adapters: As ``XLoraConfig`` takes them.

    Raises:
        CheckpointError: Listing every unknown key and every value out of range.
    """
    return _config(path, values, adapters, known=_field_names(), faults=[], hint="")


def foreign_config_of(
    path: Path, values: Mapping[str, Any], adapters: Mapping[str, str], *, faults: list[str]
) -> XLoraConfig:
    """Returns the config of PEFT's or the original package's file.

    Both only warn, or say nothing, about settings that contradict each other. One of them has an
    exact meaning, which is kept: a softmax over top-k without top-k is one over all adapters.

    Args:
        path: The file, for the message.
        values: Field -> value, without the adapters and what only the other package needs.
        adapters: Adapter name -> folder, in the classifier's order.
        faults: Found already; told with the others.

    Raises:
        CheckpointError: Listing every unknown key and every value out of range.
    """
    values = dict(values)
    softmaxes = (values.get("enable_softmax", True), values.get("enable_softmax_topk"))
    if softmaxes == (False, True) and values.get("top_k_lora") is None:
        values["top_k_lora"] = len(adapters) or None
    hint = ""
    if softmaxes == (True, True):
        hint = "PEFT takes a softmax of a softmax here, which is not supported: switch one off"
    elif isinstance(values.get("top_k_lora"), int) and values["top_k_lora"] not in range(
        1, len(adapters) + 1
    ):
        hint = (
            "PEFT only warns: a top_k_lora of 0 switches all experts off there, and one above the "
            "number of adapters fails at the first forward"
        )
    if values.get("hidden_size") is None:
        faults = [*faults, "hidden_size is missing"]
    return _config(path, values, adapters, known=set(SHARED_FIELDS), faults=faults, hint=hint)


def foreign_values(config: XLoraConfig, *, package: str) -> dict[str, Any]:
    """Returns the fields that PEFT and the original package share, without the adapters.

    Raises:
        CheckpointError: Naming every field of our own that is not at its default.
    """
    values = config.to_dict()
    plain = XLoraConfig().to_dict()
    own = [name for name in plain if name not in {*SHARED_FIELDS, "adapters"}]
    set_here = [f"{name} {values[name]!r}" for name in own if values[name] != plain[name]]
    if set_here:
        raise CheckpointError(
            f"{package} has no {', no '.join(set_here)}",
            hint="only a model without these can be written in its layout",
        )
    return {name: values[name] for name in SHARED_FIELDS}


def _field_names() -> set[str]:
    return {field.name for field in fields(XLoraConfig)} - {"adapters"}


def _config(
    path: Path,
    values: Mapping[str, Any],
    adapters: object,
    *,
    known: set[str],
    faults: list[str],
    hint: str,
) -> XLoraConfig:
    faults = list(faults)
    unknown = sorted(set(values) - known)
    if unknown:
        faults.append(f"unknown X-LoRA config keys: {', '.join(map(repr, unknown))}")
        hint = f"allowed keys: {', '.join(sorted(known))}"
    given = {key: value for key, value in values.items() if key in known}
    try:
        config = XLoraConfig.from_dict(given | {"adapters": adapters})
    except ConfigError as error:
        faults += error.faults
    if faults:
        raise CheckpointError(
            f"{path}: " + "\n".join(faults),
            hint=hint or "correct the file, or save the checkpoint again",
        )
    return config
