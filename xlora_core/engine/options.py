"""What an engine may be asked for when it is made."""

from __future__ import annotations

from xlora_core.config.checks import is_finite, is_int, raise_if
from xlora_core.engine.overlap import OVERLAP_MODES


def check_options(
    *,
    max_queue: int,
    max_active: int,
    n_guesses: int,
    memory_bytes: int | None,
    step_timeout: float | None,
    overlap: str,
) -> None:
    """Checks options of ``Engine``, all at once.

    Raises:
        ConfigError: If one or more are out of range.
    """
    counts = {"max_queue": max_queue, "max_active": max_active, "n_guesses": n_guesses}
    if memory_bytes is not None:
        counts["memory_bytes"] = memory_bytes
    faults = [
        f"{name} must be a whole number >= 1, got {value!r}"
        for name, value in counts.items()
        if not is_int(value) or value < 1
    ]
    if step_timeout is not None and (not is_finite(step_timeout) or step_timeout <= 0):
        faults.append(f"step_timeout must be None or a number > 0, got {step_timeout!r}")
    if overlap not in OVERLAP_MODES:
        faults.append(f"overlap must be one of {', '.join(OVERLAP_MODES)}, got {overlap!r}")
    raise_if(faults)
