"""The gate: the router of one module, which reads the module's own input."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xlora_core.precision import Float32OrWider


class Gate(Float32OrWider, nn.Linear):
    """Turns each token's input of a module into one router logit per adapter.

    It starts at zero: the uniform mixture, so every preference it ends with comes from training.
    It computes in float32 (float64 under a float64 model), whatever the dtype of its input, and
    outside autocast.

    Args:
        in_features: Size of the module's input.
        n_adapters: K.
        dtype: dtype of the weights, float32 or wider.
        device: Where the weights live.

    Attributes:
        weight: ``[K, in]``.
        bias: ``[K]``.
    """

    def __init__(
        self,
        in_features: int,
        n_adapters: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(
            in_features,
            n_adapters,
            dtype=torch.promote_types(dtype, torch.float32),
            device=device,
        )

    def reset_parameters(self) -> None:
        """Makes every logit 0."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the router logits ``[..., K]`` of inputs ``[..., in]`` of any floating dtype."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return F.linear(x.to(self.weight.device, self.weight.dtype), self.weight, self.bias)
