"""Limits of a request: checked when they are set, and named when a request goes beyond."""

from __future__ import annotations

import pytest

from xlora_core import EngineLimits
from xlora_core.errors import ConfigError, PromptError


def test_no_limits_allow_everything() -> None:
    EngineLimits().check(n_prompt_tokens=10**9, max_new_tokens=10**9, n_arms=10**9)


def test_a_request_at_the_limits_is_allowed() -> None:
    limits = EngineLimits(max_prompt_tokens=10, max_new_tokens=20, max_arms=2, max_seconds=0.5)
    limits.check(n_prompt_tokens=10, max_new_tokens=20, n_arms=2)


def test_everything_beyond_a_limit_is_named() -> None:
    limits = EngineLimits(max_prompt_tokens=1_000, max_new_tokens=2_000, max_arms=2)
    with pytest.raises(ConfigError) as caught:
        limits.check(n_prompt_tokens=1_001, max_new_tokens=2_001, n_arms=3)
    assert caught.value.faults == [
        "the request has 3 arms, this engine allows 2",
        "max_new_tokens is 2,001, this engine allows 2,000",
        "the prompt has 1,001 tokens, this engine allows 1,000",
    ]
    assert caught.value.hint


def test_a_long_prompt_alone_is_an_error_of_the_prompt() -> None:
    limits = EngineLimits(max_prompt_tokens=3, max_new_tokens=5)
    with pytest.raises(
        PromptError, match="the prompt has 4 tokens, this engine allows 3"
    ) as caught:
        limits.check(n_prompt_tokens=4, max_new_tokens=5, n_arms=1)
    assert "shorten the prompt" in caught.value.hint


def test_every_limit_out_of_range_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        EngineLimits(
            max_prompt_tokens=0,
            max_new_tokens=2.5,  # type: ignore[arg-type]  # what is refused
            max_seconds=float("nan"),
            max_arms=True,
        )
    assert caught.value.faults == [
        "max_prompt_tokens must be None or a whole number >= 1, got 0",
        "max_new_tokens must be None or a whole number >= 1, got 2.5",
        "max_arms must be None or a whole number >= 1, got True",
        "max_seconds must be None or a finite number > 0, got nan",
    ]
    with pytest.raises(ConfigError, match="max_seconds must be None or a finite number > 0, got 0"):
        EngineLimits(max_seconds=0)
