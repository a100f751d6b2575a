"""``generate`` over encoder-decoders: the source is read once, and cached is uncached."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from accelerate import disk_offload
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from tests.seq2seq_models import (
    FAMILIES,
    one_per_family,
    randomise,
    run_by_hand,
    tiny_seq2seq,
    tokens,
)
from xlora_core.config import RoutingKnobs
from xlora_core.errors import ModelError
from xlora_core.kv_cache import DualCache
from xlora_core.model import XLoraModel

NEAR = {"atol": 1e-11, "rtol": 1e-9}
NEW = 8
MakeModel = Callable[[str], XLoraModel]
both = pytest.mark.parametrize("family", sorted(FAMILIES))


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    return one_per_family(tmp_path_factory)


def generate(model: XLoraModel, source: Tensor | None, **arguments: object) -> Tensor:
    """Generates without an end token, so that every row reaches its full length."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None} | arguments
    output: Tensor = model.generate(**({} if source is None else {"input_ids": source}), **settings)
    return output


# ---------------------------------------------------------------- cached is uncached


@both
def test_greedy_is_the_mixture_by_hand(make: MakeModel, family: str) -> None:
    model, source = make(family), tokens(2, 6)
    expected = torch.full((2, 1), FAMILIES[family].start)
    for _ in range(4):
        # The last label is not read: the decoder sees the labels before it.
        labels = torch.cat([expected[:, 1:], torch.zeros(2, 1, dtype=torch.long)], dim=1)
        logits = run_by_hand(model, family, source, labels).logits
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generate(model, source, max_new_tokens=4), expected)
    assert not torch.equal(tiny_seq2seq(family).generate(source, max_new_tokens=4), expected)


WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_p": 0.95},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "one source, beams": {"num_beams": 3, "batch": 1},
}


@pytest.mark.parametrize("way", sorted(WAYS))
@both
def test_cached_is_uncached(make: MakeModel, family: str, way: str) -> None:
    model, settings = make(family), dict(WAYS[way])
    source = tokens(settings.pop("batch", 2), 6)
    logs, outputs = [], []
    model.enable_scalings_logging()
    for use_cache in (True, False):
        model.clear_scalings_log()
        torch.manual_seed(5)
        outputs.append(generate(model, source, use_cache=use_cache, **settings))
        logs.append(model.get_scalings_log())
        assert len(model.get_encoder_scalings_log()) == 1  # the source is read once
    model.disable_scalings_logging()
    model.clear_scalings_log()
    assert torch.equal(*outputs)
    rows = len(source) * max(settings.get("num_beams", 1), settings.get("num_return_sequences", 1))
    assert [entry.shape[:2] for entry in logs[0]] == [(rows, t) for t in range(1, NEW + 1)]
    for cached, uncached in zip(*logs, strict=True):
        torch.testing.assert_close(cached, uncached, **NEAR)


@both
def test_beams_changed_places(make: MakeModel, family: str) -> None:
    """Or the test above shows nothing about the order of the cache's rows."""
    output = generate(
        make(family),
        tokens(2, 6),
        num_beams=4,
        num_return_sequences=2,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert (output.beam_indices[:, :NEW].diff(dim=1) != 0).any()


@pytest.mark.parametrize(
    ("family", "padding"), [("bart", "right"), ("t5", "right"), ("t5", "left")]
)
def test_a_padded_batch_is_its_rows_alone(make: MakeModel, family: str, padding: str) -> None:
    model, rows = make(family), [tokens(1, length, seed=length) for length in (6, 3, 5)]
    source, mask = torch.zeros(3, 6, dtype=torch.long), torch.zeros(3, 6, dtype=torch.long)
    for index, row in enumerate(rows):
        n = row.shape[1]
        where = slice(6 - n, None) if padding == "left" else slice(0, n)
        source[index, where], mask[index, where] = row[0], 1
    for beams in (1, 3):
        together = generate(model, source, attention_mask=mask, num_beams=beams)
        alone = torch.cat([generate(model, row, num_beams=beams) for row in rows])
        assert torch.equal(together, alone)


@both
def test_a_target_that_is_begun(make: MakeModel, family: str) -> None:
    model, source = make(family), tokens(2, 6)
    begun = torch.cat([torch.full((2, 1), FAMILIES[family].start), tokens(2, 3, seed=9)], dim=1)
    cached = generate(model, source, decoder_input_ids=begun)
    assert torch.equal(cached[:, :4], begun)
    assert torch.equal(cached, generate(model, source, decoder_input_ids=begun, use_cache=False))


@both
def test_step_by_step_with_a_cache_of_ones_own(make: MakeModel, family: str) -> None:
    model, target = make(family), tokens(2, 5, seed=1)
    encoded = model.encode(input_ids=tokens(2, 6))
    whole = model(encoder_outputs=encoded, decoder_input_ids=target, use_cache=False)
    assert whole.past_key_values is None
    cache, parts = model.new_cache(), []
    for part in target.split((2, 1, 2), dim=1):
        output = model(encoder_outputs=encoded, decoder_input_ids=part, past_key_values=cache)
        assert output.past_key_values is cache
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.logits, **NEAR)
    assert cache.get_seq_length() == 5
    cache.crop(-2)
    again = model(encoder_outputs=encoded, decoder_input_ids=target[:, 3:], past_key_values=cache)
    torch.testing.assert_close(again.logits, whole.logits[:, 3:], **NEAR)
    torch.testing.assert_close(model.get_latest_scalings()[:, :3], cache.logged.tensor()[:, :3])


# ---------------------------------------------------------------- the encoder


@both
def test_the_encoder_runs_once_a_pass(make: MakeModel, family: str) -> None:
    model, calls = make(family), []
    encoder = model.base_model.get_encoder()
    handle = encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        generate(model, tokens(2, 6), num_beams=2)
    finally:
        handle.remove()
    assert len(calls) == 2


@both
def test_an_encoded_source_may_be_given(make: MakeModel, family: str) -> None:
    model, source = make(family), tokens(2, 6)
    mask = torch.ones_like(source)
    mask[1, 4:] = 0
    expected = generate(model, source, attention_mask=mask, num_beams=2)
    for encode in (model.encode, model.get_encoder()):
        encoded = encode(input_ids=source, attention_mask=mask)
        given = generate(model, None, encoder_outputs=encoded, attention_mask=mask, num_beams=2)
        assert torch.equal(given, expected)
        assert len(encoded.last_hidden_state) == len(encoded["scalings"]) == 2
    by_position = model.get_encoder()(source, mask)
    torch.testing.assert_close(by_position.last_hidden_state, encoded.last_hidden_state)
    with pytest.raises(ModelError, match="must be an XLoraEncoderOutput"):
        generate(
            model,
            None,
            encoder_outputs=model.base_model.get_encoder()(source),
            attention_mask=mask,
        )


@both
def test_hidden_states_of_both_sides_are_the_main_passs(make: MakeModel, family: str) -> None:
    model, source = make(family), tokens(2, 6)
    output = generate(
        model, source, return_dict_in_generate=True, output_hidden_states=True, max_new_tokens=2
    )
    main = model(input_ids=source, decoder_input_ids=output.sequences, output_hidden_states=True)
    torch.testing.assert_close(
        output.encoder_hidden_states[-1], main.encoder_hidden_states[-1], **NEAR
    )
    torch.testing.assert_close(
        output.decoder_hidden_states[0][-1], main.decoder_hidden_states[-1][:, :1], **NEAR
    )


def test_a_model_that_accelerate_placed(make: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """``generate`` puts a hook on the encoder of such a model."""
    model, source = make("t5"), tokens(2, 6)
    expected = generate(model, source)
    monkeypatch.setattr(model.base_model, "hf_device_map", {"": "cpu"}, raising=False)
    assert torch.equal(generate(model, source), expected)


@both
def test_a_base_whose_weights_rest_on_disk(make: MakeModel, family: str, tmp_path: Path) -> None:
    model, source = make(family), tokens(2, 6)
    base = tiny_seq2seq(family)
    disk_offload(base, str(tmp_path), execution_device=torch.device("cpu"))
    offloaded = randomise(XLoraModel.from_base(base, model.config_xlora))
    assert base.device.type == "meta"
    assert torch.equal(
        generate(offloaded, source, num_beams=2), generate(model, source, num_beams=2)
    )


# ---------------------------------------------------------------- knobs, threads, refusals


@both
def test_knobs_reach_both_sides(make: MakeModel, family: str) -> None:
    model, source = make(family), tokens(2, 6)
    plain = tiny_seq2seq(family)
    base = plain.generate(source, max_new_tokens=NEW, eos_token_id=None)
    assert torch.equal(generate(model, source, knobs=RoutingKnobs(global_weight=0.0)), base)
    with model.disable_adapter():
        assert torch.equal(generate(model, source), base)
    assert not torch.equal(generate(model, source), base)


@both
def test_generations_in_several_threads(make: MakeModel, family: str) -> None:
    model = make(family)
    calls = [
        (tokens(2, 6), RoutingKnobs()),
        (tokens(2, 6, seed=1), RoutingKnobs(top_k=1)),
        (tokens(1, 4, seed=2), RoutingKnobs(temperature=3.0)),
    ]

    def run(call: tuple[Tensor, RoutingKnobs]) -> Tensor:
        return generate(model, call[0], knobs=call[1])

    alone = [run(call) for call in calls]
    with ThreadPoolExecutor(len(calls)) as pool:
        for _ in range(2):
            for together, expected in zip(pool.map(run, calls), alone, strict=True):
                assert torch.equal(together, expected)


def test_another_kind_of_cache_is_refused(make: MakeModel) -> None:
    model, source = make("t5"), tokens(1, 4)
    for cache in (EncoderDecoderCache(DynamicCache(), DynamicCache()), DynamicCache()):
        with pytest.raises(ModelError, match="must be a DualCache"):
            model(input_ids=source, decoder_input_ids=source, past_key_values=cache)
        with pytest.raises(ModelError, match="must be a DualCache"):
            generate(model, source, past_key_values=cache)
    with pytest.raises(ModelError, match="cache_implementation='static'"):
        generate(model, source, cache_implementation="static")


def test_what_is_done_to_the_rows_is_done_to_every_cache(make: MakeModel) -> None:
    model, source, target = make("t5"), tokens(2, 4), tokens(2, 3, seed=1)
    cache = model.new_cache()
    assert isinstance(cache, DualCache)
    model(input_ids=source, decoder_input_ids=target, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    cache.reorder_cache(torch.tensor([1, 0]))
    swapped = model.encode(input_ids=source.flip(0))
    last = tokens(2, 1, seed=2)
    step = model(encoder_outputs=swapped, decoder_input_ids=last, past_key_values=cache)
    whole = model(
        encoder_outputs=swapped, decoder_input_ids=torch.cat([target.flip(0), last], dim=1)
    )
    torch.testing.assert_close(step.logits, whole.logits[:, -1:], **NEAR)
    cache.reset()
    assert cache.get_seq_length() == 0
    fresh = model(encoder_outputs=swapped, decoder_input_ids=last, past_key_values=cache)
    torch.testing.assert_close(
        fresh.logits, model(encoder_outputs=swapped, decoder_input_ids=last).logits, **NEAR
    )
