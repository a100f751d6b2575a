"""The experts baked into a model's own layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from xlora_core.layers import XLoraLayer, merged_layer


def merge_layers(model: nn.Module, layers: Mapping[str, XLoraLayer], weights: Tensor) -> None:
    """Replaces every adapted module of a model by a plain one with the experts baked in.

    Args:
        model: Changed in place.
        layers: Module path -> adapted module, in order.
        weights: ``[L, K]``.
    """
    for (path, layer), row in zip(layers.items(), weights, strict=True):
        delta, delta_bias = layer.delta_weight(row), layer.delta_bias(row)
        model.set_submodule(path, merged_layer(layer.base_layer, delta, delta_bias))
