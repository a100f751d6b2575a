"""Losses and metrics of training, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from tests.tiny_models import tiny_base
from tests.training_models import PAD, examples
from xlora_core.training.data import collate
from xlora_core.training.losses import (
    answer_columns,
    answer_positions,
    backbone_losses,
    balance_loss,
    column_losses,
    label_losses,
    token_weights,
)
from xlora_core.training.metrics import RoutingSums

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def test_the_writer_of_an_answer_token_is_the_one_before_it() -> None:
    labels = torch.tensor([[-100, -100, 7, 8], [5, 6, -100, -100]])
    # The answer token at position 0 has no writer.
    assert answer_positions(labels).tolist() == [[0, 1], [0, 2], [1, 0]]
    assert answer_columns(labels).tolist() == [0, 1, 2]


def test_backbone_and_column_losses_are_the_models_own() -> None:
    base = tiny_base()
    batch = collate(examples(3), PAD)
    columns = answer_columns(batch.labels)
    logits = base(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    losses = column_losses(logits[:, columns], batch.labels, columns)
    of_backbone = backbone_losses(base, batch.input_ids, batch.attention_mask, batch.labels)
    torch.testing.assert_close(losses, of_backbone, **CLOSE)
    by_hand = [
        F.cross_entropy(logits[b, t], batch.labels[b, t + 1]).item()
        for b, t in answer_positions(batch.labels).tolist()
    ]
    torch.testing.assert_close(losses, torch.tensor(by_hand), **CLOSE)


def test_token_weights_of_a_step_sum_to_one_over_its_passes() -> None:
    passes = [torch.tensor([0, 0, 2]), torch.tensor([2, 2])]
    plain = token_weights(passes, balanced=False)
    assert [w.tolist() for w in plain] == [pytest.approx([0.2] * 3), pytest.approx([0.2] * 2)]
    # Two domains: half for the two tokens of one, half for the three of the other.
    balanced = token_weights(passes, balanced=True)
    assert torch.cat(balanced).tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 6, 1 / 6, 1 / 6])


def test_a_pass_without_answers_has_no_weights() -> None:
    none, some = token_weights(
        [torch.zeros(0, dtype=torch.int64), torch.tensor([1])], balanced=True
    )
    assert (none.tolist(), some.tolist()) == ([], [1.0])


def test_balance_loss_is_the_squared_coefficient_of_variation_of_the_mass() -> None:
    even = torch.full((5, 3, 4), 0.25)
    assert balance_loss(even).item() == pytest.approx(0)
    collapsed = torch.eye(4)[torch.zeros(5, dtype=torch.int64)].unsqueeze(1)
    assert balance_loss(collapsed).item() == pytest.approx(3)
    # Tokens that each take another adapter whole are balanced together.
    assert balance_loss(torch.eye(4).unsqueeze(1)).item() == pytest.approx(0)
    # Two modules with masses (0.7, 0.3) and (0.5, 0.5): CV^2 is 0.16 and 0, mean 0.08.
    scalings = torch.tensor([[[0.9, 0.1], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]]])
    assert balance_loss(scalings).item() == pytest.approx(0.08)


def test_balance_loss_has_the_gradient_of_the_formula() -> None:
    logits = torch.tensor([[[1.0, 0.0]], [[0.5, 0.0]]], dtype=torch.float64, requires_grad=True)
    balance_loss(logits.softmax(-1)).backward()
    p = logits.detach().softmax(-1)[:, 0, 0]
    mass = p.mean()
    # K sum m^2 - 1 = (2m - 1)^2 for two adapters; d/dlogit = 4 (2m - 1) * p (1 - p) / N.
    by_hand = 4 * (2 * mass - 1) * p * (1 - p) / 2
    torch.testing.assert_close(logits.grad[:, 0, 0], by_hand)  # type: ignore[index]
    torch.testing.assert_close(logits.grad[:, 0, 1], -by_hand)  # type: ignore[index]


def test_label_loss_is_the_cross_entropy_of_the_modules_common_vote() -> None:
    scalings = torch.tensor([[[0.8, 0.2], [0.5, 0.5]]])
    # Mean log-scalings are log sqrt(0.8 * 0.5) and log sqrt(0.2 * 0.5): odds 2 to 1.
    assert label_losses(scalings, torch.tensor([0])).item() == pytest.approx(-math.log(2 / 3))
    assert label_losses(scalings, torch.tensor([1])).item() == pytest.approx(-math.log(1 / 3))


def test_label_loss_leaves_out_tokens_without_an_expert() -> None:
    scalings = torch.full((3, 2, 2), 0.5)
    losses = label_losses(scalings, torch.tensor([-1, 0, 2]))
    assert losses.tolist() == pytest.approx([0, math.log(2), 0])


def test_label_loss_has_the_gradient_of_the_formula() -> None:
    logits = torch.tensor([[[0.3, -0.2], [0.1, 0.4]]], dtype=torch.float64, requires_grad=True)
    label_losses(logits.softmax(-1), torch.tensor([1])).sum().backward()
    # The vote's logits are the mean of the modules' logits; each module gets 1/L of softmax - 1.
    vote = logits.detach().mean(dim=1).softmax(-1)[0]
    by_hand = (vote - torch.tensor([0.0, 1.0], dtype=torch.float64)) / 2
    torch.testing.assert_close(logits.grad, by_hand.expand(1, 2, 2))


def test_routing_figures_on_tokens_made_by_hand() -> None:
    scalings = torch.tensor(
        [
            [[1.0, 0.0], [0.6, 0.4]],  # mass 0.8, 0.2; entropies 0 and H(0.6)
            [[0.5, 0.5], [0.5, 0.5]],  # a tie leads nobody; entropy 1
            [[0.2, 0.8], [0.2, 0.8]],
        ]
    )
    sums = RoutingSums()
    sums.add(scalings[:2], torch.tensor([0, 0]))
    sums.add(scalings[2:], torch.tensor([-1]))  # its domain has no expert
    means = sums.means(["math", "verse"])

    def h(p: float) -> float:
        return -(p * math.log2(p) + (1 - p) * math.log2(1 - p))

    assert means["entropy"] == pytest.approx((h(0.6) / 2 + 1 + h(0.2)) / 3)
    assert means["mass:math"] == pytest.approx((0.8 + 0.5 + 0.2) / 3)
    assert means["mass:verse"] == pytest.approx((0.2 + 0.5 + 0.8) / 3)
    assert means["right_mass"] == pytest.approx((0.8 + 0.5) / 2)
    assert means["right_top"] == pytest.approx(1 / 2)


def test_routing_figures_without_a_right_expert_or_with_one_adapter() -> None:
    sums = RoutingSums()
    sums.add(torch.full((2, 3, 2), 0.5), torch.tensor([2, -1]))
    assert set(sums.means(["a", "b"])) == {"entropy", "mass:a", "mass:b"}
    alone = RoutingSums()
    alone.add(torch.ones(2, 3, 1), torch.tensor([0, 0]))
    assert alone.means(["a"]) == {"entropy": 0, "mass:a": 1, "right_mass": 1, "right_top": 1}
