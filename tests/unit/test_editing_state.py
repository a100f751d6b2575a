"""What an edit does to all that hangs on the adapters: training, knobs, log, caches, files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from tests.edited_models import (
    IDS,
    ROUTERS,
    routed_model,
    run,
    same_tensors,
    write_extra,
)
from tests.gradients import backward, trainable
from tests.tiny_models import tiny_base
from xlora_core.config import AdapterOverride
from xlora_core.model import XLoraModel

NEAR = {"atol": 1e-10, "rtol": 0}


@pytest.fixture(params=ROUTERS)
def routed(request: pytest.FixtureRequest, tmp_path: Path) -> XLoraModel:
    return routed_model(tmp_path, request.param)


@pytest.fixture
def model(tmp_path: Path) -> XLoraModel:
    return routed_model(tmp_path)


# ---------------------------------------------------------------- what learns, and where it lives


def test_trained_experts_keep_their_weights_and_go_on_learning(tmp_path: Path) -> None:
    model = routed_model(tmp_path, "layerwise", use_trainable_adapters=True).train()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    trained = {
        path: layer.experts()
        for path, layer in zip(model.lora_layer_names, model.lora_layers, strict=True)
    }
    model.remove_adapter("1")
    model.add_adapter("extra", write_extra(tmp_path, ("q_proj", "lm_head")))
    for path, layer in zip(model.lora_layer_names, model.lora_layers, strict=True):
        assert layer.lora_A.requires_grad
        assert layer.lora_B.requires_grad
        assert layer.training
        for now, before in ((0, 0), (1, 2)):
            if path in trained:
                assert torch.equal(layer.experts()[now].lora_A, trained[path][before].lora_A)
                assert torch.equal(layer.experts()[now].lora_B, trained[path][before].lora_B)
    _, gradients = backward(model, IDS)
    assert any(name.endswith("lm_head.lora_A") for name in gradients)
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


def test_experts_frozen_by_hand_stay_frozen(tmp_path: Path) -> None:
    model = routed_model(tmp_path, use_trainable_adapters=True)
    path, layer = model.lora_layer_names[0], model.lora_layers[0]
    layer.requires_grad_(False)
    model.reorder_adapters(["2", "1", "0"])
    frozen = [
        p
        for p, m in zip(model.lora_layer_names, model.lora_layers, strict=True)
        if not m.lora_A.requires_grad and not m.lora_B.requires_grad
    ]
    assert frozen == [path]


def test_what_is_frozen_stays_frozen_and_the_router_learns(
    routed: XLoraModel, tmp_path: Path
) -> None:
    router = set(map(id, routed.router.parameters()))
    assert {id(p) for p in trainable(routed).values()} == router
    routed.add_adapter("extra", write_extra(tmp_path, ("q_proj", "lm_head")))
    routed.remove_adapter("0")
    routed.reorder_adapters(["extra", "2", "1"])
    assert {id(p) for p in trainable(routed).values()} == set(map(id, routed.router.parameters()))
    _, gradients = backward(routed.train(), IDS)
    last = [name for name in gradients if name.endswith("bias")][-1]
    assert gradients[last].abs().min() > 0  # every row of the newest layer learns


def test_a_frozen_router_stays_frozen(routed: XLoraModel, tmp_path: Path) -> None:
    routed.router.requires_grad_(False)
    routed.add_adapter("extra", write_extra(tmp_path, ("q_proj", "lm_head")))
    assert not trainable(routed)


@pytest.mark.parametrize("router", ["layerwise", "per_layer"])
def test_dtypes_are_kept(tmp_path: Path, router: str) -> None:
    model = routed_model(tmp_path, router).to(torch.bfloat16)
    model.add_adapter("extra", write_extra(tmp_path, ("q_proj", "lm_head")), position=0)
    assert {layer.lora_A.dtype for layer in model.lora_layers} == {torch.bfloat16}
    assert {layer.lora_scaling.dtype for layer in model.lora_layers} == {torch.float32}
    assert {p.dtype for p in model.router.parameters()} == {torch.float32}
    assert run(model).dtype == torch.bfloat16


def test_dropout_follows_its_adapter(tmp_path: Path) -> None:
    model = routed_model(tmp_path)
    model.add_adapter("extra", write_extra(tmp_path, config={"lora_dropout": 0.3}), position=1)
    assert model.lora_layers[0].dropouts == [0.0, 0.3, 0.0, 0.0]
    model.reorder_adapters(["extra", "0", "1", "2"])
    assert model.lora_layers[0].dropouts == [0.3, 0.0, 0.0, 0.0]


# ---------------------------------------------------------------- config, log, caches, files


def test_overrides_go_with_the_adapter_and_its_modules(model: XLoraModel) -> None:
    model.pin_adapter("0", 0.5)
    model.rescale_adapter("2", 2.0, "*.q_proj")
    model.remove_adapter("0")
    assert model.get_adapter_overrides() == (AdapterOverride.scale("2", 2.0, "*.q_proj"),)
    assert list(model.config_xlora.adapters) == ["1", "2"]


@pytest.mark.parametrize("names", [["2", "1", "0"], ["0", "2"]])
def test_the_log_is_cleared_and_goes_on(model: XLoraModel, names: list[str]) -> None:
    model.enable_scalings_logging()
    run(model)
    if "1" in names:
        model.reorder_adapters(names)
    else:
        model.remove_adapter("1")
    assert model.get_scalings_log() == []
    assert model.get_latest_scalings() is None
    run(model)
    (entry,) = model.get_scalings_log()
    assert entry.shape[-1] == len(model.adapter_names)


def test_generation_is_cached_as_exactly_as_before(routed: XLoraModel, tmp_path: Path) -> None:
    routed.add_adapter("extra", write_extra(tmp_path, ("q_proj", "lm_head")), share=0.4)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = routed.generate(input_ids=IDS, **options)
    assert torch.equal(cached, routed.generate(input_ids=IDS, use_cache=False, **options))


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("edit", ["add", "remove", "rename", "reorder"])
def test_an_edited_model_is_saved_and_loaded_as_it_is(
    tmp_path: Path, edit: str, router: str
) -> None:
    model = routed_model(tmp_path, router)
    if edit == "add":
        model.add_adapter(
            "extra", write_extra(tmp_path, ("q_proj", "lm_head")), position=1, share=0.3
        )
    elif edit == "remove":
        model.remove_adapter("1")
    elif edit == "rename":
        model.rename_adapter("1", "../odd name")
    else:
        model.reorder_adapters(["1", "2", "0"])
    model.save_pretrained(tmp_path / "saved")
    again = XLoraModel.from_pretrained(tiny_base(dtype=torch.float64), tmp_path / "saved")
    assert again.adapter_names == model.adapter_names
    assert again.lora_layer_names == model.lora_layer_names
    assert torch.equal(run(again), run(model))


# ---------------------------------------------------------------- PEFT's names


def test_pefts_names_for_it(model: XLoraModel, tmp_path: Path) -> None:
    other = copy.deepcopy(model)
    folder = write_extra(tmp_path)
    model.load_adapter(folder, "extra")
    model.delete_adapter("1")
    other.add_adapter("extra", folder)
    other.remove_adapter("1")
    assert model.adapter_names == other.adapter_names == ["0", "2", "extra"]
    assert same_tensors(model, other)


def test_set_adapter_in_another_order_permutes_nothing(model: XLoraModel) -> None:
    before = run(model)
    model.set_adapter(["2", "0", "1"])
    assert model.adapter_names == ["0", "1", "2"]
    assert torch.equal(run(model), before)
