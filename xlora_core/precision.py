"""Routers compute in float32 or wider, whatever a model is cast to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class Float32OrWider(nn.Module):
    """A module whose weights are never rounded below float32.

    ``model.to(torch.bfloat16)`` asks every module to; rounding in a router changes tokens.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts as asked, but casts to float32 at the least."""

        def keeping_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            wide = torch.promote_types(moved.dtype, torch.float32)
            return moved if moved.dtype == wide else tensor.to(moved.device, wide)

        super()._apply(keeping_precision, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        return self
