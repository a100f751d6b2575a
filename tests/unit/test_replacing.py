"""Putting adapted modules into a model: their order, and adapters that do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.tiny_models import tiny_base
from xlora_core.adapters import LoraAdapter, LoraWeights, SavedModule
from xlora_core.errors import AdapterError
from xlora_core.layers import ActiveScalings, linear_features, merged_layer
from xlora_core.replacing import replace_adapted_modules

FIRST, LAST = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def adapter(name: str, modules: Mapping[str, tuple[int, int]]) -> LoraAdapter:
    """An adapter of rank 2 on modules given as path -> (out, in)."""
    return LoraAdapter(
        name=name,
        config={},
        modules={
            path: LoraWeights(
                lora_A=torch.ones(2, n_in), lora_B=torch.ones(n_out, 2), lora_scaling=1.0
            )
            for path, (n_out, n_in) in modules.items()
        },
        dtype=torch.float32,
    )


def refusal(model: nn.Module, *adapters: LoraAdapter) -> AdapterError:
    """Returns the error of replacing; the model must be as it was."""
    before = dict(model.named_modules())
    with pytest.raises(AdapterError) as caught:
        replace_adapted_modules(model, adapters, ActiveScalings())
    assert dict(model.named_modules()) == before
    return caught.value


def test_modules_are_numbered_in_the_models_order_not_the_adapters() -> None:
    model = tiny_base()
    layers = replace_adapted_modules(
        model,
        [adapter("a", {LAST: (32, 48)}), adapter("b", {LAST: (32, 48), FIRST: (32, 32)})],
        ActiveScalings(),
    )
    assert list(layers) == [FIRST, LAST]
    assert [layer.layer_index for layer in layers.values()] == [0, 1]
    assert [layer.adapter_indices for layer in layers.values()] == [[1], [0, 1]]
    assert model.get_submodule(LAST) is layers[LAST]
    assert isinstance(layers[LAST].base_layer, nn.Linear)


def test_a_module_the_architecture_does_not_have() -> None:
    error = refusal(
        tiny_base(), adapter("a", {FIRST: (32, 32)}), adapter("b", {"transformer.h.0": (32, 32)})
    )
    assert error.message == (
        "adapter 'b', module transformer.h.0: LlamaForCausalLM has no such module; the adapter "
        "was trained for another architecture"
    )
    assert error.hint == "load the base model the adapter was trained on"


def test_a_module_of_another_size() -> None:
    error = refusal(tiny_base(), adapter("a", {FIRST: (32, 32), LAST: (64, 96)}))
    assert error.message == (
        f"adapter 'a', module {LAST}: expected lora_A [2, 48] and lora_B [32, 2], "
        "found [2, 96] and [64, 2]"
    )
    assert error.hint == "the adapter was trained on a base model of another size"


def test_a_module_that_cannot_carry_experts() -> None:
    error = refusal(tiny_base(), adapter("a", {"model.norm": (32, 32)}))
    assert error.message == (
        "adapter 'a', module model.norm: a module of class LlamaRMSNorm cannot carry "
        "experts, expected a linear layer, Conv1D, Embedding or Conv2d"
    )
    assert error.hint == "leave it out of the adapters' target_modules"


def test_weights_of_another_kind_than_the_module() -> None:
    error = refusal(tiny_base(), adapter("a", {"model.embed_tokens": (32, 97)}))
    assert error.message == (
        "adapter 'a', module model.embed_tokens: the module is of class Embedding, the adapter "
        "has no embedding's weights for it"
    )


def test_a_whole_module_whose_base_is_not_in_memory() -> None:
    """The weights of an offloaded base rest on ``meta`` until a layer runs."""
    model = tiny_base()
    model.lm_head.to("meta")
    head = SavedModule(weight=torch.zeros(97, 32))
    whole = replace(adapter("math", {FIRST: (32, 32)}), saved_modules={"lm_head": head})
    assert "adapter 'math', module lm_head: " in refusal(model, whole).message


def test_a_module_that_carries_experts_already() -> None:
    model = tiny_base()
    replace_adapted_modules(model, [adapter("a", {FIRST: (32, 32)})], ActiveScalings())
    error = refusal(model, adapter("b", {FIRST: (32, 32)}))
    assert error.message == (f"adapter 'b', module {FIRST}: the module carries experts already")
    assert error.hint == "load a fresh base model for every XLoraModel"


def test_sizes_of_linear_like_layers() -> None:
    assert linear_features(nn.Linear(6, 5)) == linear_features(Conv1D(5, 6)) == (5, 6)


def test_a_merged_layer_keeps_training_mode() -> None:
    layer, delta = nn.Linear(6, 5).eval(), torch.zeros(5, 6)
    assert not merged_layer(layer, delta).training
    assert merged_layer(layer.train(), delta).training
