"""Adapted modules for another list of adapters, made beside the model that is edited."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from xlora_core.adapters import LoraAdapter, LoraWeights
from xlora_core.errors import AdapterError
from xlora_core.layers import ActiveScalings, XLoraLayer, adapted_layer_class
from xlora_core.layers.experts import compute_dtype
from xlora_core.replacing import adapted_paths, check_bases_are_here
from xlora_core.saved_modules import as_lora_weights

Source = int | LoraAdapter
"""Where an adapter comes from: its number before, or new from disk."""


def without_experts(model: nn.Module) -> nn.Module:
    """Returns the model as it is without experts: a second tree of modules over the same weights.

    The tree is for looking at, not for running.
    """
    copies: dict[int, nn.Module] = {}

    def plain(module: nn.Module) -> nn.Module:
        if isinstance(module, XLoraLayer):
            return module.base_layer
        if not module._modules:  # noqa: SLF001  # the tree itself, not what it yields
            return module
        if id(module) not in copies:
            copies[id(module)] = copied = copy.copy(module)
            copied._modules = {  # noqa: SLF001
                name: child if child is None else plain(child)
                for name, child in module._modules.items()  # noqa: SLF001
            }
        return copies[id(module)]

    return plain(model)


def rebuilt_layers(
    model: nn.Module,
    layers: Mapping[str, XLoraLayer],
    sources: Sequence[Source],
    *,
    active: ActiveScalings,
    trainable: bool,
) -> dict[str, XLoraLayer]:
    """Returns the adapted modules for another list of adapters; changes nothing.

    Experts that stay keep their weights, dtype, device and whether they learn; the parameters
    are new objects.

    Args:
        model: The base model with the adapted modules in it.
        layers: Module path -> adapted module, as they are now.
        sources: Where each adapter comes from, in the new order.
        active: The scalings the modules read.
        trainable: Whether experts in newly adapted modules learn.

    Returns:
        Module path -> new module, in ``named_modules()`` order.

    Raises:
        AdapterError: If a new adapter does not fit the model.
    """
    plain = without_experts(model)
    for source in sources:
        if isinstance(source, LoraAdapter):
            _check_fits(plain, source)
    rebuilt: dict[str, XLoraLayer] = {}
    for path, module in plain.named_modules():
        old = layers.get(path)
        before = _experts(old)
        experts, dropouts = {}, {}
        for k, source in enumerate(sources):
            if isinstance(source, LoraAdapter):
                weights, dropout = _new_expert(source, path, module, like=old)
            else:
                weights, dropout = before.get(source, (None, 0.0))
            if weights is not None:
                experts[k], dropouts[k] = weights, dropout
        if not experts:
            continue
        kind = adapted_layer_class(module, next(iter(experts.values())))
        rebuilt[path] = kind(
            module,
            layer_index=len(rebuilt),
            n_adapters=len(sources),
            experts=experts,
            dropouts=dropouts,
            active=active,
            dtype=_new_dtype(model, module, trainable) if old is None else old.lora_A.dtype,
            trainable=trainable if old is None else old.lora_A.requires_grad,
        ).train((old or module).training)
    return rebuilt


def check_finite(adapter: LoraAdapter) -> None:
    """Raises ``AdapterError`` if an adapter from memory holds what none from a file may hold."""
    of_path: dict[str, tuple[Tensor | None, ...]] = {
        path: (weights.lora_A, weights.lora_B, weights.bias)
        for path, weights in adapter.modules.items()
    } | {path: (saved.weight, saved.bias) for path, saved in adapter.saved_modules.items()}
    for path, tensors in of_path.items():
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor is not None):
            raise AdapterError(
                f"adapter {adapter.name!r}, module {path}: its weights hold NaN or infinite values",
                hint="its training diverged; take an earlier state of it",
            )


def put_in_place(
    model: nn.Module, old: Mapping[str, XLoraLayer], new: Mapping[str, XLoraLayer]
) -> None:
    """Puts new adapted modules where old ones were, and base layers where none are left."""
    for path, layer in old.items():
        if path not in new:
            model.set_submodule(path, layer.base_layer)
    for path, layer in new.items():
        model.set_submodule(path, layer)


def _check_fits(plain: nn.Module, adapter: LoraAdapter) -> None:
    if not adapter.paths:
        raise AdapterError(f"adapter {adapter.name!r} changes no module")
    adapted_paths(plain, [adapter])
    check_bases_are_here(plain, [adapter])


def _weights(adapter: LoraAdapter, path: str, module: nn.Module) -> LoraWeights:
    if path in adapter.modules:
        return adapter.modules[path]
    return as_lora_weights(adapter.saved_modules[path], module)


def _new_expert(
    adapter: LoraAdapter, path: str, module: nn.Module, *, like: XLoraLayer | None
) -> tuple[LoraWeights | None, float]:
    """Returns an adapter's weights for a module and its dropout; None if it has none there."""
    if path not in adapter.paths:
        return None, 0.0
    weights = _weights(adapter, path, module)
    # PEFT's dropout is on the input of lora_A, which a wholly trained module has not.
    dropout = adapter.dropout if path in adapter.modules else 0.0
    if like is None:
        return weights, dropout
    stacked = like.lora_A
    bias = None if weights.bias is None else weights.bias.to(stacked)
    lora_A, lora_B = weights.lora_A.to(stacked), weights.lora_B.to(stacked)
    return replace(weights, lora_A=lora_A, lora_B=lora_B, bias=bias), dropout


def _experts(layer: XLoraLayer | None) -> dict[int, tuple[LoraWeights, float]]:
    """Returns adapter number -> its weights in a module, and its dropout."""
    if layer is None:
        return {}
    experts = layer.experts().items()
    return {k: (weights, p) for (k, weights), p in zip(experts, layer.dropouts, strict=True)}


def _new_dtype(model: nn.Module, module: nn.Module, trainable: bool) -> torch.dtype:
    dtype = compute_dtype(module, getattr(model, "dtype", torch.float32))
    return torch.promote_types(dtype, torch.float32) if trainable else dtype
