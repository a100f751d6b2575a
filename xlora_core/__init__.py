"""X-LoRA: a per-token mixture of LoRA experts on a frozen language model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xlora_core.config import (
        AdapterOverride,
        Arm,
        EngineLimits,
        RoutingKnobs,
        SamplingParams,
        XLoraConfig,
    )
    from xlora_core.demo import load_model
    from xlora_core.engine import Engine
    from xlora_core.errors import XLoraError
    from xlora_core.layer_adapters import LoraLayerAdapter, XLoraLayerAdapter
    from xlora_core.model import XLoraModel
    from xlora_core.recording import Run

__all__ = [
    "AdapterOverride",
    "Arm",
    "Engine",
    "EngineLimits",
    "LoraLayerAdapter",
    "RoutingKnobs",
    "Run",
    "SamplingParams",
    "XLoraConfig",
    "XLoraError",
    "XLoraLayerAdapter",
    "XLoraModel",
    "load_model",
]

# Loaded at first use, so that configuration and errors can be imported without torch.
_HOMES = {
    "AdapterOverride": "config",
    "Arm": "config",
    "Engine": "engine",
    "EngineLimits": "config",
    "LoraLayerAdapter": "layer_adapters",
    "RoutingKnobs": "config",
    "Run": "recording",
    "SamplingParams": "config",
    "XLoraConfig": "config",
    "XLoraError": "errors",
    "XLoraLayerAdapter": "layer_adapters",
    "XLoraModel": "model",
    "load_model": "demo",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
