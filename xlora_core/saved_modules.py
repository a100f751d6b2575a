"""Wholly trained modules (PEFT's ``modules_to_save``) as exact low-rank pairs, and back.

Every adapter of a sequence classifier brings a head of its own. As a difference from the base
module it is mixed like any expert: with scalings that sum to 1 the mixture is the same mixture
of whole heads, whatever the base head was.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from xlora_core.adapters import LoraWeights, SavedModule
from xlora_core.errors import AdapterError
from xlora_core.layers import XLoraLayer
from xlora_core.layers.experts import COMPUTED


def as_lora_weights(saved: SavedModule, module: nn.Module) -> LoraWeights:
    """Returns the difference of a saved module from the base module as a low-rank pair.

    The pair is exact: its rank is the smaller side of the weight.

    Args:
        saved: The module as an adapter trained it.
        module: The base module, a plain linear layer or embedding. Without data (on ``meta``)
            it gives a pair without data, which has the shapes that the true one would have.

    Raises:
        AdapterError: If the module is of another kind or shape.
    """
    weight = getattr(module, "weight", None)
    if (
        not isinstance(module, nn.Linear | nn.Embedding | Conv1D)
        or not isinstance(weight, Tensor)
        or weight.dtype not in COMPUTED
    ):
        raise AdapterError(
            f"modules_to_save holds a module of class {type(module).__name__}; only whole linear "
            "layers and embeddings in floating point can be mixed",
            hint="train the adapter without it, or merge that part into the base model first",
        )
    if saved.weight.shape != weight.shape:
        raise AdapterError(
            f"the saved module's weight is {list(saved.weight.shape)}, the model's is "
            f"{list(weight.shape)}",
            hint="load the base model with as many labels (num_labels) or tokens as the adapter's",
        )
    wide = torch.promote_types(weight.dtype, torch.float32)
    delta = _difference(saved.weight, weight, wide)
    # Both layouts, [num_embeddings, dim] and Conv1D's [in, out], are B A turned round.
    turned = isinstance(module, nn.Embedding | Conv1D)
    matrix = delta.T if turned else delta  # [out, in]
    out_features, in_features = matrix.shape
    if out_features <= in_features:
        lora_A, lora_B = matrix, torch.eye(out_features, dtype=wide)
    else:
        lora_A, lora_B = torch.eye(in_features, dtype=wide), matrix
    return LoraWeights(
        lora_A=lora_A,
        lora_B=lora_B,
        lora_scaling=1.0,
        bias=_bias_difference(saved, module, wide),
        embedding=isinstance(module, nn.Embedding),
    )


def _bias_difference(saved: SavedModule, module: nn.Module, dtype: torch.dtype) -> Tensor | None:
    base = getattr(module, "bias", None)
    if saved.bias is None and base is None:
        return None
    if saved.bias is None or base is None or saved.bias.shape != base.shape:
        raise AdapterError(
            "the saved module and the model's differ in their bias",
            hint="load the base model the adapter was trained on",
        )
    return _difference(saved.bias, base, dtype)


def _difference(saved: Tensor, base: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``saved - base``, on the CPU if there is a base to take it from."""
    place = "meta" if base.is_meta else "cpu"
    return saved.to(place, dtype) - base.detach().to(place, dtype)


def as_saved_module(layer: XLoraLayer, adapter_index: int) -> SavedModule:
    """Returns the whole module that an adapter stands for in an adapted module, as it is now."""
    weights = torch.zeros(layer.n_adapters, dtype=torch.float64)
    weights[adapter_index] = 1
    base_weight, base_bias = layer.weight.detach(), layer.bias
    delta = layer.delta_weight(weights)
    if isinstance(layer.base_layer, Conv1D):
        delta = delta.T
    bias = layer.delta_bias(weights)
    return SavedModule(
        weight=(base_weight.to(delta) + delta).cpu(),
        bias=None if bias is None or base_bias is None else (base_bias.detach().to(bias) + bias),
    )
