"""The best weighted merge, on tiny models: it is the best, and the same every time."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_models import tiny_xlora
from tests.training_models import PAD, letter_tokenizer, row
from xlora_core.model import XLoraModel
from xlora_core.training.data import Example, encode_rows, mixed_examples
from xlora_core.training.evaluation import evaluate, mean_losses
from xlora_core.training.merge_fit import MergeFitSettings, fit_merge

SETTINGS = MergeFitSettings(steps=60, rows_per_group=4, learning_rate=0.1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> XLoraModel:
    return tiny_xlora(tmp_path_factory.mktemp("model"), n_adapters=3)


@pytest.fixture(scope="module")
def groups() -> dict[str, list[Example]]:
    """Answers of one length, so that the mean over rows is the mean over tokens."""
    rows = {
        domain: [row(f"{domain}{i}?", answer[i:] + answer[:i], domain) for i in range(4)]
        for domain, answer in (("0", "abcd"), ("1", "1234"), ("2", "qrst"))
    }
    return {domain: encode_rows(rows[domain], letter_tokenizer(), 60) for domain in rows}


def test_it_is_no_worse_than_uniform_weights_and_any_expert(
    model: XLoraModel, groups: dict[str, list[Example]]
) -> None:
    lines: list[str] = []
    fit = fit_merge(model, groups, PAD, SETTINGS, report=lines.append)
    assert list(fit.weights) == model.adapter_names
    assert fit.rows == 12
    assert len(fit.losses) == 60
    assert lines[-1].startswith("best weighted merge: step 56/60, loss ")
    results = evaluate(model, groups, PAD, merge_weights=list(fit.weights.values()))
    means = mean_losses({name: vars(result) for name, result in results.items()})
    others = [arm for arm in means if arm == "uniform" or arm.startswith("expert:")]
    assert len(others) == 4
    assert means["best_merge"] <= min(means[arm] for arm in others)
    assert means["best_merge"] < means["uniform"] - 0.01


def test_it_starts_as_the_uniform_merge_and_repeats_itself(
    model: XLoraModel, groups: dict[str, list[Example]]
) -> None:
    first = {name: examples[:1] for name, examples in groups.items()}
    settings = MergeFitSettings(steps=3)
    fit = fit_merge(model, first, PAD, settings)
    results = evaluate(model, first, PAD)
    uniform = mean_losses({name: vars(result) for name, result in results.items()})["uniform"]
    assert fit.losses[0] == pytest.approx(uniform, abs=2e-4)
    assert fit == fit_merge(model, first, PAD, settings)
    assert fit.rows == 3


def test_every_group_counts_the_same_and_the_model_stays_as_it_is(
    model: XLoraModel,
) -> None:
    tokenizer = letter_tokenizer()
    rows = {"0": [row("a", "b", "0")], "1": [row("c", "d" * 40, "1")]}
    groups = {domain: encode_rows(rows[domain] * 2, tokenizer, 60) for domain in rows}
    groups["mixed"] = mixed_examples(rows, tokenizer, 60, 2)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    fit = fit_merge(model, groups, PAD, MergeFitSettings(steps=1))
    each = [fit_merge(model, {k: g}, PAD, MergeFitSettings(steps=1)) for k, g in groups.items()]
    assert fit.losses[0] == pytest.approx(sum(f.losses[0] for f in each) / 3, abs=2e-4)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
