"""One test per bug and limit of the original ``xlora`` package that no other test shows us free of.

The package is not on an index and not run here: its last commit is of August 2024. Named after the
numbers of docs/semantics.md, where the rest of the list names its tests.
"""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

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


def test_d8_a_log_with_steps_of_different_lengths_is_kept_on_disk(tmp_path: Path) -> None:
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


def test_d4_softmax_over_top_k_is_of_each_token_alone(tmp_path: Path) -> None:
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


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers", "ignore:.*tie_word_embeddings")
@torch.no_grad()
def test_d5_embedding_adapters_are_gated_after_the_lookup(tmp_path: Path) -> None:
    """The package multiplies token ids by scalings. PEFT, right since 0.18, is the reference."""
    adapters = {}
    for i in range(3):
        torch.manual_seed(i)
        lora = peft.LoraConfig(
            task_type="CAUSAL_LM",
            target_modules=["embed_tokens", "v_proj"],
            init_lora_weights=False,
        )
        peft.get_peft_model(gemma3(), lora).save_pretrained(tmp_path / str(i))
        adapters[str(i)] = str(tmp_path / str(i))
    model = XLoraModel.from_base(gemma3(), XLoraConfig(adapters=adapters, layerwise_scalings=True))
    model.classifier.layers[0].weight.normal_(0, 0.5)
    base = gemma3()
    base.config.use_cache = False
    reference = peft.get_peft_model(
        base,
        peft.XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=32, adapters=adapters, layerwise_scalings=True
        ),
    ).eval()
    reference.base_model.internal_xlora_classifier.load_state_dict(model.classifier.state_dict())
    prompt = tiny_prompt()
    ours, theirs = (m(input_ids=prompt).logits for m in (model.eval(), reference))
    assert (ours - gemma3()(input_ids=prompt).logits).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


def gemma3() -> Gemma3ForCausalLM:
    """Returns a tiny model that scales its embeddings, the same at every call, in float64."""
    config = Gemma3TextConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Gemma3ForCausalLM(config).double().eval()


def test_d7_buckets_are_of_lengths_not_of_batch_sizes(model: XLoraModel) -> None:
    model.enable_scalings_logging()
    model(input_ids=tiny_prompt(batch=3, length=5))
    model(input_ids=tiny_prompt(batch=2, length=5))
    model(input_ids=tiny_prompt(batch=3, length=4))
    buckets = model.get_bucketed_scalings_log()
    assert {length: positions for length, (positions, _) in buckets.items()} == {5: [0, 1], 4: [2]}


def test_u1_backward_again_and_again_with_the_log_on(tmp_path: Path) -> None:
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


def test_u6_an_epoch_of_generation_leaves_no_hook_behind(model: XLoraModel) -> None:
    """PEFT issue 1472: hooks that pile up while generating."""
    plain = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in tiny_base().modules())
    for _ in range(2):
        model.generate(input_ids=tiny_prompt(), max_new_tokens=3)
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    assert hooks == plain
