"""What the fields of every configuration class are checked with."""

from __future__ import annotations

import math

from xlora_core.errors import ConfigError


def is_finite(value: object) -> bool:
    """Whether a value is a finite number (true and false are none)."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def is_int(value: object) -> bool:
    """Whether a value is a whole number (true and false are none)."""
    return isinstance(value, int) and not isinstance(value, bool)


def raise_if(faults: list[str], *, hint: str = "") -> None:
    """Raises one ``ConfigError`` of all faults, if there are any."""
    if faults:
        raise ConfigError(faults, hint=hint)


def top_k_fault(name: str, value: object, n_adapters: int | None) -> str | None:
    """Returns the fault of a top-k value, or None. ``n_adapters`` None: K is not known."""
    if value is None:
        return None
    upper = (
        "the number of adapters" if n_adapters is None else f"{n_adapters} (the number of adapters)"
    )
    if not is_int(value) or value < 1 or (n_adapters is not None and value > n_adapters):  # type: ignore[operator]  # is_int has checked it
        return f"{name} must be None or a whole number from 1 to {upper}, got {value!r}"
    return None
