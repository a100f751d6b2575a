"""What may be turned while a request runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xlora_core.config.checks import is_finite, raise_if, top_k_fault
from xlora_core.config.overrides import (
    PATTERN_HINT,
    AdapterOverride,
    checked_overrides,
    override_faults,
)

if TYPE_CHECKING:
    from xlora_core.config.model import XLoraConfig


@dataclass(frozen=True, kw_only=True)
class RoutingKnobs:
    """What a user may turn while a request runs. Belongs to one arm of one request.

    Attributes:
        top_k: Keep the k largest scalings per token and module; None keeps all.
        temperature: Softmax temperature, > 0. Without effect when the model's config has
            ``enable_softmax=False``.
        global_weight: Factor g on every scaling; 0 is the base model.
        overrides: Adapters that are pinned, muted or rescaled; of two for the same adapter and
            module the later one holds. They concern the main pass only, so the router's
            logits do not depend on them.

    Raises:
        ConfigError: Listing every knob out of range.
    """

    top_k: int | None = None
    temperature: float = 1.0
    global_weight: float = 1.0
    overrides: Sequence[AdapterOverride] = ()

    def __post_init__(self) -> None:
        faults: list[str] = []
        fault = top_k_fault("top_k", self.top_k, None)
        if fault:
            faults.append(fault)
        if not is_finite(self.temperature) or self.temperature <= 0:
            faults.append(f"temperature must be finite and > 0, got {self.temperature!r}")
        if not is_finite(self.global_weight):
            faults.append(f"global_weight must be a finite number, got {self.global_weight!r}")
        overrides, override_faults = checked_overrides(self.overrides)
        object.__setattr__(self, "overrides", overrides)
        raise_if(faults + override_faults)

    def check(self, n_adapters: int) -> RoutingKnobs:
        """Returns self if ``top_k`` fits a model of ``n_adapters`` adapters.

        Raises:
            ConfigError: If ``top_k`` is larger than ``n_adapters``; names both.
        """
        fault = top_k_fault("top_k", self.top_k, n_adapters)
        raise_if([fault] if fault else [])
        return self

    def check_names(self, adapter_names: Sequence[str], layer_names: Sequence[str]) -> RoutingKnobs:
        """Returns self if the knobs fit a model of these adapters and modules.

        Args:
            adapter_names: K names.
            layer_names: L paths of the adapted modules.

        Raises:
            ConfigError: Listing every fault: ``top_k`` larger than K; an override of an adapter
                that is not there, or of modules of which there are none.
        """
        if not self.overrides:
            return self.check(len(adapter_names))
        fault = top_k_fault("top_k", self.top_k, len(adapter_names))
        faults = override_faults(tuple(self.overrides), tuple(adapter_names), tuple(layer_names))
        some_modules = any(override.modules is not None for override in self.overrides)
        raise_if([*([fault] if fault else []), *faults], hint=PATTERN_HINT if some_modules else "")
        return self

    @classmethod
    def from_config(cls, config: XLoraConfig) -> RoutingKnobs:
        """Returns the knobs that a config sets as a model's defaults."""
        return cls(
            top_k=config.top_k_lora,
            temperature=config.softmax_temperature,
            global_weight=config.global_scaling_weight,
            overrides=config.adapter_overrides,
        )
