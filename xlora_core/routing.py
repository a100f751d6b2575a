"""Routing: router logits -> scalings -> effective scalings. Pure functions on tensors.

Three stages, named as everywhere else in the project:

* router logits: what the classifier writes;
* scalings: after temperature and softmax; what PEFT logs;
* effective scalings: after top-k and global weight; what the adapted modules multiply by.

Every knob is either one value for all tokens or a tensor of one value per token, so that a
recorded run, whose knobs changed on the way, is re-routed in one call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xlora_core.config import RoutingKnobs, XLoraConfig
from xlora_core.errors import ConfigError


def scalings_from_logits(
    logits: Tensor, *, enable_softmax: bool, temperature: float | Tensor = 1.0
) -> Tensor:
    """Returns the scalings of router logits.

    Args:
        logits: ``[..., T, L, K]``, floating point.
        enable_softmax: Softmax over the K adapters; otherwise the logits are the scalings.
        temperature: Divides the logits before the softmax, > 0; a tensor has shape ``[T]``.
            However small, the result is finite: it tends to the largest logit alone.

    Returns:
        ``[..., T, L, K]``; with ``enable_softmax`` each token's scalings sum to 1 per module.

    Source: PEFT 0.21.2, ``TemperatureScaledSoftmax``.
    """
    if not enable_softmax:
        return logits
    # The largest logit is taken off before the division: a small temperature would make it
    # infinite, and the softmax NaN. The bounds keep the temperature from rounding to 0.
    bounds = torch.finfo(logits.dtype)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(logits.dtype).clamp(bounds.tiny, bounds.max)
    else:
        temperature = min(max(temperature, bounds.tiny), bounds.max)
    logits = logits - logits.detach().amax(dim=-1, keepdim=True)
    return torch.softmax(logits / _per_token(temperature), dim=-1)


def effective_scalings(
    scalings: Tensor,
    *,
    top_k: int | Tensor | None = None,
    enable_softmax_topk: bool = False,
    global_weight: float | Tensor = 1.0,
) -> Tensor:
    """Returns what the adapted modules multiply by.

    Args:
        scalings: ``[..., T, L, K]``, floating point.
        top_k: Keep the k largest (signed) scalings per token and module and zero the rest,
            without renormalising; None keeps all. A tensor has shape ``[T]``, 0 keeps all.
        enable_softmax_topk: Softmax over the kept scalings.
        global_weight: Factor on the result; a tensor has shape ``[T]``.

    Returns:
        ``[..., T, L, K]``.

    Raises:
        ConfigError: If a top-k is outside 1..K.

    Source: PEFT 0.21.2, ``XLoraLayer.get_maybe_topk_scalings``. Unlike PEFT, a scaling that
    happens to be 0 is not taken for one that top-k dropped.
    """
    dropped = _dropped_by_top_k(scalings, top_k)
    if enable_softmax_topk:
        if dropped is not None:
            scalings = scalings.masked_fill(dropped, float("-inf"))
        scalings = torch.softmax(scalings, dim=-1)
    if dropped is not None:
        scalings = scalings.masked_fill(dropped, 0.0)
    return scalings * _per_token(global_weight)


def route(logits: Tensor, config: XLoraConfig, knobs: RoutingKnobs) -> Tensor:
    """Returns the effective scalings of router logits under a config and one set of knobs.

    Args:
        logits: ``[..., T, L, K]``.
        config: Says which softmax is on.
        knobs: Top-k, temperature and global weight.

    Returns:
        ``[..., T, L, K]``.
    """
    scalings = scalings_from_logits(
        logits, enable_softmax=config.enable_softmax, temperature=knobs.temperature
    )
    return effective_scalings(
        scalings,
        top_k=knobs.top_k,
        enable_softmax_topk=config.enable_softmax_topk,
        global_weight=knobs.global_weight,
    )


def _per_token(value: float | Tensor) -> float | Tensor:
    """``[T]`` -> ``[T, 1, 1]``, to broadcast against ``[..., T, L, K]``; numbers pass."""
    return value[:, None, None] if isinstance(value, Tensor) else value


def _dropped_by_top_k(scalings: Tensor, top_k: int | Tensor | None) -> Tensor | None:
    """Returns the mask ``[..., T, L, K]`` of scalings that top-k drops; None when it drops none."""
    n_adapters = scalings.shape[-1]
    if top_k is None:
        return None
    if isinstance(top_k, int):
        if not 1 <= top_k <= n_adapters:
            raise ConfigError(
                f"top_k must be from 1 to {n_adapters} (the number of adapters), got {top_k}"
            )
        if top_k == n_adapters:
            return None
        kept = torch.topk(scalings, k=top_k, dim=-1).indices
        return torch.ones_like(scalings, dtype=torch.bool).scatter_(-1, kept, False)
    dropped = torch.zeros_like(scalings, dtype=torch.bool)
    # Few distinct values ever occur in a run, so this loop is shorter than a sort by rank, and
    # ties fall exactly as they do for a single k.
    for k in torch.unique(top_k).tolist():
        if k == 0:
            continue
        rows = top_k == k
        of_rows = _dropped_by_top_k(scalings[..., rows, :, :], int(k))
        if of_rows is not None:
            dropped[..., rows, :, :] = of_rows
    return dropped
