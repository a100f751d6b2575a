"""What the tests of the laws share, for either router."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.tiny_models import tiny_base
from xlora_core.model import XLoraModel

NEAR = {"atol": 1e-10, "rtol": 0}
T = 9


def run(model: XLoraModel, ids: Tensor, **inputs: object) -> tuple[Tensor, Tensor]:
    """Returns logits and scalings of an uncached call."""
    logits = model(input_ids=ids, use_cache=False, **inputs).logits
    scalings = model.get_latest_scalings()
    assert scalings is not None
    return logits, scalings


def base_logits(family: str, ids: Tensor) -> Tensor:
    """Returns the logits of a family's base model in float64."""
    logits: Tensor = tiny_base(family, dtype=torch.float64)(input_ids=ids).logits
    return logits


def positions(mask: Tensor) -> Tensor:
    """Returns the position ids of padded texts."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
