"""A model whose layers route themselves: what each gate does, and that the rest works as ever."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.gated_models import gated_xlora, randomise_gates
from tests.task_models import TASKS, peft_experts, task_base
from tests.tiny_models import families, tiny_base, tiny_prompt, tiny_xlora, write_experts
from xlora_core import routing
from xlora_core.classifier import XLoraClassifier
from xlora_core.config import AdapterOverride, RoutingKnobs, XLoraConfig
from xlora_core.errors import ConfigError, ModelError
from xlora_core.gates import LayerGates
from xlora_core.layers import XLoraLayer
from xlora_core.model import XLoraModel

FAMILIES = sorted(families())
NEAR = {"atol": 1e-10, "rtol": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> XLoraModel:
    """For tests that change nothing of it but the log."""
    return gated_xlora(tmp_path_factory.mktemp("gated"), dtype=torch.float64)


@torch.no_grad()
def logits_of(model: XLoraModel, ids: Tensor, **options: Any) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False, **options).logits
    return logits


class Seen:
    """Notes what every adapted module was given and gave."""

    def __init__(self, model: XLoraModel) -> None:
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        for layer in model.lora_layers:
            layer.register_forward_hook(self._note)

    def _note(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, XLoraLayer)
        self.inputs[layer.layer_index], self.outputs[layer.layer_index] = inputs[0], output


# -------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_is_mixed_by_its_own_gate(tmp_path: Path, family: str) -> None:
    """``y = W x + g sum_k softmax(gate(x) / T)_k lora_scaling_k B_k A_k x``, module by module."""
    model = gated_xlora(tmp_path, family, dtype=torch.float64)
    seen, ids = Seen(model), tiny_prompt()
    knobs = RoutingKnobs(temperature=0.7, global_weight=1.3)
    logits_of(model, ids, knobs=knobs)
    scalings = model.get_latest_scalings()
    assert scalings is not None
    for index, layer in enumerate(model.lora_layers):
        x, gate = seen.inputs[index], model.gates[index]
        s = torch.softmax((x @ gate.weight.T + gate.bias) / 0.7, dim=-1)
        torch.testing.assert_close(scalings[:, :, index].reshape(s.shape), s, **NEAR)
        y = layer.base_layer(x)
        for k, expert in layer.experts().items():
            change = x @ expert.lora_A.T @ expert.lora_B.T
            y = y + 1.3 * s[..., k, None] * expert.lora_scaling * change
        torch.testing.assert_close(seen.outputs[index], y, **NEAR)
    assert scalings.std(dim=1).mean() > 0.1  # differs from token to token
    assert scalings.std(dim=2).mean() > 0.1  # and from module to module


@pytest.mark.parametrize("name", sorted(TASKS))
def test_any_model_and_kind_of_module(tmp_path: Path, name: str) -> None:
    """The pass that routes itself is the pass under the scalings that it recorded."""
    task = TASKS[name]
    config = XLoraConfig(adapters=peft_experts(tmp_path, name), router="per_layer")
    model = XLoraModel.from_base(task_base(name), config)
    randomise_gates(model)
    inputs = task.inputs()
    with torch.no_grad():
        gated = model.gated_pass(**inputs)
        router_logits = gated.router_logits
        assert router_logits.shape[2:] == (len(model.lora_layers), 3)
        assert router_logits.abs().amax(dim=(0, 1, 3)).min() > 1e-3  # every gate has spoken
        again = model.main_pass(scalings=model.route(router_logits), **inputs)
        base = task_base(name)(**inputs)
    field = "logits" if "logits" in gated.output else "last_hidden_state"
    routed = gated.output[field]
    assert (routed - base[field]).abs().max() > 1e-3
    torch.testing.assert_close(again[field], routed, **NEAR)


def test_an_embeddings_gate_reads_the_base_embedding(tmp_path: Path) -> None:
    name = "adapted embedding"
    config = XLoraConfig(adapters=peft_experts(tmp_path, name), router="per_layer")
    model = XLoraModel.from_base(task_base(name), config)
    randomise_gates(model)
    ids = TASKS[name].inputs()["input_ids"]
    with torch.no_grad():
        rows = model.lora_layers[0].base_layer(ids)
        spoken = model.read_router(input_ids=ids)[:, :, 0]
        torch.testing.assert_close(spoken, model.gates[0](rows), **NEAR)
        # Without ids it does not run: nothing is said there, the other modules go on.
        silent = model.read_router(inputs_embeds=rows)
    assert torch.equal(silent[:, :, 0], torch.zeros_like(spoken))
    assert silent[:, :, 1:].abs().min(dim=-1).values.max() > 0


def test_there_is_no_scaling_pass(tmp_path: Path) -> None:
    calls = []
    model = gated_xlora(tmp_path)
    model.lora_layers[0].register_forward_hook(lambda *_: calls.append(True))
    logits_of(model, tiny_prompt())
    assert len(calls) == 1
    with pytest.raises(ModelError, match="router is 'per_layer', scaling_pass is for the other"):
        model.scaling_pass(input_ids=tiny_prompt())
    with pytest.raises(ModelError, match="router is 'classifier', gated_pass is for the other"):
        tiny_xlora(tmp_path / "classifier").gated_pass(input_ids=tiny_prompt())


@pytest.mark.parametrize(
    "options",
    [
        {"enable_softmax": False},
        {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2},
        {"top_k_lora": 1},
        {"softmax_temperature": 3.0, "global_scaling_weight": -0.5},
    ],
    ids=str,
)
def test_the_configs_routing_holds(tmp_path: Path, options: dict[str, object]) -> None:
    model = gated_xlora(tmp_path, dtype=torch.float64, **options)
    ids = tiny_prompt()
    router_logits = model.read_router(input_ids=ids)
    expected = routing.route(
        router_logits, XLoraConfig(**options), RoutingKnobs.from_config(model.config_xlora)
    )
    with torch.no_grad():
        again = model.main_pass(scalings=expected, input_ids=ids).logits
    torch.testing.assert_close(logits_of(model, ids), again, **NEAR)
    plain = gated_xlora(tmp_path / "plain", dtype=torch.float64)
    assert (logits_of(plain, ids) - again).abs().max() > 1e-2


# -------------------------------------------------------------------- its surface


def test_a_model_has_one_of_the_two_routers(tmp_path: Path, model: XLoraModel) -> None:
    assert isinstance(model.gates, LayerGates)
    assert model.router is model.gates
    assert len(model.gates) == len(model.lora_layers)
    assert not hasattr(model, "classifier")
    with pytest.raises(AttributeError, match="no classifier, its router is 'per_layer'"):
        _ = model.classifier
    other = tiny_xlora(tmp_path)
    assert isinstance(other.router, XLoraClassifier)
    assert other.router is other.classifier
    assert not hasattr(other, "gates")


def test_the_base_models_own_classifier_is_not_taken_for_the_router(tmp_path: Path) -> None:
    name = "encoder with a classification head"
    config = XLoraConfig(adapters=peft_experts(tmp_path, name), router="per_layer")
    model = XLoraModel.from_base(task_base(name), config)
    assert model.base_model.classifier is not None
    assert not hasattr(model, "classifier")


def test_read_router_serves_both_kinds(tmp_path: Path, model: XLoraModel) -> None:
    ids = tiny_prompt()
    for one in (model, tiny_xlora(tmp_path, dtype=torch.float64)):
        router_logits = one.read_router(input_ids=ids)
        assert not router_logits.requires_grad
        with torch.no_grad():
            logits = one.main_pass(scalings=one.route(router_logits), input_ids=ids).logits
        torch.testing.assert_close(logits, logits_of(one, ids), **NEAR)


def test_gates_start_as_the_uniform_mixture(tmp_path: Path) -> None:
    config = XLoraConfig(adapters=write_experts(tmp_path), router="per_layer")
    model = XLoraModel.from_base(tiny_base(), config)
    logits_of(model, tiny_prompt())
    scalings = model.get_latest_scalings()
    assert scalings is not None
    torch.testing.assert_close(scalings, torch.full_like(scalings, 1 / 3))


def test_gates_compute_in_float32_under_a_bfloat16_model(tmp_path: Path) -> None:
    wide = gated_xlora(tmp_path)
    narrow = copy.deepcopy(wide).to(torch.bfloat16)
    assert {p.dtype for p in narrow.gates.parameters()} == {torch.float32}
    assert all(
        torch.equal(a, b)
        for a, b in zip(narrow.gates.parameters(), wide.gates.parameters(), strict=True)
    )
    assert narrow.read_router(input_ids=tiny_prompt()).dtype == torch.float32
    loaded = gated_xlora(tmp_path / "bf16", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.gates.parameters()} == {torch.float32}
    assert logits_of(loaded, tiny_prompt()).dtype == torch.bfloat16


def test_disable_adapter_is_the_base_model(model: XLoraModel) -> None:
    ids = tiny_prompt()
    with model.disable_adapter():
        inside = logits_of(model, ids)
    with torch.no_grad():
        assert torch.equal(inside, tiny_base(dtype=torch.float64)(input_ids=ids).logits)
    assert (logits_of(model, ids) - inside).abs().max() > 1


def test_knobs_of_a_call_and_setters(tmp_path: Path) -> None:
    model = gated_xlora(tmp_path, dtype=torch.float64)
    ids = tiny_prompt()
    plain = logits_of(model, ids)
    knobs = RoutingKnobs(top_k=1, temperature=0.3)
    turned = logits_of(model, ids, knobs=knobs)
    assert (turned - plain).abs().max() > 1e-2
    assert torch.equal(logits_of(model, ids), plain)
    model.set_topk_lora(1)
    model.set_softmax_temperature(0.3)
    assert torch.equal(logits_of(model, ids), turned)
    with pytest.raises(ConfigError, match="from 1 to 3"):
        model(input_ids=ids, knobs=RoutingKnobs(top_k=4))


def test_overrides_reach_single_modules(model: XLoraModel) -> None:
    ids = tiny_prompt()
    seen = Seen(copied := copy.deepcopy(model))
    knobs = RoutingKnobs(
        overrides=[AdapterOverride.pin("1", 0.5, "*.q_proj"), AdapterOverride.mute("0")]
    )
    logits_of(copied, ids, knobs=knobs)
    for index, (path, layer) in enumerate(
        zip(copied.lora_layer_names, copied.lora_layers, strict=True)
    ):
        x = seen.inputs[index]
        s = torch.softmax(copied.gates[index](x), dim=-1).detach()
        s[..., 0] = 0
        if path.endswith("q_proj"):
            s[..., 1] = 0.5
        y = layer.base_layer(x)
        for k, expert in layer.experts().items():
            y = y + s[..., k, None] * expert.lora_scaling * (x @ expert.lora_A.T @ expert.lora_B.T)
        torch.testing.assert_close(seen.outputs[index], y, **NEAR)
