"""Summaries of scalings for charts and comparisons: pure functions on numpy arrays.

All take scalings ``[T, L, K]`` (T tokens, L modules, K adapters), raw or effective. ``present``
``[L, K]`` says where an adapter has weights; what is absent then neither leads nor counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]
BoolArray = NDArray[np.bool_]


def top1_share(scalings: FloatArray) -> NDArray[np.float32]:
    """Returns 1 for the largest of the K scalings and 0 for the others, ``[..., K]`` float32.

    Those that tie for the largest share the 1 equally. Where all scalings are 0 nobody leads.

    Args:
        scalings: ``[..., K]``.
    """
    leads = scalings == scalings.max(axis=-1, keepdims=True)
    leads &= scalings.any(axis=-1, keepdims=True)
    share: NDArray[np.float32] = leads / np.maximum(leads.sum(axis=-1, keepdims=True), 1)
    return share.astype(np.float32)


def dominant_adapter(scalings: FloatArray, present: BoolArray | None = None) -> NDArray[np.int16]:
    """Returns the adapter with the largest scaling, ``[T, L]`` int16.

    -1 where all are 0 or absent; of those that tie the first in order.

    Args:
        scalings: ``[T, L, K]``.
        present: ``[L, K]``; None: all are present.
    """
    values = _without_absent(scalings, present)
    dominant: NDArray[np.int16] = np.argmax(values, axis=-1).astype(np.int16)
    nobody = ~((scalings != 0) & np.isfinite(values)).any(axis=-1)
    dominant[nobody] = -1
    return dominant


def adapter_mean(scalings: FloatArray, present: BoolArray | None = None) -> NDArray[np.float64]:
    """Returns each adapter's mean scaling over tokens and modules, ``[K]`` float64.

    NaN for an adapter that is absent everywhere, and without tokens.

    Args:
        scalings: ``[T, L, K]``.
        present: ``[L, K]``; modules where the adapter is absent do not count.
    """
    counted = np.ones(scalings.shape[1:], dtype=bool) if present is None else present
    total = (scalings.sum(axis=0, dtype=np.float64) * counted).sum(axis=0)
    count = counted.sum(axis=0) * len(scalings)
    mean: NDArray[np.float64] = np.divide(
        total, count, out=np.full(len(total), np.nan), where=count > 0
    )
    return mean


def entropy(scalings: FloatArray) -> NDArray[np.float32]:
    """Returns how evenly each token's adapters are mixed, in nats, ``[T]`` float32.

    The entropy of a module's absolute scalings, taken as shares of their sum; averaged over the
    modules that have any. 0: one adapter carries everything; log K: all carry the same.

    Args:
        scalings: ``[T, L, K]``.
    """
    per_module, alive = _module_entropy(scalings)
    return _mean_where(per_module, alive)


def effective_number(scalings: FloatArray) -> NDArray[np.float32]:
    """Returns how many adapters share each token's work, ``[T]`` float32.

    ``exp`` of a module's entropy (see ``entropy``), averaged over the modules that have any
    scaling: 1 to K; 0 for a token without any.

    Args:
        scalings: ``[T, L, K]``.
    """
    per_module, alive = _module_entropy(scalings)
    return _mean_where(np.exp(per_module), alive)


def lead_share(scalings: FloatArray, present: BoolArray | None = None) -> NDArray[np.float64]:
    """Returns the share of tokens that each adapter leads, ``[K]`` float64.

    An adapter leads a token if its scalings, summed over the modules, are the largest. Adapters
    that tie share the token equally; a token without any scaling is led by nobody, so the shares
    sum to 1 or less.

    Args:
        scalings: ``[T, L, K]``.
        present: ``[L, K]``; None: all are present.
    """
    if len(scalings) == 0:
        return np.zeros(scalings.shape[-1])
    counted = scalings if present is None else scalings * present
    shares: NDArray[np.float64] = top1_share(counted.sum(axis=1, dtype=np.float64)).mean(
        axis=0, dtype=np.float64
    )
    return shares


def first_divergence(
    first: Sequence[int] | NDArray[np.integer],
    second: Sequence[int] | NDArray[np.integer],
    *,
    first_ended: bool = True,
    second_ended: bool = True,
) -> int | None:
    """Returns the first position at which two responses have different tokens.

    A response that has ended differs where the other goes on; one that has not may yet write the
    same.

    Args:
        first: Token ids of a response.
        second: Token ids of the other.
        first_ended: Whether the first is complete.
        second_ended: Whether the second is complete.

    Returns:
        The position from the start of the responses; None if there is none (yet).

    Example:
        >>> first_divergence([5, 6, 7], [5, 6, 9])
        2
    """
    a, b = np.asarray(first), np.asarray(second)
    n_both = min(len(a), len(b))
    different = np.flatnonzero(a[:n_both] != b[:n_both])
    if len(different):
        return int(different[0])
    if len(a) == len(b):
        return None
    shorter_ended = first_ended if len(a) < len(b) else second_ended
    return n_both if shorter_ended else None


def _without_absent(scalings: FloatArray, present: BoolArray | None) -> FloatArray:
    return scalings if present is None else np.where(present, scalings, -np.inf)


def _module_entropy(scalings: FloatArray) -> tuple[NDArray[np.float64], BoolArray]:
    """Returns the entropy ``[T, L]`` and where a module has any scaling at all ``[T, L]``."""
    size = np.abs(scalings, dtype=np.float64)
    total = size.sum(axis=-1, keepdims=True)
    share = np.divide(size, total, out=np.zeros_like(size), where=total > 0)
    per_module = -(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=-1)
    return per_module, total[..., 0] > 0


def _mean_where(values: NDArray[np.float64], counted: BoolArray) -> NDArray[np.float32]:
    count = np.maximum(counted.sum(axis=-1), 1)
    mean: NDArray[np.float32] = ((values * counted).sum(axis=-1) / count).astype(np.float32)
    return mean
