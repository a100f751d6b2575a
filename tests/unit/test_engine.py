"""What the engine computes: each arm's tokens, log-probabilities and routing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.pacer import Pacer
from tests.tiny_chat import EXPERTS, tiny_chat_base, tiny_chat_xlora, tiny_tokenizer
from tests.tiny_models import families
from xlora_core.config import Arm, RoutingKnobs, SamplingParams
from xlora_core.engine import ArmFinished, Engine, Finished, Queued, Started, TokenEvent, scheduler
from xlora_core.model import XLoraModel

TOKENIZER = tiny_tokenizer()
PROMPT = "the quick fox and 你好"
PROMPT_IDS = TOKENIZER(PROMPT)["input_ids"]
N_NEW = 12
GREEDY = SamplingParams(max_new_tokens=N_NEW)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> XLoraModel:
    return tiny_chat_xlora(tmp_path_factory.mktemp("experts"))


@pytest.fixture
def engine(model: XLoraModel) -> Iterator[Engine]:
    with Engine(model, TOKENIZER, model_id="tiny") as engine:
        yield engine


@pytest.fixture
def paced_engine(model: XLoraModel) -> Iterator[Engine]:
    """An engine of one request at a time, whose reads a pacer can hold."""
    with Engine(model, TOKENIZER, max_active=1, batched=False) as engine:
        yield engine


def generated(model: torch.nn.Module, **options: object) -> list[int]:
    ids = torch.tensor([PROMPT_IDS])
    out = model.generate(input_ids=ids, max_new_tokens=N_NEW, do_sample=False, **options)
    return list(out[0].tolist())


def full_logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


# -------------------------------------------------------------------- tokens


def test_the_routed_arm_writes_what_generate_writes(engine: Engine, model: XLoraModel) -> None:
    track = engine.run(PROMPT, sampling=GREEDY).tracks[0]
    assert track.token_ids.tolist() == generated(model)
    assert track.n_prompt == len(PROMPT_IDS)
    assert "".join(track.pieces) == TOKENIZER.decode(track.token_ids)


@pytest.mark.parametrize(
    ("arm", "weights"),
    [
        (Arm.merged(), [1 / 3, 1 / 3, 1 / 3]),
        (Arm.base(), [0, 0, 0]),
        (Arm.expert("code"), [0, 1, 0]),
    ],
    ids=lambda value: value.label if isinstance(value, Arm) else "",
)
def test_a_constant_arm_writes_what_the_merged_model_writes(
    engine: Engine, tmp_path: Path, arm: Arm, weights: list[float]
) -> None:
    merged = tiny_chat_xlora(tmp_path).merge_and_unload(weights)
    run = engine.run(PROMPT, [arm], GREEDY)
    assert run.tracks[0].token_ids.tolist() == generated(merged)
    assert run.tracks[0].router_logits is None
    assert np.allclose(run.scalings(0), weights)


def test_the_base_arm_writes_what_the_base_model_writes(engine: Engine) -> None:
    track = engine.run(PROMPT, [Arm.base()], GREEDY).tracks[0]
    assert track.token_ids.tolist() == generated(tiny_chat_base())
    np.testing.assert_array_equal(track.base_logprob, track.logprob)


@pytest.mark.parametrize("family", sorted(families()))
def test_every_architecture(tmp_path: Path, family: str) -> None:
    model = tiny_chat_xlora(tmp_path, family)
    with Engine(model, TOKENIZER) as engine:
        run = engine.run(PROMPT, [Arm.routed(), Arm.base()], GREEDY)
    assert run.tracks[0].token_ids.tolist() == generated(model)
    assert run.tracks[1].token_ids.tolist() == generated(tiny_chat_base(family))


@pytest.mark.parametrize(
    "config",
    [
        {"layerwise_scalings": False},
        {"scaling_pass_value": 0.5},
        {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2},
        {"softmax_temperature": 0.3, "global_scaling_weight": 1.5},
    ],
    ids=str,
)
def test_routed_tokens_under_other_configs(tmp_path: Path, config: dict[str, object]) -> None:
    model = tiny_chat_xlora(tmp_path, **config)
    with Engine(model, TOKENIZER) as engine:
        run = engine.run(PROMPT, sampling=GREEDY)
    ids = run.tracks[0].token_ids.tolist()
    assert ids == generated(model)
    full_logits(model, ids)
    logged = model.get_latest_scalings()
    assert logged is not None
    np.testing.assert_allclose(run.scalings(0), logged[0].numpy(), atol=2e-3)


def test_a_prompt_read_in_parts_gives_the_same_run(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = engine.run(PROMPT, sampling=GREEDY)
    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 4)
    parts = engine.run(PROMPT, sampling=GREEDY)
    assert len(PROMPT_IDS) > 8
    assert parts.tracks[0].token_ids.tolist() == whole.tracks[0].token_ids.tolist()
    np.testing.assert_allclose(parts.scalings(0), whole.scalings(0), atol=1e-3)


def test_messages_are_answered_through_the_chat_template(engine: Engine, model: XLoraModel) -> None:
    messages = [{"role": "user", "content": "add 2 and 3"}]
    inputs = TOKENIZER.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0].tolist()
    run = engine.run(messages, sampling=SamplingParams(max_new_tokens=5))
    assert run.tracks[0].token_ids.tolist() == expected


# -------------------------------------------------------------------- the record


def test_log_probabilities_are_those_of_the_uncached_model(
    engine: Engine, model: XLoraModel
) -> None:
    track = engine.run(PROMPT, sampling=GREEDY).tracks[0]
    ids, n_prompt = track.token_ids.tolist(), track.n_prompt
    for column, reference in ((track.logprob, model), (track.base_logprob, tiny_chat_base())):
        logprobs = torch.log_softmax(full_logits(reference, ids), dim=-1)
        expected = [logprobs[t - 1, ids[t]].item() for t in range(n_prompt, len(ids))]
        np.testing.assert_allclose(column[n_prompt:], expected, atol=1e-4)
        assert np.isnan(column[:n_prompt]).all()
    best = torch.topk(full_logits(model, ids)[n_prompt - 1], 5).indices.tolist()
    assert track.alternative_ids[n_prompt].tolist() == best
    assert track.alternative_ids[0].tolist() == [-1] * 5


def test_scalings_are_those_of_the_uncached_model_for_every_token(
    engine: Engine, model: XLoraModel
) -> None:
    run = engine.run(PROMPT, sampling=GREEDY)
    ids = run.tracks[0].token_ids.tolist()
    full_logits(model, ids)
    logged = model.get_latest_scalings()
    assert logged is not None
    # The last token has a row although no token follows it. float16 logits: 2e-3.
    assert run.scalings(0).shape == (len(ids), len(model.lora_layer_names), len(EXPERTS))
    np.testing.assert_allclose(run.scalings(0), logged[0].numpy(), atol=2e-3)


def test_base_log_probabilities_can_be_left_out(engine: Engine) -> None:
    run = engine.run(PROMPT, sampling=GREEDY, record_base_logprob=False)
    assert np.isnan(run.tracks[0].base_logprob).all()


def test_base_log_probabilities_are_unknown_when_the_scaling_pass_is_not_the_base(
    tmp_path: Path,
) -> None:
    with Engine(tiny_chat_xlora(tmp_path, scaling_pass_value=0.5), TOKENIZER) as engine:
        run = engine.run(PROMPT, sampling=GREEDY)
    assert np.isnan(run.tracks[0].base_logprob).all()


def test_the_header_says_what_made_the_run(engine: Engine, model: XLoraModel) -> None:
    header = engine.run(PROMPT, sampling=SamplingParams(max_new_tokens=1, seed=5)).header
    assert list(header.adapter_names) == list(EXPERTS)
    assert list(header.layer_names) == model.lora_layer_names
    assert header.model_id == "tiny"
    assert header.prompt_text == PROMPT
    assert header.sampling.seed == 5
    assert header.versions["torch"] == torch.__version__


def test_fingerprints_tell_models_apart(engine: Engine, tmp_path: Path) -> None:
    one_token = SamplingParams(max_new_tokens=1)
    header = engine.run(PROMPT, sampling=one_token).header
    other_model = tiny_chat_xlora(tmp_path)
    with torch.no_grad():
        other_model.base_model.model.norm.weight[0] += 1
        other_model.lora_layers[0].lora_B[0, 0] += 1  # belongs to the first expert
    with Engine(other_model, TOKENIZER) as other_engine:
        other = other_engine.run(PROMPT, sampling=one_token).header
    assert header.base_hash != other.base_hash
    assert header.adapter_hashes["math"] != other.adapter_hashes["math"]
    assert header.adapter_hashes["code"] == other.adapter_hashes["code"]


# -------------------------------------------------------------------- the end of an answer


def test_an_answer_ends_at_the_stop_token(
    engine: Engine, model: XLoraModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = engine.run(PROMPT, sampling=GREEDY).tracks[0].token_ids.tolist()
    stop = ids[len(PROMPT_IDS) + 3]
    n_until_stop = ids[len(PROMPT_IDS) :].index(stop) + 1
    monkeypatch.setattr(model.generation_config, "eos_token_id", [stop, 0])
    with Engine(model, TOKENIZER) as other:
        track = other.run(PROMPT, sampling=GREEDY).tracks[0]
    assert track.finish_reason == "stop"
    assert track.token_ids.tolist() == ids[: len(PROMPT_IDS) + n_until_stop]
    assert track.n_routed == len(track.token_ids)


def test_an_answer_ends_at_the_token_limit(engine: Engine) -> None:
    track = engine.run(PROMPT, sampling=SamplingParams(max_new_tokens=1)).tracks[0]
    assert track.finish_reason == "length"
    assert len(track.token_ids) == len(PROMPT_IDS) + 1


def test_an_answer_ends_where_the_context_window_does(tmp_path: Path) -> None:
    window = len(PROMPT_IDS) + 4
    with Engine(tiny_chat_xlora(tmp_path, context_length=window), TOKENIZER) as engine:
        track = engine.run(PROMPT, sampling=SamplingParams(max_new_tokens=1000)).tracks[0]
    assert track.finish_reason == "length"
    assert len(track.token_ids) == track.n_routed == window


# -------------------------------------------------------------------- knobs


def test_knobs_change_from_the_next_token_on(
    paced_engine: Engine, model: XLoraModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pacer = Pacer(model, monkeypatch)
    before, after = RoutingKnobs(temperature=0.5), RoutingKnobs(top_k=1, global_weight=2.0)
    handle = paced_engine.submit(PROMPT, [Arm.routed(before)], GREEDY)
    pacer.hold()  # prompt about to be read
    pacer.step(3)  # prompt and two tokens read, third token (row n + 2) on its way
    assert handle.set_knobs(0, after)
    pacer.release()
    run = handle.wait()
    changed = len(PROMPT_IDS) + 3
    track = run.tracks[0]
    assert track.top_k.tolist() == [0] * changed + [1] * (len(track.token_ids) - changed)
    np.testing.assert_array_equal(track.temperature[:changed], np.float32(0.5))
    np.testing.assert_array_equal(track.temperature[changed:], 1.0)
    np.testing.assert_array_equal(track.global_weight[changed:], 2.0)
    kept = (run.scalings(0, effective=True) > 0).sum(axis=-1)
    assert (kept[:changed] == len(EXPERTS)).all()
    assert (kept[changed:] == 1).all()
    assert track.token_ids.tolist() != generated(model)


def test_knobs_of_a_waiting_request_are_its_first(
    paced_engine: Engine, model: XLoraModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pacer = Pacer(model, monkeypatch)
    paced_engine.submit(PROMPT, sampling=GREEDY)
    pacer.hold()
    waiting = paced_engine.submit(PROMPT, sampling=GREEDY)
    knobs = RoutingKnobs(top_k=2)
    waiting.set_knobs(0, knobs)
    pacer.release()
    run = waiting.wait()
    assert run.tracks[0].arm == Arm.routed(knobs)
    assert (run.tracks[0].top_k == 2).all()
    assert not waiting.set_knobs(0, RoutingKnobs())  # too late, and said so


def test_arms_of_one_request_have_their_own_knobs(engine: Engine) -> None:
    knobs = [RoutingKnobs(), RoutingKnobs(top_k=1), RoutingKnobs(global_weight=0.0)]
    together = engine.run(PROMPT, [Arm.routed(k) for k in knobs] + [Arm.base()], GREEDY)
    for index, k in enumerate(knobs):
        alone = engine.run(PROMPT, [Arm.routed(k)], GREEDY).tracks[0]
        assert together.tracks[index].token_ids.tolist() == alone.token_ids.tolist()
    # g = 0 is the base model
    assert together.tracks[2].token_ids.tolist() == together.tracks[3].token_ids.tolist()


def test_concurrent_requests_get_what_they_get_alone(engine: Engine) -> None:
    knobs = [RoutingKnobs(temperature=0.2), RoutingKnobs(top_k=1, global_weight=1.5)]
    alone = [engine.run(PROMPT, [Arm.routed(k)], GREEDY) for k in knobs]
    handles = [engine.submit(PROMPT, [Arm.routed(k)], GREEDY) for k in knobs]
    for handle, expected in zip(handles, alone, strict=True):
        run = handle.wait()
        assert run.tracks[0].token_ids.tolist() == expected.tracks[0].token_ids.tolist()
        np.testing.assert_allclose(run.scalings(0), expected.scalings(0), atol=2e-3)
    assert alone[0].tracks[0].token_ids.tolist() != alone[1].tracks[0].token_ids.tolist()


# -------------------------------------------------------------------- sampling, events


def test_the_seed_reproduces_a_sampled_run(engine: Engine) -> None:
    def tokens(seed: int) -> list[int]:
        sampling = SamplingParams(max_new_tokens=N_NEW, temperature=1.5, seed=seed)
        return list(engine.run(PROMPT, sampling=sampling).tracks[0].token_ids.tolist())

    first = tokens(1)
    assert tokens(1) == first
    assert tokens(2) != first


def test_events_tell_the_run_in_order(paced_engine: Engine) -> None:
    arms = [Arm.routed(RoutingKnobs(top_k=2)), Arm.merged()]
    events = list(paced_engine.stream(PROMPT, arms, SamplingParams(max_new_tokens=3)))
    assert events[:2] == [
        Queued(position=1, expected_seconds=0.0),
        Started(arms=tuple(arms), n_prompt_tokens=len(PROMPT_IDS)),
    ]
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    assert [event.arm for event in tokens] == [0, 1, 0, 1, 0, 1]
    assert [e.index - len(PROMPT_IDS) for e in tokens] == [0, 0, 1, 1, 2, 2]
    assert tokens[0].knobs == arms[0].knobs
    assert tokens[1].knobs is None
    assert [e for e in events if isinstance(e, ArmFinished)] == [
        ArmFinished(arm=0, reason="length"),
        ArmFinished(arm=1, reason="length"),
    ]
    last = events[-1]
    assert isinstance(last, Finished)
    for arm, track in enumerate(last.run.tracks):
        mine = [event for event in tokens if event.arm == arm]
        assert [e.piece for e in mine] == track.pieces[track.n_prompt :]
        assert [e.token_id for e in mine] == track.token_ids[track.n_prompt :].tolist()
        np.testing.assert_array_equal(
            np.float32([e.logprob for e in mine]), track.logprob[track.n_prompt :]
        )
    assert math.isnan(tokens[1].base_logprob)
    assert tokens[0].base_logprob < 0


def test_a_record_can_be_watched_while_it_grows(
    paced_engine: Engine, model: XLoraModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pacer = Pacer(model, monkeypatch)
    handle = paced_engine.submit(PROMPT, sampling=GREEDY)
    pacer.hold()
    n_tokens, versions = [], []
    for _ in range(3):
        pacer.step()
        n_tokens.append(len(handle.run.tracks[0].token_ids))
        versions.append(handle.version)
    assert n_tokens == [len(PROMPT_IDS) + n for n in (1, 2, 3)]
    assert versions == sorted(set(versions))
    snapshot = handle.run
    pacer.release()
    assert len(handle.wait().tracks[0].token_ids) == len(PROMPT_IDS) + N_NEW
    assert len(snapshot.tracks[0].token_ids) == len(PROMPT_IDS) + 3  # a snapshot stays


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("rope", ["longrope", "dynamic"])
def test_a_prompt_is_read_whole_where_positions_follow_its_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rope: str, batched: bool
) -> None:
    """As Hugging Face reads it; in parts, its first tokens would stand at other positions."""
    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 4)
    half = tiny_chat_base().config.head_dim // 2
    parameters: dict[str, object] = {"rope_type": rope, "rope_theta": 10000.0, "factor": 4.0}
    if rope == "longrope":
        parameters |= {
            "short_factor": [1.0] * half,
            "long_factor": [4.0] * half,
            "original_max_position_embeddings": 8,
        }
    model = tiny_chat_xlora(tmp_path)
    config = model.base_model.config
    config.rope_parameters = parameters
    config.original_max_position_embeddings = 8
    config.max_position_embeddings = 8 if rope == "dynamic" else 128
    model.base_model.model.rotary_emb = LlamaRotaryEmbedding(config)
    config.max_position_embeddings = 128
    assert len(PROMPT_IDS) > 8
    with Engine(model, TOKENIZER, batched=batched) as engine:
        run = engine.run(PROMPT, sampling=SamplingParams(max_new_tokens=1))
    expected = full_logits(model, PROMPT_IDS)[-1]
    written = int(run.tracks[0].token_ids[-1])
    assert written == int(expected.argmax())
    np.testing.assert_allclose(
        run.tracks[0].logprob[-1], torch.log_softmax(expected, -1)[written].item(), atol=1e-4
    )
