"""Language-model losses over answer tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xlora_core.training.data import IGNORE, Batch, Example, collate


def backbone_losses(causal_lm: Any, batch: Batch) -> Tensor:
    """Returns the loss of each answer token of a plain Hugging Face causal language model.

    The head runs on the answer tokens only: with a large vocabulary it is the costly part.

    Args:
        causal_lm: Has ``get_decoder()`` and ``get_output_embeddings()``.
        batch: B rows of T tokens.

    Returns:
        float32 ``[N]``, nats, one for each answer token that has a token before it.
    """
    batch = batch.to(causal_lm.device)
    kept = batch.labels[:, 1:] != IGNORE
    hidden = causal_lm.get_decoder()(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask
    ).last_hidden_state
    logits = causal_lm.get_output_embeddings()(hidden[:, :-1][kept])
    return F.cross_entropy(logits.float(), batch.labels[:, 1:][kept], reduction="none")


@torch.no_grad()
def mean_backbone_loss(
    causal_lm: Any, examples: Sequence[Example], pad_id: int, rows: int = 8
) -> float:
    """Returns the mean loss over all answer tokens, in nats a token."""
    ordered = sorted(examples, key=len)
    total, count = 0.0, 0
    for start in range(0, len(ordered), rows):
        losses = backbone_losses(causal_lm, collate(ordered[start : start + rows], pad_id))
        total += float(losses.sum())
        count += losses.numel()
    return total / count


def answer_columns(batch: Batch) -> Tensor:
    """Returns the positions after which some row has an answer token, int64 ``[C]``.

    They are the only positions whose logits a loss needs (``logits_to_keep``).
    """
    return (batch.labels[:, 1:] != IGNORE).any(dim=0).nonzero().flatten()


def column_losses(logits: Tensor, batch: Batch, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the loss of each answer token from the logits of ``answer_columns``.

    Args:
        logits: ``[B, C, V]``.
        batch: B rows.
        columns: ``[C]``.

    Returns:
        float32 ``[N]`` in nats, and int64 ``[N, 2]``: row and position of the token *before*
        each answer token, that is the one whose scalings wrote it.
    """
    targets = batch.labels[:, columns + 1]
    kept = targets != IGNORE
    losses = F.cross_entropy(logits[kept].float(), targets[kept], reduction="none")
    where = kept.nonzero()
    where[:, 1] = columns[where[:, 1]]
    return losses, where


def balanced_mean(losses: Tensor, domains: Sequence[str]) -> Tensor:
    """Returns the mean over domains of each domain's mean loss.

    Domains with short answers (a number) would otherwise hardly count beside those with long
    ones (a program), and the router would not learn them.

    Args:
        losses: ``[N]``.
        domains: The domain of each loss, length N.
    """
    names = sorted(set(domains))
    of_token = torch.tensor([names.index(d) for d in domains], device=losses.device)
    return torch.stack([losses[of_token == i].mean() for i in range(len(names))]).mean()
