"""What makes a training run what it is: a checkpoint or a result of another run is told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from typing import Any

import torch
from torch import Tensor, nn

from xlora_core.config.training import ExpertTrainConfig, RouterTrainConfig, TrainConfig
from xlora_core.model import XLoraModel
from xlora_core.training.data import Example


def run_identity(
    base: Any,
    train: Sequence[Example],
    heldout: Sequence[Example],
    settings: TrainConfig,
    **more: Any,
) -> dict[str, Any]:
    """Returns what makes a run what it is: its settings, and a sha256 of base model and rows.

    Args:
        base: The base model.
        train: Training examples.
        heldout: Held-out examples.
        settings: How to train.
        more: What else does, plain JSON types.
    """
    rows = {"training rows": _hash_of(train), "held-out rows": _hash_of(heldout)}
    return {"settings": asdict(settings), "base weights": _hash_of_base(base), **rows, **more}


def router_identity(
    model: XLoraModel,
    train: Sequence[Example],
    heldout: Sequence[Example],
    settings: RouterTrainConfig,
) -> dict[str, Any]:
    """Returns what makes a router's run what it is, as ``run_identity``; before training."""
    more: dict[str, Any] = {
        "adapters": list(model.adapter_names),
        "expert weights": _hash_of_experts(model),
    }
    if settings.label_start_rows:
        topics = repr([example.topics for example in train])
        more["topics of training rows"] = hashlib.sha256(topics.encode()).hexdigest()
    return run_identity(model.base_model, train, heldout, settings, **more)


def with_defaults(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a stored run's identity with the settings that came after it, at their defaults.

    The default of a new setting is what runs did before there was one, so an old run stays the
    same run.

    Args:
        stored: As of ``run_identity``, as read from JSON.
    """
    settings = stored.get("settings")
    if not isinstance(settings, Mapping):
        return dict(stored)
    kind = ExpertTrainConfig if "domain" in settings else RouterTrainConfig
    defaults = {f.name: f.default for f in fields(kind) if f.default is not MISSING}
    return {**stored, "settings": defaults | dict(settings)}


def _hash_of_base(base: nn.Module) -> str:
    """Returns a sha256 of the beginning of every weight: enough to tell models apart."""
    digest = hashlib.sha256()
    for name, weight in base.named_parameters():
        digest.update(f"{name} {list(weight.shape)}".encode())
        digest.update(_bytes(weight.flatten()[:64]))
    return digest.hexdigest()


def _hash_of(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.input_ids, example.labels, example.domains)).encode())
    return digest.hexdigest()


def _hash_of_experts(model: XLoraModel) -> str:
    """Returns a sha256 of the experts as they are before training."""
    digest = hashlib.sha256()
    for layer in model.lora_layers:
        for weight in (layer.lora_A, layer.lora_B):
            digest.update(_bytes(weight))
    return digest.hexdigest()


def _bytes(weight: Tensor) -> bytes:
    """Returns a weight's bytes; none of one that is kept on disk."""
    if weight.is_meta:
        return b""
    return weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
