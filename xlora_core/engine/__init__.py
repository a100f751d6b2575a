"""The engine: requests, arms, a queue, and events as tokens come."""

from __future__ import annotations

from xlora_core.engine.engine import Engine
from xlora_core.engine.events import (
    ArmFinished,
    Event,
    Failed,
    Finished,
    Queued,
    Started,
    TokenEvent,
)
from xlora_core.engine.handle import EventStream, RequestHandle

__all__ = [
    "ArmFinished",
    "Engine",
    "Event",
    "EventStream",
    "Failed",
    "Finished",
    "Queued",
    "RequestHandle",
    "Started",
    "TokenEvent",
]
