"""Gradient checkpointing changes nothing but memory; PEFT's X-LoRA fails with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.gradients import backward, trainable
from tests.tiny_models import families, tiny_prompt, tiny_xlora
from xlora_core.errors import ModelError
from xlora_core.model import XLoraModel

FAMILIES = sorted(families())
NEAR = {"atol": 1e-10, "rtol": 1e-8}


def enable(model: XLoraModel, use_reentrant: bool) -> None:
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})


def counted(model: XLoraModel) -> list[bool]:
    """Notes every call of the first adapted module."""
    calls: list[bool] = []
    model.lora_layers[0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    return calls


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("trains_adapters", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_loss_and_no_gradient(
    tmp_path: Path, family: str, trains_adapters: bool, use_reentrant: bool
) -> None:
    model = tiny_xlora(
        tmp_path, family, dtype=torch.float64, use_trainable_adapters=trains_adapters
    ).train()
    ids = tiny_prompt()
    loss, gradients = backward(model, ids)
    assert all(gradient.abs().max() > 1e-8 for gradient in gradients.values())
    enable(model, use_reentrant)
    calls = counted(model)
    checkpointed_loss, checkpointed = backward(model, ids)
    # Scaling pass without a graph, main pass, and once more inside backward: it recomputed.
    assert len(calls) == 3
    assert calls[0] is False
    assert checkpointed_loss == pytest.approx(loss, abs=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed[name], gradient, **NEAR)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_two_forward_calls_before_one_backward(tmp_path: Path, use_reentrant: bool) -> None:
    """Each recomputation must run with the scalings of its own call."""
    model = tiny_xlora(tmp_path, dtype=torch.float64, use_trainable_adapters=True).train()
    prompts = (tiny_prompt(), tiny_prompt(seed=1, batch=1, length=5))
    loss, gradients = backward(model, *prompts)
    enable(model, use_reentrant)
    checkpointed_loss, checkpointed = backward(model, *prompts)
    assert checkpointed_loss == pytest.approx(loss, abs=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed[name], gradient, **NEAR)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_an_inference_call_between_forward_and_backward_disturbs_nothing(
    tmp_path: Path, use_reentrant: bool
) -> None:
    model = tiny_xlora(tmp_path, dtype=torch.float64).train()
    ids = tiny_prompt()
    _, gradients = backward(model, ids)
    enable(model, use_reentrant)
    loss = model(input_ids=ids, labels=ids).loss
    with torch.no_grad():
        model(input_ids=tiny_prompt(seed=4))
    loss.backward()
    for name, parameter in trainable(model).items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradients[name], **NEAR)


@pytest.mark.parametrize(
    "enable_on",
    [
        lambda model: model.base_model.activation_checkpointing_enable({"use_reentrant": True}),
        lambda model: model.gradient_checkpointing_enable({"use_reentrant": True}),
        lambda model: model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": True}
        ),
    ],
    ids=["base model", "old name", "old name and argument"],
)
def test_other_ways_to_turn_it_on(tmp_path: Path, enable_on: Callable[[XLoraModel], None]) -> None:
    model = tiny_xlora(tmp_path, dtype=torch.float64).train()
    ids = tiny_prompt()
    _, gradients = backward(model, ids)
    enable_on(model)
    calls = counted(model)
    _, checkpointed = backward(model, ids)
    assert len(calls) == 3
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed[name], gradient, **NEAR)


def test_experts_train_under_constant_scalings_too(tmp_path: Path) -> None:
    """As when one expert is trained alone; no scaling carries a gradient then."""
    model = tiny_xlora(tmp_path, dtype=torch.float64, use_trainable_adapters=True).train()
    ids, alone = tiny_prompt(), torch.tensor([0.0, 1.0, 0.0])
    gradients = []
    for checkpointing in (None, True, False):
        if checkpointing is not None:
            enable(model, checkpointing)
        model.main_pass(input_ids=ids, labels=ids, scalings=alone).loss.backward()
        grad = model.lora_layers[0].lora_B.grad
        assert grad is not None
        gradients.append(grad.clone())
        model.zero_grad()
    assert gradients[0].abs().max() > 1e-8
    torch.testing.assert_close(gradients[1], gradients[0], **NEAR)
    torch.testing.assert_close(gradients[2], gradients[0], **NEAR)


def test_after_merging_another_model_on_the_same_base_still_learns(tmp_path: Path) -> None:
    """The checkpoint function stays on the base; it must follow the newest model's scalings."""
    first = tiny_xlora(tmp_path, dtype=torch.float64)
    enable(first, True)
    base = first.merge_and_unload()
    second = XLoraModel.from_base(base, first.config_xlora).train()
    ids = tiny_prompt()
    _, checkpointed = backward(second, ids)
    base.activation_checkpointing_disable()
    _, gradients = backward(second, ids)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 1e-8
        torch.testing.assert_close(checkpointed[name], gradient, **NEAR)


def test_a_merged_model_still_checkpoints(tmp_path: Path) -> None:
    model = tiny_xlora(tmp_path)
    enable(model, False)
    path = model.lora_layer_names[0]
    merged = model.merge_and_unload().train().requires_grad_(True)
    calls: list[bool] = []
    merged.get_submodule(path).register_forward_hook(lambda *_: calls.append(True))
    ids = tiny_prompt()
    merged(input_ids=ids, labels=ids).loss.backward()
    assert len(calls) == 2


@torch.no_grad()
def test_generation_and_checkpointing(tmp_path: Path) -> None:
    """In training mode the layers drop the cache: a plain model then writes nonsense."""
    model = tiny_xlora(tmp_path, dtype=torch.float64)
    ids, greedy = tiny_prompt(), {"max_new_tokens": 4, "do_sample": False}
    tokens = model.generate(input_ids=ids, **greedy)
    enable(model, False)
    assert torch.equal(model.generate(input_ids=ids, **greedy), tokens)
    model.train()
    with pytest.raises(ModelError) as caught:
        model.generate(input_ids=ids, **greedy)
    assert caught.value.message == "gradient checkpointing in training mode keeps no cache"
    assert caught.value.hint == ("call model.eval() before generating, or pass use_cache=False")
    assert torch.equal(model.generate(input_ids=ids, use_cache=False, **greedy), tokens)
