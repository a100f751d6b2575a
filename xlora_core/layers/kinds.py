"""Which modules can carry experts, and as what."""

from __future__ import annotations

from torch import nn

from xlora_core.adapters import LoraWeights
from xlora_core.errors import AdapterError
from xlora_core.layers.convolution import XLoraConv2d
from xlora_core.layers.embedding import XLoraEmbedding
from xlora_core.layers.experts import XLoraLayer
from xlora_core.layers.linear import XLoraLinear, linear_features


def adapted_layer_class(module: nn.Module, weights: LoraWeights) -> type[XLoraLayer]:
    """Returns the class that adapts a module with given weights.

    Raises:
        AdapterError: If the module cannot carry experts, or experts of another kind or shape.
    """
    if isinstance(module, nn.Embedding):
        kind: type[XLoraLayer] = XLoraEmbedding
        expected_A: tuple[int, ...] = (module.num_embeddings,)
        expected_B: tuple[int, ...] = (module.embedding_dim,)
    elif isinstance(module, nn.Conv2d):
        if module.groups != 1 or module.dilation != (1, 1) or module.padding_mode != "zeros":
            raise AdapterError(
                "grouped or dilated convolutions, and those that pad with other than zeros, "
                "cannot carry experts",
                hint="leave it out of the adapters' target_modules",
            )
        kind = XLoraConv2d
        expected_A = (module.in_channels, *module.kernel_size)
        expected_B = (module.out_channels,)
    else:
        kind = XLoraLinear
        out_features, in_features = linear_features(module)
        expected_A, expected_B = (in_features,), (out_features,)
    rank = weights.rank
    shape_A = (rank, *expected_A)
    shape_B = (*expected_B, rank, *([1, 1] if kind is XLoraConv2d else []))
    if weights.embedding != kind.is_embedding:
        has = "an embedding's" if weights.embedding else "no embedding's"
        raise AdapterError(
            f"the module is of class {type(module).__name__}, the adapter has {has} weights for it",
            hint="load the base model the adapter was trained on",
        )
    if tuple(weights.lora_A.shape) != shape_A or tuple(weights.lora_B.shape) != shape_B:
        raise AdapterError(
            f"expected lora_A {list(shape_A)} and lora_B {list(shape_B)}, "
            f"found {list(weights.lora_A.shape)} and {list(weights.lora_B.shape)}",
            hint="the adapter was trained on a base model of another size",
        )
    return kind


def is_adaptable(module: nn.Module) -> bool:
    """Returns whether a module can carry experts."""
    if isinstance(module, nn.Embedding | nn.Conv2d):
        return True
    try:
        linear_features(module)
    except AdapterError:
        return False
    return True
