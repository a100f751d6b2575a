"""The root-mean-square norm of Hugging Face's Llama-shaped models, in fewer operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def rms_norm(module: Any) -> Callable[[Tensor], Tensor]:
    """Returns a function that computes what a ``LlamaRMSNorm`` does, up to rounding.

    A 135M model has 61 norms a step; at few rows each costs what its operations cost to call.

    Args:
        module: A norm with ``weight`` ``[H]`` and ``variance_epsilon``; its weight stays as it is.

    Returns:
        ``[*, H]`` -> ``[*, H]``, computed in float32 whatever the model's dtype.
    """
    weight: Tensor = module.weight.detach()
    if weight.dtype == torch.float64:
        # The module rounds to float32 inside; only the same operations round the same.
        return module  # type: ignore[no-any-return]  # a module is called like a function
    root = weight.shape[0] ** 0.5
    epsilon = torch.tensor(root * module.variance_epsilon**0.5, device=weight.device)

    def size(x: Tensor) -> Tensor:
        """Root of the sum of squares and epsilons, ``[*, 1]`` float32."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return torch.hypot(norm, epsilon)

    if weight.dtype == torch.float32:
        from_size = weight * root
        return lambda x: torch.div(x, size(x)).mul_(from_size)
    # Rounded before the weight comes in, as the module does it.
    return lambda x: torch.div(x, size(x).div_(root)).to(x.dtype).mul_(weight)
