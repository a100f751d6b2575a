"""One arm's record, as plain numpy arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from xlora_core.config import AdapterOverride, Arm, RoutingKnobs
from xlora_core.errors import ConfigError
from xlora_core.recording.header import RunHeader

FinishReason = Literal["stop", "length", "time", "cancelled", "error"]
FINISH_REASONS: tuple[str, ...] = get_args(FinishReason)

# Field -> (dtype, number of dimensions, counted in "tokens" or in routed "rows").
ARRAYS: dict[str, tuple[type[np.generic], int, str]] = {
    "token_ids": (np.int32, 1, "tokens"),
    "router_logits": (np.float16, 3, "rows"),
    "top_k": (np.int16, 1, "rows"),
    "temperature": (np.float32, 1, "rows"),
    "global_weight": (np.float32, 1, "rows"),
    "override_set": (np.int32, 1, "rows"),
    "logprob": (np.float32, 1, "tokens"),
    "base_logprob": (np.float32, 1, "tokens"),
    "alternative_ids": (np.int32, 2, "tokens"),
    "alternative_logprobs": (np.float32, 2, "tokens"),
    "seconds": (np.float32, 1, "tokens"),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Track:
    """The record of one arm: T tokens, and the routing of the first R of them.

    Row t belongs to token t as input: its router logits and knobs are those with which the model
    read token t and predicted token t + 1. A track that ended with ``"stop"`` or ``"length"`` has
    R = T; while it grows, and after a failure, the last tokens may not have been read yet.

    Attributes:
        arm: The arm.
        token_ids: ``[T]`` int32.
        pieces: T texts; joined they are the exact text, special tokens included. A token whose
            bytes are not a whole character yet has ``""``.
        n_prompt: How many of the tokens are the prompt's.
        router_logits: ``[R, L or 1, K]`` float16; None for an arm that is not routed.
        top_k: ``[R]`` int16, in force at the token; 0 keeps all.
        temperature: ``[R]`` float32, in force at the token.
        global_weight: ``[R]`` float32, in force at the token.
        override_set: ``[R]`` int32, which overrides were in force at the token: 0 none, n those
            of ``override_sets[n - 1]``.
        override_sets: The distinct sets of overrides that occur, in order of their first use.
        logprob: ``[T]`` float32, natural log-probability of the token under the arm when it was
            chosen; NaN for the prompt.
        base_logprob: ``[T]`` float32, the same under the base model; NaN where not known.
        alternative_ids: ``[T, A]`` int32, the most probable tokens in its place; -1 is none.
        alternative_logprobs: ``[T, A]`` float32; NaN where there is none.
        seconds: ``[T]`` float32, wall time from the start of the arm to the token.
        finish_reason: ``"stop"``, ``"length"``, ``"time"`` (a limit of seconds was reached),
            ``"cancelled"``, ``"error"``, or None while the arm still runs.
        n_guessed: Tokens whose scalings were fetched ahead for a guess of what the token would
            be; 0 where nothing was guessed.
        n_hit: How many of those guesses were right, so that the scalings could be used.
    """

    arm: Arm
    token_ids: NDArray[np.int32]
    pieces: list[str]
    n_prompt: int
    router_logits: NDArray[np.float16] | None
    top_k: NDArray[np.int16]
    temperature: NDArray[np.float32]
    global_weight: NDArray[np.float32]
    override_set: NDArray[np.int32]
    override_sets: tuple[tuple[AdapterOverride, ...], ...] = ()
    logprob: NDArray[np.float32]
    base_logprob: NDArray[np.float32]
    alternative_ids: NDArray[np.int32]
    alternative_logprobs: NDArray[np.float32]
    seconds: NDArray[np.float32]
    finish_reason: FinishReason | None = None
    n_guessed: int = 0
    n_hit: int = 0

    @property
    def n_tokens(self) -> int:
        """T, prompt and response."""
        return len(self.token_ids)

    @property
    def n_routed(self) -> int:
        """R, the tokens whose scalings are known; T for an arm that is not routed."""
        return self.n_tokens if self.router_logits is None else len(self.router_logits)

    @property
    def hit_rate(self) -> float | None:
        """Share of the guesses that were right, from 0 to 1; None where nothing was guessed."""
        return self.n_hit / self.n_guessed if self.n_guessed else None

    def overrides(self, row: int) -> tuple[AdapterOverride, ...]:
        """Returns the overrides in force at a token."""
        index = int(self.override_set[row])
        return self.override_sets[index - 1] if index else ()

    def knobs(self, row: int) -> RoutingKnobs:
        """Returns the knobs in force at a token whose routing is known, as they were recorded."""
        return RoutingKnobs(
            top_k=int(self.top_k[row]) or None,
            temperature=float(self.temperature[row]),
            global_weight=float(self.global_weight[row]),
            overrides=self.overrides(row),
        )

    def knob_changes(self) -> list[int]:
        """Returns the rows at which other knobs came into force; row 0 first, if there is one."""
        if self.router_logits is None or not self.n_routed:
            return []
        columns = (self.top_k, self.temperature, self.global_weight, self.override_set)
        changed = np.any([column[1:] != column[:-1] for column in columns], axis=0)
        return [0, *(np.flatnonzero(changed) + 1).tolist()]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Returns field name -> array, without the router logits of an arm that has none."""
        found = {name: getattr(self, name) for name in ARRAYS}
        return {name: array for name, array in found.items() if array is not None}


def shape_faults(track: Track, header: RunHeader) -> list[str]:
    """Returns every field whose dtype or shape does not fit, one sentence each.

    Args:
        track: A record.
        header: The header of its run.
    """
    if (track.arm.kind == "routed") != (track.router_logits is not None):
        has = "has no" if track.router_logits is None else "has"
        return [f"router_logits: a {track.arm.kind} arm {has} router logits"]
    counts = {"tokens": track.n_tokens, "rows": track.n_routed}
    n_alternatives = track.alternative_ids.shape[-1] if track.alternative_ids.ndim else 0
    inner = {
        "router_logits": (header.n_routed_layers, header.n_adapters),
        "alternative_ids": (n_alternatives,),
        "alternative_logprobs": (n_alternatives,),
    }
    faults = []
    if track.arm.kind == "expert" and track.arm.adapter not in header.adapter_names:
        faults.append(f"arm: the run has no adapter {track.arm.adapter!r}")
    names = header.adapter_names, header.layer_names
    if track.arm.knobs is not None:
        try:
            track.arm.knobs.check_names(*names)
        except ConfigError as error:
            faults.append(f"arm: {error.message}")
    for index, overrides in enumerate(track.override_sets):
        try:
            RoutingKnobs(overrides=overrides).check_names(*names)
        except ConfigError as error:
            faults.append(f"override_sets[{index}]: {error.message}")
    for name, array in track.arrays().items():
        dtype, _, counted = ARRAYS[name]
        expected = (counts[counted], *inner.get(name, ()))
        if array.dtype != dtype:
            faults.append(f"{name}: expected dtype {np.dtype(dtype).name}, got {array.dtype.name}")
        if array.shape != expected:
            faults.append(f"{name}: expected shape {list(expected)}, got {list(array.shape)}")
    if len(track.pieces) != track.n_tokens:
        faults.append(f"pieces: expected {track.n_tokens} texts, got {len(track.pieces)}")
    if not 0 <= track.n_prompt <= track.n_tokens:
        faults.append(f"n_prompt: expected 0 to {track.n_tokens}, got {track.n_prompt}")
    if not 0 <= track.n_hit <= track.n_guessed <= track.n_tokens:
        faults.append(
            f"n_hit, n_guessed: expected 0 <= hits <= guesses <= {track.n_tokens} tokens, "
            f"got {track.n_hit} and {track.n_guessed}"
        )
    elif track.n_guessed and track.arm.kind != "routed":
        faults.append(f"n_guessed: a {track.arm.kind} arm has no scalings to guess for")
    if track.n_routed > track.n_tokens:
        faults.append(
            f"router_logits: {track.n_routed} rows are more than the {track.n_tokens} tokens"
        )
    elif track.n_routed < track.n_tokens and track.finish_reason in ("stop", "length"):
        faults.append(
            f"router_logits: a finished arm needs {track.n_tokens} rows, got {track.n_routed}"
        )
    return faults


def value_faults(track: Track, header: RunHeader) -> list[str]:
    """Returns every field that holds an impossible value, one sentence each.

    Args:
        track: A record of the right shapes.
        header: The header of its run.
    """
    checks: list[tuple[str, object, str]] = [
        ("token_ids", np.all(track.token_ids >= 0), "ids must be >= 0"),
        (
            "top_k",
            np.all((track.top_k >= 0) & (track.top_k <= header.n_adapters)),
            f"values must be from 0 (all) to {header.n_adapters} (the number of adapters)",
        ),
        (
            "temperature",
            np.all(np.isfinite(track.temperature) & (track.temperature > 0)),
            "values must be finite and > 0",
        ),
        ("global_weight", np.all(np.isfinite(track.global_weight)), "values must be finite"),
        (
            "override_set",
            np.all((track.override_set >= 0) & (track.override_set <= len(track.override_sets))),
            f"values must be from 0 (none) to {len(track.override_sets)} (the sets recorded)",
        ),
        ("alternative_ids", np.all(track.alternative_ids >= -1), "ids must be >= -1"),
        (
            "seconds",
            np.all(np.isfinite(track.seconds) & (track.seconds >= 0)),
            "values must be finite and >= 0",
        ),
    ]
    if track.router_logits is not None:
        checks.append(
            (
                "router_logits",
                np.all(np.isfinite(track.router_logits)),
                "values must be finite (no NaN, no infinity)",
            )
        )
    # A probability may round to just over 1.
    checks += [
        (name, not np.any(getattr(track, name) > 1e-3), "values must be <= 0")
        for name in ("logprob", "base_logprob", "alternative_logprobs")
    ]
    return [f"{name}: {demand}" for name, fine, demand in checks if not fine]
