"""What the environment may say of how the engine is shared."""

from __future__ import annotations

import pytest

from app import sharing
from xlora_core import EngineLimits
from xlora_core.errors import ConfigError


def test_without_settings_nothing_is_limited():
    assert sharing.settings_from({}) == {"limits": EngineLimits()}
    assert sharing.settings_from({"XLORA_APP_MAX_ARMS": " "}) == {"limits": EngineLimits()}


def test_settings_are_passed_to_the_engine():
    settings = sharing.settings_from(
        {
            "XLORA_APP_MAX_PROMPT_TOKENS": "500",
            "XLORA_APP_MAX_NEW_TOKENS": "200",
            "XLORA_APP_MAX_SECONDS": "7.5",
            "XLORA_APP_MAX_ARMS": "3",
            "XLORA_APP_MAX_QUEUE": "20",
            "XLORA_APP_MAX_ACTIVE": "4",
            "XLORA_APP_MEMORY_MIB": "0.5",
        }
    )
    assert settings == {
        "limits": EngineLimits(
            max_prompt_tokens=500, max_new_tokens=200, max_seconds=7.5, max_arms=3
        ),
        "max_queue": 20,
        "max_active": 4,
        "memory_bytes": 2**19,
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MAX_ARMS", "many", "XLORA_APP_MAX_ARMS must be a number, got 'many'"),
        ("MAX_ARMS", "0", "max_arms must be None or a whole number >= 1, got 0"),
        ("MAX_NEW_TOKENS", "1.5", "max_new_tokens must be None or a whole number >= 1"),
        ("MEMORY_MIB", "inf", "XLORA_APP_MEMORY_MIB must be a number, got 'inf'"),
    ],
)
def test_what_is_no_limit_is_refused(name, value, message):
    with pytest.raises(ConfigError, match=message):
        sharing.settings_from({f"XLORA_APP_{name}": value})
