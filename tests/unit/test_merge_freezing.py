"""Frozen mixtures: the mean of a run, the mean over texts, and the file that keeps them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.gated_models import gated_xlora
from tests.recorded_runs import ADAPTERS, ALL_ARMS, LAYERS, PRESENT, expected_scalings, make_run
from tests.seq2seq_models import seq2seq_xlora
from tests.tiny_chat import tiny_chat_xlora, tiny_tokenizer
from tests.tiny_models import tiny_base, tiny_prompt, tiny_xlora, write_lora
from xlora_core import Arm, Engine, RoutingKnobs, SamplingParams, XLoraConfig, XLoraModel
from xlora_core.errors import ConfigError, ModelError, PromptError
from xlora_core.freezing import (
    FrozenMixture,
    TokenChoice,
    freeze_rows,
    freeze_run,
    plain_rows,
    read_texts,
    token_rows,
)
from xlora_core.merge import weight_matrix
from xlora_core.training.data import IGNORE, Example, Row

TEXTS = ["the quick brown fox", "def add(a, b): return a + b", "the sum of two numbers and more"]
ROWS = [
    Row(domain="", id="1", user="the sum of two numbers", assistant="def add(a, b)"),
    Row(domain="", id="2", user="the fox", assistant="over the lazy dog and the quick fox"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> XLoraModel:
    return tiny_chat_xlora(tmp_path_factory.mktemp("experts")).double()


def rows(*texts: str | Row) -> list[Example]:
    return token_rows(texts, tiny_tokenizer(), context_length=128)


def mixture(**changes: object) -> FrozenMixture:
    values: dict[str, object] = {
        "adapter_names": ["a", "b"],
        "layer_names": ["x", "y", "z"],
        "weights": torch.tensor([[0.1, 0.2], [1 / 3, -4.0], [0.0, 1e-300]], dtype=torch.float64),
        "n_tokens": 7,
        "source": "a test",
        "adapter_hashes": {"a": "00ff"},
    }
    return FrozenMixture(**(values | changes))  # type: ignore[arg-type]  # values are its fields


# ---------------------------------------------------------------- of a run


@pytest.mark.parametrize(
    ("tokens", "chosen"),
    [("response", slice(3, None)), ("prompt", slice(3)), ("all", slice(None))],
)
@pytest.mark.parametrize("knobs", [None, RoutingKnobs(top_k=1, temperature=0.3, global_weight=2.0)])
def test_a_run_gives_the_mean_of_its_effective_scalings(
    tokens: TokenChoice, chosen: slice, knobs: RoutingKnobs | None
) -> None:
    changing = [RoutingKnobs(top_k=k, temperature=t) for k, t in ((None, 1.0), (2, 0.5))] * 4
    run = make_run(knobs=changing)
    frozen = freeze_run(run, tokens=tokens, knobs=knobs)
    expected = expected_scalings(run, 0, knobs, effective=True)[chosen]
    np.testing.assert_allclose(frozen.weights.numpy(), expected.mean(axis=0), atol=1e-6)
    assert frozen.weights.dtype == torch.float64
    assert frozen.weights[1, 1] == 0  # absent there
    assert frozen.n_tokens == len(expected)
    assert frozen.adapter_names == ADAPTERS
    assert frozen.layer_names == LAYERS
    assert frozen.adapter_hashes == run.header.adapter_hashes


def test_it_is_the_mean_that_the_segment_table_shows() -> None:
    run = make_run(n_prompt=4, n_response=9)
    table = run.bucketed(by="segment")
    for segment in ("prompt", "response"):
        frozen = freeze_run(run, tokens=segment)  # type: ignore[arg-type]  # one of its values
        for row in table[table["bucket"] == segment].itertuples():
            if PRESENT[row.layer_index][ADAPTERS.index(row.adapter)]:
                weight = frozen.weights[row.layer_index, ADAPTERS.index(row.adapter)]
                assert float(weight) == pytest.approx(row.mean_effective_scaling, abs=1e-6)


def test_every_arm_can_be_frozen() -> None:
    run = make_run(arms=ALL_ARMS)
    present = torch.tensor(PRESENT).double()
    merged, base, expert = (freeze_run(run, arm) for arm in (1, 2, 3))
    torch.testing.assert_close(merged.weights, present / 3, atol=1e-7, rtol=0)
    assert torch.equal(base.weights, torch.zeros(2, 3).double())
    assert torch.equal(expert.weights, present * torch.tensor([0.0, 1.0, 0.0]))
    assert expert.source == f"run {run.header.run_id}, arm 3 (expert:code), 5 response tokens"


def test_one_set_of_scalings_for_all_modules() -> None:
    run = make_run(layerwise=False)
    frozen = freeze_run(run, tokens="all")
    expected = expected_scalings(run, 0, None, effective=True).mean(axis=0)
    np.testing.assert_allclose(frozen.weights.numpy(), expected, atol=1e-6)


def test_a_run_that_broke_off_counts_what_it_has() -> None:
    run = make_run(n_prompt=3, n_response=5, finish=None, n_routed=5)
    assert freeze_run(run).n_tokens == 2
    assert freeze_run(run, tokens="all").n_tokens == 5


def test_what_a_run_does_not_have_is_refused() -> None:
    run = make_run(n_prompt=3, n_response=0)
    with pytest.raises(ConfigError) as caught:
        freeze_run(run)
    assert caught.value.message == (
        "arm 0 of the run has no response tokens whose scalings are known"
    )
    with pytest.raises(ConfigError, match="there is no arm 1"):
        freeze_run(run, 1)
    with pytest.raises(ConfigError, match="top_k"):
        freeze_run(make_run(), knobs=RoutingKnobs(top_k=4))


def test_tokens_of_an_unknown_kind_are_no_prompt(model: XLoraModel) -> None:
    wrong: TokenChoice = "answer"  # type: ignore[assignment]  # what is tried here
    for freeze in (
        lambda: freeze_run(make_run(), tokens=wrong),
        lambda: freeze_rows(model, rows(*TEXTS), tokens=wrong),
    ):
        with pytest.raises(ConfigError, match="'response', 'prompt', 'all', got 'answer'"):
            freeze()


# ---------------------------------------------------------------- of texts


@pytest.mark.parametrize("tokens", ["response", "prompt", "all"])
@pytest.mark.parametrize("knobs", [None, RoutingKnobs(top_k=1, global_weight=0.5)])
@torch.no_grad()
def test_texts_give_the_mean_over_their_tokens_alone(
    model: XLoraModel, tokens: TokenChoice, knobs: RoutingKnobs | None
) -> None:
    """Row by row without padding, the long way; batches of any size give the same."""
    examples = rows(*ROWS)
    parts = []
    for example in examples:
        logits = model.scaling_pass(input_ids=torch.tensor([example.input_ids])).router_logits
        scalings = model.route(logits, knobs)[0]
        labelled = torch.tensor(example.labels) != IGNORE
        kept = {"response": labelled, "prompt": ~labelled, "all": labelled | True}[tokens]
        parts.append(scalings[kept])
    expected = torch.cat(parts).mean(dim=0)
    for tokens_per_batch in (1, 40, 10_000):
        frozen = freeze_rows(
            model, examples, tokens=tokens, knobs=knobs, tokens_per_batch=tokens_per_batch
        )
        torch.testing.assert_close(frozen.weights, expected, atol=1e-12, rtol=0)
    assert frozen.n_tokens == sum(map(len, parts))
    assert len({len(example) for example in examples}) == 2  # something was padded


def test_plain_texts_are_all_response(model: XLoraModel) -> None:
    examples = rows(*TEXTS)
    frozen = freeze_rows(model, examples, name="fox.txt")
    assert frozen.n_tokens == sum(map(len, examples))
    assert frozen.source == f"fox.txt, 3 rows, {frozen.n_tokens} response tokens"
    assert torch.equal(frozen.weights, freeze_rows(model, examples, tokens="all").weights)
    with pytest.raises(ConfigError, match="the texts have no prompt tokens"):
        freeze_rows(model, examples, tokens="prompt")


def test_a_run_and_its_text_freeze_alike(tmp_path: Path) -> None:
    """What the engine records with caches, and what one pass over the same tokens finds."""
    model = tiny_chat_xlora(tmp_path)
    knobs = RoutingKnobs(top_k=2, temperature=0.5)
    with Engine(model, tiny_tokenizer()) as engine:
        run = engine.run("the quick fox", [Arm.routed(knobs)], SamplingParams(max_new_tokens=12))
    track = run.tracks[0]
    ids = track.token_ids.tolist()
    labels = [IGNORE] * track.n_prompt + ids[track.n_prompt :]
    example = Example(input_ids=ids, labels=labels, domains=[""] * len(ids))
    for tokens in ("response", "prompt", "all"):
        of_run = freeze_run(run, tokens=tokens)
        of_text = freeze_rows(model, [example], tokens=tokens, knobs=knobs)
        assert of_run.n_tokens == of_text.n_tokens
        torch.testing.assert_close(of_run.weights, of_text.weights, atol=2e-3, rtol=0)
        assert of_run.adapter_hashes == of_text.adapter_hashes
    assert of_run.weights.std(dim=0).min() > 0.01  # modules differ: it is no uniform mixture


@torch.no_grad()
def test_gates_of_each_layer_are_frozen_as_well(tmp_path: Path) -> None:
    model = gated_xlora(tmp_path, dtype=torch.float64)
    rows_ = [
        Example(input_ids=ids, labels=ids, domains=[""] * len(ids)) for ids in ([5, 6, 7], [8])
    ]
    knobs = RoutingKnobs(top_k=2)
    parts = []
    for row in rows_:
        logits = model.gated_pass(
            input_ids=torch.tensor([row.input_ids]), knobs=knobs
        ).router_logits
        parts.append(model.route(logits, knobs)[0])
    expected = torch.cat(parts).mean(dim=0)
    frozen = freeze_rows(model, rows_, knobs=knobs)
    torch.testing.assert_close(frozen.weights, expected, atol=1e-12, rtol=0)
    assert frozen.weights.std(dim=0).min() > 0.01


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="reads a source and a target"):
        freeze_rows(seq2seq_xlora(tmp_path, "t5"), rows(*TEXTS))


def test_absent_experts_are_frozen_as_0(tmp_path: Path) -> None:
    base = tiny_base()
    a = write_lora(tmp_path / "a", base, ("q_proj",))
    b = write_lora(tmp_path / "b", base, ("q_proj", "v_proj"))
    model = XLoraModel.from_base(base, XLoraConfig(adapters={"a": str(a), "b": str(b)}))
    example = Example(input_ids=[5, 6, 7], labels=[5, 6, 7], domains=[""] * 3)
    weights = freeze_rows(model, [example]).weights
    absent = torch.tensor(["v_proj" in name for name in model.lora_layer_names])
    assert torch.equal(weights[absent, 0], torch.zeros(2).double())
    assert (weights[~absent, 0] > 0.1).all()
    assert (weights[:, 1] > 0.1).all()


# ---------------------------------------------------------------- reading texts


def test_rows_and_lines_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps({"domain": r.domain, "id": r.id, "user": r.user, "assistant": r.assistant})
            + "\n"
            for r in ROWS
        )
    )
    (tmp_path / "lines.txt").write_text("\n".join(["", *TEXTS, "  "]))
    assert rows(*read_texts(tmp_path / "rows.jsonl")) == rows(*ROWS)
    assert rows(*read_texts(tmp_path / "lines.txt")) == rows(*TEXTS)
    first = rows(ROWS[0])[0]
    answer = tiny_tokenizer()(ROWS[0].assistant)["input_ids"]
    assert first.labels[-len(answer) - 1 : -1] == answer
    assert first.labels[0] == IGNORE


def test_unreadable_texts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    for name, message in (
        ("none.txt", "none.txt cannot be read as text"),
        ("latin.txt", "latin.txt cannot be read as text"),
        ("empty.txt", "empty.txt holds no text"),
        ("none.jsonl", "none.jsonl"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_texts(tmp_path / name)
    with pytest.raises(ConfigError, match="there are no rows"):
        rows()
    with pytest.raises(ConfigError, match="the list holds no text"):
        plain_rows([])


def test_long_rows_are_refused_or_cut_on_request() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(PromptError) as caught:
        token_rows([TEXTS[0], "fox " * 200], tokenizer, context_length=128)
    assert caught.value.message.startswith("row 2 has ")
    assert "the model's context window is 128" in caught.value.message
    cut = token_rows([TEXTS[0], "fox " * 200], tokenizer, context_length=128, cut_at=20)
    assert [len(example) for example in cut] == [min(20, len(rows(TEXTS[0])[0])), 20]
    long = Row(domain="", id="1", user="fox " * 200, assistant="yes")
    with pytest.raises(PromptError, match="row 1: its prompt alone has 20 tokens or more"):
        token_rows([long], tokenizer, context_length=128, cut_at=20)


# ---------------------------------------------------------------- the file


def test_the_file_gives_the_mixture_back_to_the_last_bit(tmp_path: Path) -> None:
    path = tmp_path / "mixture.json"
    mixture().save(path)
    again = FrozenMixture.load(path)
    assert torch.equal(again.weights, mixture().weights)
    for name in ("adapter_names", "layer_names", "n_tokens", "source", "adapter_hashes"):
        assert getattr(again, name) == getattr(mixture(), name)
    assert [file.name for file in tmp_path.iterdir()] == ["mixture.json"]


def test_names_are_matched_not_places() -> None:
    frozen = mixture()
    assert torch.equal(frozen.matrix(["a", "b"], ["x", "y", "z"]), frozen.weights)
    turned = frozen.matrix(["b", "a"], ["z", "x", "y"])
    assert torch.equal(turned, frozen.weights[[2, 0, 1]][:, [1, 0]])
    assert frozen.adapter_means() == {"a": pytest.approx(13 / 90), "b": pytest.approx(-3.8 / 3)}


def test_other_names_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        mixture().matrix(["a", "c"], ["x", "y", "z", "w"])
    lacks = "it has, the model lacks: 'b'; the model has: 'c'"
    assert caught.value.faults == [
        f"the frozen mixture is for other adapters: {lacks}",
        "the frozen mixture is for other modules: the model has: 'w'",
    ]
    assert caught.value.hint == "apply it to the model that it was frozen from, or freeze again"


def test_a_mixture_goes_where_weights_go() -> None:
    frozen = mixture()
    names = ["x", "y", "z"]
    assert torch.equal(weight_matrix(frozen, ["a", "b"], names), frozen.weights)
    with pytest.raises(ConfigError, match="is for other modules"):
        weight_matrix(frozen, ["a", "b"], ["x", "y", "w"])
    with pytest.raises(ConfigError, match="must be checked against the model's modules"):
        weight_matrix(frozen, ["a", "b"], 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weights": [[1.0, 2.0]]},
            "weights must have shape [3, 2] (modules, adapters), got [1, 2]",
        ),
        ({"weights": torch.full((3, 2), float("nan"))}, "weights must be finite"),
        ({"weights": "x"}, "weights must be numbers"),
        ({"adapter_names": ["a", "a"]}, "adapter_names must be a list of different names"),
        ({"adapter_names": []}, "adapter_names must be a list of different names"),
        ({"layer_names": "xyz"}, "layer_names must be a list of different names"),
        ({"n_tokens": 1.5}, "n_tokens must be a whole number >= 0, got 1.5"),
        ({"source": None}, "source must be text, got None"),
        ({"adapter_hashes": []}, "adapter_hashes must map names to texts"),
        ({"adapter_hashes": {"a": 1}}, "adapter_hashes must map names to texts"),
    ],
)
def test_malformed_mixtures_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        mixture(**changes)
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "something"}, "is not a frozen mixture: its format is not"),
        ({"version": 2}, "has format version 2, this program reads 1"),
        ({"weights": [[1, 2], [3]]}, "mixture.json: frozen mixture: weights must be numbers"),
        ({"weights": [[1, 2], [3, None], [1, 1]]}, "weights must be numbers"),
        ({"layer_names": ["x"]}, "weights must have shape [1, 2]"),
        ({"adapter_names": {"a": 1}}, "adapter_names must be a list of different names"),
    ],
)
def test_doctored_files_are_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "mixture.json"
    mixture().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError) as caught:
        FrozenMixture.load(path)
    assert message in caught.value.message


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mixture.json"
    with pytest.raises(ConfigError, match=r"mixture\.json cannot be read"):
        FrozenMixture.load(path)
    for text in ("{", "[" * 100_000, "\x00", "1"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="is not a frozen mixture"):
            FrozenMixture.load(path)
    mixture().save(path)
    values = json.loads(path.read_text())
    del values["weights"]
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="field weights is missing"):
        FrozenMixture.load(path)
    with pytest.raises(ConfigError, match="cannot be written"):
        mixture().save(tmp_path / "none" / "mixture.json")


def test_a_model_is_merged_by_a_mixture_of_its_own_names_only(tmp_path: Path) -> None:
    model = tiny_xlora(tmp_path, dtype=torch.float64)
    names, layers = list(model.adapter_names), list(model.lora_layer_names)
    weights = torch.rand(len(layers), len(names), dtype=torch.float64)
    other = FrozenMixture(adapter_names=names[::-1][:2], layer_names=layers, weights=weights[:, :2])
    with pytest.raises(ConfigError):
        model.merge_and_unload(other)
    with torch.no_grad():
        expected = model.main_pass(input_ids=tiny_prompt(), scalings=weights).logits
        mixture = FrozenMixture(adapter_names=names, layer_names=layers, weights=weights)
        found = model.merge_and_unload(mixture)(input_ids=tiny_prompt()).logits
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
