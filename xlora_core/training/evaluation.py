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
    rows: int = 4,
    report: Report = silent,
) -> dict[str, DomainResult]:
    """Evaluates every arm on every group of held-out rows.

    Args:
        model: The model; left in evaluation mode. In float32 for figures worth quoting.
        groups: Domain (or ``MIXED``) -> examples.
        pad_id: Token id to pad with.
        rows: Rows of one forward call.
        report: Gets a line per group.
    """
    model.eval()
    names = model.adapter_names
    results = {}
    for name, examples in groups.items():
        losses: dict[str, float] = {}
        sums = RoutingSums()
        for group in by_length(examples, rows):
            for arm, loss in _add_batch(model, collate(group, pad_id), sums).items():
                losses[arm] = losses.get(arm, 0.0) + loss
        means = {key: round(value, 4) for key, value in sums.means(names).items()}
        if sums.known < sums.tokens:  # a token without a right expert has no oracle
            losses.pop("right")
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
    shown = ", ".join(f"{arm} {losses[arm]:.3f}" for arm in ("base", "uniform", "routed"))
    leads = "" if result.right_top is None else f"; right expert leads {result.right_top:.0%}"
    return f"{name}: {result.tokens} tokens, {shown} nats a token{leads}"


def _add_batch(model: XLoraModel, batch: Batch, sums: RoutingSums) -> dict[str, float]:
    """Adds a batch's routing to the sums; returns each arm's loss summed over answer tokens."""
    names = model.adapter_names
    n_adapters = len(names)
    device = model.device
    batch = batch.to(device)
    columns = answer_columns(batch.labels)
    rows, writers = answer_positions(batch.labels).unbind(dim=1)
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "logits_to_keep": columns,
        "use_cache": False,
    }
    indices = batch.domain_indices({name: k for k, name in enumerate(names)})
    # The scalings of a token write the next one, so a token's right expert is the next one's.
    right = indices.roll(-1, dims=1)
    right[:, -1] = NO_DOMAIN
    ahead = _filled_from_ahead(right)
    one_hot = torch.eye(n_adapters, device=device)
    oracle = torch.zeros(*right.shape, 1, n_adapters, device=device)
    oracle[ahead >= 0] = one_hot[ahead[ahead >= 0]].unsqueeze(1)
    arms: dict[str, Tensor | None] = {
        "base": None,
        "uniform": torch.full((n_adapters,), 1 / n_adapters, device=device),
        **{f"expert:{name}": one_hot[k] for k, name in enumerate(names)},
        "right": oracle,
    }
    losses = {}
    for arm, scalings in arms.items():
        logits = model.main_pass(scalings=scalings, **inputs).logits.to(device)
        losses[arm] = float(column_losses(logits, batch.labels, columns).sum())
    logits, router_logits = routed_call(model, **inputs)
    losses["routed"] = float(column_losses(logits.to(device), batch.labels, columns).sum())
    routed = model.route(router_logits).to(device)  # [B, T, L or 1, K]
    sums.add(routed[rows, writers], right[rows, writers])
    return losses


def _filled_from_ahead(right: Tensor) -> Tensor:
    """Gives prompt tokens (-1) the expert of the answer that follows them, ``[B, T]``."""
    filled = right.clone()
    for t in range(right.shape[1] - 2, -1, -1):
        filled[:, t] = torch.where(filled[:, t] < 0, filled[:, t + 1], filled[:, t])
    return filled


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the results (as read from the JSON file) as a Markdown table.

    The lowest loss of a row is bold; ``right expert`` is the oracle.
    """
    arms = [arm for arm in next(iter(results.values()))["losses"] if arm != "right"]
    header = ["domain", "tokens", *arms, "right expert", "mass on right", "right is strongest"]
    lines = [" | ".join(header), " | ".join(["---"] + ["--:"] * (len(header) - 1))]
    for domain, result in results.items():
        losses = result["losses"]
        best = min(losses[arm] for arm in arms)
        cells = [
            f"**{losses[arm]:.2f}**" if losses[arm] == best else f"{losses[arm]:.2f}"
            for arm in arms
        ]
        right = f"{losses['right']:.2f}" if "right" in losses else "-"
        mass = "-" if result["right_mass"] is None else f"{result['right_mass']:.2f}"
        top = "-" if result["right_top"] is None else f"{result['right_top']:.0%}"
        lines.append(" | ".join([domain, str(result["tokens"]), *cells, right, mass, top]))
    return "\n".join(f"| {line} |" for line in lines)
