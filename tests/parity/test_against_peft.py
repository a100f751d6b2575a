"""Scalings, logits and gradients against PEFT 0.21.2, the oracle of the numbers.

Tolerances: float64 to 1e-10 (only the order of additions differs); float32 to 1e-5 on logits
of size about 5 (3e-5 where the scaling pass adds its own rounding); bfloat16 see ``test_bfloat16``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import peft
import pytest
import torch

from tests.parity.peft_reference import peft_reference, peft_scalings
from tests.tiny_models import families, tiny_base, tiny_prompt, tiny_xlora, write_lora
from xlora_core.config import XLoraConfig
from xlora_core.model import XLoraModel

# 0.3125 is exact in float32, in which PEFT makes the constant of the scaling pass.
ROUTING: dict[str, Mapping[str, object]] = {
    "softmax": {},
    "softmax, temperature 0.5": {"softmax_temperature": 0.5},
    "softmax, top-k 2": {"top_k_lora": 2},
    "softmax, top-k 1, temperature 3, weight 1.7": {
        "top_k_lora": 1,
        "softmax_temperature": 3.0,
        "global_scaling_weight": 1.7,
    },
    "softmax over top-k 2": {
        "enable_softmax": False,
        "enable_softmax_topk": True,
        "top_k_lora": 2,
    },
    "raw logits": {"enable_softmax": False},
    "raw logits, top-k 2, weight -0.5": {
        "enable_softmax": False,
        "top_k_lora": 2,
        "global_scaling_weight": -0.5,
    },
    "scaling pass at 0.3125": {"scaling_pass_value": 0.3125},
    "scaling pass at 0.3125, top-k 2, weight 0.6": {
        "scaling_pass_value": 0.3125,
        "top_k_lora": 2,
        "global_scaling_weight": 0.6,
    },
    "scaling pass at 0.3125, softmax over top-k 2": {
        "scaling_pass_value": 0.3125,
        "enable_softmax": False,
        "enable_softmax_topk": True,
        "top_k_lora": 2,
    },
}
CLASSIFIERS: dict[str, Mapping[str, object]] = {
    f"{'layerwise' if layerwise else 'shared'}, depth {depth}, dropout {dropout}": {
        "layerwise_scalings": layerwise,
        "xlora_depth": depth,
        "xlora_dropout_p": dropout,
    }
    for layerwise in (True, False)
    for depth, dropout in ((1, 0.2), (2, 0.0), (3, 0.2), (4, 0.2))
}


def test_peft_is_the_version_the_numbers_are_stated_for() -> None:
    assert peft.__version__ == "0.21.2"


def assert_same(model: XLoraModel, family: str, dtype: torch.dtype, atol: float) -> None:
    reference = peft_reference(model, family, dtype)
    prompt = tiny_prompt()
    with torch.no_grad():
        ours = model(input_ids=prompt)
        theirs = reference(input_ids=prompt)
    scalings = model.get_latest_scalings()
    assert scalings is not None
    torch.testing.assert_close(scalings, peft_scalings(reference), atol=atol, rtol=0)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=atol * 3, rtol=0)
    # The comparison means something only where the adapters matter.
    with torch.no_grad():
        base = model.main_pass(scalings=None, input_ids=prompt)
    assert (ours.logits - base.logits).abs().max() > 1000 * atol


@pytest.mark.parametrize("classifier", CLASSIFIERS.values(), ids=CLASSIFIERS.keys())
@pytest.mark.parametrize("routing", ROUTING.values(), ids=ROUTING.keys())
def test_float64_over_the_grid(
    tmp_path: Path, routing: Mapping[str, object], classifier: Mapping[str, object]
) -> None:
    model = tiny_xlora(tmp_path, dtype=torch.float64, **(routing | classifier))  # type: ignore[operator]  # both are dicts
    assert_same(model, "llama", torch.float64, atol=1e-11)


@pytest.mark.parametrize("routing", ROUTING.values(), ids=ROUTING.keys())
def test_float32_over_the_routing_grid(tmp_path: Path, routing: Mapping[str, object]) -> None:
    model = tiny_xlora(tmp_path, xlora_depth=2, **routing)
    assert_same(model, "llama", torch.float32, atol=1e-5)


# PEFT cannot load adapters of GPT-2 and GPT-NeoX ("Got unexpected keys"): their bodies are not
# called "model". test_stacked_layers covers those against plain LoRA.
@pytest.mark.parametrize("family", ["llama", "opt", "gemma", "qwen2"])
def test_float32_over_families(tmp_path: Path, family: str) -> None:
    model = tiny_xlora(tmp_path, family, softmax_temperature=0.7, top_k_lora=2)
    if family == "opt":
        # OPT flattens tokens before its feed-forward part, where PEFT's X-LoRA fails.
        base = tiny_base("opt")
        targets = ("q_proj", "v_proj", "out_proj")
        adapters = {
            str(i): str(write_lora(tmp_path / f"opt-{i}", base, targets, seed=i)) for i in range(3)
        }
        weights = model.classifier.state_dict()
        model = XLoraModel.from_base(
            base, XLoraConfig(adapters=adapters, softmax_temperature=0.7, top_k_lora=2)
        )
        model.classifier.load_state_dict(
            {k: v[: model.classifier.layers[0].weight.shape[0]] for k, v in weights.items()}
        )
    assert_same(model, family, torch.float32, atol=1e-5)


def test_different_ranks_targets_rslora_and_patterns(tmp_path: Path) -> None:
    base = tiny_base(dtype=torch.float64)
    folders = {
        "0": write_lora(tmp_path / "a", base, ("q_proj", "v_proj"), rank=2, seed=1),
        "1": write_lora(
            tmp_path / "b", base, ("v_proj", "down_proj"), rank=6, alpha=3, seed=2,
            config={"use_rslora": True},
        ),
        "2": write_lora(
            tmp_path / "c", base, ("k_proj", "v_proj"), rank=4, seed=3,
            config={"alpha_pattern": {"layers.0.self_attn.v_proj": 24, "k_proj": 2}},
        ),
    }  # fmt: skip
    config = XLoraConfig(
        adapters={k: str(v) for k, v in folders.items()}, layerwise_scalings=True, top_k_lora=2
    )
    model = XLoraModel.from_base(base, config).double()
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(3))
    assert model.present.float().mean() < 1
    assert_same(model, "llama", torch.float64, atol=1e-11)


def test_bfloat16(tmp_path: Path) -> None:
    """PEFT's router computes in bfloat16 (8 bits of mantissa), ours in float32.

    So the scalings agree to 0.03 and the logits, of size about 5, to 0.5; and ours are nearer
    to the float32 model's than PEFT's are.
    """
    exact = tiny_xlora(tmp_path, dtype=torch.float32)
    model = tiny_xlora(tmp_path, dtype=torch.bfloat16)
    reference = peft_reference(model, "llama", torch.bfloat16)
    prompt = tiny_prompt(batch=8, length=20)
    with torch.no_grad():
        ours = model(input_ids=prompt).logits.float()
        theirs = reference(input_ids=prompt).logits.float()
        true = exact(input_ids=prompt).logits
    scalings, peft_s = model.get_latest_scalings(), peft_scalings(reference).float()
    true_s = exact.get_latest_scalings()
    assert scalings is not None
    assert true_s is not None
    assert scalings.dtype == torch.float32
    torch.testing.assert_close(scalings, peft_s, atol=0.03, rtol=0)
    torch.testing.assert_close(ours, theirs, atol=0.5, rtol=0)
    assert (scalings - true_s).abs().mean() <= (peft_s - true_s).abs().mean()
    assert (ours - true).abs().mean() <= 1.1 * (theirs - true).abs().mean()


@pytest.mark.parametrize("layerwise", [True, False])
def test_classifier_gradients(tmp_path: Path, layerwise: bool) -> None:
    model = tiny_xlora(
        tmp_path, dtype=torch.float64, xlora_depth=2, layerwise_scalings=layerwise, top_k_lora=2
    )
    reference = peft_reference(model, "llama", torch.float64)
    prompt = tiny_prompt()
    model(input_ids=prompt, labels=prompt).loss.backward()
    reference(input_ids=prompt, labels=prompt).loss.backward()
    theirs = dict(reference.base_model.internal_xlora_classifier.named_parameters())
    for name, parameter in model.classifier.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-6
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-11, rtol=1e-8)


def test_trainable_adapters_get_the_same_gradients(tmp_path: Path) -> None:
    model = tiny_xlora(tmp_path, dtype=torch.float64, use_trainable_adapters=True)
    reference = peft_reference(model, "llama", torch.float64)
    prompt = tiny_prompt()
    model(input_ids=prompt, labels=prompt).loss.backward()
    reference(input_ids=prompt, labels=prompt).loss.backward()
    path = model.lora_layer_names[0]
    theirs = dict(reference.named_modules())[f"base_model.lora_model.model.{path}"]
    grad = model.lora_layers[0].lora_A.grad
    assert grad is not None
    for k, block in enumerate(grad.split(model.lora_layers[0].ranks)):
        torch.testing.assert_close(block, theirs.lora_A[str(k)].weight.grad, atol=1e-9, rtol=1e-6)


def test_cached_generation_against_pefts_uncached_one(tmp_path: Path) -> None:
    """The same greedy tokens, and the same scalings log, bucket by bucket."""
    model = tiny_xlora(tmp_path, dtype=torch.float64, softmax_temperature=0.7, top_k_lora=2)
    reference = peft_reference(model, "llama", torch.float64)
    prompt = tiny_prompt()
    arguments = {
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
    }
    model.enable_scalings_logging()
    reference.enable_scalings_logging()
    assert torch.equal(model.generate(**arguments), reference.generate(**arguments))
    ours, theirs = model.get_bucketed_scalings_log(), reference.get_bucketed_scalings_log()
    assert list(ours) == list(theirs) == list(range(9, 21))
    for length, (positions, tensors) in theirs.items():
        assert ours[length][0] == positions
        for own, their in zip(ours[length][1], tensors, strict=True):
            torch.testing.assert_close(own, their, atol=1e-11, rtol=0)


def test_left_padding(tmp_path: Path) -> None:
    model = tiny_xlora(tmp_path, dtype=torch.float64)
    reference = peft_reference(model, "llama", torch.float64)
    prompt = tiny_prompt()
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": prompt, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        torch.testing.assert_close(
            model(**inputs).logits, reference(**inputs).logits, atol=1e-10, rtol=0
        )


def test_every_family_is_a_family_here() -> None:
    assert set(families()) == {"llama", "gpt2", "opt", "gemma", "qwen2", "gpt_neox"}
