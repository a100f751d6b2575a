"""Overrides: pinned, muted and rescaled adapters, in routing, in the model and in the engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.pacer import Pacer
from tests.tiny_chat import EXPERTS, tiny_chat_xlora, tiny_tokenizer
from tests.tiny_models import tiny_base, tiny_prompt, tiny_xlora, write_experts, write_lora
from xlora_core import AdapterOverride, Arm, Engine, RoutingKnobs, SamplingParams, XLoraConfig
from xlora_core.errors import ConfigError
from xlora_core.model import XLoraModel
from xlora_core.routing import effective_scalings, override_matrix, route

pin, scale, mute = AdapterOverride.pin, AdapterOverride.scale, AdapterOverride.mute

NAMES = ("math", "code", "verse")
LAYERS = ("model.layers.0.q_proj", "model.layers.0.v_proj", "model.layers.1.q_proj")


def knobs_of(*overrides: AdapterOverride, **knobs: object) -> RoutingKnobs:
    return RoutingKnobs(overrides=overrides, **knobs)  # type: ignore[arg-type]  # RoutingKnobs' own


# -------------------------------------------------------------------- numbers by hand

SCALINGS = torch.tensor([[[0.5, 0.3, 0.2]]], dtype=torch.float64).expand(1, 3, 3)


def effective(*overrides: AdapterOverride, **knobs: object) -> list[list[float]]:
    matrix = override_matrix(knobs_of(*overrides), LAYERS, NAMES, dtype=torch.float64)
    rows = effective_scalings(SCALINGS, overrides=matrix, **knobs)  # type: ignore[arg-type]  # its own
    return [[round(x, 9) for x in row] for row in rows[0].tolist()]


def test_an_override_acts_between_top_k_and_the_global_weight() -> None:
    """And the other adapters keep what they had: nothing is normalised anew."""
    assert effective(mute("math")) == [[0, 0.3, 0.2]] * 3
    assert effective(pin("math", -2)) == [[-2, 0.3, 0.2]] * 3
    assert effective(scale("math", 3)) == [[1.5, 0.3, 0.2]] * 3
    # Top-k keeps math; verse acts all the same where it is pinned, but not where it is rescaled.
    assert effective(pin("verse", 0.7), top_k=1) == [[0.5, 0, 0.7]] * 3
    assert effective(scale("verse", 0.7), top_k=1) == [[0.5, 0, 0]] * 3
    assert effective(mute("math"), top_k=1) == [[0, 0, 0]] * 3
    assert effective(pin("verse", 0.7), top_k=1, global_weight=2.0) == [[1, 0, 1.4]] * 3
    assert effective(pin("verse", 0.7), global_weight=0.0) == [[0, 0, 0]] * 3


def test_a_softmax_over_the_kept_is_taken_before_overrides() -> None:
    kept = effective(top_k=2, enable_softmax_topk=True)[0]
    assert sum(kept) == pytest.approx(1)
    muted = effective(mute("math"), top_k=2, enable_softmax_topk=True)
    assert muted == [[0, kept[1], 0]] * 3


def test_modules_differ_where_overrides_do_and_the_later_one_holds() -> None:
    rows = effective(mute("math"), pin("math", 1, "*.q_proj"), scale("math", 2, LAYERS[2]))
    assert rows == [[1, 0.3, 0.2], [0, 0.3, 0.2], [1.0, 0.3, 0.2]]
    assert effective(pin("math", 1, "*.q_proj"), mute("math")) == [[0, 0.3, 0.2]] * 3


def test_shared_logits_become_rows_only_where_modules_differ() -> None:
    logits = torch.zeros(2, 5, 1, 3)
    names = {"layer_names": LAYERS, "adapter_names": NAMES}
    shared = route(logits, XLoraConfig(), knobs_of(mute("code")), **names)
    assert shared.shape == (2, 5, 1, 3)
    rows = route(logits, XLoraConfig(), knobs_of(mute("code"), pin("math", 1, "*.v_proj")), **names)
    assert rows.shape == (2, 5, 3, 3)
    third = pytest.approx(1 / 3)
    assert rows[1, 4].tolist() == [[third, 0, third], [1, 0, third], [third, 0, third]]


def test_overrides_without_names_are_refused_not_ignored() -> None:
    with pytest.raises(ConfigError, match="override of 'math': there is no such adapter"):
        route(torch.zeros(1, 3, 3), XLoraConfig(), knobs_of(mute("math")))


def test_a_value_beyond_the_dtype_is_its_largest() -> None:
    matrix = override_matrix(knobs_of(scale("math", 1e300), pin("code", -1e300)), LAYERS, NAMES)
    assert matrix is not None
    largest = torch.finfo(torch.float32).max
    assert matrix.factor[0].tolist() == [largest, 0, 1]
    assert matrix.pin[0].tolist() == [0, -largest, 0]


def test_what_inference_has_resolved_serves_training_too() -> None:
    """A tensor made in inference mode cannot be saved for a backward pass."""
    knobs = knobs_of(scale("math", 0.123))
    names = {"layer_names": LAYERS, "adapter_names": NAMES}
    with torch.inference_mode():
        route(torch.zeros(1, 3, 3), XLoraConfig(), knobs, **names)
    logits = torch.zeros(1, 3, 3, requires_grad=True)
    route(logits, XLoraConfig(), knobs, **names)[..., 0].sum().backward()
    # d s_0 / d z_0 = s_0 (1 - s_0), times the factor
    assert logits.grad is not None
    assert logits.grad[0, :, 0].tolist() == pytest.approx([0.123 * 2 / 9] * 3)


# -------------------------------------------------------------------- the model


@pytest.fixture(scope="module")
def shared_model(tmp_path_factory: pytest.TempPathFactory) -> XLoraModel:
    return tiny_xlora(tmp_path_factory.mktemp("experts"))


@pytest.fixture
def model(shared_model: XLoraModel) -> Iterator[XLoraModel]:
    yield shared_model
    shared_model.clear_adapter_overrides()
    shared_model.set_global_scaling_weight(1.0)
    shared_model.set_scaling_pass_value(0.0)
    shared_model.set_topk_lora(None)


def logits_of(model: XLoraModel, knobs: RoutingKnobs | None = None) -> torch.Tensor:
    with torch.no_grad():
        out = model(input_ids=tiny_prompt(), knobs=knobs, use_cache=False)
    logits: torch.Tensor = out.logits
    return logits


def with_scalings(model: XLoraModel, scalings: torch.Tensor | None) -> torch.Tensor:
    with torch.no_grad():
        out = model.main_pass(scalings=scalings, input_ids=tiny_prompt(), use_cache=False)
    logits: torch.Tensor = out.logits
    return logits


def test_setters_steer_the_main_pass(model: XLoraModel) -> None:
    first, second, third = model.adapter_names
    plain = logits_of(model)
    scalings = model.get_latest_scalings()
    assert scalings is not None
    model.pin_adapter(first, 0.75)
    model.rescale_adapter(second, 1.5, "*.q_proj")
    model.mute_adapter(third, ["*.v_proj", model.lora_layer_names[0]])
    expected = scalings.clone()
    expected[..., 0] = 0.75
    names = model.lora_layer_names
    for index, name in enumerate(names):
        if name.endswith(".q_proj"):
            expected[:, :, index, 1] *= 1.5
        if name.endswith(".v_proj") or index == 0:
            expected[:, :, index, 2] = 0
    steered = logits_of(model)
    assert (steered - plain).abs().max() > 0.1
    torch.testing.assert_close(steered, with_scalings(model, expected))
    # What is logged is the router's, as with top-k.
    torch.testing.assert_close(model.get_latest_scalings(), scalings)
    assert model.get_adapter_overrides()[0].label == f"{first} pinned at 0.75"
    model.clear_adapter_overrides(first)
    assert {o.adapter for o in model.get_adapter_overrides()} == {second, third}
    model.clear_adapter_overrides()
    assert model.get_adapter_overrides() == ()
    torch.testing.assert_close(logits_of(model), plain)


def test_a_call_with_knobs_takes_its_own_overrides_only(model: XLoraModel) -> None:
    plain = logits_of(model)
    model.mute_adapter(model.adapter_names[0])
    torch.testing.assert_close(logits_of(model, RoutingKnobs()), plain)
    own = knobs_of(pin(model.adapter_names[1], 1.0))
    assert (logits_of(model, own) - logits_of(model)).abs().max() > 0.01


def test_all_muted_or_no_weight_is_the_base_model(model: XLoraModel) -> None:
    base = with_scalings(model, None)
    assert (logits_of(model) - base).abs().max() > 0.1
    torch.testing.assert_close(
        logits_of(model, knobs_of(*map(mute, model.adapter_names))), base, atol=1e-6, rtol=0
    )
    pinned = knobs_of(*(pin(name, 3.0) for name in model.adapter_names), global_weight=0.0)
    torch.testing.assert_close(logits_of(model, pinned), base, atol=1e-6, rtol=0)


def test_one_pinned_at_1_and_the_others_muted_is_plain_lora(model: XLoraModel) -> None:
    first, second, third = model.adapter_names
    alone = knobs_of(mute(first), pin(second, 1.0), mute(third), top_k=1)
    expected = with_scalings(model, torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(logits_of(model, alone), expected)


@pytest.mark.parametrize("scaling_pass_value", [0.0, 0.4])
def test_the_router_does_not_know_of_overrides(
    model: XLoraModel, scaling_pass_value: float
) -> None:
    model.set_scaling_pass_value(scaling_pass_value)
    overrides = (mute(model.adapter_names[0]), pin(model.adapter_names[1], 9.0, "*.q_proj"))
    ids = tiny_prompt()
    plain = model.scaling_pass(input_ids=ids, knobs=RoutingKnobs()).router_logits
    steered = model.scaling_pass(input_ids=ids, knobs=knobs_of(*overrides)).router_logits
    assert torch.equal(steered, plain)
    for override in overrides:
        model._override(override)
    assert torch.equal(model.scaling_pass(input_ids=ids).router_logits, plain)


@pytest.mark.parametrize("layerwise", [True, False])
def test_cached_generation_under_overrides_is_uncached_generation(
    tmp_path: Path, layerwise: bool
) -> None:
    model = tiny_xlora(tmp_path, layerwise_scalings=layerwise)
    ids = tiny_prompt(batch=1)
    options = {"max_new_tokens": 8, "do_sample": False}
    plain = model.generate(input_ids=ids, **options)
    model.mute_adapter(model.adapter_names[0], "*.q_proj")
    model.pin_adapter(model.adapter_names[1], 1.5)
    cached = model.generate(input_ids=ids, **options)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **options))
    assert not torch.equal(cached, plain)


def test_setters_refuse_what_the_model_does_not_have(model: XLoraModel) -> None:
    name = model.adapter_names[0]
    with pytest.raises(ConfigError, match="override of 'law': there is no such adapter"):
        model.mute_adapter("law")
    with pytest.raises(ConfigError, match=r"no adapted module matches '\*\.c_attn'; there are 14"):
        model.pin_adapter(name, 1.0, "*.c_attn")
    with pytest.raises(ConfigError, match="value must be a finite number, got inf"):
        model.rescale_adapter(name, float("inf"))
    with pytest.raises(ConfigError, match="there is no adapter 'law' in this model"):
        model.clear_adapter_overrides("law")
    with pytest.raises(ConfigError, match="override of 'law'"):
        logits_of(model, knobs_of(mute("law")))
    assert model.get_adapter_overrides() == ()


def test_overrides_reach_the_checkpoint_and_come_back(model: XLoraModel, tmp_path: Path) -> None:
    model.mute_adapter(model.adapter_names[0], ["*.q_proj", "*.v_proj"])
    model.pin_adapter(model.adapter_names[2], 0.25)
    model.save_pretrained(tmp_path / "checkpoint")
    again = XLoraModel.from_pretrained(tiny_base(), tmp_path / "checkpoint").eval()
    assert again.get_adapter_overrides() == model.get_adapter_overrides()
    torch.testing.assert_close(logits_of(again), logits_of(model))


def test_compiled_before_its_first_call_it_computes_the_same(tmp_path: Path) -> None:
    plain, compiled = (tiny_xlora(tmp_path / name) for name in ("plain", "compiled"))
    for model in (plain, compiled):
        model.pin_adapter("1", 0.4, "*.q_proj")
    torch._dynamo.reset()
    run = torch.compile(compiled, backend="eager")
    with torch.no_grad():
        found = run(input_ids=tiny_prompt(), use_cache=False).logits
    torch.testing.assert_close(found, logits_of(plain))


def test_an_override_of_a_wholly_trained_module_comes_back(tmp_path: Path) -> None:
    """Nothing but a whole head stands in that module."""
    adapters = {
        name: str(
            write_lora(
                tmp_path / name,
                tiny_base(),
                ("q_proj",),
                seed=seed,
                config={"modules_to_save": ["lm_head"]},
                extra={"lm_head.weight": torch.full((97, 32), 0.1 * seed)},
            )
        )
        for seed, name in enumerate(NAMES)
    }
    model = XLoraModel.from_base(tiny_base(), XLoraConfig(adapters=adapters)).eval()
    model.pin_adapter("code", 0.5, "lm_head")
    model.save_pretrained(tmp_path / "checkpoint")
    again = XLoraModel.from_pretrained(tiny_base(), tmp_path / "checkpoint").eval()
    assert again.get_adapter_overrides() == model.get_adapter_overrides()
    torch.testing.assert_close(logits_of(again), logits_of(model))


def test_a_config_whose_overrides_do_not_fit_leaves_the_base_as_it_was(tmp_path: Path) -> None:
    adapters = write_experts(tmp_path, "llama", 2)
    base = tiny_base()
    modules = {path: type(module) for path, module in base.named_modules()}
    name = next(iter(adapters))
    config = XLoraConfig(adapters=adapters, adapter_overrides=[mute(name, "*.c_attn")])
    with pytest.raises(ConfigError, match=r"no adapted module matches '\*\.c_attn'"):
        XLoraModel.from_base(base, config)
    assert {path: type(module) for path, module in base.named_modules()} == modules


def test_training_under_an_override_moves_the_router_by_the_others_alone(
    tmp_path: Path,
) -> None:
    model = tiny_xlora(tmp_path, n_adapters=2, enable_softmax=False).train()
    model.mute_adapter(model.adapter_names[0])
    model(input_ids=tiny_prompt(), labels=tiny_prompt()).loss.backward()
    last = [p for p in model.classifier.parameters() if p.ndim == 1][-1]
    assert last.grad is not None
    per_adapter = last.grad.view(-1, 2).abs().sum(0)  # output index = module * K + adapter
    assert per_adapter[0] == 0
    assert per_adapter[1] > 0


# -------------------------------------------------------------------- the engine

TOKENIZER = tiny_tokenizer()
PROMPT = "the quick fox and 你好"
N_PROMPT = len(TOKENIZER(PROMPT)["input_ids"])
GREEDY = SamplingParams(max_new_tokens=10)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> XLoraModel:
    return tiny_chat_xlora(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def engine(chat_model: XLoraModel) -> Iterator[Engine]:
    with Engine(chat_model, TOKENIZER, model_id="tiny") as engine:
        yield engine
    chat_model.clear_adapter_overrides()


@pytest.fixture
def paced_engine(chat_model: XLoraModel) -> Iterator[Engine]:
    """An engine whose reads a pacer can hold."""
    with Engine(chat_model, TOKENIZER, batched=False) as engine:
        yield engine


def test_arms_of_one_request_have_their_own_overrides(
    engine: Engine, chat_model: XLoraModel
) -> None:
    alone = knobs_of(mute("math"), pin("code", 1.0), mute("verse"))
    some = knobs_of(pin("math", 2.0, "*.q_proj"), top_k=1)
    run = engine.run(PROMPT, [Arm.routed(alone), Arm.expert("code"), Arm.routed(some)], GREEDY)
    tokens = [track.token_ids.tolist() for track in run.tracks]
    assert tokens[0] == tokens[1]
    assert tokens[2] != tokens[0]
    ids = torch.tensor([tokens[2][:N_PROMPT]])
    chat_model._set(top_k_lora=1, adapter_overrides=some.overrides)
    try:
        expected = chat_model.generate(input_ids=ids, max_new_tokens=10, do_sample=False)
    finally:
        chat_model._set(top_k_lora=None, adapter_overrides=())
    assert tokens[2] == expected[0].tolist()


def test_an_arm_without_knobs_takes_the_models_overrides(
    engine: Engine, chat_model: XLoraModel
) -> None:
    chat_model.mute_adapter("math")
    track = engine.run(PROMPT, sampling=GREEDY).tracks[0]
    assert track.arm.knobs == knobs_of(mute("math"))
    assert track.override_sets == ((mute("math"),),)


def test_live_overrides_apply_from_the_next_token_and_are_recorded(
    paced_engine: Engine, chat_model: XLoraModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pacer = Pacer(chat_model, monkeypatch)
    handle = paced_engine.submit(PROMPT, [Arm.routed()], GREEDY)
    pacer.hold()
    pacer.step(3)
    first = knobs_of(mute("math"), mute("code"))
    assert handle.set_knobs(0, first)
    pacer.step(2)
    snapshot = handle.run.tracks[0]
    assert handle.set_knobs(0, knobs_of(pin("verse", 1.5, "*.v_proj")))
    pacer.step(2)
    assert handle.set_knobs(0, first)
    pacer.step(1)
    assert handle.set_knobs(0, RoutingKnobs())
    pacer.release()
    run = handle.wait()
    track = run.tracks[0]
    n = N_PROMPT + 3
    # The token that is being read when knobs change is read with those before.
    expected = [0] * n + [1, 1, 2, 2, 1]
    assert track.override_set[: len(expected)].tolist() == expected
    assert (track.override_set[len(expected) :] == 0).all()
    assert track.override_sets == (first.overrides, (pin("verse", 1.5, "*.v_proj"),))
    assert snapshot.override_sets == (first.overrides,)
    assert track.knob_changes() == [0, n, n + 2, n + 4, n + 5]
    assert track.knobs(n) == first
    values = run.scalings(0, effective=True)
    plain = run.scalings(0)
    np.testing.assert_array_equal(values[:n], plain[:n])
    assert (values[n : n + 2, :, :2] == 0).all()
    np.testing.assert_array_equal(values[n : n + 2, :, 2], plain[n : n + 2, :, 2])
    pinned = [name.endswith(".v_proj") for name in run.header.layer_names]
    assert (values[n + 2 : n + 4, pinned, 2] == 1.5).all()
    np.testing.assert_array_equal(
        values[n + 2 : n + 4][:, np.logical_not(pinned)],
        plain[n + 2 : n + 4][:, np.logical_not(pinned)],
    )


def test_what_an_arm_multiplied_by_is_what_its_record_says(
    paced_engine: Engine, chat_model: XLoraModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    original = chat_model.main_pass

    def main_pass(*, scalings: torch.Tensor, **inputs: object) -> object:
        seen.append(scalings[0].clone())
        return original(scalings=scalings, **inputs)

    monkeypatch.setattr(chat_model, "main_pass", main_pass)
    knobs = knobs_of(scale("math", 1.7), pin("verse", 0.3, "*.k_proj"), top_k=2, global_weight=0.9)
    run = paced_engine.run(PROMPT, [Arm.routed(knobs)], GREEDY)
    used = torch.cat(seen).numpy()
    # Recorded logits are float16.
    np.testing.assert_allclose(run.scalings(0, effective=True)[: len(used)], used, atol=2e-3)


def test_overrides_that_do_not_fit_are_refused_at_once(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="override of 'law': there is no such adapter"):
        engine.submit(PROMPT, [Arm.routed(knobs_of(mute("law")))])
    handle = engine.submit(PROMPT, [Arm.routed()], GREEDY)
    with pytest.raises(ConfigError, match="no adapted module matches 'q_proj'"):
        handle.set_knobs(0, knobs_of(mute("math", "q_proj")))
    assert handle.wait().tracks[0].override_sets == ()


def test_threads_may_override_the_same_model_at_once(chat_model: XLoraModel) -> None:
    """Nothing of a call stays on the model: two engines, two sets, each as it is alone."""
    sets = [knobs_of(mute(EXPERTS[0])), knobs_of(pin(EXPERTS[1], 2.0), mute(EXPERTS[2]))]
    with Engine(chat_model, TOKENIZER) as one, Engine(chat_model, TOKENIZER) as other:
        alone = [one.run(PROMPT, [Arm.routed(k)], GREEDY).tracks[0].token_ids for k in sets]
        handles = [
            e.submit(PROMPT, [Arm.routed(k)], GREEDY)
            for e, k in zip((one, other), sets, strict=True)
        ]
        together = [handle.wait().tracks[0].token_ids for handle in handles]
    assert alone[0].tolist() != alone[1].tolist()
    assert [t.tolist() for t in together] == [t.tolist() for t in alone]
