"""The model: making one, its passes, its setters, what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, OPTConfig

from tests.gradients import backward, trainable
from tests.tiny_models import (
    families,
    tiny_base,
    tiny_prompt,
    tiny_xlora,
    write_experts,
    write_lora,
)
from xlora_core.adapters import read_adapter
from xlora_core.config import RoutingKnobs, XLoraConfig
from xlora_core.errors import AdapterError, ConfigError
from xlora_core.layers import XLoraLinear
from xlora_core.model import XLoraModel

NEAR = {"atol": 1e-10, "rtol": 0}


@pytest.fixture
def model(tmp_path: Path) -> XLoraModel:
    return tiny_xlora(tmp_path, dtype=torch.float64)


# ---------------------------------------------------------------- making one


def test_zero_adapters() -> None:
    with pytest.raises(AdapterError) as caught:
        XLoraModel.from_base(tiny_base(), XLoraConfig())
    assert caught.value.message == "an X-LoRA model needs at least one adapter, got none"
    assert 'XLoraConfig(adapters={"math": "path/to/lora"})' in caught.value.hint


def test_two_adapters_with_one_name(tmp_path: Path) -> None:
    folder = write_lora(tmp_path, tiny_base(), ("q_proj",))
    with pytest.raises(ConfigError, match="two adapters are named 'math', names must differ"):
        XLoraConfig(adapters=[("math", str(folder)), ("math", str(folder))])
    twice = [read_adapter("math", folder)] * 2
    with pytest.raises(AdapterError, match="adapter names must differ, got 'math', 'math'"):
        XLoraModel(tiny_base(), XLoraConfig(), twice)


def test_adapters_of_another_architecture(tmp_path: Path) -> None:
    folder = write_lora(tmp_path, tiny_base("gpt2"), ("c_attn",))
    with pytest.raises(AdapterError) as caught:
        XLoraModel.from_base(tiny_base(), XLoraConfig(adapters={"a": str(folder)}))
    assert caught.value.message == (
        "adapter 'a', module transformer.h.0.attn.c_attn: LlamaForCausalLM has no such module; "
        "the adapter was trained for another architecture"
    )


def test_adapters_of_another_hidden_size(tmp_path: Path) -> None:
    wide = families()["llama"].config
    wide.hidden_size = 64
    folder = write_lora(tmp_path, AutoModelForCausalLM.from_config(wide), ("v_proj",), rank=3)
    with pytest.raises(AdapterError) as caught:
        XLoraModel.from_base(tiny_base(), XLoraConfig(adapters={"a": str(folder)}))
    assert caught.value.message == (
        "adapter 'a', module model.layers.0.self_attn.v_proj: expected lora_A [3, 32] and "
        "lora_B [16, 3], found [3, 64] and [16, 3]"
    )


def test_nan_in_an_adapter(tmp_path: Path) -> None:
    folder = write_lora(tmp_path, tiny_base(), ("q_proj",))
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="adapter 'a': .* holds NaN or infinite values"):
        XLoraModel.from_base(tiny_base(), XLoraConfig(adapters={"a": str(folder)}))


def test_a_base_model_survives_what_does_not_fit(tmp_path: Path) -> None:
    base, good = tiny_base(), write_lora(tmp_path / "good", tiny_base(), ("q_proj",))
    bad = write_lora(tmp_path / "bad", tiny_base("gpt2"), ("c_attn",))
    logits = base(input_ids=tiny_prompt()).logits
    with pytest.raises(AdapterError):
        XLoraModel.from_base(base, XLoraConfig(adapters={"good": str(good), "bad": str(bad)}))
    assert not any(isinstance(module, XLoraLinear) for module in base.modules())
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert torch.equal(base(input_ids=tiny_prompt()).logits, logits)
    XLoraModel.from_base(base, XLoraConfig(adapters={"good": str(good)}))


def test_hidden_size_is_taken_from_the_model_or_checked(tmp_path: Path) -> None:
    adapters = write_experts(tmp_path, n_adapters=1)
    taken = XLoraModel.from_base(tiny_base(), XLoraConfig(adapters=adapters))
    assert taken.config_xlora.hidden_size == 32
    with pytest.raises(ConfigError) as caught:
        XLoraModel.from_base(tiny_base(), XLoraConfig(adapters=adapters, hidden_size=64))
    assert caught.value.message == "hidden_size is 64, LlamaForCausalLM has 32"
    assert caught.value.hint == "leave hidden_size out to take it from the model"


def test_a_head_narrower_than_the_hidden_size(tmp_path: Path) -> None:
    """OPT-350m projects its output to ``word_embed_proj_dim``."""
    config = families()["opt"].config
    assert isinstance(config, OPTConfig)
    config.word_embed_proj_dim = 16
    base = AutoModelForCausalLM.from_config(config)
    folder = write_lora(tmp_path, base, ("q_proj",))
    model = XLoraModel.from_base(base, XLoraConfig(adapters={"a": str(folder)}))
    assert model.config_xlora.hidden_size == 16
    assert model(input_ids=tiny_prompt()).logits.shape == (2, 9, 97)


def test_adapters_with_different_ranks_and_targets_mix(tmp_path: Path) -> None:
    base = tiny_base(dtype=torch.float64)
    a = write_lora(tmp_path / "a", base, ("q_proj", "v_proj"), rank=2)
    b = write_lora(tmp_path / "b", base, ("v_proj", "down_proj"), rank=5)
    model = XLoraModel.from_base(base, XLoraConfig(adapters={"a b": str(a), "ü/..": str(b)}))
    assert model.adapter_names == ["a b", "ü/.."]
    assert model.lora_layer_names == [
        f"model.layers.{i}.{path}"
        for i in (0, 1)
        for path in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    ]
    assert model.present.tolist() == [[True, False], [True, True], [False, True]] * 2
    assert [layer.ranks for layer in model.lora_layers[:3]] == [[2], [2, 5], [5]]
    # The absent adapter still takes its share of the softmax.
    model(input_ids=tiny_prompt())
    scalings = model.get_latest_scalings()
    assert scalings is not None
    torch.testing.assert_close(scalings.sum(-1), torch.ones_like(scalings[..., 0]))
    assert (scalings[..., 0, 1] > 0.01).all()


def test_what_it_does_not_have_itself_is_the_base_models(model: XLoraModel) -> None:
    assert model.config is model.base_model.config
    assert model.device == torch.device("cpu")
    assert model.context_length == 128
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        model.nothing_of_the_kind  # noqa: B018  # the access is the test


def test_a_deep_copy_is_its_own_model(model: XLoraModel) -> None:
    ids = tiny_prompt()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        other = copy.deepcopy(model)
        assert torch.equal(other(input_ids=ids).logits, before)
        other.lora_layers[0].lora_B.zero_()
        other.set_topk_lora(1)
        assert not torch.equal(other(input_ids=ids).logits, before)
        assert torch.equal(model(input_ids=ids).logits, before)


# ---------------------------------------------------------------- the log


def test_latest_scalings_and_the_log(model: XLoraModel) -> None:
    assert model.get_latest_scalings() is None
    ids = tiny_prompt()
    model(input_ids=ids)
    assert model.get_scalings_log() == []
    model.enable_scalings_logging()
    model(input_ids=ids, labels=ids)
    model(input_ids=ids[:, :4], knobs=RoutingKnobs(top_k=1, global_weight=0.0))
    model.disable_scalings_logging()
    model(input_ids=ids[:1])
    log = model.get_scalings_log()
    assert [tuple(t.shape) for t in log] == [(2, 9, 14, 3), (2, 4, 14, 3)]
    assert not any(t.requires_grad for t in log)
    # Logged before top-k and global weight.
    torch.testing.assert_close(log[1].sum(-1), torch.ones(2, 4, 14, dtype=torch.float64))
    torch.testing.assert_close(log[1], log[0][:, :4], **NEAR)
    assert {t: at for t, (at, _) in model.get_bucketed_scalings_log().items()} == {9: [0], 4: [1]}
    latest = model.get_latest_scalings()
    assert latest is not None
    assert latest.shape == (1, 9, 14, 3)
    model.clear_scalings_log()
    assert model.get_scalings_log() == []
    assert model.get_latest_scalings() is None


# ---------------------------------------------------------------- setters


@torch.no_grad()
def test_setters_take_effect_at_once(tmp_path: Path) -> None:
    model, ids = tiny_xlora(tmp_path, dtype=torch.float64), tiny_prompt()
    for setter, value, field in (
        (model.set_topk_lora, 1, "top_k_lora"),
        (model.set_softmax_temperature, 0.2, "softmax_temperature"),
        (model.set_global_scaling_weight, 0.5, "global_scaling_weight"),
        (model.set_scaling_pass_value, 0.4, "scaling_pass_value"),
    ):
        before = model(input_ids=ids).logits
        setter(value)
        assert getattr(model.config_xlora, field) == value
        assert not torch.allclose(model(input_ids=ids).logits, before, atol=1e-3)
    fresh = tiny_xlora(
        tmp_path,
        dtype=torch.float64,
        top_k_lora=1,
        softmax_temperature=0.2,
        global_scaling_weight=0.5,
        scaling_pass_value=0.4,
    )
    assert torch.equal(model(input_ids=ids).logits, fresh(input_ids=ids).logits)
    assert model.get_global_scaling_weight() == 0.5
    assert model.default_knobs == RoutingKnobs(top_k=1, temperature=0.2, global_weight=0.5)
    model.set_topk_lora(None)
    model.set_scaling_pass_value(None)
    assert model.config_xlora.top_k_lora is None
    assert model.config_xlora.scaling_pass_value == 1 / 3


def test_setters_refuse_bad_values_and_change_nothing(model: XLoraModel) -> None:
    before = model.config_xlora
    for top_k in (0, 4, -1, 2.0):
        with pytest.raises(ConfigError) as caught:
            model.set_topk_lora(top_k)
        assert caught.value.message == (
            "top_k_lora must be None or a whole number from 1 to 3 (the number of adapters), "
            f"got {top_k}"
        )
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="softmax_temperature must be finite and > 0, got"):
            model.set_softmax_temperature(temperature)
    with pytest.raises(ConfigError, match="global_scaling_weight must be a finite number"):
        model.set_global_scaling_weight(float("nan"))
    with pytest.raises(ConfigError, match="scaling_pass_value must be a finite number"):
        model.set_scaling_pass_value(float("inf"))
    assert model.config_xlora == before


def test_knobs_that_do_not_fit_name_k(model: XLoraModel) -> None:
    with pytest.raises(ConfigError, match=r"from 1 to 3 \(the number of adapters\), got 4"):
        model(input_ids=tiny_prompt(), knobs=RoutingKnobs(top_k=4))


def test_top_k_of_a_config_is_checked_against_the_adapters_given(tmp_path: Path) -> None:
    adapters = [read_adapter("a", write_lora(tmp_path, tiny_base(), ("q_proj",)))]
    with pytest.raises(ConfigError, match=r"from 1 to 1 \(the number of adapters\), got 2"):
        XLoraModel(tiny_base(), XLoraConfig(top_k_lora=2), adapters)


# ---------------------------------------------------------------- what learns


def test_only_the_classifier_is_trainable_by_default(tmp_path: Path) -> None:
    model = tiny_xlora(tmp_path, xlora_depth=2)
    assert set(trainable(model)) == {
        f"classifier.layers.{i}.{kind}" for i in (0, 3) for kind in ("weight", "bias")
    }


def test_with_trainable_adapters_the_experts_learn_too_but_never_the_base(tmp_path: Path) -> None:
    model = tiny_xlora(tmp_path, use_trainable_adapters=True)
    names = set(trainable(model))
    assert {n for n in names if not n.startswith("classifier.")} == {
        f"base_model.{path}.lora_{side}" for path in model.lora_layer_names for side in "AB"
    }
    _, gradients = backward(model, tiny_prompt())
    assert all(gradient.abs().max() > 1e-8 for gradient in gradients.values())


def test_the_scaling_pass_gives_no_gradient(tmp_path: Path) -> None:
    """With a non-zero constant its experts would get one; they must learn from the main pass."""
    model = tiny_xlora(
        tmp_path, dtype=torch.float64, use_trainable_adapters=True, scaling_pass_value=0.3
    )
    ids = tiny_prompt()
    output = model.scaling_pass(input_ids=ids, with_lm_logits=True)
    assert not output.router_logits.requires_grad
    assert output.lm_logits is not None
    assert not output.lm_logits.requires_grad
    _, gradients = backward(model, ids)
    # The same loss with the hidden state as a constant.
    hidden, _ = model._scaling_hidden(None, {"input_ids": ids}, False)
    scalings = model.route(model.classifier(hidden.detach().clone()))
    model.main_pass(input_ids=ids, labels=ids, scalings=scalings).loss.backward()
    for name, parameter in trainable(model).items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradients[name], **NEAR)


def test_the_classifiers_gradient_is_the_slope_of_the_loss(tmp_path: Path) -> None:
    """Against finite differences, so independent of autograd.

    On GPT-2, because Llama's norms round to float32 even in a float64 model.
    """
    model = tiny_xlora(tmp_path, "gpt2", dtype=torch.float64, top_k_lora=2)
    ids = tiny_prompt()

    def loss() -> Tensor:  # Hugging Face's own is float32, too coarse for differences
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())

    loss().backward()
    weight = model.classifier.layers[0].weight
    assert weight.grad is not None
    for index in ((0, 0), (7, 3), (23, 31)):
        losses = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                weight[index] += step
                losses.append(float(loss()))
                weight[index] -= step
        slope = (losses[0] - losses[1]) / 2e-6
        assert slope == pytest.approx(float(weight.grad[index]), rel=1e-5, abs=1e-9)


def test_train_and_eval_reach_the_base_model_and_the_router(tmp_path: Path) -> None:
    model = tiny_xlora(tmp_path, xlora_depth=2, xlora_dropout_p=0.5)
    assert not any(module.training for module in model.modules())
    ids = tiny_prompt()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
        model.train()
        assert all(module.training for module in model.modules())
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
        model.generate(input_ids=ids, max_new_tokens=2)
        assert model.training  # PEFT up to 0.20 left it in eval mode, the classifier frozen
        assert trainable(model)
