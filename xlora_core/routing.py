"""Routing: router logits -> scalings -> effective scalings. Pure functions on tensors.

Three stages, named as everywhere else in the project:

* router logits: what the classifier writes;
* scalings: after temperature and softmax; what PEFT logs;
* effective scalings: after top-k, overrides and global weight; what the adapted modules
  multiply by.

Every knob is either one value for all tokens or a tensor of one value per token, so that a
recorded run, whose knobs changed on the way, is re-routed in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from xlora_core.config import AdapterOverride, RoutingKnobs, XLoraConfig
from xlora_core.errors import ConfigError

# Values from which it pays to move the few adapters out of the last axis: a softmax over an axis
# of 8 handles 8 values at a time, over the first axis as many as the processor can.
_MANY_VALUES = 2**15


class OverrideMatrix(NamedTuple):
    """What overrides make of the scalings s that top-k left: ``factor * s + pin``.

    Attributes:
        factor: ``[L, K]``, or ``[1, K]`` when all modules have the same; ``[T, L or 1, K]`` when
            tokens differ. 0 where an adapter is pinned or muted.
        pin: Of the same shape; 0 where no adapter is pinned.
    """

    factor: Tensor
    pin: Tensor


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
    if _is_large(logits):
        of_adapters = logits.movedim(-1, 0).contiguous()
        of_adapters = of_adapters - of_adapters.detach().amax(dim=0)
        of_adapters = of_adapters / _per_token(temperature, n_inner=1)
        return torch.softmax(of_adapters, dim=0).movedim(0, -1).contiguous()
    logits = logits - logits.detach().amax(dim=-1, keepdim=True)
    return torch.softmax(logits / _per_token(temperature), dim=-1)


def effective_scalings(
    scalings: Tensor,
    *,
    top_k: int | Tensor | None = None,
    enable_softmax_topk: bool = False,
    overrides: OverrideMatrix | None = None,
    global_weight: float | Tensor = 1.0,
) -> Tensor:
    """Returns what the adapted modules multiply by.

    Args:
        scalings: ``[..., T, L, K]``, floating point.
        top_k: Keep the k largest (signed) scalings per token and module and zero the rest,
            without renormalising; None keeps all. A tensor has shape ``[T]``, 0 keeps all.
        enable_softmax_topk: Softmax over the kept scalings.
        overrides: Act on what top-k left; nothing is renormalised after them, so the other
            adapters' scalings stay what they were.
        global_weight: Factor on the result; a tensor has shape ``[T]``.

    Returns:
        ``[..., T, L, K]``; scalings ``[..., T, 1, K]`` that all modules share become L rows where
        overrides differ between modules.

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
    if overrides is not None:
        scalings = scalings * overrides.factor + overrides.pin
    return scalings * _per_token(global_weight)


def route(
    logits: Tensor,
    config: XLoraConfig,
    knobs: RoutingKnobs,
    *,
    layer_names: Sequence[str] = (),
    adapter_names: Sequence[str] = (),
) -> Tensor:
    """Returns the effective scalings of router logits under a config and one set of knobs.

    Args:
        logits: ``[..., T, L, K]``.
        config: Says which softmax is on.
        knobs: Top-k, temperature, overrides and global weight.
        layer_names: Paths of the L adapted modules; only knobs with overrides need them.
        adapter_names: The K adapters' names; only knobs with overrides need them.

    Returns:
        ``[..., T, L, K]``; logits ``[..., T, 1, K]`` that all modules share become L rows where
        overrides differ between modules.

    Raises:
        ConfigError: If top-k is outside 1..K, or an override names an adapter or modules that
            are not there.
    """
    scalings = scalings_from_logits(
        logits, enable_softmax=config.enable_softmax, temperature=knobs.temperature
    )
    return effective_scalings(
        scalings,
        top_k=knobs.top_k,
        enable_softmax_topk=config.enable_softmax_topk,
        overrides=override_matrix(
            knobs, layer_names, adapter_names, dtype=logits.dtype, device=logits.device
        ),
        global_weight=knobs.global_weight,
    )


def override_matrix(
    knobs: RoutingKnobs,
    layer_names: Sequence[str],
    adapter_names: Sequence[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> OverrideMatrix | None:
    """Returns the overrides of knobs as matrices; None if there are none.

    Args:
        knobs: The knobs.
        layer_names: Paths of the L adapted modules.
        adapter_names: The K adapters' names.
        dtype: Of the matrices.
        device: Of the matrices.

    Raises:
        ConfigError: If an override names an adapter or modules that are not there.
    """
    if not knobs.overrides:
        return None
    names = tuple(layer_names), tuple(adapter_names)
    return _override_matrix(tuple(knobs.overrides), *names, dtype, torch.device(device))


# A request asks for the same matrices at every token. They follow from the arguments alone, and
# nobody writes to them.
@lru_cache(maxsize=128)
@torch.inference_mode(False)
def _override_matrix(
    overrides: tuple[AdapterOverride, ...],
    layer_names: tuple[str, ...],
    adapter_names: tuple[str, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> OverrideMatrix:
    """Returns the matrices of overrides; checks first that they fit.

    Raises:
        ConfigError: If an override names an adapter or modules that are not there.
    """
    RoutingKnobs(overrides=overrides).check_names(adapter_names, layer_names)
    n_rows = 1 if all(o.modules is None for o in overrides) else len(layer_names)
    factor = torch.ones(n_rows, len(adapter_names), dtype=dtype)
    pin = torch.zeros_like(factor)
    bound = torch.finfo(dtype).max
    for override in overrides:
        rows = override.module_indices(layer_names) if n_rows > 1 else [0]
        k = adapter_names.index(override.adapter)
        value = min(max(override.value or 0.0, -bound), bound)
        factor[rows, k] = value if override.kind == "scale" else 0.0
        pin[rows, k] = value if override.kind == "pin" else 0.0
    return OverrideMatrix(factor.to(device), pin.to(device))


def _is_large(values: Tensor) -> bool:
    """Whether the adapters' axis had better come first. Never in a graph: sizes may vary there."""
    on_cpu = values.device.type == "cpu" and not torch.compiler.is_compiling()
    return on_cpu and values.numel() >= _MANY_VALUES


def _per_token(value: float | Tensor, *, n_inner: int = 2) -> float | Tensor:
    """``[T]`` -> ``[T, 1, 1]``, to broadcast against ``[..., T, L, K]``; numbers pass."""
    return value[(..., *[None] * n_inner)] if isinstance(value, Tensor) else value


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
