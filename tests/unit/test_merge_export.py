"""What merging writes: a plain model folder, and one LoRA in PEFT's format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.tiny_chat import tiny_chat_xlora, tiny_tokenizer
from tests.tiny_models import (
    families,
    tiny_base,
    tiny_prompt,
    tiny_xlora,
    write_experts,
    write_lora,
)
from xlora_core import XLoraConfig, XLoraModel
from xlora_core.adapters import read_adapter
from xlora_core.errors import AdapterError, CheckpointError, ConfigError, ModelError
from xlora_core.freezing import (
    FrozenMixture,
    freeze_rows,
    lora_of_mixture,
    save_merged_lora,
    save_merged_model,
)
from xlora_core.training.data import Example

FAMILIES = sorted(families())
NEAR = {"atol": 1e-10, "rtol": 0}
pytestmark = pytest.mark.usefixtures("without_gradient")


@pytest.fixture
def without_gradient() -> object:
    with torch.no_grad():
        yield


def table(model: XLoraModel, seed: int = 0) -> Tensor:
    """Random weights per module and adapter, some negative."""
    shape = (len(model.lora_layer_names), len(model.adapter_names))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def constant(model: XLoraModel, weights: Tensor) -> Tensor:
    logits: Tensor = model.main_pass(input_ids=tiny_prompt(), scalings=weights).logits
    return logits


def loaded(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Returns a base model by way of the disk.

    Gemma's embedding scale and rotary frequencies, which no file holds, come out otherwise in a
    model that is cast to float64 than in one that is loaded so.
    """
    base.save_pretrained(folder)
    again: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return again.eval()


def alone(base: torch.nn.Module, folder: Path) -> Tensor:
    """Logits of an exported LoRA as the only expert, read by this project."""
    model = XLoraModel.from_base(base, XLoraConfig(adapters={"merged": str(folder)}))  # type: ignore[arg-type]
    return constant(model, torch.ones(1, dtype=torch.float64))


def settings(folder: Path) -> dict[str, object]:
    values: dict[str, object] = json.loads((folder / "adapter_config.json").read_text())
    return values


# ---------------------------------------------------------------- a plain model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_is_the_constant_mixture_to_float64(tmp_path: Path, family: str) -> None:
    base = loaded(tiny_base(family), tmp_path / "base")
    config = XLoraConfig(adapters=write_experts(tmp_path / "experts", family))
    model = XLoraModel.from_base(base, config)
    weights = table(model)
    expected = constant(model, weights)
    save_merged_model(model, tmp_path / "merged", weights)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    torch.testing.assert_close(again.eval()(tiny_prompt()).logits, expected, **NEAR)
    with pytest.raises(ModelError, match="was merged into its base model"):
        model.main_pass(input_ids=tiny_prompt(), scalings=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "experts", "merged"]


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    model = tiny_chat_xlora(tmp_path / "experts")
    save_merged_model(model, tmp_path / "merged", tokenizer=tiny_tokenizer())
    text = "naïve café, def add(a, b)"
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert again(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert again.chat_template == tiny_tokenizer().chat_template


def test_a_frozen_mixture_is_taken_and_checked(tmp_path: Path) -> None:
    model = tiny_xlora(tmp_path / "experts", dtype=torch.float64)
    example = Example(input_ids=[5, 6, 7, 8], labels=[5, 6, 7, 8], domains=[""] * 4)
    frozen = freeze_rows(model, [example])
    expected = constant(model, frozen.weights)
    renamed = FrozenMixture(
        adapter_names=frozen.adapter_names,
        layer_names=[name.replace("q_proj", "query") for name in frozen.layer_names],
        weights=frozen.weights,
    )
    for save in (save_merged_model, save_merged_lora):
        with pytest.raises(ConfigError, match="is for other modules"):
            save(model, tmp_path / "refused", renamed)
    assert not (tmp_path / "refused").exists()
    frozen.save(tmp_path / "frozen.json")
    save_merged_lora(model, tmp_path / "lora", frozen)
    torch.testing.assert_close(
        alone(tiny_base(dtype=torch.float64), tmp_path / "lora"), expected, **NEAR
    )
    save_merged_model(model, tmp_path / "merged", FrozenMixture.load(tmp_path / "frozen.json"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    torch.testing.assert_close(again.eval()(tiny_prompt()).logits, expected, **NEAR)


@pytest.mark.parametrize("save", [save_merged_model, save_merged_lora])
def test_nothing_is_overwritten(tmp_path: Path, save: object) -> None:
    model = tiny_xlora(tmp_path / "experts")
    expected = constant(model, table(model))
    full = tmp_path / "full"
    full.mkdir()
    (full / "thing").touch()
    for output in (full, full / "thing"):
        with pytest.raises(CheckpointError, match="exists and is not empty"):
            save(model, output)  # type: ignore[operator]  # one of two functions
    assert torch.equal(constant(model, table(model)), expected)
    (tmp_path / "empty").mkdir()
    save(model, tmp_path / "empty")  # type: ignore[operator]
    (written,) = (tmp_path / "empty").glob("*.safetensors")
    assert written.stat().st_mode & 0o777 == 0o644


# ---------------------------------------------------------------- one LoRA


@pytest.mark.parametrize("family", FAMILIES)
def test_our_own_reader_finds_the_constant_mixture(tmp_path: Path, family: str) -> None:
    model = tiny_xlora(tmp_path / "experts", family, dtype=torch.float64)
    weights = table(model)
    lora = save_merged_lora(model, tmp_path / "lora", weights)
    expected = constant(model, weights)
    found = alone(tiny_base(family, dtype=torch.float64), tmp_path / "lora")
    torch.testing.assert_close(found, expected, **NEAR)
    assert (expected - constant(model, torch.ones(3).double() / 3)).abs().max() > 0.5
    assert {weights.rank for weights in lora.modules.values()} == {12}
    adapter = read_adapter("merged", tmp_path / "lora")
    assert set(adapter.modules) == set(model.lora_layer_names)
    assert all(part.lora_scaling == 1 for part in adapter.modules.values())


def test_ranks_and_targets_that_differ(tmp_path: Path) -> None:
    base = tiny_base(dtype=torch.float64)
    folders = {
        "a": write_lora(tmp_path / "a", base, ("q_proj", "o_proj"), rank=2, alpha=3),
        "b": write_lora(tmp_path / "b", base, ("q_proj", "down_proj"), rank=5, seed=1),
        "c": write_lora(
            tmp_path / "c", base, ("o_proj",), rank=4, seed=2, config={"use_rslora": True}
        ),
    }
    adapters = {name: str(folder) for name, folder in folders.items()}
    model = XLoraModel.from_base(base, XLoraConfig(adapters=adapters))
    weights = table(model)
    dropped = "model.layers.1.mlp.down_proj"
    weights[model.lora_layer_names.index(dropped), 1] = 0
    save_merged_lora(model, tmp_path / "lora", weights)
    values = settings(tmp_path / "lora")
    assert dropped not in values["target_modules"]  # type: ignore[operator]
    assert values["alpha_pattern"] == values["rank_pattern"]
    modules = read_adapter("merged", tmp_path / "lora").modules
    ranks = {path.rpartition(".")[2]: part.rank for path, part in modules.items()}
    assert ranks == {"q_proj": 7, "o_proj": 6, "down_proj": 5}
    assert set(modules) == set(model.lora_layer_names) - {dropped}
    found = alone(tiny_base(dtype=torch.float64), tmp_path / "lora")
    torch.testing.assert_close(found, constant(model, weights), **NEAR)


def test_a_module_whose_path_ends_like_anothers_keeps_its_own_rank(tmp_path: Path) -> None:
    """PEFT reads rank patterns as the end of a path; ``h.1.x`` must not be taken for ``h.11.x``."""
    model = tiny_xlora(tmp_path / "experts", dtype=torch.float64)
    weights = torch.ones(14, 3)
    weights[0, 1:] = 0
    save_merged_lora(model, tmp_path / "lora", weights)
    values = settings(tmp_path / "lora")
    assert values["r"] == values["lora_alpha"] == 12
    assert values["rank_pattern"] == {r"^model\.layers\.0\.self_attn\.q_proj": 4}


@pytest.mark.parametrize("family", ["gpt2", "gemma"])
def test_a_tied_head(tmp_path: Path, family: str) -> None:
    base = loaded(tiny_base(family), tmp_path / "base")
    folder = write_lora(tmp_path / "head", base, ("lm_head", "q_proj", "c_attn"))
    model = XLoraModel.from_base(base, XLoraConfig(adapters={"a": str(folder)}))
    weights = torch.tensor([-0.75], dtype=torch.float64)
    expected = constant(model, weights)
    save_merged_lora(model, tmp_path / "lora", weights)
    found = alone(loaded(tiny_base(family), tmp_path / "base"), tmp_path / "lora")
    torch.testing.assert_close(found, expected, **NEAR)
    save_merged_model(model, tmp_path / "merged", weights)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    torch.testing.assert_close(again.eval()(tiny_prompt()).logits, expected, **NEAR)


def test_truncated_to_a_rank(tmp_path: Path) -> None:
    model = tiny_xlora(tmp_path / "experts", dtype=torch.float64)
    weights = table(model)
    lora = save_merged_lora(model, tmp_path / "lora", weights, rank=3)
    modules = read_adapter("merged", tmp_path / "lora").modules
    for layer, row, path in zip(model.lora_layers, weights, model.lora_layer_names, strict=True):
        part = modules[path]
        whole = layer.delta_weight(row)
        S = torch.linalg.svdvals(whole)
        error = (whole - part.lora_B @ part.lora_A).square().sum()
        torch.testing.assert_close(error, S[3:].square().sum(), rtol=1e-9, atol=1e-20)
        kept = float(S[:3].square().sum() / S.square().sum())
        assert lora.kept[path] == pytest.approx(kept, rel=1e-9)
        assert 0.3 < kept < 0.99
    assert settings(tmp_path / "lora")["r"] == 3
    assert settings(tmp_path / "lora")["rank_pattern"] == {}


def test_bf16_experts_are_written_in_float32(tmp_path: Path) -> None:
    """Product of weight, lora_scaling and lora_B: bfloat16 would round it to 8 bits once more."""
    model = tiny_xlora(tmp_path / "experts", dtype=torch.bfloat16)
    save_merged_lora(model, tmp_path / "lora", [0.3, 0.3, 0.4])
    adapter = read_adapter("merged", tmp_path / "lora")
    assert adapter.dtype == torch.float32
    for layer, path in zip(model.lora_layers, model.lora_layer_names, strict=True):
        part = adapter.modules[path]
        whole = layer.delta_weight(torch.tensor([0.3, 0.3, 0.4]))
        torch.testing.assert_close(part.lora_B @ part.lora_A, whole, atol=1e-6, rtol=0)


def test_no_path_of_this_machine_is_written(tmp_path: Path) -> None:
    tiny_base().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    folder = write_lora(tmp_path / "a", base, ("q_proj",))
    model = XLoraModel.from_base(base, XLoraConfig(adapters={"a": str(folder)}))
    save_merged_lora(model, tmp_path / "lora")
    assert str(tmp_path) not in (tmp_path / "lora" / "adapter_config.json").read_text()
    assert settings(tmp_path / "lora")["base_model_name_or_path"] is None
    base.config._name_or_path = base.name_or_path = "somebody/a-model"
    save_merged_lora(model, tmp_path / "other")
    assert settings(tmp_path / "other")["base_model_name_or_path"] == "somebody/a-model"


# ---------------------------------------------------------------- refusals


def test_a_mixture_of_nothing_is_refused(tmp_path: Path) -> None:
    model = tiny_xlora(tmp_path / "experts")
    for weights in ({}, [0.0, 0.0, 0.0], torch.zeros(14, 3)):
        with pytest.raises(ConfigError, match="the mixture is zero in every module"):
            save_merged_lora(model, tmp_path / "lora", weights)  # type: ignore[arg-type]
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("weights", [[1.0], {"poetry": 1.0}, [1.0, float("nan"), 0.0]])
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, weights: object) -> None:
    model = tiny_xlora(tmp_path / "experts")
    for save in (save_merged_model, save_merged_lora):
        with pytest.raises(ConfigError, match="merge weights"):
            save(model, tmp_path / "lora", weights)  # type: ignore[arg-type]
    assert not (tmp_path / "lora").exists()
    assert constant(model, table(model)).shape == (2, 9, 97)  # not spent


def test_a_quantised_base_is_written_as_a_lora_only(tmp_path: Path) -> None:
    model = tiny_xlora(tmp_path / "experts")
    expected = constant(model, table(model))
    model.base_model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(CheckpointError, match="the base model is quantised"):
        save_merged_model(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert torch.equal(constant(model, table(model)), expected)  # not spent
    save_merged_lora(model, tmp_path / "lora")
    assert read_adapter("merged", tmp_path / "lora").modules.keys() == set(model.lora_layer_names)


def test_a_bias_beside_an_adapted_embedding_is_refused_by_name(tmp_path: Path) -> None:
    """PEFT's ``lora_bias`` holds for all modules of an adapter, and it refuses it on embeddings."""
    model = tiny_xlora(tmp_path / "experts")
    lora = lora_of_mixture(model)
    from dataclasses import replace

    from xlora_core.freezing import export

    first, second = list(lora.modules)[:2]
    modules = dict(lora.modules)
    modules[first] = replace(modules[first], bias=torch.ones(32))
    modules[second] = replace(modules[second], embedding=True)
    with pytest.raises(AdapterError) as caught:
        export._with_a_bias_each(modules)
    assert first in caught.value.message
    assert second in caught.value.message
    assert caught.value.hint == "merge into a plain model instead"
