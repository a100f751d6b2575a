"""Merging: a constant mixture of the experts, baked into plain layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from xlora_core.errors import ConfigError
from xlora_core.layers import XLoraLinear, merged_layer

MergeWeights = Mapping[str, float] | Sequence[float] | Sequence[Sequence[float]] | Tensor | None


def weight_matrix(weights: MergeWeights, adapter_names: Sequence[str], n_layers: int) -> Tensor:
    """Returns merge weights as a matrix.

    Args:
        weights: None (uniform, 1/K each), adapter name -> weight (absent names weigh 0), or
            numbers of shape ``[K]`` or ``[L, K]``.
        adapter_names: The K adapters in order.
        n_layers: L.

    Returns:
        ``[L, K]`` float64.

    Raises:
        ConfigError: For an unknown name, a wrong shape, or a weight that is not finite.
    """
    n_adapters = len(adapter_names)
    if weights is None:
        weights = [1 / n_adapters] * n_adapters
    if isinstance(weights, Mapping):
        unknown = [name for name in weights if name not in adapter_names]
        if unknown:
            raise ConfigError(
                f"merge weights name unknown adapters: {', '.join(map(repr, unknown))}",
                hint=f"the adapters are {', '.join(adapter_names)}",
            )
        weights = [weights.get(name, 0.0) for name in adapter_names]
    try:
        matrix = torch.as_tensor(weights, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"merge weights must be numbers: {error}") from error
    if matrix.shape not in ((n_adapters,), (n_layers, n_adapters)):
        raise ConfigError(
            f"merge weights must have shape [{n_adapters}] (one per adapter) or "
            f"[{n_layers}, {n_adapters}] (one per module and adapter), got {list(matrix.shape)}"
        )
    if not torch.isfinite(matrix).all():
        raise ConfigError("merge weights must be finite")
    return matrix.expand(n_layers, n_adapters)


def merge_layers(model: nn.Module, layers: Mapping[str, XLoraLinear], weights: Tensor) -> None:
    """Replaces every adapted module of a model by a plain one with the experts baked in.

    Args:
        model: Changed in place.
        layers: Module path -> adapted module, in order.
        weights: ``[L, K]``.
    """
    for (path, layer), row in zip(layers.items(), weights, strict=True):
        model.set_submodule(path, merged_layer(layer.base_layer, layer.delta_weight(row)))
