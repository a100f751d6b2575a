"""A model whose layers route themselves: what each gate does, and that the rest works as ever."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.gated_models import gated_xlora, randomise_gates
from tests.gradients import backward, trainable
from tests.task_models import TASKS, peft_experts, task_base
from tests.tiny_models import families, tiny_base, tiny_prompt, tiny_xlora, write_experts
from tests.unit.test_threads import at_once, in_step
from xlora_core import routing
from xlora_core.checkpoint import read_checkpoint, write_original, write_peft
from xlora_core.classifier import XLoraClassifier
from xlora_core.config import AdapterOverride, RoutingKnobs, XLoraConfig
from xlora_core.errors import CheckpointError, ConfigError, ModelError
from xlora_core.freezing import approximation_loss, freeze_rows
from xlora_core.gates import LayerGates
from xlora_core.kv_cache import DualCache, GatedCache
from xlora_core.layers import XLoraLayer
from xlora_core.model import XLoraModel
from xlora_core.training.data import IGNORE, Example

FAMILIES = sorted(families())
NEAR = {"atol": 1e-10, "rtol": 0}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> XLoraModel:
    """For tests that change nothing of it but the log."""
    return gated_xlora(tmp_path_factory.mktemp("gated"), dtype=torch.float64)


def mask_of(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


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


# -------------------------------------------------------------------- caches, generation, log


def test_an_ordinary_single_cache(model: XLoraModel) -> None:
    ids = tiny_prompt()
    cache = model.new_cache()
    assert isinstance(cache, GatedCache)
    with torch.no_grad():
        blocks = [
            model(input_ids=part, past_key_values=cache).logits
            for part in ids.split((4, 1, 4), dim=1)
        ]
    torch.testing.assert_close(torch.cat(blocks, dim=1), logits_of(model, ids), **NEAR)
    assert cache.get_seq_length() == 9
    assert repr(cache) == "GatedCache(tokens=9)"
    cache.crop(-3)
    with torch.no_grad():
        model(input_ids=ids[:, 6:], past_key_values=cache)
    scalings = model.get_latest_scalings()
    logits_of(model, ids)
    torch.testing.assert_close(scalings, model.get_latest_scalings(), **NEAR)
    for wrong in (DualCache(model.base_model.config), cache.main):
        with pytest.raises(ModelError, match="must be a GatedCache, got D"):
            model(input_ids=ids, past_key_values=wrong)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=["greedy", "beams", "sampling", "several"],
)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_generation_with_the_cache_is_that_without(
    tmp_path: Path, family: str, options: dict[str, object]
) -> None:
    model = gated_xlora(tmp_path, family, dtype=torch.float64)
    written = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        written.append(
            model.generate(
                **mask_of(tiny_prompt()),
                use_cache=use_cache,
                max_new_tokens=6,
                eos_token_id=None,
                **options,
            )
        )
    assert torch.equal(*written)


@torch.no_grad()
def test_greedy_generation_is_the_loop_written_out(model: XLoraModel) -> None:
    ids = tiny_prompt()
    tokens = model.generate(**mask_of(ids), **GREEDY)
    for _ in range(6):
        ids = torch.cat([ids, logits_of(model, ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens, ids)


def test_a_cached_generation_logs_what_an_uncached_one_does(tmp_path: Path) -> None:
    logs = []
    for use_cache in (True, False):
        model = gated_xlora(tmp_path / str(use_cache), dtype=torch.float64)
        model.enable_scalings_logging()
        model.generate(**mask_of(tiny_prompt()), use_cache=use_cache, **GREEDY)
        model.disable_scalings_logging()
        logs.append((model.get_scalings_log(), model.get_bucketed_scalings_log()))
    (cached, buckets), (uncached, uncached_buckets) = logs
    assert [t.shape for t in cached] == [(2, 9 + i, 14, 3) for i in range(6)]
    for mine, other in zip(cached, uncached, strict=True):
        torch.testing.assert_close(mine, other, **NEAR)
        torch.testing.assert_close(mine.sum(-1), torch.ones_like(mine[..., 0]), **NEAR)
        assert not mine.requires_grad
    assert list(buckets) == list(uncached_buckets) == list(range(9, 15))
    assert [positions for positions, _ in buckets.values()] == [[i] for i in range(6)]


def test_the_log_follows_the_beams(model: XLoraModel) -> None:
    """Beams change places at every step; the rows of earlier tokens must go with them."""
    tokens = model.generate(
        **mask_of(tiny_prompt(batch=1)), num_beams=3, num_return_sequences=3, **GREEDY
    )
    latest = model.get_latest_scalings()
    assert latest is not None
    logits_of(model, tokens[:, :-1])
    expected = model.get_latest_scalings()
    assert expected is not None
    # Each text that came back is one of the beams that the last step read, and a token more.
    for row in expected:
        assert min(float((row - other).abs().max()) for other in latest) < 1e-10


def test_an_adapted_head_reads_all_tokens(tmp_path: Path) -> None:
    name = "tied embedding and head, both adapted"
    config = XLoraConfig(adapters=peft_experts(tmp_path, name), router="per_layer")
    model = XLoraModel.from_base(task_base(name), config).eval()
    randomise_gates(model)
    ids = tiny_prompt()
    with torch.no_grad():
        gated = model.gated_pass(input_ids=ids, logits_to_keep=1)
    assert gated.output.logits.shape[1] == 1
    assert gated.router_logits.shape[:2] == ids.shape
    torch.testing.assert_close(gated.output.logits, logits_of(model, ids)[:, -1:], **NEAR)


def test_threads_with_different_knobs(tmp_path: Path) -> None:
    model = gated_xlora(tmp_path, dtype=torch.float64)
    prompts = (tiny_prompt(), tiny_prompt(seed=1))
    knobs = (RoutingKnobs(top_k=1), RoutingKnobs(temperature=3.0, global_weight=-1.0))

    def write(which: int) -> Tensor:
        tokens: Tensor = model.generate(**mask_of(prompts[which]), knobs=knobs[which], **GREEDY)
        return tokens

    alone = [write(0), write(1)]
    assert not torch.equal(
        alone[0], model.generate(**mask_of(prompts[0]), knobs=knobs[1], **GREEDY)
    )
    with in_step(*model.lora_layers):
        together = at_once(lambda: write(0), lambda: write(1))
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[1], alone[1])


# -------------------------------------------------------------------- learning


def test_only_the_gates_learn(tmp_path: Path) -> None:
    model = gated_xlora(tmp_path).train()
    assert set(trainable(model)) == {
        f"gates.{i}.{part}" for i in range(14) for part in ("weight", "bias")
    }
    _, gradients = backward(model, tiny_prompt())
    assert all(gradient.abs().max() > 1e-6 for gradient in gradients.values())
    learning, _ = model.get_nb_trainable_parameters()
    widths = [layer.gate_features for layer in model.lora_layers]
    assert learning == sum(3 * (width + 1) for width in widths)


def test_gradients_are_right(tmp_path: Path) -> None:
    """Against finite differences of the loss; GPT-2 computes in float64 throughout."""
    model = gated_xlora(tmp_path, "gpt2", dtype=torch.float64)
    ids = tiny_prompt()

    def loss() -> Tensor:
        logits = model(input_ids=ids).logits[:, :-1]  # Hugging Face's own loss is in float32
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    loss().backward()
    for index in (0, len(model.gates) - 1):
        weight = model.gates[index].weight
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[1, 2] += sign * 1e-5
                losses.append(float(loss()))
                weight[1, 2] -= sign * 1e-5
        slope = (losses[0] - losses[1]) / 2e-5
        assert abs(slope) > 1e-5
        assert weight.grad[1, 2].item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("trains_adapters", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_loss_and_no_gradient(
    tmp_path: Path, family: str, trains_adapters: bool, use_reentrant: bool
) -> None:
    model = gated_xlora(
        tmp_path, family, dtype=torch.float64, use_trainable_adapters=trains_adapters
    ).train()
    prompts = (tiny_prompt(), tiny_prompt(seed=1, batch=1, length=5))
    loss, gradients = backward(model, *prompts)
    assert all(gradient.abs().max() > 1e-8 for gradient in gradients.values())
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    model.lora_layers[0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    checkpointed_loss, checkpointed = backward(model, *prompts)
    assert len(calls) == 4  # each prompt's pass, and again inside backward
    assert checkpointed_loss == pytest.approx(loss, abs=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-10, rtol=1e-8)
    scalings = model.get_latest_scalings()
    assert scalings is not None
    assert scalings.shape == (1, 5, len(model.lora_layers), 3)


def test_router_logits_carry_a_gradient(tmp_path: Path) -> None:
    """What losses on the routing itself need."""
    model = gated_xlora(tmp_path, dtype=torch.float64).train()
    gated = model.gated_pass(input_ids=tiny_prompt())
    gated.router_logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.gates.parameters())


def test_it_learns_to_prefer_the_expert_that_helps(tmp_path: Path) -> None:
    """The text is what expert "1" alone writes; the gates start uniform."""
    config = XLoraConfig(adapters=write_experts(tmp_path), router="per_layer")
    model = XLoraModel.from_base(tiny_base(), config)
    alone = torch.tensor([0.0, 1.0, 0.0])
    with torch.no_grad():
        ids = tiny_prompt(batch=8)
        wanted = model.main_pass(input_ids=ids, scalings=alone).logits.softmax(-1)
    optimiser = torch.optim.Adam(model.gates.parameters(), lr=0.05)
    losses = []
    for _ in range(40):
        loss = -(wanted * model(input_ids=ids).logits.log_softmax(-1)).sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    logits_of(model, ids)
    scalings = model.get_latest_scalings()
    assert scalings is not None
    assert scalings[..., 1].mean() > 0.7


# -------------------------------------------------------------------- keeping, merging


@pytest.mark.parametrize("name", ["llama", "adapted embedding"])
def test_a_checkpoint_brings_it_back(tmp_path: Path, name: str) -> None:
    if name in TASKS:
        fresh: Callable[[], Any] = lambda: task_base(name)  # noqa: E731  # one of two
        config = XLoraConfig(adapters=peft_experts(tmp_path, name), router="per_layer")
        model = XLoraModel.from_base(fresh(), config).eval()
        randomise_gates(model)
    else:
        fresh = lambda: tiny_base(dtype=torch.float64)  # noqa: E731  # the other
        model = gated_xlora(tmp_path, dtype=torch.float64)
    model.set_topk_lora(2)
    model.save_pretrained(tmp_path / "checkpoint")
    loaded = XLoraModel.from_pretrained(fresh(), tmp_path / "checkpoint").eval()
    assert loaded.config_xlora.router == "per_layer"
    assert torch.equal(logits_of(loaded, tiny_prompt()), logits_of(model, tiny_prompt()))
    for name_, tensor in model.gates.state_dict().items():
        assert torch.equal(loaded.gates.state_dict()[name_], tensor)


def test_trained_experts_are_saved_beside_the_gates(tmp_path: Path) -> None:
    model = gated_xlora(tmp_path, use_trainable_adapters=True)
    with torch.no_grad():
        model.lora_layers[3].lora_B.mul_(1.7)
    model.save_pretrained(tmp_path / "checkpoint")
    loaded = XLoraModel.from_pretrained(tiny_base(), tmp_path / "checkpoint").eval()
    assert torch.equal(logits_of(loaded, tiny_prompt()), logits_of(model, tiny_prompt()))


def test_damaged_gates_are_refused(tmp_path: Path) -> None:
    model = gated_xlora(tmp_path)
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    path = folder / "classifier.safetensors"
    good = load_file(path)
    assert sorted(good) == sorted(f"gates.{i}.{p}" for i in range(14) for p in ("weight", "bias"))
    for change, message in (
        ({"gates.3.bias": None}, "gates.3.bias is missing"),
        ({"gates.14.bias": torch.zeros(3)}, "gates.14.bias is not known"),
        ({"gates.2.weight": torch.zeros(4, 32)}, r"gates.2.weight must be \[3, inputs\]"),
        ({"gates.2.bias": torch.zeros(3, 1)}, r"gates.2.bias must be \[3\], found \[3, 1\]"),
        (
            {"gates.6.weight": torch.zeros(3, 31)},
            "gate of module model.layers.0.mlp.down_proj reads 31 values, .* input has 48",
        ),
        ({"gates.0.bias": torch.full((3,), float("nan"))}, "NaN"),
    ):
        tensors = {k: v for k, v in (good | change).items() if v is not None}
        save_file(tensors, path, metadata={"format": "pt"})
        base = tiny_base()
        with pytest.raises(CheckpointError, match=message):
            XLoraModel.from_pretrained(base, folder)
        assert not any(isinstance(module, XLoraLayer) for module in base.modules())


def test_no_other_layout_can_hold_gates(tmp_path: Path) -> None:
    gated_xlora(tmp_path).save_pretrained(tmp_path / "checkpoint")
    checkpoint = read_checkpoint(tmp_path / "checkpoint")
    for write in (write_peft, write_original):
        with pytest.raises(CheckpointError, match="no router 'per_layer'"):
            write(tmp_path / "out", checkpoint)
        assert not (tmp_path / "out").exists()


def test_gates_follow_their_modules_by_name(tmp_path: Path) -> None:
    """A checkpoint whose header lists the modules in another order loads as the same model."""
    model = gated_xlora(tmp_path)
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0)).tolist()
    header = json.loads((folder / "xlora.json").read_text())
    header["layer_names"] = [header["layer_names"][i] for i in order]
    (folder / "xlora.json").write_text(json.dumps(header))
    path = folder / "classifier.safetensors"
    tensors = load_file(path)
    shuffled = {
        f"gates.{new}.{part}": tensors[f"gates.{old}.{part}"]
        for new, old in enumerate(order)
        for part in ("weight", "bias")
    }
    save_file(shuffled, path, metadata={"format": "pt"})
    loaded = XLoraModel.from_pretrained(tiny_base(), folder).eval()
    assert torch.equal(logits_of(loaded, tiny_prompt()), logits_of(model, tiny_prompt()))


def test_merging_leaves_a_plain_model(tmp_path: Path) -> None:
    model = gated_xlora(tmp_path, dtype=torch.float64)
    ids = tiny_prompt()
    with torch.no_grad():
        wanted = model.main_pass(input_ids=ids, scalings=torch.tensor([0.2, 0.5, 0.3])).logits
        merged = model.merge_and_unload([0.2, 0.5, 0.3])
        torch.testing.assert_close(merged(input_ids=ids).logits, wanted, atol=1e-6, rtol=0)
    with pytest.raises(ModelError, match="was merged"):
        model(input_ids=ids)


@torch.no_grad()
def test_it_freezes_into_a_constant_mixture(model: XLoraModel) -> None:
    """Merging's own measures work on it: the mean over texts, and what it loses."""
    ids = tiny_prompt(batch=3)
    rows = [
        Example(input_ids=row, labels=[IGNORE, *row[1:]], domains=[""] * len(row))
        for row in ids.tolist()
    ]
    frozen = freeze_rows(model, rows, tokens="all", name="texts")
    scalings = model.route(model.read_router(input_ids=ids))
    torch.testing.assert_close(frozen.weights, scalings.mean(dim=(0, 1)), **NEAR)
    report = approximation_loss(model, frozen.weights, rows)
    logits = logits_of(model, ids)[:, :-1].flatten(0, 1)
    wanted = nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    assert report.arms["routed"].cross_entropy == pytest.approx(float(wanted), abs=1e-9)
    assert report.arms["routed"].kl == pytest.approx(0, abs=1e-9)
    assert report.arms["frozen"].kl > 1e-3


@torch.no_grad()
def test_a_cache_that_a_failed_call_left_half_filled_is_refused(tmp_path: Path) -> None:
    """Its first layers hold tokens that its last ones never read."""
    model = gated_xlora(tmp_path)
    ids, cache = tiny_prompt(), model.new_cache()
    model(input_ids=ids[:, :4], past_key_values=cache)
    hook = model.lora_layers[-1].register_forward_pre_hook(_fail)
    with pytest.raises(MemoryError):
        model(input_ids=ids[:, 4:], past_key_values=cache)
    hook.remove()
    with pytest.raises(ModelError, match="with this GatedCache failed half way"):
        model(input_ids=ids[:, 4:], past_key_values=cache)
    cache.reset()
    logits = model(input_ids=ids, past_key_values=cache).logits
    torch.testing.assert_close(logits, logits_of(model, ids), atol=1e-5, rtol=0)


def _fail(*_: object) -> None:
    raise MemoryError
