"""A classifier learns from labels alone before the language-model loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.tiny_models import tiny_base, write_experts
from tests.training_models import PAD, ROUTER, CallAt, letter_tokenizer, row, weights_of
from xlora_core.config import RouterTrainConfig
from xlora_core.errors import ConfigError
from xlora_core.model import XLoraModel
from xlora_core.training import router as router_module
from xlora_core.training.data import Example, collate, encode, encode_rows, joined
from xlora_core.training.label_start import _n_shared, _read, start_from_labels
from xlora_core.training.metrics import RoutingSums
from xlora_core.training.router import fresh_model, train_router

START = replace(ROUTER, label_start_rows=24, learning_rate=0.03)
WORDS = {"0": "abc", "1": "xyz", "2": "mno"}  # of each expert's domain


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_experts(tmp_path_factory.mktemp("experts"))


@pytest.fixture
def model(adapters: dict[str, str]) -> XLoraModel:
    return fresh_model(tiny_base(), adapters, START)


def rows_of(domain: str, n: int = 8) -> list[Example]:
    letters = WORDS[domain]
    rows = [row(letters * (1 + i % 3), letters[::-1] * (1 + i % 2), domain) for i in range(n)]
    return encode_rows(rows, letter_tokenizer(), 60)


def mixture() -> list[Example]:
    return [example for domain in WORDS for example in rows_of(domain)]


def read(model: XLoraModel, examples: list[Example], **settings: Any) -> tuple[torch.Tensor, ...]:
    return _read(model, PAD, examples, replace(START, **settings))


def routing(model: XLoraModel, examples: list[Example]) -> dict[str, float]:
    """Where the router looks on all labelled tokens, questions included."""
    hidden, targets, _ = read(model, examples)
    with torch.no_grad():
        sums = RoutingSums()
        sums.add(model.classifier(hidden).softmax(dim=-1), targets)
    return sums.means(model.adapter_names)


def test_questions_and_answers_go_to_the_expert_of_their_row(model: XLoraModel) -> None:
    assert routing(model, mixture())["right_top"] == 0
    before = weights_of(model)
    losses = start_from_labels(model, PAD, mixture(), START)
    assert losses[0] == pytest.approx(torch.tensor(3.0).log().item(), abs=1e-5)
    assert losses[-1] < 0.2
    assert routing(model, mixture())["right_top"] > 0.95
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {f"classifier.{n}" for n, _ in model.classifier.named_parameters()}


def test_all_modules_start_alike(model: XLoraModel) -> None:
    start_from_labels(model, PAD, mixture(), START)
    logits = model.scaling_pass(input_ids=torch.tensor([[5, 6, 7]])).router_logits
    torch.testing.assert_close(logits, logits[:, :, :1].expand_as(logits), rtol=0.01, atol=0.01)


def test_it_repeats_by_seed(adapters: dict[str, str]) -> None:
    runs = []
    for seed in (0, 0, 1):
        model = fresh_model(tiny_base(), adapters, START)
        settings = replace(START, seed=seed, label_start_rows=12)
        runs.append(start_from_labels(model, PAD, mixture(), settings))
    assert runs[0] == runs[1] != runs[2]


def test_steps_and_learning_rate_are_its_own(adapters: dict[str, str]) -> None:
    def losses(**settings: Any) -> list[float]:
        model = fresh_model(tiny_base(), adapters, START)
        return start_from_labels(model, PAD, mixture(), replace(START, **settings))

    few = losses(label_start_steps=20)
    assert len(few) == 20
    assert few == losses(
        label_start_steps=20, label_start_learning_rate=START.learning_rate, learning_rate=9.0
    )
    assert few != losses(label_start_steps=20, label_start_learning_rate=1e-3)


def test_a_deeper_classifier_repeats_by_seed_with_its_dropout(adapters: dict[str, str]) -> None:
    runs = []
    for seed in (0, 0, 1):
        settings = replace(START, depth=2, size=16, label_start_steps=30, seed=seed)
        torch.rand(seed + len(runs))  # what was drawn before changes nothing
        model = fresh_model(tiny_base(), adapters, settings)
        hidden_weights = model.classifier.layers[0].weight.detach().clone()
        modes: list[bool] = []
        dropout = next(m for m in model.classifier.layers if isinstance(m, nn.Dropout))
        dropout.register_forward_hook(lambda m, *_, seen=modes: seen.append(m.training))
        losses = start_from_labels(model, PAD, mixture(), settings)
        assert modes.count(True) == 30  # the rest read the hidden states
        assert not dropout.training
        runs.append((losses, hidden_weights.tolist()))
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[2][0]
    assert runs[0][1] != runs[2][1]


def test_smoothing_leaves_a_share_of_the_mixture_open(adapters: dict[str, str]) -> None:
    mass = {}
    for smoothing in (0.0, 0.3):
        model = fresh_model(tiny_base(), adapters, START)
        settings = replace(START, label_start_smoothing=smoothing)
        start_from_labels(model, PAD, mixture(), settings)
        mass[smoothing] = routing(model, mixture())["right_mass"]
    assert mass[0.0] > 0.95
    # Each of three experts has a third of the smoothed share, the right one the rest besides.
    assert mass[0.3] == pytest.approx(0.8, abs=0.04)


def test_it_reads_what_the_classifier_reads_one_token_ahead(model: XLoraModel) -> None:
    example = encode([row("abc", "xy", "1")], letter_tokenizer(), 60)
    assert example is not None
    hidden, targets, weights = read(model, [example])
    batch = collate([example], PAD)
    with torch.no_grad():
        states = model.base_model.model(input_ids=batch.input_ids).last_hidden_state[0]
    torch.testing.assert_close(hidden, states[:-1])  # the last token writes nothing
    assert targets.tolist() == [1] * (len(example) - 1)
    # "Uabc\nA" has 5 tokens of the question that write another; "A", "x", "y" write the answer.
    torch.testing.assert_close(weights, torch.tensor([0.1] * 5 + [0.5 / 3] * 3))


def test_the_common_beginning_and_other_peoples_domains_are_left_out(model: XLoraModel) -> None:
    tokenizer = letter_tokenizer()
    history = (("system", "be brief"),)
    turns = [
        replace(row("abc", "ab", "0"), history=history),
        replace(row("xyz", "xy", "1"), history=history),
        replace(row("zzz", "zz", "law"), history=history),
    ]
    examples = [e for turn in turns if (e := encode([turn], tokenizer, 60))]
    plain = Example(input_ids=[9, 10, 11], labels=[9, 10, 11], domains=["2"] * 3)
    _, targets, _ = read(model, [*examples, plain])
    # "be brief\nU" is the same in all: "abc\nAab<e>" is left, 7 of which are written by another.
    assert sorted(targets.tolist()) == [0] * 7 + [1] * 7 + [2] * 2


def test_a_prompt_of_two_domains_has_no_topic_but_its_answers_have() -> None:
    tokenizer = letter_tokenizer()
    mixed = joined(row("a", "b", "math"), row("c", "d", "verse"), tokenizer, 50)
    same = joined(row("a", "b", "math"), row("c", "d", "math"), tokenizer, 50)
    turns = encode([row("a", "b", "math"), row("c", "d", "verse")], tokenizer, 50)
    assert mixed is not None
    assert mixed.topics == [""] * 7 + ["math"] * 3 + ["verse"] * 2
    assert same is not None
    assert same.topics == ["math"] * len(same)
    assert turns is not None
    assert turns.topics == ["math"] * 6 + ["verse"] * 6


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=4))
def test_the_common_beginning_is_the_longest(prompts: list[list[int]]) -> None:
    n = _n_shared(prompts)
    if len(prompts) < 2:
        assert n == 0
        return
    assert all(p[:n] == prompts[0][:n] for p in prompts)
    assert len({tuple(p[: n + 1]) for p in prompts}) > 1 or n == min(map(len, prompts))


def test_a_run_starts_from_labels_once(
    adapters: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fresh_model(tiny_base(), adapters, START)
    log = train_router(whole, PAD, mixture(), rows_of("1"), tmp_path / "whole", START)
    assert log.heldout_routing[0][0] == 0
    assert log.heldout_routing[0][1]["right_top"] > 0.9

    def stop() -> None:
        raise KeyboardInterrupt

    cut = fresh_model(tiny_base(), adapters, START)
    with pytest.raises(KeyboardInterrupt):
        train_router(
            cut, PAD, mixture(), rows_of("1"), tmp_path / "cut", START, progress=CallAt(4, stop)
        )
    monkeypatch.setattr(
        router_module, "start_from_labels", lambda *_, **__: pytest.fail("started anew")
    )
    resumed = fresh_model(tiny_base(), adapters, START)
    again = train_router(resumed, PAD, mixture(), rows_of("1"), tmp_path / "cut", START)
    assert again.heldout_loss == log.heldout_loss
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, weights_of(resumed)[name])


def test_other_topics_are_another_run(adapters: dict[str, str]) -> None:
    def identity(topics: list[str], settings: RouterTrainConfig) -> dict[str, Any]:
        example = Example(input_ids=[5, 6], labels=[5, 6], domains=["0", "0"], topics=topics)
        model = fresh_model(tiny_base(), adapters, settings)
        return router_module.router_identity(model, [example], [], settings)

    assert identity(["0", "0"], START) != identity(["0", "1"], START)
    assert identity(["0", "0"], ROUTER) == identity(["0", "1"], ROUTER)


def test_rows_of_no_expert_are_an_error(model: XLoraModel) -> None:
    strangers = encode_rows([row("abc", "xy", "law")], letter_tokenizer(), 60)
    before = weights_of(model)
    with pytest.raises(ConfigError, match="needs rows of the domains 0, 1, 2; none of the 1 that"):
        start_from_labels(model, PAD, strangers, START)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_gates_cannot_start_from_labels(adapters: dict[str, str], tmp_path: Path) -> None:
    settings = replace(START, router="per_layer")
    model = fresh_model(tiny_base(), adapters, settings)
    with pytest.raises(ConfigError, match="label_start_rows needs a classifier"):
        train_router(model, PAD, mixture(), [], tmp_path / "out", settings)


@pytest.mark.parametrize("rows", [-1, 1.5, True])
def test_bad_numbers_are_refused(rows: Any) -> None:
    with pytest.raises(ConfigError, match="label_start_rows must be a whole number >= 0"):
        replace(ROUTER, label_start_rows=rows)


@pytest.mark.parametrize("steps", [0, 2.5])
@pytest.mark.parametrize("rate", [0, float("nan")])
@pytest.mark.parametrize("smoothing", [-0.1, 1])
def test_bad_settings_of_the_start_are_refused_together(
    steps: Any, rate: Any, smoothing: Any
) -> None:
    with pytest.raises(ConfigError) as refused:
        replace(
            ROUTER,
            label_start_steps=steps,
            label_start_learning_rate=rate,
            label_start_smoothing=smoothing,
            global_scaling_weight=float("inf"),
        )
    assert "label_start_smoothing must be in [0, 1)" in str(refused.value)
    assert "global_scaling_weight must be finite, got inf" in str(refused.value)
    assert "label_start_steps must be a whole number >= 1" in str(refused.value)
    assert "label_start_learning_rate must be None or finite and > 0" in str(refused.value)
