"""Adapters for one layer of any PyTorch model, without a language model around them.

``LoraLayerAdapter`` puts one low-rank pair on a layer, ``XLoraLayerAdapter`` puts several there
and a gate that mixes them by the layer's own input. Both are plain modules: they nest, compile,
export, and save through ``state_dict``.
"""

from xlora_core.layer_adapters.diagnostics import ExpertDiagnostics, LayerAdapterDiagnostics
from xlora_core.layer_adapters.lora import LoraLayerAdapter
from xlora_core.layer_adapters.low_rank import LowRankPair
from xlora_core.layer_adapters.xlora import XLoraLayerAdapter

__all__ = [
    "ExpertDiagnostics",
    "LayerAdapterDiagnostics",
    "LoraLayerAdapter",
    "LowRankPair",
    "XLoraLayerAdapter",
]
