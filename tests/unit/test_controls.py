"""Switching the adapters off, and counting what learns."""

from __future__ import annotations

import threading
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from torch import Tensor

from tests.edited_models import IDS, routed_model, run
from tests.tiny_models import families, tiny_base, tiny_xlora
from xlora_core.errors import ModelError
from xlora_core.model import XLoraModel

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(params=["layerwise", "per_layer"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> XLoraModel:
    return routed_model(tmp_path, request.param)


@pytest.fixture
def routed(model: XLoraModel) -> Tensor:
    """What the model says with its adapters on."""
    return run(model)


@pytest.fixture
def base() -> Tensor:
    """What the plain base model says."""
    with torch.no_grad():
        logits: Tensor = tiny_base(dtype=torch.float64)(input_ids=IDS).logits
    return logits


# ---------------------------------------------------------------- disable_adapter


@pytest.mark.parametrize("family", sorted(families()))
def test_it_is_the_base_model_bit_by_bit(family: str, tmp_path: Path) -> None:
    model = tiny_xlora(tmp_path, family, scaling_pass_value=0.5)
    with torch.no_grad(), model.disable_adapter():
        off = model(input_ids=IDS, use_cache=False).logits
        assert torch.equal(off, tiny_base(family)(input_ids=IDS, use_cache=False).logits)
        assert not torch.equal(off, run_on(model))


def run_on(model: XLoraModel) -> Tensor:
    """Runs a model in another thread, where its adapters are on."""
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(run(model)))
    thread.start()
    thread.join()
    return found[0]


def test_it_is_of_this_thread_alone(model: XLoraModel, routed: Tensor, base: Tensor) -> None:
    both_are_inside = threading.Barrier(2)
    found: dict[str, Tensor] = {}

    def with_adapters() -> None:
        both_are_inside.wait()
        found["on"] = run(model)
        both_are_inside.wait()

    thread = threading.Thread(target=with_adapters)
    thread.start()
    with model.disable_adapter():
        both_are_inside.wait()
        found["off"] = run(model)
        both_are_inside.wait()
    thread.join()
    assert torch.equal(found["on"], routed)
    assert torch.equal(found["off"], base)


def test_nested_blocks_end_with_the_outer_one(
    model: XLoraModel, routed: Tensor, base: Tensor
) -> None:
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(run(model), base)
        assert torch.equal(run(model), base)
    assert torch.equal(run(model), routed)


def test_an_exception_inside_switches_them_on_again(model: XLoraModel, routed: Tensor) -> None:
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        raise ZeroDivisionError
    assert torch.equal(run(model), routed)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_generate_inside_writes_what_the_base_model_writes(
    model: XLoraModel, options: dict[str, object]
) -> None:
    plain = tiny_base(dtype=torch.float64).generate(input_ids=IDS, **GREEDY, **options)
    with model.disable_adapter():
        assert torch.equal(model.generate(input_ids=IDS, **GREEDY, **options), plain)
    assert not torch.equal(model.generate(input_ids=IDS, **GREEDY, **options), plain)


def test_nothing_is_logged_inside(model: XLoraModel) -> None:
    model.enable_scalings_logging()
    run(model)
    with model.disable_adapter():
        run(model)
        assert model.get_latest_scalings() is None
    assert len(model.get_scalings_log()) == 1


def test_a_cache_of_inside_goes_on_inside_and_is_refused_outside(
    model: XLoraModel, base: Tensor
) -> None:
    with model.disable_adapter():
        cache = model(input_ids=IDS[:, :-2], use_cache=True).past_key_values
        step = model(input_ids=IDS[:, -2:-1], past_key_values=cache).logits
    torch.testing.assert_close(step[:, 0], base[:, -2], atol=1e-10, rtol=0)
    with pytest.raises(ModelError, match="filled while the adapters were switched off"):
        model(input_ids=IDS[:, -1:], past_key_values=cache)
    cache.reset()
    model(input_ids=IDS, past_key_values=cache)


def test_a_cache_of_outside_is_refused_inside_and_goes_on_outside(
    model: XLoraModel, routed: Tensor
) -> None:
    cache = model(input_ids=IDS[:, :-1], use_cache=True).past_key_values
    refused = pytest.raises(ModelError, match="filled while the adapters were on")
    with refused, model.disable_adapter():
        model(input_ids=IDS[:, -1:], past_key_values=cache)
    step = model(input_ids=IDS[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(step[:, 0], routed[:, -1], atol=1e-10, rtol=0)


def test_nothing_learns_inside_and_nothing_is_frozen_by_it(model: XLoraModel) -> None:
    learning = [p.requires_grad for p in model.parameters()]
    with model.disable_adapter():
        assert not model(input_ids=IDS, labels=IDS).loss.requires_grad
    assert [p.requires_grad for p in model.parameters()] == learning
    assert model(input_ids=IDS, labels=IDS).loss.requires_grad


# ---------------------------------------------------------------- what learns


def test_the_counts_are_pefts(model: XLoraModel, capsys: pytest.CaptureFixture[str]) -> None:
    n_router = sum(p.numel() for p in model.router.parameters())
    n_all = sum(p.numel() for p in model.parameters())
    assert model.get_nb_trainable_parameters() == (n_router, n_all)
    for learns in (False, True, False):
        model.set_use_trainable_adapters(learns)
        # PEFT's own formula and text, over our model.
        expected = PeftModel.get_nb_trainable_parameters(model)  # type: ignore[arg-type]
        assert model.get_nb_trainable_parameters() == expected
        PeftModel.print_trainable_parameters(model)  # type: ignore[arg-type]
        theirs = capsys.readouterr().out
        model.print_trainable_parameters()
        assert capsys.readouterr().out == theirs
        assert theirs.startswith(f"trainable params: {expected[0]:,} || all params: {n_all:,} || ")


def test_two_weights_of_4_bits_in_a_byte_count_as_two(tmp_path: Path) -> None:
    model = tiny_xlora(tmp_path)
    before = model.get_nb_trainable_parameters()
    layer = model.lora_layers[0]
    packed = bnb.nn.Linear4bit(32, 32, bias=False, compute_dtype=torch.float32)
    packed.load_state_dict(layer.base_layer.state_dict())
    layer.base_layer = packed.to("cpu").requires_grad_(False)
    assert packed.weight.numel() == 32 * 32 // 2
    assert model.get_nb_trainable_parameters() == before
    assert PeftModel.get_nb_trainable_parameters(model) == before  # type: ignore[arg-type]
