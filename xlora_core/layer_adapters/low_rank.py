"""The low-rank pair: what one expert adds to a layer."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xlora_core.adapters import LoraWeights
from xlora_core.errors import AdapterError


class LowRankPair(nn.Module):
    """One LoRA expert: ``lora_scaling * (B A x + bias)``.

    ``lora_A`` is drawn from U(-1/sqrt(in), 1/sqrt(in)) and ``lora_B`` is zero, so a fresh pair
    adds nothing.

    Args:
        in_features: Size of the input.
        out_features: Size of the output.
        rank: r, >= 1.
        alpha: ``lora_scaling`` is alpha / r; None is alpha = r.
        dtype: dtype of the weights.
        device: Where the weights live.

    Attributes:
        lora_A: ``[r, in]``.
        lora_B: ``[out, r]``.
        bias: ``[out]``, or None; only pairs that were read with one have it.
        lora_scaling: alpha / r.

    Raises:
        AdapterError: If rank or alpha is out of range.

    Source: arXiv 2106.09685, section 4.1.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise AdapterError(f"rank must be a whole number >= 1, got {rank!r}")
        alpha = rank if alpha is None else alpha
        if not math.isfinite(alpha) or alpha <= 0:
            raise AdapterError(
                f"alpha must be finite and > 0, got {alpha!r}",
                hint="leave alpha out for alpha = rank",
            )
        self.lora_scaling = alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank, dtype=dtype, device=device))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Makes the pair a fresh one, which adds nothing."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def from_weights(
        cls,
        weights: LoraWeights,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Self:
        """Returns a pair that copies an adapter's weights for one linear module.

        Raises:
            AdapterError: If they are those of an embedding or a convolution.
        """
        lora_A, lora_B = weights.lora_A, weights.lora_B
        if weights.embedding or lora_A.ndim != 2 or lora_B.ndim != 2:
            kind = "an embedding" if weights.embedding else "a convolution"
            raise AdapterError(
                f"these are LoRA weights of {kind} (lora_A {list(lora_A.shape)}), those of a "
                "linear module were expected",
                hint="layer adapters carry linear experts; XLoraModel takes the other kinds, too",
            )
        pair = cls(lora_A.shape[1], lora_B.shape[0], weights.rank, dtype=dtype, device=device)
        pair.lora_scaling = weights.lora_scaling
        with torch.no_grad():
            pair.lora_A.copy_(lora_A)
            pair.lora_B.copy_(lora_B)
        if weights.bias is not None:
            pair.bias = nn.Parameter(weights.bias.detach().to(pair.lora_B, copy=True))
        return pair

    def to_weights(self) -> LoraWeights:
        """Returns the pair as adapter weights, views of its own."""
        return LoraWeights(
            lora_A=self.lora_A.detach(),
            lora_B=self.lora_B.detach(),
            lora_scaling=self.lora_scaling,
            bias=None if self.bias is None else self.bias.detach(),
        )

    @property
    def rank(self) -> int:
        """r."""
        return self.lora_A.shape[0]

    @property
    def alpha(self) -> float:
        """``lora_scaling * r``."""
        return self.lora_scaling * self.rank

    def forward(self, x: Tensor) -> Tensor:
        """Returns what the pair adds, ``[..., out]`` for ``x`` ``[..., in]``, in its own dtype."""
        shrunk = F.linear(x.to(self.lora_A.dtype), self.lora_A)
        return F.linear(shrunk, self.lora_B, self.bias) * self.lora_scaling

    def delta_weight(self) -> Tensor:
        """Returns ``lora_scaling * B A``, ``[out, in]`` in float32 or wider, without gradient."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        return (self.lora_B.detach().to(dtype) @ self.lora_A.detach().to(dtype)) * self.lora_scaling

    def delta_norm(self) -> float:
        """Returns the Frobenius norm of ``delta_weight()`` without making that matrix."""
        A, B = self.lora_A.detach().double(), self.lora_B.detach().double()
        squared = ((A @ A.T) * (B.T @ B)).sum()
        return abs(self.lora_scaling) * math.sqrt(max(float(squared), 0.0))

    def extra_repr(self) -> str:
        """Returns sizes and scaling for ``print``."""
        out_features, rank = self.lora_B.shape
        return (
            f"in_features={self.lora_A.shape[1]}, out_features={out_features}, rank={rank}, "
            f"lora_scaling={self.lora_scaling:g}"
        )
