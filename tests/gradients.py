"""What learns in a model, and the gradients of one backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from xlora_core.model import XLoraModel


def trainable(model: XLoraModel) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def backward(model: XLoraModel, *prompts: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Returns the loss and the gradients of one backward through a call per prompt."""
    torch.manual_seed(11)  # both runs draw the same dropout
    loss = sum(model(input_ids=ids, labels=ids).loss for ids in prompts)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainable(model).items()}
    model.zero_grad()
    return float(loss.detach()), gradients
