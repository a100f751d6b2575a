"""Generation by a model whose layers route themselves: its cache, its log, threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.gated_models import gated_xlora, randomise_gates
from tests.task_models import peft_experts, task_base
from tests.tiny_models import tiny_prompt
from tests.unit.test_per_layer_router import NEAR, logits_of
from tests.unit.test_threads import at_once, in_step
from xlora_core.config import RoutingKnobs, XLoraConfig
from xlora_core.errors import ModelError
from xlora_core.kv_cache import DualCache, GatedCache
from xlora_core.model import XLoraModel

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> XLoraModel:
    """For tests that change nothing of it but the log."""
    return gated_xlora(tmp_path_factory.mktemp("gated"), dtype=torch.float64)


def mask_of(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# -------------------------------------------------------------------- its cache


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


# -------------------------------------------------------------------- generation, log


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
