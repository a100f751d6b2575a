"""Putting adapted modules in the place of those that the adapters target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from xlora_core.adapters import LoraAdapter, LoraWeights
from xlora_core.errors import AdapterError
from xlora_core.layers import ActiveScalings, XLoraLinear, linear_features


def adapted_paths(model: nn.Module, adapters: Sequence[LoraAdapter]) -> list[str]:
    """Returns the paths of the modules that adapters target, in ``named_modules()`` order.

    Raises:
        AdapterError: If an adapter targets a module that is missing or of another shape or kind.
    """
    modules = dict(model.named_modules())
    for adapter in adapters:
        for path, weights in adapter.modules.items():
            _check_fits(adapter.name, path, weights, modules.get(path), type(model).__name__)
    return [path for path in modules if any(path in a.modules for a in adapters)]


def replace_adapted_modules(
    model: nn.Module,
    adapters: Sequence[LoraAdapter],
    active: ActiveScalings,
    *,
    trainable: bool = False,
) -> dict[str, XLoraLinear]:
    """Replaces every module that an adapter targets by an ``XLoraLinear``.

    All adapters are checked against the model before the first module is replaced.

    Args:
        model: The Hugging Face model; changed in place.
        adapters: In the classifier's output order.
        active: The scalings the new modules read.
        trainable: Whether the experts learn; then they are kept in float32.

    Returns:
        Module path -> new module, in ``named_modules()`` order.

    Raises:
        AdapterError: If an adapter targets a module that is missing or of another shape or kind.
    """
    dropouts = {index: adapter.dropout for index, adapter in enumerate(adapters)}
    replaced: dict[str, XLoraLinear] = {}
    for layer_index, path in enumerate(adapted_paths(model, adapters)):
        base_layer = model.get_submodule(path)
        dtype = base_layer.weight.dtype
        assert isinstance(dtype, torch.dtype)  # narrows nn.Module's loose attribute type
        layer = XLoraLinear(
            base_layer,
            layer_index=layer_index,
            n_adapters=len(adapters),
            experts={k: a.modules[path] for k, a in enumerate(adapters) if path in a.modules},
            dropouts=dropouts,
            active=active,
            dtype=torch.promote_types(dtype, torch.float32) if trainable else dtype,
            trainable=trainable,
        )
        model.set_submodule(path, layer)
        replaced[path] = layer
    return replaced


def _check_fits(
    name: str, path: str, weights: LoraWeights, module: nn.Module | None, model_class: str
) -> None:
    where = f"adapter {name!r}, module {path}"
    if module is None:
        raise AdapterError(
            f"{where}: {model_class} has no such module; the adapter was trained for another "
            "architecture",
            hint="load the base model the adapter was trained on",
        )
    if isinstance(module, XLoraLinear):
        raise AdapterError(
            f"{where}: the module carries experts already",
            hint="load a fresh base model for every XLoraModel",
        )
    try:
        out_features, in_features = linear_features(module)
    except AdapterError as error:
        raise AdapterError(f"{where}: {error.message}", hint=error.hint) from None
    dtype = module.weight.dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise AdapterError(
            f"{where}: the module's weight is {dtype}, expected floating point",
            hint="load the base model without quantisation",
        )
    found = (weights.lora_A.shape[1], weights.lora_B.shape[0])
    if found != (in_features, out_features):
        rank = weights.rank
        raise AdapterError(
            f"{where}: expected lora_A {[rank, in_features]} and lora_B {[out_features, rank]}, "
            f"found {[rank, found[0]]} and {[found[1], rank]}",
            hint="the adapter was trained on a base model of another size",
        )
