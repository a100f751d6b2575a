"""The adapted embedding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from xlora_core.layers.experts import XLoraLayer


class XLoraEmbedding(XLoraLayer):
    """An embedding with its mixture of LoRA experts.

    ``lora_A`` is ``[R, num_embeddings]``, ``lora_B`` is ``[dim, R]``. An embedding that scales
    its output (``embed_scale``, as in Gemma) scales the mixture alike.

    Where a model is given ``inputs_embeds``, its embedding does not run, nor do the experts on it.

    Source: PEFT 0.21.2, ``XLoraEmbeddingLayer``.
    """

    is_embedding = True

    @property
    def num_embeddings(self) -> int:
        """Number of rows."""
        return self.lora_A.shape[1]

    @property
    def embedding_dim(self) -> int:
        """Size of a row."""
        return self.lora_B.shape[0]

    @property
    def padding_idx(self) -> int | None:
        """The base layer's padding index."""
        index = getattr(self.base_layer, "padding_idx", None)
        return index if isinstance(index, int) else None

    def token_shape(self, x: Tensor) -> torch.Size:
        """``[B, T]`` token ids -> ``[B, T]``."""
        return x.shape

    def gate_input(self, x: Tensor) -> Tensor:
        """Returns the base embedding's rows ``[B, T, dim]``: ids are no features."""
        rows: Tensor = self.base_layer(x)
        return rows

    @property
    def gate_features(self) -> int:
        """Size of a row."""
        return self.embedding_dim

    def mixture(self, x: Tensor, weights: Tensor) -> Tensor:
        """Returns ``[B, T, dim]`` for ids ``x`` ``[B, T]`` and ``weights`` ``[B, T, R]``."""
        rows = F.linear(F.embedding(x, self.lora_A.T) * weights, self.lora_B)
        scale = getattr(self.base_layer, "embed_scale", None)
        if scale is None:
            return rows
        return rows * (scale.to(rows) if isinstance(scale, Tensor) else scale)

    def delta_weight(self, weights: Tensor) -> Tensor:
        """Returns the experts' weighted sum ``[num_embeddings, dim]`` for ``weights`` ``[K]``."""
        dtype = self.lora_scaling.dtype
        rows = self.lora_A.detach().to(dtype).T * self.per_rank(weights)
        return rows @ self.lora_B.detach().to(dtype).T
