"""What one request asks for: how tokens are picked, and which arms run."""

from __future__ import annotations

from dataclasses import dataclass

from xlora_core.config.checks import is_finite, is_int, raise_if
from xlora_core.config.knobs import RoutingKnobs


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
        if not is_int(self.max_new_tokens) or self.max_new_tokens < 1:
            faults.append(
                f"max_new_tokens must be a whole number >= 1, got {self.max_new_tokens!r}"
            )
        if not is_finite(self.temperature) or self.temperature < 0:
            faults.append(f"sampling temperature must be finite and >= 0, got {self.temperature!r}")
        if not is_finite(self.top_p) or not 0 < self.top_p <= 1:
            faults.append(f"top_p must be in (0, 1], got {self.top_p!r}")
        if self.top_k is not None and (not is_int(self.top_k) or self.top_k < 1):
            faults.append(f"sampling top_k must be None or a whole number >= 1, got {self.top_k!r}")
        if not is_finite(self.repetition_penalty) or self.repetition_penalty <= 0:
            faults.append(
                f"repetition_penalty must be finite and > 0, got {self.repetition_penalty!r}"
            )
        if not is_int(self.seed) or not 0 <= self.seed < 2**63:
            faults.append(f"seed must be a whole number from 0 to 2**63 - 1, got {self.seed!r}")
        raise_if(faults)


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
        raise_if(faults)

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
