"""PEFT's X-LoRA over the same base, experts and classifier weights as a model of ours."""

from __future__ import annotations

import dataclasses

import torch
from peft import XLoraConfig as PeftXLoraConfig
from peft import get_peft_model
from torch import Tensor

from tests.tiny_models import tiny_base
from xlora_core.model import XLoraModel


def peft_reference(model: XLoraModel, family: str, dtype: torch.dtype) -> torch.nn.Module:
    """Returns PEFT's model with the classifier weights of ours, copied in memory.

    In memory, because PEFT's ``save_pretrained`` loses classifier layers since 0.20.
    The experts must be named "0", "1", ...: PEFT fails with any other name.
    """
    config = model.config_xlora
    base = tiny_base(family, dtype=dtype)
    base.config.use_cache = False
    known = {field.name for field in dataclasses.fields(PeftXLoraConfig)}
    fields = {name: value for name, value in config.to_dict().items() if name in known}
    # XLoraConfig of PEFT changes the dict it is given, and would share ours.
    fields["adapters"] = dict(config.adapters)
    reference = get_peft_model(base, PeftXLoraConfig(task_type="CAUSAL_LM", **fields))
    classifier = reference.base_model.internal_xlora_classifier
    classifier.load_state_dict(
        {f"layers.{k}" if not k.startswith("layers.") else k: v for k, v in state(model).items()}
    )
    return reference.eval()


def state(model: XLoraModel) -> dict[str, Tensor]:
    """Returns the classifier's tensors."""
    return {k: v.detach().clone() for k, v in model.classifier.state_dict().items()}


def peft_scalings(reference: torch.nn.Module) -> Tensor:
    """Returns the scalings ``[B, T, L, K]`` of PEFT's last forward call."""
    return reference.base_model.internal_xlora_scalings.detach()
