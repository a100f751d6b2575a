"""Plain LoRA on one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from torch import Tensor, nn

from xlora_core.adapters import LoraWeights
from xlora_core.layer_adapters.adapter import LayerAdapter, adapter_placement
from xlora_core.layer_adapters.low_rank import LowRankPair


class LoraLayerAdapter(LayerAdapter):
    """A layer with one low-rank pair: ``y = base(x) + alpha/r * B A x``.

    Args:
        base_layer: ``nn.Linear``, ``Conv1D``, a quantised linear layer, or any module from
            ``[..., in]`` to ``[..., out]`` with ``in_features`` and ``out_features`` given.
            It is kept, not copied.
        rank: r, >= 1.
        alpha: None is alpha = r.
        freeze_base_layer: Whether the base layer's parameters stop learning.
        in_features: Needed where the base layer does not say it itself.
        out_features: The same.

    Attributes:
        base_layer: As given.
        lora_layer: The pair, ``lora_A`` ``[r, in]`` and ``lora_B`` ``[out, r]``; ``lora_B``
            starts at zero, so a fresh adapter changes nothing.

    Raises:
        AdapterError: If rank, alpha or a size is out of range or unknown.

    Example:
        >>> adapter = LoraLayerAdapter(nn.Linear(16, 8), rank=4)
        >>> adapter.alpha, adapter.parameter_count, adapter.is_base_layer_frozen
        (4.0, 96, True)

    Source: arXiv 2106.09685, section 4.1.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int,
        alpha: float | None = None,
        freeze_base_layer: bool = True,
        *,
        in_features: int | None = None,
        out_features: int | None = None,
    ) -> None:
        super().__init__(
            base_layer,
            freeze_base_layer=freeze_base_layer,
            in_features=in_features,
            out_features=out_features,
        )
        self.lora_layer = LowRankPair(
            self.in_features, self.out_features, rank, alpha, **adapter_placement(base_layer)
        )

    @classmethod
    def from_weights(
        cls, base_layer: nn.Module, weights: LoraWeights, *, freeze_base_layer: bool = True
    ) -> Self:
        """Returns the adapter of a finished LoRA, as ``read_adapter(...).modules[path]`` has it.

        Raises:
            AdapterError: If the weights do not fit the base layer.
        """
        out_features, in_features = weights.lora_B.shape[0], weights.lora_A.shape[1]
        adapter = cls(
            base_layer,
            weights.rank,
            freeze_base_layer=freeze_base_layer,
            in_features=in_features,
            out_features=out_features,
        )
        adapter.lora_layer = LowRankPair.from_weights(weights, **adapter_placement(base_layer))
        return adapter

    def pairs(self) -> Sequence[LowRankPair]:
        """Returns the one low-rank pair."""
        return [self.lora_layer]

    def _own_modules(self) -> Sequence[nn.Module]:
        return [self.lora_layer]

    @property
    def rank(self) -> int:
        """r."""
        return self.lora_layer.rank

    @property
    def alpha(self) -> float:
        """The pair is multiplied by alpha / r."""
        return self.lora_layer.alpha

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[..., out]`` for ``x`` ``[..., in]``, in the base layer's dtype."""
        y: Tensor = self.base_layer(x)
        added: Tensor = self.lora_layer(x)
        return y + added.to(y.dtype)

    def merge_to_original_layer(self) -> nn.Module:
        """Returns a new plain layer that computes the same; this one is not changed.

        Raises:
            AdapterError: If the base layer is not ``nn.Linear`` or ``Conv1D``.
        """
        pair = self.lora_layer
        bias = None if pair.bias is None else pair.bias.detach() * pair.lora_scaling
        return self._merged(pair.delta_weight(), bias)
