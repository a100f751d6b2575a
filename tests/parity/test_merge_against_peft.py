"""One LoRA for a constant mixture, loaded by PEFT itself: the same logits, in float64."""

from __future__ import annotations

import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor

from tests.seq2seq_models import seq2seq_xlora, tiny_seq2seq, tokens
from tests.task_models import TASKS, peft_experts, task_base
from tests.tiny_models import families, tiny_base, tiny_prompt, tiny_xlora, write_lora
from xlora_core import XLoraConfig, XLoraModel
from xlora_core.freezing import lora_of_mixture, save_merged_lora, save_merged_model

FAMILIES = sorted(families())
NEAR = {"atol": 1e-10, "rtol": 0}
pytestmark = pytest.mark.usefixtures("without_gradient")


@pytest.fixture(scope="module")
def without_gradient() -> object:
    with torch.no_grad():
        yield


def peft_over(base: Any, folder: Path) -> Any:
    """Returns PEFT's model of a folder; a key that is missing or left over is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        return PeftModel.from_pretrained(base, str(folder)).eval()


def result(output: Any) -> Tensor:
    """What a model says: logits, or the last hidden state of one without head."""
    logits = getattr(output, "logits", None)
    return (logits if logits is not None else output.last_hidden_state).detach()


def random_weights(model: XLoraModel, seed: int = 0) -> Tensor:
    """``[L, K]``, some negative."""
    shape = (len(model.lora_layer_names), len(model.adapter_names))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_in_peft(tmp_path: Path, family: str) -> None:
    model = tiny_xlora(tmp_path / "experts", family, dtype=torch.float64)
    weights = random_weights(model)
    save_merged_lora(model, tmp_path / "lora", weights)
    reference = peft_over(tiny_base(family, dtype=torch.float64), tmp_path / "lora")
    expected = model.main_pass(input_ids=tiny_prompt(), scalings=weights).logits
    torch.testing.assert_close(reference(input_ids=tiny_prompt()).logits, expected, **NEAR)
    base = tiny_base(family, dtype=torch.float64)(input_ids=tiny_prompt()).logits
    assert (expected - base).abs().max() > 1
    merged = reference.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=tiny_prompt()).logits, expected, **NEAR)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("form", ["lora", "model"])
def test_every_kind_of_model_and_module(tmp_path: Path, name: str, form: str) -> None:
    # A copy: saving writes the dtype into the config, which all models of a task share.
    base = copy.deepcopy(task_base(name))
    base.save_pretrained(tmp_path / "base")

    def loaded(folder: str) -> Any:
        return type(base).from_pretrained(tmp_path / folder, dtype=torch.float64).eval()

    adapters = peft_experts(tmp_path, name)
    model = XLoraModel.from_base(loaded("base"), XLoraConfig(adapters=adapters)).eval()
    weights, inputs = random_weights(model), TASKS[name].inputs()
    expected = result(model.main_pass(scalings=weights, **inputs))
    if form == "lora":
        save_merged_lora(model, tmp_path / "merged", weights)
        again = peft_over(loaded("base"), tmp_path / "merged")
    else:
        save_merged_model(model, tmp_path / "merged", weights)
        again = loaded("merged")
    torch.testing.assert_close(result(again(**inputs)), expected, **NEAR)
    assert (expected - result(loaded("base")(**inputs))).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder(tmp_path: Path, family: str) -> None:
    """One set of weights for a module, whichever side's tokens it reads."""
    model = seq2seq_xlora(tmp_path / "experts", family)
    weights = random_weights(model)
    save_merged_lora(model, tmp_path / "lora", weights)
    inputs = {"input_ids": tokens(2, 7), "decoder_input_ids": tokens(2, 5, seed=1)}
    expected = model.main_pass(scalings=weights, **inputs).logits
    found = peft_over(tiny_seq2seq(family), tmp_path / "lora")(**inputs).logits
    torch.testing.assert_close(found, expected, **NEAR)
    assert (expected - tiny_seq2seq(family)(**inputs).logits).abs().max() > 1e-2


@given(data=st.data())
@settings(max_examples=25)
def test_a_constant_mixture_is_its_exact_lora(data: st.DataObject) -> None:
    """For experts of any ranks and targets, and any weights, zero and negative ones included."""
    family = data.draw(st.sampled_from(["llama", "gpt2", "opt"]))
    targets = [*families()[family].targets, "lm_head"]
    n_adapters = data.draw(st.integers(1, 3))
    with tempfile.TemporaryDirectory() as folder:
        base = tiny_base(family, dtype=torch.float64)
        adapters = {
            f"e{k}": str(
                write_lora(
                    Path(folder) / f"e{k}",
                    base,
                    data.draw(st.lists(st.sampled_from(targets), min_size=1, unique=True)),
                    rank=data.draw(st.integers(1, 5)),
                    alpha=data.draw(st.sampled_from([1, 4, 9])),
                    seed=k,
                    config={"use_rslora": data.draw(st.booleans())},
                )
            )
            for k in range(n_adapters)
        }
        model = XLoraModel.from_base(base, XLoraConfig(adapters=adapters)).eval()
        values = st.sampled_from([0.0, 0.0, 1.0, -0.5, 0.3, 2.0])
        row = st.lists(values, min_size=n_adapters, max_size=n_adapters)
        n_layers = len(model.lora_layer_names)
        drawn = data.draw(st.lists(row, min_size=n_layers, max_size=n_layers))
        weights = torch.tensor(drawn, dtype=torch.float64)
        if not (weights * model.present).any():
            weights += 1
        save_merged_lora(model, Path(folder) / "lora", weights)
        reference = peft_over(tiny_base(family, dtype=torch.float64), Path(folder) / "lora")
        expected = model.main_pass(input_ids=tiny_prompt(), scalings=weights).logits
        found = reference(input_ids=tiny_prompt()).logits
    torch.testing.assert_close(found, expected, **NEAR)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_truncated_it_is_pefts_own_svd(tmp_path: Path, rank: int) -> None:
    """PEFT's ``add_weighted_adapter(combination_type="svd")`` knows one weight per adapter."""
    weights = [0.7, -0.4, 0.5]
    model = tiny_xlora(tmp_path / "experts", dtype=torch.float64)
    folders = dict(model.config_xlora.adapters)
    reference = PeftModel.from_pretrained(
        tiny_base(dtype=torch.float64), folders["0"], adapter_name="a0"
    )
    for k in (1, 2):
        reference.load_adapter(folders[str(k)], adapter_name=f"a{k}")
    reference.add_weighted_adapter(
        ["a0", "a1", "a2"], weights, "merged", combination_type="svd", svd_rank=rank
    )
    lora = lora_of_mixture(model, weights, rank=rank)
    layers = dict(reference.base_model.model.named_modules())
    for path, part in lora.modules.items():
        torch.testing.assert_close(
            part.lora_B @ part.lora_A, layers[path].get_delta_weight("merged"), atol=1e-5, rtol=0
        )


def test_exact_it_is_pefts_own_concatenation(tmp_path: Path) -> None:
    """PEFT's ``combination_type="cat"`` is exact as well, for one weight per adapter."""
    weights = [0.7, 0.4, 0.5]
    model = tiny_xlora(tmp_path / "experts", dtype=torch.float64)
    folders = dict(model.config_xlora.adapters)
    reference = PeftModel.from_pretrained(
        tiny_base(dtype=torch.float64), folders["0"], adapter_name="a0"
    )
    for k in (1, 2):
        reference.load_adapter(folders[str(k)], adapter_name=f"a{k}")
    reference.add_weighted_adapter(["a0", "a1", "a2"], weights, "merged", combination_type="cat")
    reference.set_adapter("merged")
    save_merged_lora(model, tmp_path / "lora", weights)
    ours = peft_over(tiny_base(dtype=torch.float64), tmp_path / "lora")
    torch.testing.assert_close(
        ours(input_ids=tiny_prompt()).logits,
        reference.eval()(input_ids=tiny_prompt()).logits,
        **NEAR,
    )
