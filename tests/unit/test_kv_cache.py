"""Whatever moves rows or drops tokens is done to both caches and to the logged scalings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny_models import tiny_prompt, tiny_xlora
from xlora_core.errors import ModelError
from xlora_core.kv_cache import DualCache
from xlora_core.model import XLoraModel

TOKENS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> XLoraModel:
    return tiny_xlora(tmp_path_factory.mktemp("experts"), dtype=torch.float64)


@pytest.fixture
def cache(model: XLoraModel) -> DualCache:
    """Both passes have read six tokens of two rows."""
    return read(model, tiny_prompt(length=TOKENS))


@torch.no_grad()
def read(model: XLoraModel, ids: torch.Tensor) -> DualCache:
    cache = model.new_cache()
    model(input_ids=ids, past_key_values=cache)
    return cache


def assert_same_cache(cache: DualCache, expected: DualCache) -> None:
    assert cache.logged is not None
    assert expected.logged is not None
    torch.testing.assert_close(cache.logged.tensor(), expected.logged.tensor(), atol=1e-12, rtol=0)
    for mine, theirs in ((cache.main, expected.main), (cache.scaling, expected.scaling)):
        for layer, other in zip(mine.layers, theirs.layers, strict=True):
            torch.testing.assert_close(layer.keys, other.keys, atol=1e-12, rtol=0)
            torch.testing.assert_close(layer.values, other.values, atol=1e-12, rtol=0)


def test_it_holds_the_tokens_of_both_passes(cache: DualCache) -> None:
    assert cache.get_seq_length() == TOKENS
    assert cache.main.get_seq_length() == cache.scaling.get_seq_length() == TOKENS
    assert repr(cache) == "DualCache(tokens=6)"
    assert not cache.is_compileable
    # The two passes differ, so neither can stand in for the other.
    assert not torch.equal(cache.main.layers[1].keys, cache.scaling.layers[1].keys)


def test_an_empty_one(model: XLoraModel) -> None:
    empty = model.new_cache()
    assert empty.get_seq_length() == 0
    assert empty.logged is None


def test_reordering(model: XLoraModel, cache: DualCache) -> None:
    order = torch.tensor([1, 0])
    cache.reorder_cache(order)
    assert_same_cache(cache, read(model, tiny_prompt(length=TOKENS)[order]))


def test_cropping(model: XLoraModel, cache: DualCache) -> None:
    cache.crop(-2)
    assert_same_cache(cache, read(model, tiny_prompt(length=TOKENS)[:, :-2]))


def test_repeating_rows(model: XLoraModel, cache: DualCache) -> None:
    cache.batch_repeat_interleave(3)
    assert_same_cache(cache, read(model, tiny_prompt(length=TOKENS).repeat_interleave(3, 0)))


def test_selecting_rows(model: XLoraModel, cache: DualCache) -> None:
    rows = torch.tensor([1, 1, 0])
    cache.batch_select_indices(rows)
    assert_same_cache(cache, read(model, tiny_prompt(length=TOKENS)[rows]))


@torch.no_grad()
def test_resetting(model: XLoraModel, cache: DualCache) -> None:
    cache.reset()
    assert cache.main.get_seq_length() == cache.scaling.get_seq_length() == 0
    assert cache.logged is None
    other = tiny_prompt(length=4, seed=3)
    model(input_ids=other, past_key_values=cache)
    assert_same_cache(cache, read(model, other))


@torch.no_grad()
def test_generation_goes_on_after_cropping(model: XLoraModel, cache: DualCache) -> None:
    ids = tiny_prompt(length=TOKENS)
    cache.crop(-3)
    cached = model(input_ids=ids[:, 3:], past_key_values=cache).logits
    torch.testing.assert_close(cached, model(input_ids=ids).logits[:, 3:], atol=1e-11, rtol=0)


def test_a_plain_model_given_both_caches_is_told_what_to_give(
    model: XLoraModel, cache: DualCache
) -> None:
    with pytest.raises(TypeError, match="a DualCache serves an XLoraModel; give a plain model"):
        model.base_model(input_ids=tiny_prompt(), past_key_values=cache)


def test_caches_that_fell_out_of_step_are_refused(tmp_path: Path) -> None:
    """A call that fails between the passes leaves the scaling cache ahead."""
    model = tiny_xlora(tmp_path)
    cache = read(model, tiny_prompt(length=TOKENS))

    def fail(*_: object) -> None:
        raise MemoryError

    hook = model.classifier.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        model(input_ids=tiny_prompt(length=1), past_key_values=cache)
    hook.remove()
    with pytest.raises(ModelError) as caught:
        model(input_ids=tiny_prompt(length=1), past_key_values=cache)
    assert caught.value.message == (
        "the two caches of this DualCache hold 6 and 7 tokens, expected as many in both; "
        "an earlier call with it failed half way"
    )
    assert caught.value.hint == "start again with model.new_cache()"
