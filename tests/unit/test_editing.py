"""Adding, removing, renaming and reordering adapters: what follows, and what stays."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from tests.edited_models import (
    IDS,
    ROUTERS,
    routed_model,
    router_logits,
    run,
    same_tensors,
    scalings_of,
    write_extra,
)
from tests.task_models import TASKS, peft_experts, task_base
from tests.tiny_models import tiny_base, write_lora
from xlora_core.adapters import read_adapter
from xlora_core.config import XLoraConfig
from xlora_core.editing import Moves, Newcomer, moved_rows
from xlora_core.layers import XLoraLayer
from xlora_core.model import XLoraModel

NEAR = {"atol": 1e-10, "rtol": 0}


@pytest.fixture(params=ROUTERS)
def routed(request: pytest.FixtureRequest, tmp_path: Path) -> XLoraModel:
    return routed_model(tmp_path, request.param)


@pytest.fixture
def model(tmp_path: Path) -> XLoraModel:
    return routed_model(tmp_path)


def alike(model: XLoraModel, of_modules: Tensor) -> Tensor:
    """Returns ``[B, T, L, K]`` of those modules that see the same before and after an edit.

    The scaling pass sees the base model; a gate sees what the mixtures before it left.
    """
    return of_modules[:, :, :1] if model.is_routed_per_layer else of_modules


# ---------------------------------------------------------------- the router's rows


def test_rows_of_pairs_that_stay_are_copied_bit_by_bit() -> None:
    weight, bias = torch.randn(2 * 3, 5), torch.randn(2 * 3)
    moves = Moves(modules=[1, None, 0], adapters=[2, None, 0], n_adapters=3)
    new_weight, new_bias = moved_rows(weight, bias, moves, Newcomer(follows=True, bias=-1.5))
    before, after = weight.reshape(2, 3, 5), new_weight.reshape(3, 3, 5)
    assert torch.equal(after[0, [0, 2]], before[1, [2, 0]])
    assert torch.equal(after[2, [0, 2]], before[0, [2, 0]])
    assert torch.equal(new_bias.reshape(3, 3)[2, [0, 2]], bias.reshape(2, 3)[0, [2, 0]])
    assert not after[1].any()
    assert new_bias.reshape(3, 3)[1].tolist() == [0.0, -1.5, 0.0]
    torch.testing.assert_close(after[0, 1], before[1, [2, 0]].mean(0))


# ---------------------------------------------------------------- reorder


def test_reordered_adapters_keep_their_logits_and_the_outputs(routed: XLoraModel) -> None:
    before, scalings, logits = run(routed), scalings_of(routed), router_logits(routed)
    routed.reorder_adapters(["2", "0", "1"])
    assert routed.adapter_names == ["2", "0", "1"]
    assert list(routed.config_xlora.adapters) == ["2", "0", "1"]
    torch.testing.assert_close(router_logits(routed), logits[..., [2, 0, 1]], **NEAR)
    torch.testing.assert_close(scalings_of(routed), scalings[..., [2, 0, 1]], **NEAR)
    torch.testing.assert_close(run(routed), before, **NEAR)


def test_there_and_back_is_bit_by_bit_the_same_model(routed: XLoraModel) -> None:
    before = copy.deepcopy(routed)
    routed.reorder_adapters(["2", "0", "1"])
    assert not same_tensors(routed, before)
    routed.reorder_adapters(["0", "1", "2"])
    assert same_tensors(routed, before)
    assert torch.equal(run(routed), run(before))


def test_the_order_that_is_the_case_changes_nothing(model: XLoraModel) -> None:
    parameters = list(model.parameters())
    model.reorder_adapters(["0", "1", "2"])
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


# ---------------------------------------------------------------- rename


def test_a_rename_changes_names_and_nothing_else(routed: XLoraModel) -> None:
    routed.mute_adapter("1", "*.q_proj")
    routed.enable_scalings_logging()
    before, parameters = run(routed), list(routed.parameters())
    folder = routed.config_xlora.adapters["1"]
    routed.rename_adapter("1", "a new name")
    assert routed.adapter_names == ["0", "a new name", "2"]
    assert routed.config_xlora.adapters["a new name"] == folder
    assert [o.label for o in routed.get_adapter_overrides()] == ["a new name muted in *.q_proj"]
    assert all(a is b for a, b in zip(parameters, routed.parameters(), strict=True))
    assert torch.equal(run(routed), before)
    assert len(routed.get_scalings_log()) == 2


def test_a_rename_to_its_own_name_is_no_fault(model: XLoraModel) -> None:
    model.rename_adapter("1", "1")
    assert model.adapter_names == ["0", "1", "2"]


# ---------------------------------------------------------------- remove


def test_the_others_share_out_the_mass_of_a_removed_adapter(routed: XLoraModel) -> None:
    logits = router_logits(routed)
    routed.remove_adapter("1")
    assert routed.adapter_names == ["0", "2"]
    assert routed.present.shape == (len(routed.lora_layer_names), 2)
    expected = alike(routed, logits)[..., [0, 2]]
    torch.testing.assert_close(alike(routed, router_logits(routed)), expected, **NEAR)
    scalings = alike(routed, scalings_of(routed))
    torch.testing.assert_close(scalings, expected.softmax(-1).expand_as(scalings), **NEAR)


def test_what_is_left_alone_is_its_plain_lora(routed: XLoraModel) -> None:
    folder = routed.config_xlora.adapters["1"]
    routed.remove_adapter("0")
    routed.remove_adapter("2")
    plain = PeftModel.from_pretrained(
        tiny_base(dtype=torch.float64), folder, autocast_adapter_dtype=False
    )
    with torch.no_grad():
        torch.testing.assert_close(run(routed), plain(input_ids=IDS).logits, **NEAR)


def test_modules_that_nobody_adapts_any_more_are_their_plain_selves(
    routed: XLoraModel, tmp_path: Path
) -> None:
    head, plain = routed.base_model.lm_head, tiny_base(dtype=torch.float64)
    before = copy.deepcopy(routed)
    routed.add_adapter("extra", write_extra(tmp_path, ("lm_head", "q_proj")))
    assert isinstance(routed.base_model.lm_head, XLoraLayer)
    routed.remove_adapter("extra")
    assert routed.base_model.lm_head is head
    assert same_tensors(routed, before)
    # The other way round: everything but one adapter of two modules goes.
    routed.add_adapter("extra", write_extra(tmp_path, ("v_proj",)))
    for name in ("0", "1", "2"):
        routed.remove_adapter(name)
    adapted = [f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)]
    assert routed.lora_layer_names == adapted
    found = {path: type(module) for path, module in routed.base_model.named_modules()}
    for path, module in plain.named_modules():
        assert (found[path] is type(module)) == (path not in adapted)


# ---------------------------------------------------------------- add


def test_a_new_adapter_takes_at_most_its_share(routed: XLoraModel, tmp_path: Path) -> None:
    logits, scalings = router_logits(routed), scalings_of(routed)
    routed.add_adapter("extra", write_extra(tmp_path), position=1, share=0.05)
    assert routed.adapter_names == ["0", "extra", "1", "2"]
    now = alike(routed, router_logits(routed))[..., [0, 2, 3]]
    torch.testing.assert_close(now, alike(routed, logits), **NEAR)
    after = scalings_of(routed)
    assert 0 < after[..., 1].min() < after[..., 1].max() <= 0.05
    rest = alike(routed, after)[..., [0, 2, 3]]
    rest = rest / rest.sum(-1, keepdim=True)
    torch.testing.assert_close(rest, alike(routed, scalings), **NEAR)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_it_takes_just_its_share_of_a_router_without_preferences(
    tmp_path: Path, temperature: float
) -> None:
    model = routed_model(tmp_path, "layerwise", softmax_temperature=temperature)
    nn.init.zeros_(model.classifier.layers[-1].weight)
    nn.init.constant_(model.classifier.layers[-1].bias, 2.0)
    model.add_adapter("extra", write_extra(tmp_path), share=0.2)
    expected = torch.tensor([0.8 / 3] * 3 + [0.2], dtype=torch.float64)
    scalings = scalings_of(model)
    torch.testing.assert_close(scalings, expected.expand_as(scalings), **NEAR)


def test_without_a_softmax_its_scaling_is_the_share(tmp_path: Path) -> None:
    model = routed_model(tmp_path, "layerwise", enable_softmax=False)
    before = scalings_of(model)
    model.add_adapter("extra", write_extra(tmp_path), share=0.3)
    after = scalings_of(model)
    torch.testing.assert_close(after[..., :3], before, **NEAR)
    torch.testing.assert_close(after[..., 3], torch.full_like(after[..., 3], 0.3), **NEAR)


def test_a_softmax_over_the_kept_ones_knows_no_temperature(tmp_path: Path) -> None:
    settings = {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 3}
    model = routed_model(tmp_path, "layerwise", **settings, softmax_temperature=5.0)
    nn.init.zeros_(model.classifier.layers[-1].weight)
    nn.init.zeros_(model.classifier.layers[-1].bias)
    model.add_adapter("extra", write_extra(tmp_path), share=0.1)
    model.set_topk_lora(4)
    effective = model.route(router_logits(model))
    torch.testing.assert_close(effective[..., 3], torch.full_like(effective[..., 3], 0.1), **NEAR)


def test_new_modules_are_routed_and_the_others_are_absent_there(
    routed: XLoraModel, tmp_path: Path
) -> None:
    n_before, names = len(routed.lora_layer_names), routed.lora_layer_names
    routed.add_adapter("extra", write_extra(tmp_path, ("lm_head", "q_proj")), share=0.25)
    assert routed.lora_layer_names == [*names, "lm_head"]
    assert [layer.layer_index for layer in routed.lora_layers] == list(range(n_before + 1))
    assert routed.present[-1].tolist() == [False, False, False, True]
    assert routed.present[0].tolist() == [True, True, True, True]
    scalings = scalings_of(routed)
    if not routed.is_routed_per_layer and not routed.config_xlora.layerwise_scalings:
        torch.testing.assert_close(scalings[..., -1, :], scalings[..., 0, :], **NEAR)
    else:
        expected = torch.tensor([0.25] * 4, dtype=torch.float64)
        torch.testing.assert_close(
            scalings[..., -1, :], expected.expand_as(scalings[..., -1, :]), **NEAR
        )


def test_modules_in_the_middle_are_numbered_as_the_model_has_them(tmp_path: Path) -> None:
    base = tiny_base(dtype=torch.float64)
    folders = {
        name: str(write_lora(tmp_path / name, base, targets, seed=seed))
        for seed, (name, targets) in enumerate(
            {"first": ("v_proj", "down_proj"), "second": ("q_proj", "down_proj")}.items()
        )
    }
    model = XLoraModel.from_base(
        base, XLoraConfig(adapters={"first": folders["first"]}, layerwise_scalings=True)
    )
    nn.init.normal_(model.classifier.layers[-1].weight)
    logits = dict(zip(model.lora_layer_names, router_logits(model).unbind(2), strict=True))
    model.add_adapter("second", folders["second"])
    ends = [path.rpartition(".")[2] for path in model.lora_layer_names]
    assert ends == ["q_proj", "v_proj", "down_proj"] * 2
    after = dict(zip(model.lora_layer_names, router_logits(model).unbind(2), strict=True))
    for path, before in logits.items():
        torch.testing.assert_close(after[path][..., :1], before, **NEAR)


def test_add_then_remove_is_bit_by_bit_the_model_of_before(
    routed: XLoraModel, tmp_path: Path
) -> None:
    before, config = copy.deepcopy(routed), routed.config_xlora
    folder, state = write_extra(tmp_path, ("q_proj", "lm_head")), torch.get_rng_state()
    routed.add_adapter("extra", folder, position=0, share=0.4)
    assert torch.equal(torch.get_rng_state(), state)  # nobody's random numbers were taken
    routed.remove_adapter("extra")
    assert same_tensors(routed, before)
    assert torch.equal(run(routed), run(before))
    assert routed.config_xlora == config
    assert routed.lora_layer_names == before.lora_layer_names


def test_an_adapter_that_was_read_already(model: XLoraModel, tmp_path: Path) -> None:
    other = copy.deepcopy(model)
    folder = write_extra(tmp_path)
    model.add_adapter("extra", folder)
    other.add_adapter("extra", read_adapter("under another name", folder))
    assert other.adapter_names == model.adapter_names
    assert same_tensors(other, model)
    assert list(other.config_xlora.adapters) == ["0", "1", "2", "extra"]


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_kind_of_module(name: str, tmp_path: Path) -> None:
    folders = peft_experts(tmp_path, name, 3)
    config = {"layerwise_scalings": True, "enable_softmax": False}
    inputs = TASKS[name].inputs()

    def built(names: list[str]) -> XLoraModel:
        chosen = {name: folders[name] for name in names}
        return XLoraModel.from_base(task_base(name), XLoraConfig(adapters=chosen, **config))  # type: ignore[arg-type]

    @torch.no_grad()
    def output(model: XLoraModel) -> Tensor:
        weights = dict(zip(("e0", "e1", "e2"), (0.7, -0.4, 0.9), strict=True))
        scalings = torch.tensor([weights[n] for n in model.adapter_names], dtype=torch.float64)
        first: Tensor = model.main_pass(scalings=scalings, **inputs)[0]
        return first

    edited = built(["e1", "e2"])
    edited.add_adapter("e0", folders["e0"], position=0)
    whole = built(["e0", "e1", "e2"])
    assert [layer.state_dict().keys() for layer in edited.lora_layers] == [
        layer.state_dict().keys() for layer in whole.lora_layers
    ]
    for mine, theirs in zip(edited.lora_layers, whole.lora_layers, strict=True):
        assert same_tensors(mine, theirs)
    torch.testing.assert_close(output(edited), output(whole), atol=0, rtol=0)
    edited.remove_adapter("e1")
    torch.testing.assert_close(output(edited), output(built(["e0", "e2"])), atol=0, rtol=0)


def test_a_bias_goes_with_the_adapter_that_brought_it(model: XLoraModel, tmp_path: Path) -> None:
    before = copy.deepcopy(model)
    adapter = read_adapter("biased", write_extra(tmp_path))
    modules = {
        path: replace(weights, bias=torch.ones(weights.lora_B.shape[0]))
        for path, weights in adapter.modules.items()
    }
    model.add_adapter("biased", replace(adapter, modules=modules))
    biased = next(layer for layer in model.lora_layers if layer.lora_bias is not None)
    assert biased.lora_bias is not None
    assert biased.lora_bias.sum(1).tolist() == [biased.lora_bias.shape[1]]
    model.remove_adapter("biased")
    assert same_tensors(model, before)
