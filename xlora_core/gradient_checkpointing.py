"""Gradient checkpointing with scalings: what is recomputed must be routed as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from xlora_core.layers import ActiveScalings


def carry_scalings_into_checkpoints(model: nn.Module, active: ActiveScalings) -> None:
    """Makes gradient checkpointing recompute with the scalings of its own forward call.

    The recomputation runs inside ``backward``, when the forward call and its scalings are gone.
    So they are handed to the checkpoint as an input, which also carries their gradient.

    Args:
        model: A Hugging Face model with gradient checkpointing on; changed in place.
        active: The scalings its modules read.
    """
    slot = "_gradient_checkpointing_func"  # transformers' own, on all modules that can checkpoint
    for module in model.modules():
        checkpoint = getattr(module, slot, None)
        if isinstance(checkpoint, _ScalingsCheckpoint):  # perhaps of a model merged since
            checkpoint = checkpoint.checkpoint
        if checkpoint is not None:
            setattr(module, slot, _ScalingsCheckpoint(checkpoint, active))


class _ScalingsCheckpoint:
    """A checkpoint function that re-enters the scalings before it recomputes."""

    def __init__(self, checkpoint: Callable[..., Any], active: ActiveScalings) -> None:
        self.checkpoint = checkpoint
        self.active = active

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        scalings = self.active.value
        if not torch.is_grad_enabled():
            return function(*args)
        if scalings is None:
            return self.checkpoint(function, *args)
        tensors = scalings.tensors()

        def with_scalings(*values: Any) -> Any:
            with self.active.hold(scalings.with_tensors(values[: len(tensors)])):
                return function(*values[len(tensors) :])

        return self.checkpoint(with_scalings, *tensors, *args)
