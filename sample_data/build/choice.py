"""Choices that follow from words alone: the same on every run, machine and Python."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def fraction(*words: str) -> float:
    """A number in [0, 1), evenly spread over all words.

    Args:
        words: What the choice is for, then for whom; ``("a", "b")`` and ``("ab",)`` differ.
    """
    digest = hashlib.sha256("\x1f".join(words).encode()).digest()
    # 53 bits, as many as a float holds: 64 could round up to 1.
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def pick(options: Sequence[T], *words: str, weights: Sequence[float] | None = None) -> T:
    """One of the options.

    Args:
        options: At least one.
        words: As for :func:`fraction`.
        weights: How often each is taken, in any unit; None takes all equally often.
    """
    weights = [1.0] * len(options) if weights is None else weights
    left = fraction(*words) * sum(weights)
    for option, weight in zip(options, weights, strict=True):
        left -= weight
        if left < 0:
            return option
    return options[-1]  # Only rounding leads here.
