"""What one request may ask of an engine that many share."""

from __future__ import annotations

from dataclasses import dataclass

from xlora_core.config.checks import is_finite, is_int, raise_if
from xlora_core.errors import PromptError


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """Limits of each request; None is none.

    Attributes:
        max_prompt_tokens: Most tokens of a prompt, chat template included.
        max_new_tokens: Most tokens that an arm may be asked to write.
        max_seconds: Seconds that a request may run, from its start on; it is stopped then, and
            keeps what it has written.
        max_arms: Most arms of a request.

    Raises:
        ConfigError: Listing every limit out of range.
    """

    max_prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    max_seconds: float | None = None
    max_arms: int | None = None

    def __post_init__(self) -> None:
        faults = [
            f"{name} must be None or a whole number >= 1, got {value!r}"
            for name in ("max_prompt_tokens", "max_new_tokens", "max_arms")
            if (value := getattr(self, name)) is not None and (not is_int(value) or value < 1)
        ]
        seconds = self.max_seconds
        if seconds is not None and (not is_finite(seconds) or seconds <= 0):
            faults.append(f"max_seconds must be None or a finite number > 0, got {seconds!r}")
        raise_if(faults)

    def check(self, *, n_prompt_tokens: int, max_new_tokens: int, n_arms: int) -> None:
        """Checks what a request asks for.

        Args:
            n_prompt_tokens: Tokens of its prompt.
            max_new_tokens: Most tokens that it wants written.
            n_arms: Its arms.

        Raises:
            ConfigError: Naming everything that it may not ask for.
            PromptError: If only the prompt is too long.
        """
        faults = []
        if self.max_arms is not None and n_arms > self.max_arms:
            faults.append(f"the request has {n_arms} arms, this engine allows {self.max_arms}")
        if self.max_new_tokens is not None and max_new_tokens > self.max_new_tokens:
            faults.append(
                f"max_new_tokens is {max_new_tokens:,}, this engine allows {self.max_new_tokens:,}"
            )
        prompt_faults = []
        if self.max_prompt_tokens is not None and n_prompt_tokens > self.max_prompt_tokens:
            prompt_faults.append(
                f"the prompt has {n_prompt_tokens:,} tokens, this engine allows "
                f"{self.max_prompt_tokens:,}"
            )
        raise_if(
            faults and faults + prompt_faults,
            hint="ask for less; whoever runs the engine sets its limits",
        )
        if prompt_faults:
            raise PromptError(
                prompt_faults[0],
                hint="shorten the prompt; whoever runs the engine sets its limits",
            )
