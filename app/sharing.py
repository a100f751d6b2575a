"""How the app's engine is shared, as the environment says it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from xlora_core import EngineLimits
from xlora_core.errors import ConfigError

_MIB = 2**20
_LIMITS = ("MAX_PROMPT_TOKENS", "MAX_NEW_TOKENS", "MAX_SECONDS", "MAX_ARMS")
_OPTIONS = ("MAX_QUEUE", "MAX_ACTIVE")


def settings_from(environ: Mapping[str, str]) -> dict[str, Any]:
    """Returns the arguments of ``Engine`` that the environment asks for.

    ``XLORA_APP_MAX_PROMPT_TOKENS``, ``..._MAX_NEW_TOKENS``, ``..._MAX_SECONDS`` and
    ``..._MAX_ARMS`` limit a request, ``XLORA_APP_MAX_ACTIVE`` and ``..._MAX_QUEUE`` how many run
    and wait, ``XLORA_APP_MEMORY_MIB`` what they take together.

    Raises:
        ConfigError: If one of them is no number, or out of range.
    """
    limits = {name.lower(): _number(environ, name) for name in _LIMITS if _given(environ, name)}
    settings: dict[str, Any] = {"limits": EngineLimits(**limits)}
    settings |= {name.lower(): _number(environ, name) for name in _OPTIONS if _given(environ, name)}
    if _given(environ, "MEMORY_MIB"):
        settings["memory_bytes"] = int(_number(environ, "MEMORY_MIB") * _MIB)
    return settings


def _given(environ: Mapping[str, str], name: str) -> bool:
    return bool(environ.get(f"XLORA_APP_{name}", "").strip())


def _number(environ: Mapping[str, str], name: str) -> Any:
    """Returns a whole number where the text is one, and what else it may be as a float."""
    text = environ[f"XLORA_APP_{name}"].strip()
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        if math.isfinite(number):
            return number
    raise ConfigError(
        f"XLORA_APP_{name} must be a number, got {text!r}",
        hint=f"for example XLORA_APP_{name}=60; without it there is no such limit",
    )
