"""The best weighted merge, on tiny models: it is the best, and of what the table shows."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch.nn import functional as F

from tests.tiny_models import VOCAB_SIZE, tiny_xlora
from tests.training_models import PAD, letter_tokenizer, row
from xlora_core.model import XLoraModel
from xlora_core.training.data import IGNORE, Example, collate, encode_rows
from xlora_core.training.evaluation import evaluate, mean_losses
from xlora_core.training.merge_fit import MergeFit, MergeFitSettings, fit_merge

EXACT = MergeFitSettings(steps=40, tolerance=1e-6)
# Domain -> the weights under which its answers are the likely ones, and its rows.
TRUTHS = {"0": ([0.9, -0.2, 0.1], 5), "1": ([0.0, 0.7, 0.2], 6), "2": ([0.2, 0.1, 0.5], 3)}


@torch.no_grad()
def likely_rows(
    model: XLoraModel, weights: Sequence[float], lengths: Sequence[int], seed: int
) -> list[Example]:
    """Rows of random tokens, each labelled as the model continues it under some weights."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(3, VOCAB_SIZE, (1, length), generator=generator)
        logits = model.main_pass(scalings=torch.tensor(weights), input_ids=ids).logits[0, :-1]
        likely = torch.multinomial(logits.softmax(-1), 1, generator=generator).flatten().tolist()
        labels = [IGNORE, IGNORE, *likely[1:]]
        rows.append(Example(input_ids=ids[0].tolist(), labels=labels, domains=["0"] * length))
    return rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> XLoraModel:
    return tiny_xlora(tmp_path_factory.mktemp("model"), n_adapters=3)


@pytest.fixture(scope="module")
def domains(model: XLoraModel) -> dict[str, list[Example]]:
    """Rows of different lengths, so that means over rows, tokens and domains differ."""
    return {
        name: likely_rows(model, weights, [8 + 11 * i for i in range(count)], seed=int(name))
        for name, (weights, count) in TRUTHS.items()
    }


@pytest.fixture(scope="module")
def exact(model: XLoraModel, domains: dict[str, list[Example]]) -> MergeFit:
    return fit_merge(model, domains, PAD, EXACT)


def table_means(
    model: XLoraModel, domains: Mapping[str, Sequence[Example]], weights: Sequence[float]
) -> dict[str, float]:
    results = evaluate(model, domains, PAD, merge_weights=weights)
    return mean_losses({name: vars(result) for name, result in results.items()})


def test_it_is_fitted_to_what_the_table_shows(
    model: XLoraModel, domains: dict[str, list[Example]], exact: MergeFit
) -> None:
    fit = exact
    means = table_means(model, domains, list(fit.weights.values()))
    assert list(fit.weights) == model.adapter_names
    assert fit.uniform_loss == pytest.approx(means["uniform"], abs=1.5e-4)
    assert fit.loss == pytest.approx(means["best_merge"], abs=1.5e-4)
    assert fit.rows == 14
    assert fit.tokens == sum(
        label != IGNORE for examples in domains.values() for e in examples for label in e.labels
    )


def test_it_is_no_worse_than_uniform_weights_and_any_expert(
    model: XLoraModel, domains: dict[str, list[Example]], exact: MergeFit
) -> None:
    fit = exact
    means = table_means(model, domains, list(fit.weights.values()))
    others = [arm for arm in means if arm in ("base", "uniform") or arm.startswith("expert:")]
    assert len(others) == 5
    assert means["best_merge"] <= min(means[arm] for arm in others)
    assert means["best_merge"] < means["uniform"] - 0.01


def test_it_is_the_best_of_all_weights_of_two_experts(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    model = tiny_xlora(tmp_path_factory.mktemp("two"), n_adapters=2)
    two = {
        "0": likely_rows(model, [0.8, 0.1], [40, 60], seed=0),
        "1": likely_rows(model, [-0.1, 0.6], [20, 30, 50], seed=1),
    }

    batches = [collate(examples, PAD) for examples in two.values()]

    @torch.no_grad()
    def loss(weights: tuple[float, float]) -> float:
        of_domains = []
        for batch in batches:
            logits = model.main_pass(scalings=torch.tensor(weights), input_ids=batch.input_ids)
            written = logits.logits[:, :-1].flatten(0, 1)
            of_domains.append(F.cross_entropy(written, batch.labels[:, 1:].flatten()).item())
        return sum(of_domains) / len(of_domains)

    best, width = (0.5, 0.5), 1.5
    while width > 0.02:
        grid = [[w + width * (i / 2 - 1) for i in range(5)] for w in best]
        best = min(((a, b) for a, b in itertools.product(*grid)), key=loss)
        width /= 2
    fit = fit_merge(model, two, PAD, EXACT)
    assert fit.loss == pytest.approx(loss(best), abs=1e-3)
    assert fit.loss <= loss(best) + 1e-4
    assert list(fit.weights.values()) == pytest.approx(best, abs=0.05)


def test_the_order_of_the_rows_does_not_matter(
    model: XLoraModel, domains: dict[str, list[Example]]
) -> None:
    fit = fit_merge(model, domains, PAD, MergeFitSettings())
    turned = {domain: domains[domain][::-1] for domain in reversed(domains)}
    other = fit_merge(model, turned, PAD, MergeFitSettings())
    assert other.weights == pytest.approx(fit.weights, abs=1e-3)
    assert other.losses == pytest.approx(fit.losses, abs=2e-4)
    assert fit_merge(model, domains, PAD, MergeFitSettings()) == fit


def test_every_domain_counts_the_same_however_many_rows_and_tokens_it_has(
    model: XLoraModel, domains: dict[str, list[Example]], exact: MergeFit
) -> None:
    twice = {"0": domains["0"] * 2} | {name: domains[name] for name in ("1", "2")}
    again = fit_merge(model, twice, PAD, EXACT)
    assert again.rows == exact.rows + 5
    assert again.uniform_loss == pytest.approx(exact.uniform_loss, abs=1e-4)
    assert again.weights == pytest.approx(exact.weights, abs=0.01)
    of_each = [fit_merge(model, {d: group}, PAD, EXACT) for d, group in domains.items()]
    uniform = [fit.uniform_loss for fit in of_each]
    assert max(uniform) - min(uniform) > 0.05
    assert exact.uniform_loss == pytest.approx(sum(uniform) / 3, abs=2e-4)
    assert exact.loss > sum(fit.loss for fit in of_each) / 3


def test_it_ends_where_more_steps_bring_nothing(
    model: XLoraModel, domains: dict[str, list[Example]], exact: MergeFit
) -> None:
    fit = fit_merge(model, domains, PAD, MergeFitSettings())
    assert fit.converged
    assert exact.converged
    assert exact.steps > fit.steps
    assert fit.loss - exact.loss < MergeFitSettings().tolerance
    for each in (fit, exact):
        assert each.first_losses == sorted(each.first_losses, reverse=True)
        assert each.losses == sorted(each.losses, reverse=True)
        assert each.losses[each.steps] == each.loss == each.losses[-1]
        assert each.losses[each.steps // 2] == each.loss_at_half


def test_without_enough_steps_it_says_so_and_is_still_no_worse_than_uniform(
    model: XLoraModel,
) -> None:
    tokenizer = letter_tokenizer()
    # The shortest row, on which the fit begins, is unlike all others.
    rows = [row("a", "zzzz", "0")] + [row(f"{i}?", "abcdefghij" * 3, "0") for i in range(3)]
    lines: list[str] = []
    settings = MergeFitSettings(steps=4, tolerance=1e-7)
    domains = {"0": encode_rows(rows, tokenizer, 100)}
    fit = fit_merge(model, domains, PAD, settings, report=lines.append)
    assert not fit.converged
    assert fit.steps == 4
    assert fit.loss <= fit.uniform_loss
    assert lines[0].startswith("best weighted merge: 1 rows, step 0, loss ")
    assert lines[-1].startswith("best weighted merge: 4 rows, step 4, loss ")


def test_the_model_stays_as_it_is(model: XLoraModel, domains: dict[str, list[Example]]) -> None:
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    fit_merge(model, domains, PAD, MergeFitSettings(steps=1))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
