"""Configuration: what an X-LoRA model is, and what one request asks of it.

Importable without torch. All classes are frozen; ``dataclasses.replace`` makes a changed copy
and validates it again.
"""

from xlora_core.config.knobs import RoutingKnobs
from xlora_core.config.limits import EngineLimits
from xlora_core.config.model import ROUTERS, XLoraConfig
from xlora_core.config.overrides import AdapterOverride
from xlora_core.config.requests import Arm, SamplingParams
from xlora_core.config.training import ExpertTrainConfig, RouterTrainConfig, TrainConfig

__all__ = [
    "ROUTERS",
    "AdapterOverride",
    "Arm",
    "EngineLimits",
    "ExpertTrainConfig",
    "RouterTrainConfig",
    "RoutingKnobs",
    "SamplingParams",
    "TrainConfig",
    "XLoraConfig",
]
