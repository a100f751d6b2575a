"""The adapted two-dimensional convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xlora_core.layers.experts import XLoraLayer


class XLoraConv2d(XLoraLayer):
    """A convolution over images with its mixture of LoRA experts.

    ``lora_A`` is ``[R, in, kh, kw]`` and convolves like the base layer, ``lora_B`` is
    ``[out, R, 1, 1]``. An image has no tokens, so it is mixed by the mean of the scalings of
    its tokens. (PEFT multiplies pixels by scalings of tokens, which fails for want of a shape.)
    """

    def token_shape(self, x: Tensor) -> torch.Size:
        """``[B, in, height, width]`` -> ``[B]``: one vector of scalings per image."""
        return x.shape[:1]

    def gate_input(self, x: Tensor) -> Tensor:
        """Returns each channel's mean ``[B, in]``."""
        return x.mean(dim=(-2, -1))

    @property
    def gate_features(self) -> int:
        """Number of input channels."""
        return self.lora_A.shape[1]

    def mixture(self, x: Tensor, weights: Tensor) -> Tensor:
        """Returns ``[B, out, h, w]`` for ``x`` ``[B, in, H, W]`` and ``weights`` ``[B, R]``."""
        shrunk = self._shrink(x.to(self.lora_A.dtype))
        return F.conv2d(shrunk * weights[..., None, None], self.lora_B)

    def _shrink(self, x: Tensor) -> Tensor:
        """Returns ``A x``, ``[B, R, h, w]``; in training each expert has its own dropout mask."""
        if not self.training or not any(self.dropouts):
            return self._convolve(x, self.lora_A)
        blocks = self.lora_A.split(self.ranks)
        return torch.cat(
            [
                self._convolve(F.dropout(x, p), block)
                for p, block in zip(self.dropouts, blocks, strict=True)
            ],
            dim=-3,
        )

    def _convolve(self, x: Tensor, kernel: Tensor) -> Tensor:
        base = self.base_layer
        assert isinstance(base, nn.Conv2d)  # narrows; replacing has checked it
        # As PEFT builds its lora_A: the base layer's stride and padding, without its dilation.
        return F.conv2d(x, kernel, stride=base.stride, padding=base.padding)

    def add_bias(self, mixture: Tensor, bias: Tensor) -> Tensor:
        """Returns the mixture with a bias ``[B, out]`` or ``[out]`` added to every position."""
        return mixture + bias[..., None, None]

    def delta_weight(self, weights: Tensor) -> Tensor:
        """Returns the experts' weighted sum ``[out, in, kh, kw]`` for ``weights`` ``[K]``."""
        dtype = self.lora_scaling.dtype
        expand = self.lora_B.detach().to(dtype).flatten(1) * self.per_rank(weights)
        shrink = self.lora_A.detach().to(dtype)
        return (expand @ shrink.flatten(1)).reshape(-1, *shrink.shape[1:])
