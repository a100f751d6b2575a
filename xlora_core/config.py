"""Configuration: what an X-LoRA model is, and what one request asks of it.

Importable without torch. All classes are frozen; ``dataclasses.replace`` makes a changed copy
and validates it again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from os import PathLike
from typing import Any

from xlora_core.errors import ConfigError

ROUTERS = ("classifier", "per_layer")


def _is_finite(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _raise_if(faults: list[str], *, hint: str = "") -> None:
    if faults:
        raise ConfigError(faults, hint=hint)


def _top_k_fault(name: str, value: object, n_adapters: int | None) -> str | None:
    """The fault of a top-k value, or None. ``n_adapters`` None: the upper bound is not known."""
    if value is None:
        return None
    upper = (
        "the number of adapters" if n_adapters is None else f"{n_adapters} (the number of adapters)"
    )
    if not _is_int(value) or value < 1 or (n_adapters is not None and value > n_adapters):  # type: ignore[operator]  # _is_int has checked it
        return f"{name} must be None or a whole number from 1 to {upper}, got {value!r}"
    return None


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

    Field names and defaults are those of PEFT's ``XLoraConfig``; ``router`` is our own.

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

    def __post_init__(self) -> None:
        faults: list[str] = []
        if self.router not in ROUTERS:
            faults.append(f"router must be one of {', '.join(ROUTERS)}, got {self.router!r}")
        if self.hidden_size is not None and (not _is_int(self.hidden_size) or self.hidden_size < 1):
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
            if not _is_int(getattr(self, name)) or getattr(self, name) < 1:
                faults.append(f"{name} must be a whole number >= 1, got {getattr(self, name)!r}")
        if not _is_finite(self.xlora_dropout_p) or not 0 <= self.xlora_dropout_p < 1:
            faults.append(f"xlora_dropout_p must be in [0, 1), got {self.xlora_dropout_p!r}")
        if not _is_finite(self.softmax_temperature) or self.softmax_temperature <= 0:
            faults.append(
                f"softmax_temperature must be finite and > 0, got {self.softmax_temperature!r}"
            )
        for name in ("scaling_pass_value", "global_scaling_weight"):
            if not _is_finite(getattr(self, name)):
                faults.append(f"{name} must be a finite number, got {getattr(self, name)!r}")
        fault = _top_k_fault("top_k_lora", self.top_k_lora, len(adapters) or None)
        if fault:
            faults.append(fault)
        if self.enable_softmax is True and self.enable_softmax_topk is True:
            faults.append(
                "enable_softmax and enable_softmax_topk exclude each other: "
                "set enable_softmax=False to normalise over the kept adapters only"
            )
        if self.enable_softmax_topk is True and self.top_k_lora is None:
            faults.append("enable_softmax_topk needs top_k_lora: say how many adapters to keep")
        _raise_if(faults)

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
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class RoutingKnobs:
    """What a user may turn while a request runs. Belongs to one arm of one request.

    Attributes:
        top_k: Keep the k largest scalings per token and module; None keeps all.
        temperature: Softmax temperature, > 0. Without effect when the model's config has
            ``enable_softmax=False``.
        global_weight: Factor g on every scaling; 0 is the base model.

    Raises:
        ConfigError: Listing every knob out of range.
    """

    top_k: int | None = None
    temperature: float = 1.0
    global_weight: float = 1.0

    def __post_init__(self) -> None:
        faults: list[str] = []
        fault = _top_k_fault("top_k", self.top_k, None)
        if fault:
            faults.append(fault)
        if not _is_finite(self.temperature) or self.temperature <= 0:
            faults.append(f"temperature must be finite and > 0, got {self.temperature!r}")
        if not _is_finite(self.global_weight):
            faults.append(f"global_weight must be a finite number, got {self.global_weight!r}")
        _raise_if(faults)

    def check(self, n_adapters: int) -> RoutingKnobs:
        """Returns self if ``top_k`` fits a model of ``n_adapters`` adapters.

        Raises:
            ConfigError: If ``top_k`` is larger than ``n_adapters``; names both.
        """
        fault = _top_k_fault("top_k", self.top_k, n_adapters)
        _raise_if([fault] if fault else [])
        return self

    @classmethod
    def from_config(cls, config: XLoraConfig) -> RoutingKnobs:
        """Returns the knobs that a config sets as a model's defaults."""
        return cls(
            top_k=config.top_k_lora,
            temperature=config.softmax_temperature,
            global_weight=config.global_scaling_weight,
        )


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a request picks its tokens.

    Attributes:
        max_new_tokens: Most tokens to write, >= 1.
        temperature: 0 is greedy; otherwise the language model's logits are divided by it.
            Not the router's softmax temperature.
        top_p: Keep the smallest set of tokens whose probability reaches this, in (0, 1].
        top_k: Keep the k most likely tokens; None keeps all.
        repetition_penalty: > 1 makes tokens already in the text less likely, 1 is off.
        seed: Seed of the request's own random generator.

    Raises:
        ConfigError: Listing every parameter out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        faults: list[str] = []
        if not _is_int(self.max_new_tokens) or self.max_new_tokens < 1:
            faults.append(
                f"max_new_tokens must be a whole number >= 1, got {self.max_new_tokens!r}"
            )
        if not _is_finite(self.temperature) or self.temperature < 0:
            faults.append(f"sampling temperature must be finite and >= 0, got {self.temperature!r}")
        if not _is_finite(self.top_p) or not 0 < self.top_p <= 1:
            faults.append(f"top_p must be in (0, 1], got {self.top_p!r}")
        if self.top_k is not None and (not _is_int(self.top_k) or self.top_k < 1):
            faults.append(f"sampling top_k must be None or a whole number >= 1, got {self.top_k!r}")
        if not _is_finite(self.repetition_penalty) or self.repetition_penalty <= 0:
            faults.append(
                f"repetition_penalty must be finite and > 0, got {self.repetition_penalty!r}"
            )
        if not _is_int(self.seed) or not 0 <= self.seed < 2**63:
            faults.append(f"seed must be a whole number from 0 to 2**63 - 1, got {self.seed!r}")
        _raise_if(faults)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of running a prompt.

    Make one with ``Arm.routed()``, ``merged()``, ``base()`` or ``expert(name)``.

    Attributes:
        kind: ``"routed"``, ``"merged"``, ``"base"`` or ``"expert"``.
        knobs: The routed arm's knobs at the start; None takes the model's defaults.
        adapter: The expert arm's adapter name.
    """

    kind: str
    knobs: RoutingKnobs | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        faults: list[str] = []
        if self.kind not in ("routed", "merged", "base", "expert"):
            faults.append(f"kind must be routed, merged, base or expert, got {self.kind!r}")
        if (self.kind == "expert") != (self.adapter is not None):
            faults.append("an expert arm, and no other, names its adapter")
        if self.knobs is not None and self.kind != "routed":
            faults.append(f"only a routed arm has knobs, this one is {self.kind!r}")
        _raise_if(faults)

    @property
    def label(self) -> str:
        """A short name for legends and exports, such as ``"routed"`` or ``"expert:math"``."""
        return f"expert:{self.adapter}" if self.kind == "expert" else self.kind

    @classmethod
    def routed(cls, knobs: RoutingKnobs | None = None) -> Arm:
        """X-LoRA: every token gets its own mixture."""
        return cls(kind="routed", knobs=knobs)

    @classmethod
    def merged(cls) -> Arm:
        """The uniform merge: every adapter at 1/K, for every token."""
        return cls(kind="merged")

    @classmethod
    def base(cls) -> Arm:
        """The base model without adapters."""
        return cls(kind="base")

    @classmethod
    def expert(cls, adapter: str) -> Arm:
        """One adapter alone, as plain LoRA."""
        return cls(kind="expert", adapter=adapter)
