"""What an X-LoRA model is: its adapters and its router."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from os import PathLike
from typing import Any

from xlora_core.config.checks import is_finite, is_int, raise_if, top_k_fault
from xlora_core.config.overrides import AdapterOverride, checked_overrides
from xlora_core.errors import ConfigError

ROUTERS = ("classifier", "per_layer")


def _named_folders(adapters: object) -> tuple[dict[str, str], list[str]]:
    """Returns name -> folder in order, and the faults found on the way."""
    fault = f"adapters must map names to folders, got {adapters!r}"
    if not isinstance(adapters, Iterable) or isinstance(adapters, str):
        return {}, [fault]
    pairs = list(adapters.items() if isinstance(adapters, Mapping) else adapters)
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        return {}, [fault]
    named: dict[str, str] = {}
    faults: list[str] = []
    for name, folder in pairs:
        if not isinstance(name, str) or not name.strip():
            faults.append(f"adapters: a name must be a non-empty string, got {name!r}")
        elif name in named:
            faults.append(f"adapters: two adapters are named {name!r}, names must differ")
        elif not isinstance(folder, str | PathLike):
            faults.append(f"adapters: the folder of {name!r} must be a path, got {folder!r}")
        else:
            named[name] = str(folder)
    return named, faults


@dataclass(frozen=True, kw_only=True)
class XLoraConfig:
    """What an X-LoRA model is: its adapters and its router.

    Field names and defaults are those of PEFT's ``XLoraConfig``; ``router`` and
    ``adapter_overrides`` are our own.

    Attributes:
        hidden_size: Size H of the classifier's input; None takes it from the base model.
        adapters: Adapter name -> folder with ``adapter_config.json`` and
            ``adapter_model.safetensors``, or pairs of them. The order is the classifier's
            output order.
        enable_softmax: Softmax over the adapters of router logits / ``softmax_temperature``.
        enable_softmax_topk: Softmax over the adapters that top-k kept, instead of
            ``enable_softmax``; temperature does not enter.
        layerwise_scalings: One set of scalings per adapted module instead of one for all.
        xlora_depth: Number of linear layers of the classifier, >= 1.
        xlora_size: Width of its hidden layers; unused at depth 1.
        xlora_dropout_p: Dropout between them, in [0, 1); unused at depth 1.
        use_trainable_adapters: Train the adapters together with the classifier.
        softmax_temperature: Divides the router logits before the softmax, > 0.
        top_k_lora: Keep the k largest scalings per token and module; None keeps all.
        scaling_pass_value: Constant scaling of every adapter in the scaling pass.
        global_scaling_weight: Factor g on every scaling.
        router: ``"classifier"``: one classifier behind a scaling pass sets the scalings of all
            modules. ``"per_layer"``: every adapted module has a gate on its own input, and
            there is no scaling pass; the classifier's fields (``xlora_depth`` to
            ``xlora_dropout_p``, ``layerwise_scalings``, ``scaling_pass_value``) are unused.
        adapter_overrides: Adapters that are pinned, muted or rescaled for every call that does
            not bring knobs of its own.

    Raises:
        ConfigError: Listing every field that is out of range or contradicts another.

    Example:
        >>> XLoraConfig(adapters={"math": "experts/math"}, xlora_depth=2).xlora_size
        2048
    """

    hidden_size: int | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0
    router: str = "classifier"
    adapter_overrides: Sequence[AdapterOverride] = ()

    def __post_init__(self) -> None:
        faults: list[str] = []
        if self.router not in ROUTERS:
            faults.append(f"router must be one of {', '.join(ROUTERS)}, got {self.router!r}")
        if self.hidden_size is not None and (not is_int(self.hidden_size) or self.hidden_size < 1):
            faults.append(
                f"hidden_size must be None or a whole number >= 1, got {self.hidden_size!r}"
            )
        adapters, adapter_faults = _named_folders(self.adapters)
        faults += adapter_faults
        object.__setattr__(self, "adapters", adapters)
        for name in (
            "enable_softmax",
            "enable_softmax_topk",
            "layerwise_scalings",
            "use_trainable_adapters",
        ):
            if not isinstance(getattr(self, name), bool):
                faults.append(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in ("xlora_depth", "xlora_size"):
            if not is_int(getattr(self, name)) or getattr(self, name) < 1:
                faults.append(f"{name} must be a whole number >= 1, got {getattr(self, name)!r}")
        if not is_finite(self.xlora_dropout_p) or not 0 <= self.xlora_dropout_p < 1:
            faults.append(f"xlora_dropout_p must be in [0, 1), got {self.xlora_dropout_p!r}")
        if not is_finite(self.softmax_temperature) or self.softmax_temperature <= 0:
            faults.append(
                f"softmax_temperature must be finite and > 0, got {self.softmax_temperature!r}"
            )
        for name in ("scaling_pass_value", "global_scaling_weight"):
            if not is_finite(getattr(self, name)):
                faults.append(f"{name} must be a finite number, got {getattr(self, name)!r}")
        fault = top_k_fault("top_k_lora", self.top_k_lora, len(adapters) or None)
        if fault:
            faults.append(fault)
        if self.enable_softmax is True and self.enable_softmax_topk is True:
            faults.append(
                "enable_softmax and enable_softmax_topk exclude each other: "
                "set enable_softmax=False to normalise over the kept adapters only"
            )
        if self.enable_softmax_topk is True and self.top_k_lora is None:
            faults.append("enable_softmax_topk needs top_k_lora: say how many adapters to keep")
        overrides, override_faults = checked_overrides(self.adapter_overrides)
        object.__setattr__(self, "adapter_overrides", overrides)
        faults += override_faults
        known = ", ".join(map(repr, adapters))
        faults += [
            f"adapter_overrides: there is no adapter {name!r}, only {known}"
            for name in dict.fromkeys(override.adapter for override in overrides)
            if adapters and name not in adapters
        ]
        raise_if(faults)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain JSON types, adapters in order."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> XLoraConfig:
        """Returns the config of a mapping such as ``to_dict`` makes.

        Raises:
            ConfigError: For unknown keys, or values out of range.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"unknown X-LoRA config keys: {', '.join(map(repr, unknown))}",
                hint=f"allowed keys: {', '.join(sorted(known))}",
            )
        values = dict(values)
        overrides = values.get("adapter_overrides")
        if isinstance(overrides, Sequence) and not isinstance(overrides, str):
            values["adapter_overrides"] = [AdapterOverride.from_dict(o) for o in overrides]
        return cls(**values)
