"""The best weighted merge: one weight for each expert, the same in every module and for all text.

It is what somebody gets who merges the LoRAs with tuned weights instead of routing them, so it is
the baseline that a router has to beat. It is fitted to what the table of the evaluation shows in
its last line: nats a token of each domain, averaged over the domains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xlora_core.model import XLoraModel
from xlora_core.training.data import Batch, Example, by_length, collate
from xlora_core.training.losses import answer_columns, answer_positions, column_losses
from xlora_core.training.progress import Report, silent
from xlora_core.training.quasi_newton import Minimum, minimise

_ROWS_TOGETHER = 3  # of a forward pass, of similar length, so that little is padded
_FEWER = 4  # the fit begins on one row in so many


@dataclass(frozen=True, kw_only=True)
class MergeFitSettings:
    """How the weights are fitted.

    Attributes:
        steps: Most steps, >= 1. Each reads all rows.
        tolerance: Nats a token, > 0; the fit ends where a step gains less. bfloat16 rounds the
            loss of a few dozen rows by about as much.
        rows_per_domain: Most rows of each domain, >= 1.
    """

    steps: int = 16
    tolerance: float = 0.002
    rows_per_domain: int = 6


@dataclass(frozen=True, kw_only=True)
class MergeFit:
    """A fitted merge. Losses are nats a token of a domain, averaged over the domains.

    Attributes:
        weights: Expert -> its scaling; they may be negative and need not sum to 1.
        rows: Rows it was fitted on.
        tokens: Their answer tokens.
        uniform_loss: Of the uniform merge on these rows.
        first_losses: Of the fit on one row in four that finds the weights to begin with: the
            lowest so far after each step, on its own rows, the uniform merge's first.
        losses: Of the fit on all rows: the lowest so far, the first at the weights to begin with.
        steps: Steps over all rows.
        loss_at_half: On all rows, after half of these steps.
        loss: On all rows, in the end.
        converged: It ended where no step gained the tolerance any more; False if it ran out of
            steps.
    """

    weights: dict[str, float]
    rows: int
    tokens: int
    uniform_loss: float
    first_losses: list[float]
    losses: list[float]
    steps: int
    loss_at_half: float
    loss: float
    converged: bool


def fit_merge(
    model: XLoraModel,
    domains: Mapping[str, Sequence[Example]],
    pad_id: int,
    settings: MergeFitSettings,
    *,
    report: Report = silent,
) -> MergeFit:
    """Fits one weight for each expert to the language-model loss of training rows.

    Starts at 1/K and never ends worse than there. Most steps are made on one row in four; what
    they learnt of the curvature lets a few steps over all rows do. Nothing is drawn, and the
    order of the rows does not matter.

    Args:
        model: The model; only called.
        domains: Domain -> its training rows, at least one each. Every domain counts the same.
        pad_id: Token id to pad with.
        settings: How to fit.
        report: Gets a line a step.
    """
    names = model.adapter_names
    model.eval()
    uniform = torch.full((len(names),), 1 / len(names), dtype=torch.float64)
    everything = _MeanOfDomains(model, domains, pad_id)
    few = {domain: _one_in(_FEWER, examples) for domain, examples in domains.items()}

    def fitted(on: _MeanOfDomains, start: Tensor, curvature: Tensor | None = None) -> Minimum:
        return minimise(
            _Reported(on, report),
            start,
            tolerance=settings.tolerance,
            max_evaluations=settings.steps + 1,
            inverse_hessian=curvature,
        )

    first = fitted(_MeanOfDomains(model, few, pad_id), uniform)
    uniform_loss = everything.loss(uniform)
    best = fitted(everything, first.point, first.inverse_hessian)
    if best.losses[-1] > uniform_loss:  # the few rows led astray
        best = fitted(everything, uniform)
    steps = len(best.losses) - 1
    return MergeFit(
        weights={name: round(w, 4) for name, w in zip(names, best.point.tolist(), strict=True)},
        rows=everything.rows,
        tokens=everything.tokens,
        uniform_loss=round(uniform_loss, 4),
        first_losses=[round(loss, 4) for loss in first.losses],
        losses=[round(loss, 4) for loss in best.losses],
        steps=steps,
        loss_at_half=round(best.losses[steps // 2], 4),
        loss=round(best.losses[-1], 4),
        converged=best.converged,
    )


def _one_in(count: int, examples: Sequence[Example]) -> list[Example]:
    """Returns one example in so many, of all lengths; their order does not matter."""
    return sorted(examples, key=lambda example: (len(example), example.input_ids))[::count]


class _MeanOfDomains:
    """The mean over domains of nats a token, as a function of the experts' weights.

    Args:
        model: The model.
        domains: Domain -> its rows.
        pad_id: Token id to pad with.
    """

    def __init__(
        self, model: XLoraModel, domains: Mapping[str, Sequence[Example]], pad_id: int
    ) -> None:
        self._model = model
        self._batches: list[tuple[Batch, float]] = []  # with the weight of each of its tokens
        self.rows = self.tokens = 0
        for examples in domains.values():
            batches = [collate(group, pad_id) for group in by_length(examples, _ROWS_TOGETHER)]
            tokens = sum(len(answer_positions(batch.labels)) for batch in batches)
            share = 1 / (tokens * len(domains))
            self._batches += [(batch.to(model.device), share) for batch in batches]
            self.rows += len(examples)
            self.tokens += tokens

    def __call__(self, point: Tensor) -> tuple[float, Tensor]:
        """Returns the loss and its gradient, float64 ``[K]``, at the weights ``[K]``."""
        weights = point.to(self._model.device, torch.float32).requires_grad_()
        loss, gradient = 0.0, torch.zeros_like(point)
        for batch, share in self._batches:
            of_batch = self._of_batch(weights, batch) * share
            gradient += torch.autograd.grad(of_batch, weights)[0].to(gradient)
            loss += of_batch.item()
        return loss, gradient

    @torch.no_grad()
    def loss(self, point: Tensor) -> float:
        """Returns the loss alone."""
        weights = point.to(self._model.device, torch.float32)
        return sum(self._of_batch(weights, batch).item() * share for batch, share in self._batches)

    def _of_batch(self, weights: Tensor, batch: Batch) -> Tensor:
        """Returns the sum of the nats of a batch's answer tokens."""
        columns = answer_columns(batch.labels)
        logits = self._model.main_pass(
            scalings=weights,
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            logits_to_keep=columns,
            use_cache=False,
        ).logits
        return column_losses(logits.to(self._model.device), batch.labels, columns).sum()


class _Reported:
    """An objective that tells of each of its values."""

    def __init__(self, objective: _MeanOfDomains, report: Report) -> None:
        self._objective = objective
        self._report = report
        self._step = 0

    def __call__(self, point: Tensor) -> tuple[float, Tensor]:
        """Returns the objective's value, and reports it."""
        loss, gradient = self._objective(point)
        self._report(
            f"best weighted merge: {self._objective.rows} rows, step {self._step}, loss {loss:.4f}"
        )
        self._step += 1
        return loss, gradient
