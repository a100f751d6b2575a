"""One test per bug and limit of the original ``xlora`` package that no other test shows us free of.

The package is not on an index and not run here: its last commit is of August 2024. Named after the
numbers of docs/semantics.md, where the rest of the list names its tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny_chat import tiny_chat_xlora, tiny_tokenizer
from tests.tiny_models import tiny_base, tiny_prompt, tiny_xlora, write_experts
from xlora_core.config import Arm, SamplingParams, XLoraConfig
from xlora_core.engine import Engine
from xlora_core.model import XLoraModel
from xlora_core.recording import Run


@pytest.fixture
def model(tmp_path: Path) -> XLoraModel:
    return tiny_xlora(tmp_path, dtype=torch.float64)


def test_x4_every_call_of_its_readme_is_there_and_works(model: XLoraModel) -> None:
    assert model.get_latest_scalings() is None
    assert model.get_use_trainable_adapters() is False
    assert model.get_topk_lora() is None
    model.set_topk_lora(2)
    model.set_global_scaling_weight(0.5)
    model(input_ids=tiny_prompt())
    latest = model.get_latest_scalings()
    assert latest is not None
    assert latest.shape == (2, 9, 14, 3)
    assert (model.get_topk_lora(), model.get_global_scaling_weight()) == (2, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_x4_use_trainable_adapters_may_change_at_any_time(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    # Experts in the base model's dtype, so that freezing does not round them.
    adapters = write_experts(tmp_path, dtype=dtype)

    def made(**settings: bool) -> XLoraModel:
        torch.manual_seed(0)
        return XLoraModel.from_base(
            tiny_base(dtype=dtype), XLoraConfig(adapters=adapters, **settings)
        )

    model = made()
    frozen, all_parameters = model.get_nb_trainable_parameters()
    assert frozen == sum(p.numel() for p in model.classifier.parameters())
    model.set_use_trainable_adapters(True)
    assert model.get_use_trainable_adapters() is model.config_xlora.use_trainable_adapters is True
    experts = [p for layer in model.lora_layers for p in (layer.lora_A, layer.lora_B)]
    n_experts = sum(p.numel() for p in experts)
    assert model.get_nb_trainable_parameters() == (frozen + n_experts, all_parameters)
    # The same model as one that was made so.
    made_so = made(use_trainable_adapters=True)
    prompt = tiny_prompt()
    losses = [m(input_ids=prompt, labels=prompt).loss for m in (model, made_so)]
    assert torch.equal(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    for ours, other in zip(model.lora_layers, made_so.lora_layers, strict=True):
        assert ours.lora_A.dtype == torch.float32
        assert ours.lora_A.grad is not None
        assert other.lora_A.grad is not None
        assert ours.lora_A.grad.abs().max() > 0
        assert torch.equal(ours.lora_A.grad, other.lora_A.grad)
    model.set_use_trainable_adapters(False)
    assert model.get_nb_trainable_parameters() == (frozen, all_parameters)


def test_x4_a_log_with_steps_of_different_lengths_is_kept_on_disk(tmp_path: Path) -> None:
    model = tiny_chat_xlora(tmp_path)
    with Engine(model, tiny_tokenizer()) as engine:
        run = engine.run(
            "the quick brown fox",
            arms=[Arm.routed()],
            sampling=SamplingParams(max_new_tokens=6),
        )
    for path in (tmp_path / "run.safetensors", tmp_path / "no suffix"):
        run.save(path)
        again = Run.load(path)
        assert (again.scalings(arm=0) == run.scalings(arm=0)).all()
        assert again.header.adapter_names == tuple(model.adapter_names)


def test_x14_softmax_over_top_k_is_of_each_token_alone(tmp_path: Path) -> None:
    model = tiny_xlora(
        tmp_path, enable_softmax=False, enable_softmax_topk=True, top_k_lora=2, dtype=torch.float64
    )
    router_logits = model.scaling_pass(input_ids=tiny_prompt()).router_logits
    together = model.route(router_logits)
    torch.testing.assert_close(together.sum(-1), torch.ones(2, 9, 14, dtype=torch.float64))
    for row in range(2):
        for token in range(9):
            alone = model.route(router_logits[row : row + 1, token : token + 1])
            assert torch.equal(alone[0, 0], together[row, token])


def test_x14_buckets_are_of_lengths_not_of_batch_sizes(model: XLoraModel) -> None:
    model.enable_scalings_logging()
    model(input_ids=tiny_prompt(batch=3, length=5))
    model(input_ids=tiny_prompt(batch=2, length=5))
    model(input_ids=tiny_prompt(batch=3, length=4))
    buckets = model.get_bucketed_scalings_log()
    assert {length: positions for length, (positions, _) in buckets.items()} == {5: [0, 1], 4: [2]}


def test_x17_backward_again_and_again_with_the_log_on(tmp_path: Path) -> None:
    """Issues 18 and 30: "Trying to backward through the graph a second time"."""
    model = tiny_xlora(tmp_path).train()
    model.enable_scalings_logging()
    optimizer = torch.optim.SGD(model.classifier.parameters(), lr=0.1)
    prompt = tiny_prompt()
    losses = []
    for _ in range(3):
        loss = model(input_ids=prompt, labels=prompt).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[1] < losses[0]


def test_x17_an_epoch_of_generation_leaves_no_hook_behind(model: XLoraModel) -> None:
    """PEFT issue 1472: hooks that pile up while generating."""
    plain = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in tiny_base().modules())
    for _ in range(2):
        model.generate(input_ids=tiny_prompt(), max_new_tokens=3)
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    assert hooks == plain
