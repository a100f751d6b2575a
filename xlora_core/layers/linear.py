"""The adapted linear layer: ``nn.Linear``, ``Conv1D``, quantised linear layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from xlora_core.errors import AdapterError
from xlora_core.layers.experts import XLoraLayer

# Under which names linear-like layers keep their sizes; the second is older GPTQ's.
_SIZES = (("out_features", "in_features"), ("outfeatures", "infeatures"))


class XLoraLinear(XLoraLayer):
    """A linear-like layer with its mixture of LoRA experts.

    Only the base layer's forward and its sizes are used, so quantised layers (bitsandbytes,
    torchao, GPTQ, ...) need no case of their own.

    Source: PEFT 0.21.2, ``XLoraLinearLayer``.
    """

    @property
    def in_features(self) -> int:
        """Size of the input."""
        return self.lora_A.shape[1]

    @property
    def out_features(self) -> int:
        """Size of the output."""
        return self.lora_B.shape[0]

    def token_shape(self, x: Tensor) -> torch.Size:
        """``[B, T, in]`` -> ``[B, T]``."""
        return x.shape[:-1]

    def gate_input(self, x: Tensor) -> Tensor:
        """Returns the input itself."""
        return x

    @property
    def gate_features(self) -> int:
        """Size of the input."""
        return self.in_features

    def mixture(self, x: Tensor, weights: Tensor) -> Tensor:
        """Returns ``[B, T, out]`` for ``x`` ``[B, T, in]`` and ``weights`` ``[B, T, R]``."""
        return F.linear(self._shrink(x.to(self.lora_A.dtype)) * weights, self.lora_B)

    def _shrink(self, x: Tensor) -> Tensor:
        """Returns ``A x``, ``[B, T, R]``; in training each expert has its own dropout mask."""
        if not self.training or not any(self.dropouts):
            return F.linear(x, self.lora_A)
        blocks = self.lora_A.split(self.ranks)
        return torch.cat(
            [
                F.linear(F.dropout(x, p), block)
                for p, block in zip(self.dropouts, blocks, strict=True)
            ],
            dim=-1,
        )

    def delta_weight(self, weights: Tensor) -> Tensor:
        """Returns the experts' weighted sum ``[out, in]`` for ``weights`` ``[K]``."""
        dtype = self.lora_scaling.dtype
        return (self.lora_B.detach().to(dtype) * self.per_rank(weights)) @ self.lora_A.detach().to(
            dtype
        )


def linear_features(module: nn.Module) -> tuple[int, int]:
    """Returns a linear-like module's ``(out, in)``.

    Raises:
        AdapterError: If the module is not linear-like.
    """
    if isinstance(module, Conv1D):
        n_in, n_out = module.weight.shape
        return n_out, n_in
    for names in _SIZES:
        sizes = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(size, int) for size in sizes):
            return sizes  # type: ignore[return-value]  # both have been checked
    raise AdapterError(
        f"a module of class {type(module).__name__} cannot carry experts, "
        "expected a linear layer, Conv1D, Embedding or Conv2d",
        hint="leave it out of the adapters' target_modules",
    )
