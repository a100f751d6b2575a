"""Adapted modules: a base layer plus the weighted sum of its experts.

Explicit modules replace the adapted ones, so every Hugging Face architecture works without
touching its code. All experts of a module are stacked along the rank: the whole mixture is two
products, and ranks may differ between experts.
"""

from xlora_core.layers.active import ActiveScalings, ModuleScalings, TokenScalings
from xlora_core.layers.convolution import XLoraConv2d
from xlora_core.layers.embedding import XLoraEmbedding
from xlora_core.layers.experts import XLoraLayer, compute_device, compute_dtype
from xlora_core.layers.kinds import adapted_layer_class, is_adaptable
from xlora_core.layers.linear import XLoraLinear, linear_features
from xlora_core.layers.merging import merged_layer

__all__ = [
    "ActiveScalings",
    "ModuleScalings",
    "TokenScalings",
    "XLoraConv2d",
    "XLoraEmbedding",
    "XLoraLayer",
    "XLoraLinear",
    "adapted_layer_class",
    "compute_device",
    "compute_dtype",
    "is_adaptable",
    "linear_features",
    "merged_layer",
]
