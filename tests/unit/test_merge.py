"""Merging: the constant mixture it stands for, and the plain model it leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from tests.tiny_models import families, tiny_base, tiny_prompt, tiny_xlora, write_lora
from xlora_core.adapters import LoraAdapter, LoraWeights
from xlora_core.config import XLoraConfig
from xlora_core.errors import ConfigError, ModelError
from xlora_core.layers import XLoraLinear
from xlora_core.merge import weight_matrix
from xlora_core.model import XLoraModel

pytestmark = pytest.mark.usefixtures("without_gradient")
NEAR = {"atol": 1e-10, "rtol": 0}
FAMILIES = sorted(families())


@pytest.fixture
def without_gradient() -> object:
    with torch.no_grad():
        yield


@pytest.fixture
def model(tmp_path: Path) -> XLoraModel:
    return tiny_xlora(tmp_path, dtype=torch.float64)


def constant(model: XLoraModel, scalings: Tensor) -> Tensor:
    """Logits under a constant mixture, before merging."""
    logits: Tensor = model.main_pass(input_ids=tiny_prompt(), scalings=scalings.double()).logits
    return logits


def logits_of(merged: nn.Module) -> Tensor:
    logits: Tensor = merged(input_ids=tiny_prompt()).logits
    return logits


# ---------------------------------------------------------------- what it stands for


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_is_all_scalings_1_over_k(tmp_path: Path, family: str) -> None:
    model = tiny_xlora(tmp_path, family, dtype=torch.float64)
    expected = constant(model, torch.ones(3).double() / 3)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), expected, **NEAR)
    base = tiny_base(family, dtype=torch.float64)
    assert (expected - logits_of(base)).abs().max() > 0.5


def test_by_name_with_absent_names_at_0(model: XLoraModel) -> None:
    expected = constant(model, torch.tensor([0.0, -1.5, 0.5]))
    merged = model.merge_and_unload({"2": 0.5, "1": -1.5})
    torch.testing.assert_close(logits_of(merged), expected, **NEAR)


def test_one_expert_is_that_expert(model: XLoraModel) -> None:
    expected = constant(model, torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(logits_of(model.merge_and_unload([0, 1, 0])), expected, **NEAR)


def test_per_module_and_adapter(model: XLoraModel) -> None:
    table = torch.rand(14, 3, generator=torch.Generator().manual_seed(2))
    expected = constant(model, table)
    torch.testing.assert_close(logits_of(model.merge_and_unload(table)), expected, **NEAR)


def test_no_weight_at_all_is_the_base_model(model: XLoraModel) -> None:
    assert torch.equal(
        logits_of(model.merge_and_unload({})), logits_of(tiny_base(dtype=torch.float64))
    )


def test_adapters_with_different_targets(tmp_path: Path) -> None:
    base = tiny_base(dtype=torch.float64)
    a = write_lora(tmp_path / "a", base, ("q_proj",), rank=2)
    b = write_lora(tmp_path / "b", base, ("q_proj", "down_proj"), rank=3)
    model = XLoraModel.from_base(base, XLoraConfig(adapters={"a": str(a), "b": str(b)}))
    expected = constant(model, torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(logits_of(model.merge_and_unload([0.75, 0.25])), expected, **NEAR)


def test_a_bf16_model_is_rounded_once(tmp_path: Path) -> None:
    model = tiny_xlora(tmp_path, dtype=torch.bfloat16)
    layer = model.lora_layers[3]
    weight, delta = layer.weight.clone(), layer.delta_weight(torch.tensor([0.2, 0.3, 0.5]))
    merged = model.merge_and_unload([0.2, 0.3, 0.5])
    found = merged.get_submodule(model.lora_layer_names[3]).weight
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (weight.float() + delta).bfloat16())


# ---------------------------------------------------------------- what it leaves


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_model_that_saves_and_loads(tmp_path: Path, family: str) -> None:
    model = tiny_xlora(tmp_path / "experts", family)
    base, paths = model.base_model, model.lora_layer_names
    merged = model.merge_and_unload()
    assert merged is base
    fresh = tiny_base(family)
    for path in paths:
        assert type(merged.get_submodule(path)) is type(fresh.get_submodule(path))
    assert not any(isinstance(module, XLoraLinear) for module in merged.modules())
    assert list(merged.state_dict()) == list(fresh.state_dict())
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits_of(again), logits_of(merged))
    tokens = merged.generate(input_ids=tiny_prompt(), max_new_tokens=4, do_sample=False)
    assert tokens.shape == (2, 13)


@pytest.mark.parametrize("family", ["gpt2", "gemma"])
def test_a_tied_head_comes_back_untied(tmp_path: Path, family: str) -> None:
    base = tiny_base(family)
    embedding = base.get_input_embeddings().weight
    before = embedding.clone()
    assert base.get_output_embeddings().weight is embedding
    folder = write_lora(tmp_path / "head", base, ("lm_head", "q_proj", "c_attn"))
    model = XLoraModel.from_base(base, XLoraConfig(adapters={"a": str(folder)}))
    expected = model.main_pass(input_ids=tiny_prompt(), scalings=torch.ones(1)).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), expected, atol=3e-5, rtol=0)
    assert merged.get_output_embeddings().weight is not embedding
    assert torch.equal(merged.get_input_embeddings().weight, before)
    assert not torch.equal(merged.get_output_embeddings().weight, before)
    # Loading it must not tie them again.
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits_of(again), logits_of(merged))


def test_an_adapted_embedding_leaves_the_head_as_it_was(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    weights = LoraWeights(
        lora_A=torch.randn(2, 97), lora_B=torch.randn(32, 2), lora_scaling=0.5, embedding=True
    )
    adapter = LoraAdapter(
        name="a", config={}, modules={"transformer.wte": weights}, dtype=torch.float32
    )
    model = XLoraModel(base, XLoraConfig(), [adapter]).eval()
    head = base.get_output_embeddings().weight.clone()
    expected = model.main_pass(input_ids=tiny_prompt(), scalings=torch.ones(1)).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), expected, atol=3e-5, rtol=0)
    assert torch.equal(merged.get_output_embeddings().weight, head)
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits_of(again), logits_of(merged))


def test_a_tied_head_that_is_not_adapted_stays_tied(tmp_path: Path) -> None:
    merged = tiny_xlora(tmp_path, "gpt2").merge_and_unload()
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert merged.config.tie_word_embeddings is True


def test_the_model_is_spent(model: XLoraModel, tmp_path: Path) -> None:
    model.merge_and_unload()
    ids = tiny_prompt()
    for use in (
        lambda: model(input_ids=ids),
        lambda: model.generate(input_ids=ids, max_new_tokens=2),
        lambda: model.scaling_pass(input_ids=ids),
        lambda: model.main_pass(input_ids=ids, scalings=None),
        model.merge_and_unload,
        lambda: model.save_pretrained(tmp_path / "spent"),
    ):
        with pytest.raises(ModelError) as caught:
            use()
        assert caught.value.message == (
            "this XLoraModel was merged into its base model and has no experts any more"
        )
        assert caught.value.hint == (
            "use the model that merge_and_unload returned, or load a fresh one"
        )
    assert not (tmp_path / "spent").exists()


def test_refused_weights_leave_the_model_as_it_was(model: XLoraModel) -> None:
    expected = model(input_ids=tiny_prompt()).logits
    with pytest.raises(ConfigError):
        model.merge_and_unload([1.0])
    assert torch.equal(model(input_ids=tiny_prompt()).logits, expected)
    assert isinstance(model.base_model, LlamaForCausalLM)


def test_merging_one_layer_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = tiny_xlora(tmp_path, "gpt2")
    expected = model(input_ids=tiny_prompt()).logits
    layer = model.lora_layers[0].merge_to_original_layer([1.0, 0.0, 0.0])
    assert type(layer) is Conv1D
    assert torch.equal(model(input_ids=tiny_prompt()).logits, expected)


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (None, [[0.5, 0.5]] * 3),
        ({"b": 2}, [[0.0, 2.0]] * 3),
        ([1, -1], [[1.0, -1.0]] * 3),
        ([[1, 0], [0, 1], [2, 2]], [[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]),
        (torch.ones(2, requires_grad=True), [[1.0, 1.0]] * 3),
    ],
)
def test_weight_matrix(weights: object, expected: list[list[float]]) -> None:
    matrix = weight_matrix(weights, ["a", "b"], 3)
    assert matrix.dtype == torch.float64
    assert matrix.tolist() == expected
    assert not matrix.requires_grad


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"c": 1.0, "a": 1.0}, "merge weights name unknown adapters: 'c'"),
        (
            [1.0],
            (
                "merge weights must have shape [2] (one per adapter) or [3, 2] "
                "(one per module and adapter), got [1]"
            ),
        ),
        ([[1.0, 1.0]], "got [1, 2]"),
        ([1.0, float("nan")], "merge weights must be finite"),
        ({"a": float("inf")}, "merge weights must be finite"),
        (["x", "y"], "merge weights must be numbers: "),
        ({"a": "x"}, "merge weights must be numbers: "),
        ({"a": None}, "merge weights must be numbers: "),
        ([[1.0, 1.0], [1.0]], "merge weights must be numbers: "),
    ],
)
def test_bad_weights(weights: Mapping[str, float] | Sequence[float], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        weight_matrix(weights, ["a", "b"], 3)
    assert message in caught.value.message
    if "unknown" in message:
        assert caught.value.hint == "the adapters are a, b"
