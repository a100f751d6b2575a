"""Losses: of the language model over answer tokens, and of the router."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xlora_core.config import XLoraConfig
from xlora_core.routing import scalings_from_logits
from xlora_core.training.data import IGNORE


def answer_positions(labels: Tensor) -> Tensor:
    """Returns where answer tokens are written, int64 ``[N, 2]``: row, and position of the writer.

    The writer is the token *before* the answer token: its logits are the loss's, and its scalings
    wrote it. An answer token at position 0 has no writer.

    Args:
        labels: ``[B, T]``, ``IGNORE`` outside the answers.
    """
    return (labels[:, 1:] != IGNORE).nonzero()


def backbone_losses(causal_lm: Any, input_ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Returns the loss of each answer token of a plain Hugging Face causal language model.

    The head runs on the answer tokens only: with a large vocabulary it is the costly part.

    Args:
        causal_lm: Has ``get_decoder()`` and ``get_output_embeddings()``.
        input_ids: ``[B, T]`` int64.
        mask: ``[B, T]``, 0 on padding.
        labels: ``[B, T]``, ``IGNORE`` outside the answers.

    Returns:
        float32 ``[N]``, nats, in the order of ``answer_positions``.
    """
    kept = labels[:, 1:] != IGNORE
    decoder = causal_lm.get_decoder()
    hidden = decoder(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    logits = causal_lm.get_output_embeddings()(hidden[:, :-1][kept])
    return _token_losses(logits, labels[:, 1:][kept])


def answer_columns(labels: Tensor) -> Tensor:
    """Returns the positions after which some row has an answer token, int64 ``[C]``.

    They are the only positions whose logits a loss needs (``logits_to_keep``).
    """
    return (labels[:, 1:] != IGNORE).any(dim=0).nonzero().flatten()


def column_losses(logits: Tensor, labels: Tensor, columns: Tensor) -> Tensor:
    """Returns the loss of each answer token from the logits of ``answer_columns``.

    Args:
        logits: ``[B, C, V]``.
        labels: ``[B, T]``.
        columns: ``[C]``.

    Returns:
        float32 (float64 for float64 logits) ``[N]``, nats, in the order of ``answer_positions``.
    """
    targets = labels[:, columns + 1]
    kept = targets != IGNORE
    return _token_losses(logits[kept], targets[kept])


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets, reduction="none")


def token_weights(domains: Sequence[Tensor], *, balanced: bool) -> list[Tensor]:
    """Returns the weight of each answer token in the loss of one optimiser step.

    The weights of a step sum to 1 over all its forward passes, so that accumulation changes
    nothing.

    Args:
        domains: Of each forward pass: index >= 0 of the domain of each answer token, ``[N]``.
        balanced: Every domain of the step weighs the same. Domains with short answers (a number)
            would otherwise hardly count beside those with long ones (a program), and a router
            would not learn them.

    Returns:
        Of each forward pass: float32 ``[N]``.
    """
    together = torch.cat(list(domains))
    if not balanced:
        together = torch.zeros_like(together)
        domains = [torch.zeros_like(of_pass) for of_pass in domains]
    counts = torch.bincount(together)
    weights = 1.0 / (counts.clamp_min(1) * (counts > 0).sum().clamp_min(1))
    return [weights[of_pass] for of_pass in domains]


def soft_scalings(router_logits: Tensor, config: XLoraConfig) -> Tensor:
    """Returns the scalings of router logits; softmax over all adapters even where top-k cuts.

    Args:
        router_logits: ``[..., K]``.
        config: The model's.
    """
    return scalings_from_logits(
        router_logits,
        enable_softmax=config.enable_softmax or config.enable_softmax_topk,
        temperature=config.softmax_temperature if config.enable_softmax else 1.0,
    )


def balance_loss(scalings: Tensor) -> Tensor:
    """Returns how unevenly the adapters' mass is spread: its squared coefficient of variation.

    0 when every adapter has the same mean scaling in every module, K - 1 when one has it all.

    Args:
        scalings: ``[N, L, K]`` of N tokens, each summing to 1 over K.

    Source: the importance loss of arXiv 1701.06538, section 4, per routed module; averaged over
    modules.
    """
    mass = scalings.mean(dim=0)  # [L, K]
    uneven = scalings.shape[-1] * mass.square().sum(dim=-1) / mass.sum(dim=-1).square() - 1
    return uneven.mean()


def label_losses(scalings: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Returns the cross-entropy of each token's mean log-scalings to its labelled adapter.

    The mean over modules leaves a single module free: together they shall vote for the label.

    Args:
        scalings: ``[N, L, K]``, > 0.
        targets: Index of the labelled adapter, int64 ``[N]``; where there is none, below 0 or
            K and more, the loss is 0.
        smoothing: Share of each label that all adapters divide.

    Returns:
        ``[N]``, nats.
    """
    n_adapters = scalings.shape[-1]
    votes = scalings.clamp_min(torch.finfo(scalings.dtype).tiny).log().mean(dim=1)  # [N, K]
    known = (targets >= 0) & (targets < n_adapters)
    return F.cross_entropy(
        votes,
        targets.where(known, IGNORE),
        reduction="none",
        ignore_index=IGNORE,
        label_smoothing=smoothing,
    )
