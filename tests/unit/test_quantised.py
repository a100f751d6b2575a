"""Quantised bases: the experts stand on any linear-like layer and never look at its weight.

bitsandbytes' 8- and 4-bit layers run on a CPU; layers of GPTQ are stood in for by one of their
shape: integers that are packed, sizes under GPTQ's names, no ``nn.Linear`` at all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.tiny_models import VOCAB_SIZE, families, tiny_prompt, write_lora
from xlora_core.config import XLoraConfig
from xlora_core.layers import XLoraLinear
from xlora_core.model import XLoraModel

K = 3


class PackedLinear(nn.Module):
    """A linear layer as GPTQ keeps it: eight 4-bit numbers in an int32, a scale per output."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 7
        levels = (linear.weight.detach() / scale).round().to(torch.int64) + 8
        packed = sum(levels[:, i::8] << (4 * i) for i in range(8))
        packed = torch.where(packed >= 2**31, packed - 2**32, packed)
        self.register_buffer("qweight", packed.to(torch.int32))
        self.register_buffer("scales", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        levels = torch.stack([(self.qweight >> (4 * i)) & 15 for i in range(8)], dim=-1)
        weight = (levels.flatten(1).to(x.dtype) - 8) * self.scales.to(x.dtype)
        return F.linear(x, weight, self.bias)


def eight_bit(linear: nn.Linear) -> nn.Module:
    layer = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def four_bit(linear: nn.Linear) -> nn.Module:
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        compute_dtype=torch.float32,
        quant_type="nf4",
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


Quantise = Callable[[nn.Linear], nn.Module]
KINDS: dict[str, Quantise] = {
    "bitsandbytes, 8 bits": eight_bit,
    "bitsandbytes, 4 bits": four_bit,
    "packed like GPTQ": PackedLinear,
}


def base_model() -> PreTrainedModel:
    """Sizes are multiples of 64, the block in which bitsandbytes keeps 4-bit weights."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.2)
    return model.eval()


def plain_xlora(tmp_path: Path, **config: object) -> XLoraModel:
    targets = families()["llama"].targets
    adapters = {
        f"e{k}": str(write_lora(tmp_path / f"e{k}", base_model(), targets, seed=k))
        for k in range(K)
    }
    model = XLoraModel.from_base(
        base_model(),
        XLoraConfig(adapters=adapters, layerwise_scalings=True, **config),  # type: ignore[arg-type]  # config is XLoraConfig's
    )
    torch.manual_seed(7)
    torch.nn.init.normal_(model.classifier.layers[-1].weight, 0, 0.3)
    return model.eval()


def quantised_base(quantise: Quantise) -> PreTrainedModel:
    base = base_model()
    for path, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            base.set_submodule(path, quantise(module))
    return base.eval()


def quantised_xlora(tmp_path: Path, quantise: Quantise, **config: object) -> XLoraModel:
    """Returns the model of ``plain_xlora``, experts and classifier alike, on a quantised base."""
    whole = plain_xlora(tmp_path, **config)
    model = XLoraModel.from_base(quantised_base(quantise), whole.config_xlora)
    model.classifier.load_state_dict(whole.classifier.state_dict())
    return model.eval()


def without_experts(model: XLoraModel, scalings: Tensor, ids: Tensor) -> Tensor:
    """Logits of an independent mixture: hooks on the quantised modules, one expert at a time."""
    base = copy.deepcopy(model.base_model)
    for path, layer in list(base.named_modules()):
        if not isinstance(layer, XLoraLinear):
            continue
        inner, experts, index = layer.base_layer, layer.experts(), layer.layer_index

        def add(_: object, args: tuple[Tensor], y: Tensor, e=experts, i=index) -> Tensor:
            for k, w in e.items():
                delta = F.linear(F.linear(args[0].float(), w.lora_A), w.lora_B)
                y = y + scalings[:, :, i, k, None] * w.lora_scaling * delta
            return y

        inner.register_forward_hook(add)
        base.set_submodule(path, inner)
    with torch.no_grad():
        logits: Tensor = base(input_ids=ids).logits
    return logits


@pytest.mark.parametrize("quantise", KINDS.values(), ids=KINDS)
def test_the_mixture_stands_on_the_quantised_layer(tmp_path: Path, quantise: Quantise) -> None:
    model, ids = quantised_xlora(tmp_path, quantise, top_k_lora=2), tiny_prompt()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        scalings = model.route(model.scaling_pass(input_ids=ids).router_logits)
        base = quantised_base(quantise)(input_ids=ids).logits
    expected = without_experts(model, scalings, ids)
    # 8 bits round activations, too: the last bit of a sum may move one by a whole step.
    assert (logits - expected).abs().mean() < (1e-2 if quantise is eight_bit else 1e-5)
    assert (logits - base).abs().mean() > 0.1


@pytest.mark.parametrize("quantise", KINDS.values(), ids=KINDS)
def test_experts_stay_in_floating_point(tmp_path: Path, quantise: Quantise) -> None:
    model = quantised_xlora(tmp_path, quantise)
    for layer in model.lora_layers:
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
        assert not isinstance(layer.base_layer, nn.Linear) or not (
            layer.base_layer.weight.is_floating_point()
        )
    assert model.classifier.dtype == torch.float32


@pytest.mark.parametrize("quantise", KINDS.values(), ids=KINDS)
def test_generate_is_cached_and_the_same(tmp_path: Path, quantise: Quantise) -> None:
    model, ids = quantised_xlora(tmp_path, quantise), tiny_prompt(batch=1)
    options = {"max_new_tokens": 6, "do_sample": False}
    cached = model.generate(input_ids=ids, **options)
    assert cached.shape == (1, 15)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **options))


@pytest.mark.parametrize("quantise", KINDS.values(), ids=KINDS)
def test_the_classifier_learns(tmp_path: Path, quantise: Quantise) -> None:
    model, ids = quantised_xlora(tmp_path, quantise), tiny_prompt()
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for p in model.classifier.parameters()]
    assert all(g is not None and g.abs().max() > 1e-6 for g in gradients)


@pytest.mark.parametrize("quantise", KINDS.values(), ids=KINDS)
def test_merging_makes_plain_layers(tmp_path: Path, quantise: Quantise) -> None:
    model, ids = quantised_xlora(tmp_path, quantise), tiny_prompt()
    with torch.no_grad():
        constant = model.main_pass(input_ids=ids, scalings=torch.full((K,), 1 / K)).logits
        merged = model.merge_and_unload()
        found = merged(input_ids=ids).logits
    assert type(merged.get_submodule("model.layers.0.self_attn.q_proj")) is nn.Linear
    # bitsandbytes computes with rounded activations and in bfloat16, which a plain layer does not.
    tolerance = 1e-5 if quantise is PackedLinear else 0.03
    assert (found - constant).abs().mean() < tolerance * constant.std()


@pytest.mark.parametrize("quantise", KINDS.values(), ids=KINDS)
def test_a_checkpoint_is_not_bound_to_a_quantisation(tmp_path: Path, quantise: Quantise) -> None:
    model, ids = quantised_xlora(tmp_path / "a", quantise), tiny_prompt()
    model.save_pretrained(tmp_path / "saved")
    again = XLoraModel.from_pretrained(quantised_base(quantise), tmp_path / "saved").eval()
    plain = XLoraModel.from_pretrained(base_model(), tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
        whole = plain_xlora(tmp_path / "b")
        torch.testing.assert_close(plain(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_half_precision_parts_beside_a_quantised_base(tmp_path: Path) -> None:
    whole = plain_xlora(tmp_path)
    base = quantised_base(eight_bit).to(torch.bfloat16)
    model = XLoraModel.from_base(base, XLoraConfig(adapters=whole.config_xlora.adapters))
    assert {layer.lora_A.dtype for layer in model.lora_layers} == {torch.bfloat16}
    with torch.no_grad():
        assert model(input_ids=tiny_prompt()).logits.dtype == torch.bfloat16
