"""The engine over a model whose layers route themselves: same runs, same files, same charts."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.gated_models import gated_chat
from tests.recorded_runs import assert_same_run, make_header, make_run
from tests.tiny_chat import EXPERTS, tiny_tokenizer
from tests.tiny_models import families
from xlora_core.config import Arm, RoutingKnobs, SamplingParams
from xlora_core.engine import Engine, scheduler
from xlora_core.errors import EngineError, RecordError, RunFileError
from xlora_core.model import XLoraModel
from xlora_core.recording import Run, header_json

TOKENIZER = tiny_tokenizer()
PROMPT = "the quick fox and 你好"
PROMPT_IDS = TOKENIZER(PROMPT)["input_ids"]
N_NEW = 10
GREEDY = SamplingParams(max_new_tokens=N_NEW)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> XLoraModel:
    return gated_chat(tmp_path_factory.mktemp("experts"))


@pytest.fixture
def engine(model: XLoraModel) -> Iterator[Engine]:
    with Engine(model, TOKENIZER, model_id="tiny") as engine:
        yield engine


def generated(model: XLoraModel, **options: object) -> list[int]:
    ids = torch.tensor([PROMPT_IDS])
    out = model.generate(input_ids=ids, max_new_tokens=N_NEW, do_sample=False, **options)
    return list(out[0].tolist())


def logged_scalings(model: XLoraModel, ids: list[int]) -> np.ndarray:
    """``[T, L, K]`` of an uncached call."""
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), use_cache=False)
    scalings = model.get_latest_scalings()
    assert scalings is not None
    return scalings[0].numpy()


@pytest.mark.parametrize("family", sorted(families()))
def test_the_routed_arm_writes_what_generate_writes(tmp_path: Path, family: str) -> None:
    model = gated_chat(tmp_path, family)
    with Engine(model, TOKENIZER) as engine:
        run = engine.run(PROMPT, sampling=GREEDY)
    ids = run.tracks[0].token_ids.tolist()
    assert ids == generated(model)
    # The last token has a row although no token follows it. float16 logits: 2e-3.
    assert run.scalings(0).shape == (len(ids), len(model.lora_layer_names), len(EXPERTS))
    np.testing.assert_allclose(run.scalings(0), logged_scalings(model, ids), atol=2e-3)
    assert run.scalings(0).std(axis=1).mean() > 0.05  # modules differ


def test_all_arms_side_by_side(engine: Engine, model: XLoraModel, tmp_path: Path) -> None:
    arms = [Arm.routed(), Arm.merged(), Arm.base(), Arm.expert("code")]
    run = engine.run(PROMPT, arms, GREEDY)
    texts = [track.token_ids.tolist() for track in run.tracks]
    assert texts[0] == generated(model)
    assert len({tuple(text) for text in texts}) > 1
    merged = gated_chat(tmp_path).merge_and_unload()
    out = merged.generate(
        input_ids=torch.tensor([PROMPT_IDS]), max_new_tokens=N_NEW, do_sample=False
    )
    assert texts[1] == out[0].tolist()
    # There is no scaling pass to give the base model's view of a routed token.
    assert np.isnan(run.tracks[0].base_logprob).all()
    np.testing.assert_array_equal(run.tracks[2].base_logprob, run.tracks[2].logprob)
    assert run.tracks[1].router_logits is None


def test_a_token_costs_one_pass(model: XLoraModel) -> None:
    calls = []
    hook = model.lora_layers[0].register_forward_hook(lambda *_: calls.append(True))
    try:
        with Engine(model, TOKENIZER) as engine:
            engine.run(PROMPT, sampling=GREEDY)
    finally:
        hook.remove()
    # The prompt, each new token but the last, and the last token's own row.
    assert len(calls) == 1 + (N_NEW - 1) + 1


def test_a_prompt_read_in_parts_gives_the_same_run(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = engine.run(PROMPT, sampling=GREEDY)
    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 4)
    parts = engine.run(PROMPT, sampling=GREEDY)
    assert parts.tracks[0].token_ids.tolist() == whole.tracks[0].token_ids.tolist()
    np.testing.assert_allclose(parts.scalings(0), whole.scalings(0), atol=1e-3)


@pytest.mark.parametrize(
    "config",
    [
        {"enable_softmax": False},
        {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2},
        {"softmax_temperature": 0.3, "global_scaling_weight": 1.5, "top_k_lora": 1},
    ],
    ids=str,
)
def test_other_configs(tmp_path: Path, config: dict[str, object]) -> None:
    model = gated_chat(tmp_path, **config)
    with Engine(model, TOKENIZER) as engine:
        run = engine.run(PROMPT, sampling=GREEDY)
    ids = run.tracks[0].token_ids.tolist()
    assert ids == generated(model)
    np.testing.assert_allclose(run.scalings(0), logged_scalings(model, ids), atol=4e-3)


def test_knobs_change_from_the_next_token_on(
    model: XLoraModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checked against a loop written out, whose cache is read under the same knobs."""
    before, after = RoutingKnobs(temperature=0.5), RoutingKnobs(top_k=1, global_weight=2.0)
    n_before = len(PROMPT_IDS) + 3
    unchanged, original = generated(model), model.gated_pass
    submitted = threading.Event()

    def gated_pass(**inputs: Any) -> Any:
        assert submitted.wait(60)
        if inputs["past_key_values"].get_seq_length() == n_before - 1:
            assert handle.set_knobs(0, after)  # while this token is being read
        return original(**inputs)

    monkeypatch.setattr(model, "gated_pass", gated_pass)
    with Engine(model, TOKENIZER) as engine:
        handle = engine.submit(PROMPT, [Arm.routed(before)], GREEDY)
        submitted.set()
        run = handle.wait()
    track = run.tracks[0]
    assert track.top_k.tolist() == [0] * n_before + [1] * (track.n_tokens - n_before)
    cache, ids, unread = model.new_cache(), list(PROMPT_IDS), list(PROMPT_IDS)
    while len(ids) < track.n_tokens:
        knobs = before if len(ids) <= n_before else after
        with torch.no_grad():
            output = original(
                input_ids=torch.tensor([unread]), past_key_values=cache.main, knobs=knobs
            ).output
        unread = [int(output.logits[0, -1].argmax())]
        ids += unread
    assert track.token_ids.tolist() == ids
    assert ids != unchanged


def test_gates_that_are_not_finite_end_the_run_with_a_clear_error(tmp_path: Path) -> None:
    model = gated_chat(tmp_path)
    with torch.no_grad():
        model.gates[5].bias[0] = torch.inf
    with Engine(model, TOKENIZER) as engine, pytest.raises(EngineError, match="not finite"):
        engine.run(PROMPT, sampling=GREEDY)


# -------------------------------------------------------------------- the record


def test_the_file_names_the_router(engine: Engine, tmp_path: Path) -> None:
    run = engine.run(PROMPT, [Arm.routed(RoutingKnobs(top_k=2)), Arm.merged()], GREEDY)
    assert run.header.router == "per_layer"
    assert run.header.layerwise
    run.save(tmp_path / "run.safetensors")
    loaded = Run.load(tmp_path / "run.safetensors")
    assert_same_run(loaded, run)
    assert loaded.header.router == "per_layer"
    np.testing.assert_array_equal(loaded.scalings(0, effective=True), run.scalings(0, None, True))


def test_exports_are_those_of_any_run(engine: Engine, tmp_path: Path) -> None:
    run = engine.run(PROMPT, sampling=GREEDY)
    table = run.bucketed(by="position", width=8)
    assert set(table["layer_name"]) == set(run.header.layer_names)
    run.to_csv(tmp_path / "run.csv")
    read = pd.read_csv(io.StringIO((tmp_path / "run.csv").read_text()))
    assert len(read) > 0
    assert read.groupby("layer_name")["mean_scaling"].mean().nunique() > 1


def test_rerouting_is_exact_for_the_first_module_only(engine: Engine, model: XLoraModel) -> None:
    """What ``Run.scalings`` says of itself."""
    run = engine.run(PROMPT, sampling=GREEDY)
    ids = run.tracks[0].token_ids.tolist()
    knobs = RoutingKnobs(temperature=0.4, top_k=1)
    rerouted = run.scalings(0, knobs)
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), use_cache=False, knobs=knobs)
    again = model.get_latest_scalings()[0].numpy()
    first_block = [i for i, n in enumerate(model.lora_layer_names) if ".0.self_attn.q_proj" in n]
    np.testing.assert_allclose(rerouted[:, first_block], again[:, first_block], atol=5e-3)
    assert np.abs(rerouted - again).max() > 0.1


def test_older_files_are_the_classifiers(tmp_path: Path) -> None:
    run = make_run()
    assert run.header.router == "classifier"
    text = header_json.to_json(run.header, run.tracks)
    assert '"router"' not in text  # as every program wrote it so far
    run.save(tmp_path / "run.safetensors")
    assert Run.load(tmp_path / "run.safetensors").header.router == "classifier"


def test_routers_that_cannot_be() -> None:
    with pytest.raises(
        RecordError, match="router must be one of classifier, per_layer, got 'oracle'"
    ):
        make_header(router="oracle")
    with pytest.raises(RecordError, match="a per-layer router is layerwise"):
        make_header(router="per_layer", layerwise=False)
    gated = make_header(router="per_layer")
    text = header_json.to_json(gated, make_run().tracks)
    assert header_json.from_json(text, prompt_text="")[0].router == "per_layer"
    for doctored, message in (
        (text.replace('"per_layer"', '"oracle"'), "router must be one of"),
        (text.replace('"per_layer"', "[]"), "router must be one of"),
        (text.replace('"format_version": 2', '"format_version": 1'), "key 'router' is not known"),
    ):
        assert doctored != text
        with pytest.raises(RunFileError, match=message):
            header_json.from_json(doctored, prompt_text="")
