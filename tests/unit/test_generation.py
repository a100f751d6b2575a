"""``generate``: cached output is the uncached one's, whatever the way of decoding."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tests.tiny_models import families, tiny_prompt, tiny_xlora
from xlora_core.config import RoutingKnobs
from xlora_core.errors import ConfigError, ModelError
from xlora_core.model import XLoraModel

NEW = 10
FAMILIES = sorted(families())
_models: dict[str, XLoraModel] = {}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> object:
    """One model per family for the whole file, in float64: no rounding flips a token."""

    def of_family(family: str = "llama") -> XLoraModel:
        if family not in _models:
            folder = tmp_path_factory.mktemp(family)
            _models[family] = tiny_xlora(folder, family, dtype=torch.float64, top_k_lora=2)
        return _models[family]

    yield of_family
    _models.clear()


@pytest.fixture
def model(make: object) -> XLoraModel:
    llama: XLoraModel = make()
    return llama


def generate(model: XLoraModel, ids: Tensor | None, **arguments: object) -> Tensor:
    """Generates without an end token, so that every row reaches its full length."""
    settings = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    } | arguments
    if ids is not None:
        settings = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | settings
    output: Tensor = model.generate(**settings)
    return output


@torch.no_grad()
def two_passes(model: XLoraModel, ids: Tensor, new: int = NEW) -> Tensor:
    """The reference: greedy decoding that reads the whole text twice for every token."""
    for _ in range(new):
        router_logits = model.scaling_pass(input_ids=ids).router_logits
        scalings = model.route(router_logits)
        logits = model.main_pass(input_ids=ids, scalings=scalings, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids


# ---------------------------------------------------------------- cached is uncached


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_the_two_pass_reference(make: object, family: str) -> None:
    model, ids = make(family), tiny_prompt()
    tokens = generate(model, ids)
    assert torch.equal(tokens, two_passes(model, ids))
    assert torch.equal(tokens, generate(model, ids, use_cache=False))
    assert not torch.equal(tokens, generate(model, ids, knobs=RoutingKnobs(global_weight=0.0))), (
        "the base model writes the same: this prompt shows nothing"
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 1.0}, {"temperature": 2.0, "top_p": 0.9, "repetition_penalty": 1.2}],
)
def test_sampling_with_a_seed(make: object, family: str, sampling: dict[str, float]) -> None:
    model, outputs = make(family), []
    for use_cache in (True, False, True):
        torch.manual_seed(3)
        outputs.append(
            generate(model, tiny_prompt(), do_sample=True, use_cache=use_cache, **sampling)
        )
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], generate(model, tiny_prompt()))


@pytest.mark.parametrize("family", FAMILIES)
def test_beams(make: object, family: str) -> None:
    model = make(family)
    cached, uncached = (
        generate(
            model,
            tiny_prompt(),
            num_beams=3,
            num_return_sequences=2,
            use_cache=use_cache,
            return_dict_in_generate=True,
            output_scores=True,
        )
        for use_cache in (True, False)
    )
    assert cached.sequences.shape == (4, 9 + NEW)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores)
    # Beams changed places on the way, or nothing of this was tested.
    assert (cached.beam_indices[:, :NEW].diff(dim=1) != 0).any()


def test_sampled_beams_with_a_seed(model: XLoraModel) -> None:
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        outputs.append(
            generate(model, tiny_prompt(), do_sample=True, num_beams=3, use_cache=use_cache)
        )
    assert torch.equal(*outputs)


def test_prompt_lookup_decoding_crops_both_caches(model: XLoraModel) -> None:
    ids = tiny_prompt(batch=1, length=5).repeat(1, 3)
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=3), generate(model, ids))


def test_a_prompt_read_in_chunks(model: XLoraModel) -> None:
    ids = tiny_prompt()
    assert torch.equal(generate(model, ids, prefill_chunk_size=4), generate(model, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_batch_is_its_rows_alone(make: object, family: str) -> None:
    model, lengths = make(family), (9, 4, 6)
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    rows = [tiny_prompt(1, length, seed=length) for length in lengths]
    for row, length in enumerate(lengths):
        ids[row, 9 - length :] = rows[row]
        mask[row, 9 - length :] = 1
    together = generate(model, ids, attention_mask=mask)
    for row, prompt in enumerate(rows):
        alone = generate(model, prompt)
        assert torch.equal(together[row, 9:], alone[0, prompt.shape[1] :])


def test_rows_that_end_early_are_padded(model: XLoraModel) -> None:
    ids = tiny_prompt()
    free = generate(model, ids)[:, 9:]
    end = int(free[0, 3])
    stopped = generate(model, ids, eos_token_id=end)[:, 9:]
    for row in range(2):
        hits = (free[row] == end).nonzero()
        length = int(hits[0]) + 1 if len(hits) else NEW
        assert torch.equal(stopped[row, :length], free[row, :length])
        assert (stopped[row, length:] == 0).all()
    assert (stopped == 0).any()


def test_inputs_embeds_give_the_tokens_of_their_ids(model: XLoraModel) -> None:
    ids = tiny_prompt()
    embeds = model.get_input_embeddings()(ids)
    for use_cache in (True, False):
        tokens = generate(
            model,
            None,
            inputs_embeds=embeds,
            attention_mask=torch.ones_like(ids),
            use_cache=use_cache,
        )
        assert torch.equal(tokens, generate(model, ids)[:, 9:])


# ---------------------------------------------------------------- streamers, stopping, caches


class Tape(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.blocks.append(value.reshape(-1))

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_the_prompt_and_each_token_as_it_comes(model: XLoraModel) -> None:
    ids, tape = tiny_prompt(batch=1), Tape()
    tokens = generate(model, ids, streamer=tape)
    assert [len(block) for block in tape.blocks] == [9] + [1] * NEW
    assert torch.equal(torch.cat(tape.blocks), tokens[0])
    assert tape.ended


class StopAt(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_stopping_criteria(model: XLoraModel) -> None:
    ids = tiny_prompt()
    stopped = generate(model, ids, stopping_criteria=StoppingCriteriaList([StopAt(13)]))
    assert torch.equal(stopped, generate(model, ids)[:, :13])


def test_a_cache_of_the_user_goes_on(model: XLoraModel) -> None:
    ids, cache = tiny_prompt(), model.new_cache()
    first = generate(model, ids, past_key_values=cache, max_new_tokens=4)
    assert cache.get_seq_length() == 12  # the newest token has not been read yet
    both = generate(model, first, past_key_values=cache, max_new_tokens=NEW - 4)
    assert torch.equal(both, generate(model, ids))
    assert cache.get_seq_length() == 9 + NEW - 1


def test_the_cache_that_is_returned_goes_on(model: XLoraModel) -> None:
    ids = tiny_prompt()
    first = generate(model, ids, max_new_tokens=4, return_dict_in_generate=True)
    both = generate(
        model, first.sequences, past_key_values=first.past_key_values, max_new_tokens=NEW - 4
    )
    assert torch.equal(both, generate(model, ids))


def test_another_cache_class_is_refused(model: XLoraModel) -> None:
    other = DynamicCache()
    with pytest.raises(ModelError) as caught:
        generate(model, tiny_prompt(), past_key_values=other)
    assert caught.value.message == "past_key_values must be a DualCache, got DynamicCache"
    assert caught.value.hint == "make one with model.new_cache()"
    with pytest.raises(ModelError, match="must be a DualCache, got DynamicCache"):
        model(input_ids=tiny_prompt(), past_key_values=other)


@pytest.mark.parametrize("name", ["static", "offloaded", "quantized"])
def test_another_cache_implementation_is_refused(model: XLoraModel, name: str) -> None:
    with pytest.raises(ModelError) as caught:
        generate(model, tiny_prompt(), cache_implementation=name)
    assert (
        caught.value.message == f"cache_implementation='{name}' cannot serve the passes of X-LoRA"
    )
    assert caught.value.hint == "leave cache_implementation out"


def test_the_dynamic_one_is_what_it_is_anyway(model: XLoraModel) -> None:
    ids = tiny_prompt()
    assert torch.equal(generate(model, ids, cache_implementation="dynamic"), generate(model, ids))


# ---------------------------------------------------------------- knobs and the log


def test_knobs_of_one_call(model: XLoraModel) -> None:
    ids, knobs = tiny_prompt(), RoutingKnobs(top_k=1, temperature=0.3, global_weight=1.5)
    with_knobs = generate(model, ids, knobs=knobs)
    assert not torch.equal(with_knobs, generate(model, ids))
    before = model.config_xlora
    model.set_topk_lora(1)
    model.set_softmax_temperature(0.3)
    model.set_global_scaling_weight(1.5)
    try:
        assert torch.equal(with_knobs, generate(model, ids))
    finally:
        model._config_xlora = before


def test_knobs_that_do_not_fit(model: XLoraModel) -> None:
    with pytest.raises(ConfigError, match=r"from 1 to 3 \(the number of adapters\), got 4"):
        generate(model, tiny_prompt(), knobs=RoutingKnobs(top_k=4))


def log_of(model: XLoraModel, **arguments: object) -> list[Tensor]:
    model.enable_scalings_logging()
    try:
        generate(model, tiny_prompt(), **arguments)
        return model.get_scalings_log()
    finally:
        model.disable_scalings_logging()
        model.clear_scalings_log()


@pytest.mark.parametrize(
    "arguments",
    [{}, {"num_beams": 3, "num_return_sequences": 3}],
    ids=["greedy", "beams"],
)
def test_the_log_is_the_uncached_ones(model: XLoraModel, arguments: dict[str, int]) -> None:
    cached = log_of(model, **arguments)
    uncached = log_of(model, use_cache=False, **arguments)
    rows = 2 * arguments.get("num_beams", 1)
    assert [tuple(t.shape) for t in cached] == [
        (rows, 9 + step, len(model.lora_layer_names), 3) for step in range(NEW)
    ]
    assert_same(cached, uncached)


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, atol=1e-10, rtol=0)


def test_the_latest_scalings_cover_the_whole_text(model: XLoraModel) -> None:
    tokens = generate(model, tiny_prompt())
    latest = model.get_latest_scalings()
    assert latest is not None
    # The last token was written, not read.
    with torch.no_grad():
        model(input_ids=tokens[:, :-1])
    again = model.get_latest_scalings()
    assert again is not None
    torch.testing.assert_close(latest, again, atol=1e-10, rtol=0)
