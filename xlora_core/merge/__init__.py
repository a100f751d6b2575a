"""Merging: a constant mixture of the experts, baked into plain layers or into one LoRA."""

from xlora_core.merge.plain import merge_layers
from xlora_core.merge.single_lora import SingleLora, single_lora
from xlora_core.merge.weights import MergeWeights, NamedWeights, weight_matrix

__all__ = [
    "MergeWeights",
    "NamedWeights",
    "SingleLora",
    "merge_layers",
    "single_lora",
    "weight_matrix",
]
