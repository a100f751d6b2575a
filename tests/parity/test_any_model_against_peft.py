"""Any transformers model: each expert alone is PEFT's plain LoRA, and the laws hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import XLoraConfig as PeftXLoraConfig
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from tests.parity.peft_reference import peft_scalings
from tests.task_models import (
    HIDDEN_SIZE,
    TASKS,
    llama_config,
    peft_experts,
    peft_lora,
    task_base,
    text,
)
from xlora_core.config import XLoraConfig
from xlora_core.errors import AdapterError
from xlora_core.model import XLoraModel

K = 3


def xlora(tmp_path: Path, name: str, **config: Any) -> XLoraModel:
    settings = {"layerwise_scalings": True} | config
    model = XLoraModel.from_base(
        task_base(name), XLoraConfig(adapters=peft_experts(tmp_path, name, K), **settings)
    )
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.normal_(0, 0.5)
    return model.eval()


def result(output: Any) -> Tensor:
    """What a model says: logits, or the last hidden state of one without head."""
    logits = getattr(output, "logits", None)
    return (logits if logits is not None else output.last_hidden_state).detach()


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("name", TASKS)
def test_one_expert_alone_is_pefts_lora(tmp_path: Path, name: str) -> None:
    model, inputs = xlora(tmp_path, name), TASKS[name].inputs()
    base = result(task_base(name)(**inputs))
    for k in range(K):
        expected = result(peft_lora(name, k)(**inputs))
        found = result(model.main_pass(scalings=torch.eye(K)[k].double(), **inputs))
        assert difference(found, expected) < 1e-10
        assert difference(expected, base) > 1e-2  # else the expert is not seen at all


@pytest.mark.parametrize("name", TASKS)
def test_without_adapters_it_is_the_base_model(tmp_path: Path, name: str) -> None:
    model, inputs = xlora(tmp_path, name), TASKS[name].inputs()
    base = result(task_base(name)(**inputs))
    routed = result(model(**inputs))
    with model.disable_adapter():
        assert difference(result(model(**inputs)), base) == 0
    model.set_global_scaling_weight(0.0)
    assert difference(result(model(**inputs)), base) < 1e-12
    assert difference(routed, base) > 1e-2


@pytest.mark.parametrize("name", TASKS)
def test_uniform_scalings_are_the_merged_model(tmp_path: Path, name: str) -> None:
    model, inputs = xlora(tmp_path, name), TASKS[name].inputs()
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.zero_()
    uniform = result(model(**inputs))
    merged = model.merge_and_unload()
    assert not [n for n, _ in merged.named_parameters() if "lora_" in n]
    assert difference(result(merged(**inputs)), uniform) < 1e-10


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_is_its_rows(tmp_path: Path, name: str) -> None:
    model, inputs = xlora(tmp_path, name, top_k_lora=2), TASKS[name].inputs()
    whole = model(**inputs)
    batched, scalings = result(whole), model.get_latest_scalings()
    assert scalings is not None
    assert scalings.shape[2:] == (len(model.lora_layer_names), K)
    for row in range(3):
        n = int(inputs["attention_mask"][row].sum()) if "attention_mask" in inputs else None
        one = {k: v[row : row + 1, :n] if n else v[row : row + 1] for k, v in inputs.items()}
        alone = result(model(**one))
        kept = batched[row : row + 1, :n] if n and batched.ndim == 3 else batched[row : row + 1]
        assert difference(kept, alone) < 1e-9


@pytest.mark.parametrize("name", TASKS)
def test_what_is_saved_comes_back(tmp_path: Path, name: str) -> None:
    model, inputs = xlora(tmp_path, name, xlora_depth=2, xlora_size=8), TASKS[name].inputs()
    model.save_pretrained(tmp_path / "saved")
    again = XLoraModel.from_pretrained(task_base(name), tmp_path / "saved").eval()
    assert again.lora_layer_names == model.lora_layer_names
    assert difference(result(again(**inputs)), result(model(**inputs))) < 1e-10


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.labels is not None])
def test_the_classifier_learns(tmp_path: Path, name: str) -> None:
    model = xlora(tmp_path, name)
    model(**TASKS[name].inputs(), labels=TASKS[name].labels).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(gradients) == {"classifier.layers.0.weight", "classifier.layers.0.bias"}
    assert all(gradient.abs().max() > 1e-6 for gradient in gradients.values())


# ---------------------------------------------------------------- heads that adapters bring


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("encoder with a classification head", "classifier"),
        ("decoder with a classification head", "score"),
    ],
)
def test_the_mixture_of_heads_does_not_depend_on_the_bases_random_head(
    tmp_path: Path, name: str, head: str
) -> None:
    """A base model without task head gets a random one, another one at every load."""
    model, inputs = xlora(tmp_path, name), TASKS[name].inputs()
    assert head in model.lora_layer_names
    model.save_pretrained(tmp_path / "saved")
    other = task_base(name)
    with torch.no_grad():
        for parameter in other.get_submodule(head).parameters():
            parameter.normal_(0, 1)
    again = XLoraModel.from_pretrained(other, tmp_path / "saved").eval()
    assert difference(result(again(**inputs)), result(model(**inputs))) < 1e-10


def test_a_saved_head_of_another_number_of_labels_is_refused(tmp_path: Path) -> None:
    experts = peft_experts(tmp_path, "decoder with a classification head", 1)
    base = AutoModelForSequenceClassification.from_config(llama_config(num_labels=5))
    with pytest.raises(AdapterError, match=r"adapter 'e0', module score: .*\[3, 32\].*\[5, 32\]"):
        XLoraModel.from_base(base, XLoraConfig(adapters=experts))


# ---------------------------------------------------------------- PEFT's X-LoRA, where it can


@pytest.mark.parametrize("name", ["adapted embedding", "adapted embedding that scales its output"])
@pytest.mark.parametrize("routing", [{}, {"top_k_lora": 2}, {"scaling_pass_value": 0.3125}])
def test_adapted_embeddings_are_routed_as_in_pefts_xlora(
    tmp_path: Path, name: str, routing: dict[str, Any]
) -> None:
    experts = peft_experts(tmp_path, name, K)
    experts = {str(k): folder for k, folder in enumerate(experts.values())}  # PEFT's names
    base = task_base(name)
    base.config.use_cache = False
    theirs = get_peft_model(
        base,
        PeftXLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=HIDDEN_SIZE,
            adapters=dict(experts),
            layerwise_scalings=True,
            **routing,
        ),
    ).eval()
    config = XLoraConfig(adapters=experts, layerwise_scalings=True, **routing)
    ours = XLoraModel.from_base(task_base(name), config).eval()
    ours.classifier.load_state_dict(theirs.base_model.internal_xlora_classifier.state_dict())
    ids = text()["input_ids"][:1]
    expected = theirs(input_ids=ids).logits
    found = ours(input_ids=ids).logits
    scalings = ours.get_latest_scalings()
    assert scalings is not None
    assert difference(scalings, peft_scalings(theirs)) < 1e-6
    # PEFT keeps the adapters in float32 and looks embeddings up in it.
    assert difference(found, expected) < 1e-4
    assert difference(expected, result(task_base(name)(input_ids=ids))) > 1e-2
