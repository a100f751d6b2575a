"""Held-out evaluation of an X-LoRA model: losses of every arm, and where the router looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xlora_core.model import XLoraModel
from xlora_core.training.data import NO_DOMAIN, Batch, Example, by_length, collate
from xlora_core.training.losses import answer_columns, answer_positions, column_losses
from xlora_core.training.metrics import RoutingSums
from xlora_core.training.progress import Report, silent
from xlora_core.training.router import routed_call

MIXED = "mixed"  # the group of rows whose domain changes midway


@dataclass(kw_only=True)
class DomainResult:
    """One domain's figures over its held-out answer tokens.

    Attributes:
        rows: Number of rows.
        tokens: Number of answer tokens.
        losses: Arm -> nats a token. Arms: ``base``, ``uniform`` (every expert at 1/K),
            ``best_merge`` (every expert at a fitted weight, the same for all text),
            ``expert:<name>``, ``right`` (the oracle: prompts and answers with their own
            domain's expert alone), ``routed``.
        right_mass: Mean scaling on the right expert, over tokens and modules; None when no
            expert has this domain's name.
        right_top: Share of tokens whose strongest expert (mean over modules) is the right one.
        entropy: Mean entropy of a module's scalings / log K; 1 is uniform.
        mass: Expert -> its mean scaling over tokens and modules.
    """

    rows: int
    tokens: int
    losses: dict[str, float]
    right_mass: float | None
    right_top: float | None
    entropy: float
    mass: dict[str, float]


@torch.no_grad()
def evaluate(
    model: XLoraModel,
    groups: Mapping[str, Sequence[Example]],
    pad_id: int,
    *,
    merge_weights: Sequence[float] | None = None,
    routed_only: bool = False,
    rows: int = 4,
    report: Report = silent,
) -> dict[str, DomainResult]:
    """Evaluates every arm on every group of held-out rows.

    Args:
        model: The model; left in evaluation mode.
        groups: Domain (or ``MIXED``) -> examples.
        pad_id: Token id to pad with.
        merge_weights: K scalings of the arm ``best_merge``; None leaves it out.
        routed_only: Only the arm ``routed``: the others are the same under every router over
            the same experts.
        rows: Rows of one forward call.
        report: Gets a line per group.
    """
    model.eval()
    constants = None if routed_only else _constant_arms(model, merge_weights)
    names = model.adapter_names
    results = {}
    for name, examples in groups.items():
        losses: dict[str, float] = {}
        sums = RoutingSums()
        for group in by_length(examples, rows):
            for arm, loss in _add_batch(model, collate(group, pad_id), constants, sums).items():
                losses[arm] = losses.get(arm, 0.0) + loss
        means = {key: round(value, 4) for key, value in sums.means(names).items()}
        if sums.known < sums.tokens:  # a token without a right expert has no oracle
            losses.pop("right", None)
        results[name] = DomainResult(
            rows=len(examples),
            tokens=sums.tokens,
            losses={arm: round(loss / sums.tokens, 4) for arm, loss in losses.items()},
            right_mass=means.get("right_mass"),
            right_top=means.get("right_top"),
            entropy=means["entropy"],
            mass={adapter: means[f"mass:{adapter}"] for adapter in names},
        )
        report(_in_short(name, results[name]))
    return results


def _in_short(name: str, result: DomainResult) -> str:
    losses = result.losses
    arms = [arm for arm in ("base", "uniform", "routed") if arm in losses]
    shown = ", ".join(f"{arm} {losses[arm]:.3f}" for arm in arms)
    leads = "" if result.right_top is None else f"; right expert leads {result.right_top:.0%}"
    return f"{name}: {result.tokens} tokens, {shown} nats a token{leads}"


def _constant_arms(model: XLoraModel, merge_weights: Sequence[float] | None) -> dict[str, Tensor]:
    """Returns the arms of one set of scalings ``[K]`` for every token and module."""
    names, device = model.adapter_names, model.device
    one_hot = torch.eye(len(names), device=device)
    arms = {"uniform": torch.full((len(names),), 1 / len(names), device=device)}
    if merge_weights is not None:
        arms["best_merge"] = torch.tensor(list(merge_weights), device=device)
    return arms | {f"expert:{name}": one_hot[k] for k, name in enumerate(names)}


def _add_batch(
    model: XLoraModel, batch: Batch, constants: Mapping[str, Tensor] | None, sums: RoutingSums
) -> dict[str, float]:
    """Adds a batch's routing to the sums; returns each arm's loss summed over answer tokens.

    Args:
        model: The model.
        batch: The rows.
        constants: Arm -> scalings ``[K]``; None runs the routed model alone.
        sums: Of the group.
    """
    names = model.adapter_names
    batch = batch.to(model.device)
    columns = answer_columns(batch.labels)
    rows, writers = answer_positions(batch.labels).unbind(dim=1)
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "logits_to_keep": columns,
        "use_cache": False,
    }

    def loss_of(logits: Tensor) -> float:
        return float(column_losses(logits.to(model.device), batch.labels, columns).sum())

    # The scalings of a token write the next one, so a token's right expert is the next one's.
    indices = batch.domain_indices({name: k for k, name in enumerate(names)})
    right = indices.roll(-1, dims=1)
    right[:, -1] = NO_DOMAIN
    losses: dict[str, float] = {}
    if constants is None:
        routed_logits, router_logits = routed_call(model, **inputs)
    else:
        base_logits, routed_logits, router_logits = _base_and_routed(model, inputs)
        losses["base"] = loss_of(base_logits)
        for arm, scalings in constants.items():
            losses[arm] = loss_of(model.main_pass(scalings=scalings, **inputs).logits)
        experts = right[rows, writers].unique().tolist()
        if len(experts) == 1 and experts[0] != NO_DOMAIN:
            losses["right"] = losses[f"expert:{names[experts[0]]}"]
        else:
            oracle = _oracle(right, len(names))
            losses["right"] = loss_of(model.main_pass(scalings=oracle, **inputs).logits)
    losses["routed"] = loss_of(routed_logits)
    routed = model.route(router_logits).to(model.device)  # [B, T, L or 1, K]
    sums.add(routed[rows, writers], right[rows, writers])
    return losses


def _base_and_routed(model: XLoraModel, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the logits of the base model and of the routed one, and the router logits.

    With the adapters at 0 in the scaling pass, that pass is the base model: one run serves both.
    """
    if model.is_routed_per_layer or model.config_xlora.scaling_pass_value != 0:
        base = model.main_pass(scalings=None, **inputs)
        return base.logits, *routed_call(model, **inputs)
    base = model.main_pass(scalings=None, output_hidden_states=True, **inputs)
    router_logits = model.classifier(base.hidden_states[-1])
    routed = model.main_pass(scalings=model.route(router_logits), **inputs)
    return base.logits, routed.logits, router_logits


def _oracle(right: Tensor, n_adapters: int) -> Tensor:
    """Returns one-hot scalings ``[B, T, 1, K]`` of each token's right expert.

    Args:
        right: Index of the expert that each token's next one belongs to, int64 ``[B, T]``,
            ``NO_DOMAIN`` where it is none's.
        n_adapters: K.
    """
    ahead = _filled_from_ahead(right)
    oracle = torch.zeros(*right.shape, 1, n_adapters, device=right.device)
    one_hot = torch.eye(n_adapters, device=right.device)
    oracle[ahead >= 0] = one_hot[ahead[ahead >= 0]].unsqueeze(1)
    return oracle


def _filled_from_ahead(right: Tensor) -> Tensor:
    """Gives prompt tokens (-1) the expert of the answer that follows them, ``[B, T]``."""
    filled = right.clone()
    for t in range(right.shape[1] - 2, -1, -1):
        filled[:, t] = torch.where(filled[:, t] < 0, filled[:, t + 1], filled[:, t])
    return filled


def mean_losses(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Returns the mean over the domains of every arm, ``MIXED`` left out.

    An arm that some domain lacks has no mean.

    Args:
        results: As read from the JSON file.
    """
    losses = [result["losses"] for name, result in results.items() if name != MIXED]
    arms = [arm for arm in losses[0] if all(arm in of_domain for of_domain in losses)]
    return {
        arm: round(sum(of_domain[arm] for of_domain in losses) / len(losses), 4) for arm in arms
    }
