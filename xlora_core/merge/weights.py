"""Merge weights in every form that a user may give them, as one matrix ``[L, K]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from xlora_core.errors import ConfigError


@runtime_checkable
class NamedWeights(Protocol):
    """Weights that know which modules and adapters they are for, such as a ``FrozenMixture``."""

    def matrix(self, adapter_names: Sequence[str], layer_names: Sequence[str]) -> Tensor:
        """Returns ``[L, K]`` float64 in the order of these names.

        Raises:
            ConfigError: If the names are not those the weights are for.
        """


MergeWeights = (
    Mapping[str, float] | Sequence[float] | Sequence[Sequence[float]] | Tensor | NamedWeights | None
)


def weight_matrix(
    weights: MergeWeights, adapter_names: Sequence[str], layers: Sequence[str] | int
) -> Tensor:
    """Returns merge weights as a matrix.

    Args:
        weights: None (uniform, 1/K each), adapter name -> weight (absent names weigh 0),
            numbers of shape ``[K]`` or ``[L, K]``, or weights that carry names of their own.
        adapter_names: The K adapters in order.
        layers: The L module names in order, or just L.

    Returns:
        ``[L, K]`` float64.

    Raises:
        ConfigError: For an unknown name, a wrong shape, a weight that is not finite, or named
            weights of other modules or adapters.
    """
    n_adapters = len(adapter_names)
    n_layers = layers if isinstance(layers, int) else len(layers)
    if isinstance(weights, NamedWeights):
        if isinstance(layers, int):
            # Without the names to compare, weights of another model of this size would pass.
            raise ConfigError(
                "weights that name their modules must be checked against the model's modules",
                hint="pass weights.matrix(model.adapter_names, model.lora_layer_names)",
            )
        return weights.matrix(adapter_names, layers)
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
