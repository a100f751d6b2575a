"""What a checkpoint holds, whatever layout it is kept in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import Tensor

from xlora_core.adapters import LoraAdapter
from xlora_core.config import XLoraConfig


class Layout(StrEnum):
    """How a checkpoint is kept in a folder."""

    OURS = "ours"
    PEFT = "peft"
    ORIGINAL = "original"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint folder holds.

    Attributes:
        config: The X-LoRA config; its adapter paths point to where the experts were read.
        classifier: The router's tensors by name: ``layers.<i>.weight`` and ``.bias`` of a
            classifier, ``gates.<module>.weight`` and ``.bias`` of a per-layer router.
        adapters: The experts in the classifier's output order.
        layer_names: Adapted module paths in the classifier's output order; None where the layout
            does not store them, then it is the base model's own order.
        base: Identity of the base model, such as ``model_type`` and ``hidden_size``; None where
            the layout does not store it.
        layout: The layout it was read from.
        notes: What reading it took, one sentence each, such as what was rescued.
    """

    config: XLoraConfig
    classifier: Mapping[str, Tensor]
    adapters: Sequence[LoraAdapter]
    layer_names: Sequence[str] | None
    base: Mapping[str, Any] | None
    layout: Layout = Layout.OURS
    notes: Sequence[str] = ()


def base_identity(config: Any) -> dict[str, Any]:
    """Returns what tells one base model's shape from another's.

    Args:
        config: The Hugging Face config.
    """
    text = config.get_text_config()
    return {
        "model_type": config.model_type,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "vocab_size": getattr(text, "vocab_size", None),  # models of images have none
    }


def base_model_name(adapters: Sequence[LoraAdapter]) -> str | None:
    """Returns the base model's name that all experts' configs agree on, or None."""
    names = {adapter.config.get("base_model_name_or_path") for adapter in adapters}
    name = names.pop() if len(names) == 1 else None
    return name if isinstance(name, str) and name else None
