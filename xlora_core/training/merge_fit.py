"""The best weighted merge: one weight for each expert, the same in every module and for all text.

It is what somebody gets who merges the LoRAs with tuned weights instead of routing them, so it is
the baseline that a router has to beat.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xlora_core.model import XLoraModel
from xlora_core.training.data import Batch, Example, by_length, collate
from xlora_core.training.losses import answer_columns, answer_positions, column_losses
from xlora_core.training.progress import Report, silent

_ROWS_TOGETHER = 3  # of a step's rows, of similar length, so that little is padded
_REPORT_EVERY = 8


@dataclass(frozen=True, kw_only=True)
class MergeFitSettings:
    """How the weights are fitted.

    Attributes:
        steps: Adam steps, >= 1. Each reads one row of every group.
        rows_per_group: Different rows of each group; the steps go round among them.
        max_length: Longest row in tokens; longer answers are cut.
        learning_rate: Adam's at the first step; it falls to 0 along a cosine, so that what a
            single row asks for averages out.
    """

    steps: int = 32
    rows_per_group: int = 8
    max_length: int = 192
    learning_rate: float = 0.06


@dataclass(frozen=True, kw_only=True)
class MergeFit:
    """A fitted merge.

    Attributes:
        weights: Expert -> its scaling; they may be negative and need not sum to 1.
        losses: Of each step, nats a token; the first is that of the uniform merge.
        rows: Different rows it was fitted on.
    """

    weights: dict[str, float]
    losses: list[float]
    rows: int


def fit_merge(
    model: XLoraModel,
    groups: Mapping[str, Sequence[Example]],
    pad_id: int,
    settings: MergeFitSettings,
    *,
    report: Report = silent,
) -> MergeFit:
    """Fits one weight for each expert to the language-model loss of training rows.

    Starts at 1/K. Every group counts the same in every step. Nothing is drawn: the same rows in
    the same order give the same weights.

    Args:
        model: The model; only called.
        groups: Domain (or ``MIXED``) -> its training rows, at least one each.
        pad_id: Token id to pad with.
        settings: How to fit.
        report: Gets a line every few steps.
    """
    names = model.adapter_names
    model.eval()
    weights = torch.full((len(names),), 1 / len(names), device=model.device, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    )
    losses: list[float] = []
    for step in range(settings.steps):
        rows = [examples[step % len(examples)] for examples in groups.values()]
        loss, weights.grad = _loss_and_gradient(model, weights, rows, pad_id)
        optimizer.step()
        schedule.step()
        losses.append(round(loss, 4))
        if (step + 1) % _REPORT_EVERY == 0:
            report(f"best weighted merge: step {step + 1}/{settings.steps}, loss {loss:.3f}")
    return MergeFit(
        weights={name: round(w, 4) for name, w in zip(names, weights.tolist(), strict=True)},
        losses=losses,
        rows=sum(len(examples[: settings.steps]) for examples in groups.values()),
    )


def _loss_and_gradient(
    model: XLoraModel, weights: Tensor, rows: Sequence[Example], pad_id: int
) -> tuple[float, Tensor]:
    """Returns the mean over rows of a row's nats a token, and its gradient ``[K]``."""
    total, gradient = 0.0, torch.zeros_like(weights)
    for together in by_length(rows, _ROWS_TOGETHER):
        loss = _sum_over_rows(model, weights, collate(together, pad_id)) / len(rows)
        gradient += torch.autograd.grad(loss, weights)[0]
        total += loss.item()
    return total, gradient


def _sum_over_rows(model: XLoraModel, weights: Tensor, batch: Batch) -> Tensor:
    """Returns the sum over rows of a row's mean nats a token."""
    batch = batch.to(model.device)
    columns = answer_columns(batch.labels)
    logits = model.main_pass(
        scalings=weights,
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        logits_to_keep=columns,
        use_cache=False,
    ).logits
    row_of_token = answer_positions(batch.labels)[:, 0]
    share = 1.0 / torch.bincount(row_of_token, minlength=len(batch.labels))[row_of_token]
    losses = column_losses(logits.to(model.device), batch.labels, columns)
    return (losses * share).sum()
