"""Putting adapted modules in the place of those that the adapters target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xlora_core.adapters import LoraAdapter, LoraWeights
from xlora_core.errors import AdapterError
from xlora_core.layers import ActiveScalings, XLoraLayer, adapted_layer_class, compute_dtype
from xlora_core.saved_modules import as_lora_weights


def adapted_paths(model: nn.Module, adapters: Sequence[LoraAdapter]) -> list[str]:
    """Returns the paths of the modules that adapters target, in ``named_modules()`` order.

    Raises:
        AdapterError: If an adapter targets a module that is missing or of another shape or kind.
    """
    modules = dict(model.named_modules())
    for adapter in adapters:
        for path in adapter.paths:
            _check_is_there(adapter.name, path, modules.get(path), type(model).__name__)
            _checked_class(adapter, path, modules[path])
            _check_base_weight(adapter, path, modules[path])
    return [path for path in modules if any(path in adapter.paths for adapter in adapters)]


def replace_adapted_modules(
    model: nn.Module,
    adapters: Sequence[LoraAdapter],
    active: ActiveScalings,
    *,
    trainable: bool = False,
) -> dict[str, XLoraLayer]:
    """Replaces every module that an adapter targets by an ``XLoraLayer``.

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
    fallback = getattr(model, "dtype", torch.float32)
    replaced: dict[str, XLoraLayer] = {}
    paths = adapted_paths(model, adapters)
    check_bases_are_here(model, adapters)
    for layer_index, path in enumerate(paths):
        base_layer = model.get_submodule(path)
        dtype = compute_dtype(base_layer, fallback)
        experts = {k: _weights(a, path, base_layer) for k, a in enumerate(adapters)}
        present = {k: weights for k, weights in experts.items() if weights is not None}
        kind = adapted_layer_class(base_layer, next(iter(present.values())))
        layer = kind(
            base_layer,
            layer_index=layer_index,
            n_adapters=len(adapters),
            experts=present,
            # PEFT's dropout is on the input of lora_A, which a wholly trained module has not.
            dropouts={k: p for k, p in dropouts.items() if path in adapters[k].modules},
            active=active,
            dtype=torch.promote_types(dtype, torch.float32) if trainable else dtype,
            trainable=trainable,
        )
        layer.train(base_layer.training)
        model.set_submodule(path, layer)
        replaced[path] = layer
    return replaced


def _weights(adapter: LoraAdapter, path: str, module: nn.Module) -> LoraWeights | None:
    """Returns an adapter's weights for a module; None if it has none there."""
    if path in adapter.saved_modules:
        return as_lora_weights(adapter.saved_modules[path], module)
    return adapter.modules.get(path)


def check_bases_are_here(model: nn.Module, adapters: Sequence[LoraAdapter]) -> None:
    """Raises if a wholly trained module's base weight, which it is compared with, is elsewhere.

    Raises:
        AdapterError: Naming adapter and module.
    """
    for adapter in adapters:
        for path in adapter.saved_modules:
            if next(model.get_submodule(path).parameters()).is_meta:
                raise AdapterError(
                    f"adapter {adapter.name!r}, module {path}: the adapter brings a module of its "
                    "own (modules_to_save), and the base model's is not in memory",
                    hint="load the base model so that this module is not offloaded",
                )


def _check_is_there(name: str, path: str, module: nn.Module | None, model_class: str) -> None:
    where = f"adapter {name!r}, module {path}"
    if module is None:
        raise AdapterError(
            f"{where}: {model_class} has no such module; the adapter was trained for another "
            "architecture",
            hint="load the base model the adapter was trained on",
        )
    if isinstance(module, XLoraLayer):
        raise AdapterError(
            f"{where}: the module carries experts already",
            hint="load a fresh base model for every XLoraModel",
        )


def _checked_class(adapter: LoraAdapter, path: str, module: nn.Module) -> type[XLoraLayer]:
    try:
        weights = _weights(adapter, path, module)
        assert weights is not None  # the path is one of the adapter's
        return adapted_layer_class(module, weights)
    except AdapterError as error:
        where = f"adapter {adapter.name!r}, module {path}"
        raise AdapterError(f"{where}: {error.message}", hint=error.hint) from None


def _check_base_weight(adapter: LoraAdapter, path: str, module: nn.Module) -> None:
    """Raises if the adapter was trained over another weight than the module has."""
    saved, weight = adapter.base_weights.get(path), getattr(module, "weight", None)
    if saved is None or not isinstance(weight, Tensor) or not weight.is_floating_point():
        return
    if weight.is_meta:  # a model that was made for the names of its modules only
        return
    # The two may differ by rounding: one of them was kept in a narrower dtype.
    tolerance = max(torch.finfo(saved.dtype).eps, torch.finfo(weight.dtype).eps)
    here = weight.detach().to("cpu", torch.float32)
    if saved.shape == here.shape and torch.allclose(saved.float(), here, rtol=tolerance, atol=1e-6):
        return
    raise AdapterError(
        f"adapter {adapter.name!r}, module {path}: the adapter's file brings the weight it was "
        f"trained over, {list(saved.shape)}, and the model's, {list(here.shape)}, is another one",
        hint="load the base model the adapter was trained on; tokens added for it must be added "
        "here, too",
    )
