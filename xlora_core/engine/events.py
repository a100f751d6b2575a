"""What a request tells while it runs, in the order it happens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xlora_core.config import Arm, RoutingKnobs
from xlora_core.errors import XLoraError

if TYPE_CHECKING:
    from xlora_core.recording import Run


@dataclass(frozen=True, kw_only=True)
class Queued:
    """The request waits.

    Attributes:
        position: 1 is the next to run.
        expected_seconds: Until it starts, as things were when this was told; None if nothing has
            been measured yet. ``RequestHandle.expected_seconds`` is always of now.
    """

    position: int
    expected_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Started:
    """The engine works on the request now.

    Attributes:
        arms: Its arms, with the knobs that were in force at the start.
        n_prompt_tokens: Tokens of the prompt, chat template included.
    """

    arms: tuple[Arm, ...]
    n_prompt_tokens: int


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """An arm has written a token.

    Attributes:
        arm: Index of the arm in the request.
        index: Row of the token in the run; the prompt's tokens come before the first.
        token_id: The token.
        piece: The text it completes; ``""`` while a character is incomplete.
        logprob: Natural log-probability under the arm, before any sampling knob.
        base_logprob: The same under the base model; NaN where it is not known.
        knobs: What a routed arm was set to when it chose this token (the knobs of the row
            before); None for other arms.
    """

    arm: int
    index: int
    token_id: int
    piece: str
    logprob: float
    base_logprob: float
    knobs: RoutingKnobs | None


@dataclass(frozen=True, kw_only=True)
class ArmFinished:
    """An arm writes no more.

    Attributes:
        arm: Index of the arm in the request.
        reason: ``"stop"`` (the model ended its answer), ``"length"`` (the token limit or the
            end of the context window), ``"time"`` (the engine's limit of seconds) or
            ``"cancelled"``.
    """

    arm: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Finished:
    """All arms are finished, or the request was cancelled after its start.

    Attributes:
        run: The whole record.
    """

    run: Run


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The request failed; what it had recorded stays readable.

    Attributes:
        error: Why.
    """

    error: XLoraError


Event = Queued | Started | TokenEvent | ArmFinished | Finished | Failed
