"""Held-out evaluation of an X-LoRA model: losses of every arm, and where the router looks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from xlora_core.model import XLoraModel
from xlora_core.training.data import Batch, Example, collate
from xlora_core.training.loop import Report, silent
from xlora_core.training.losses import answer_columns, column_losses

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
    """

    rows: int
    tokens: int
    losses: dict[str, float]
    right_mass: float | None
    right_top: float | None
    entropy: float


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
        model: The model, in evaluation mode; float32 for figures worth quoting.
        groups: Domain (or ``MIXED``) -> examples.
        pad_id: Token id to pad with.
        rows: Rows of one forward call.
        report: Gets a line per group.
    """
    model.eval()
    results = {}
    for name, examples in groups.items():
        ordered = sorted(examples, key=len)
        parts = [
            _batch_sums(model, collate(ordered[i : i + rows], pad_id))
            for i in range(0, len(ordered), rows)
        ]
        total = {key: sum(part[key] for part in parts) for key in parts[0]}
        tokens, known = int(total["tokens"]), total["known"]
        results[name] = DomainResult(
            rows=len(examples),
            tokens=tokens,
            losses={
                key.removeprefix("loss:"): round(value / tokens, 4)
                for key, value in total.items()
                if key.startswith("loss:") and (key != "loss:right" or known == tokens)
            },
            right_mass=round(total["right_mass"] / known, 4) if known else None,
            right_top=round(total["right_top"] / known, 4) if known else None,
            entropy=round(total["entropy"] / tokens, 4),
        )
        report(f"{name}: {asdict(results[name])}")
    return results


def _batch_sums(model: XLoraModel, batch: Batch) -> dict[str, float]:
    """Sums over a batch's answer tokens of what ``DomainResult`` averages."""
    names = model.adapter_names
    n_adapters = len(names)
    device = model.device
    batch = batch.to(device)
    columns = answer_columns(batch)
    one_hot = torch.eye(n_adapters, device=device)
    # The scalings of a token write the next one, so a token's right expert is the next one's.
    right = torch.tensor(
        [
            [names.index(d) if d in names else -1 for d in [*domains[1:], ""]]
            for domains in batch.domains
        ],
        device=device,
    )
    routed = model.route(
        model.scaling_pass(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).router_logits
    )
    ahead = _filled_from_ahead(right)
    oracle = torch.zeros(*right.shape, 1, n_adapters, device=device)
    oracle[ahead >= 0] = one_hot[ahead[ahead >= 0]].unsqueeze(1)
    arms: dict[str, Tensor | None] = {
        "base": None,
        "uniform": torch.full((n_adapters,), 1 / n_adapters, device=device),
        **{f"expert:{name}": one_hot[k] for k, name in enumerate(names)},
        "right": oracle,
        "routed": routed,
    }
    sums: dict[str, float] = {}
    where = torch.empty(0, 2, dtype=torch.int64, device=device)
    for arm, scalings in arms.items():
        logits = model.main_pass(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            scalings=scalings,
            logits_to_keep=columns,
            use_cache=False,
        ).logits
        losses, where = column_losses(logits, batch, columns)
        sums[f"loss:{arm}"] = float(losses.sum())
    at_answers = routed[where[:, 0], where[:, 1]]  # [N, L, K]
    targets = right[where[:, 0], where[:, 1]]  # [N]
    known = targets >= 0
    mass = at_answers.mean(dim=1)  # [N, K]
    shares = at_answers / at_answers.sum(dim=-1, keepdim=True).clamp_min(1e-9)
    entropy = -(shares * shares.clamp_min(1e-9).log()).sum(dim=-1).mean(dim=-1)
    scale = math.log(n_adapters) if n_adapters > 1 else 1.0
    sums |= {
        "tokens": float(len(targets)),
        "known": float(known.sum()),
        "right_mass": float(mass[known].gather(1, targets[known, None]).sum()),
        "right_top": float((mass[known].argmax(dim=1) == targets[known]).sum()),
        "entropy": float((entropy / scale).sum()),
    }
    return sums


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
