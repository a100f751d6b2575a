"""Recorders: the engine's thread writes rows, any other thread takes snapshots meanwhile.

Rows are only ever added, never changed, so a snapshot is a set of read-only views of the
recorder's arrays: it costs no copy, and later rows cannot reach it.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xlora_core.config import AdapterOverride, Arm, RoutingKnobs
from xlora_core.errors import RecordError
from xlora_core.recording.header import RunHeader
from xlora_core.recording.run import Run
from xlora_core.recording.track import ARRAYS, FINISH_REASONS, FinishReason, Track

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_LARGEST_FLOAT16 = float(np.finfo(np.float16).max)
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
_SMALLEST_FLOAT32 = float(np.finfo(np.float32).tiny)
# Knob -> the value that changes nothing.
_NEUTRAL = {"top_k": 0, "temperature": 1, "global_weight": 1, "override_set": 0}


def _row_shapes(
    n_routed_layers: int | None, n_adapters: int, n_alternatives: int
) -> dict[str, tuple[int, ...]]:
    """Returns the shape of a token's row in the arrays that have more than one value per token."""
    return {
        "router_logits": (n_routed_layers or 0, n_adapters),
        "alternative_ids": (n_alternatives,),
        "alternative_logprobs": (n_alternatives,),
    }


def bytes_per_token(n_routed_layers: int | None, n_adapters: int, n_alternatives: int = 5) -> int:
    """Returns the bytes that the arrays of a ``TrackRecorder`` take for each token."""
    inner = _row_shapes(n_routed_layers, n_adapters, n_alternatives)
    return sum(
        np.dtype(dtype).itemsize * math.prod(inner.get(name, ()))
        for name, (dtype, _, _) in ARRAYS.items()
    )


class TrackRecorder:
    """Records one arm as it grows. Every method may be called by any thread.

    Args:
        arm: The arm.
        capacity: Most tokens, prompt and response.
        n_routed_layers: L, or 1 when all modules share the router's logits; None for an arm that
            is not routed.
        n_adapters: K.
        n_alternatives: A, alternatives kept per token.
    """

    def __init__(
        self,
        arm: Arm,
        capacity: int,
        n_routed_layers: int | None,
        n_adapters: int,
        n_alternatives: int = 5,
    ) -> None:
        if (arm.kind == "routed") != (n_routed_layers is not None):
            raise RecordError(f"a routed arm, and no other, has routed layers; this is {arm.label}")
        self.arm = arm
        self.capacity = capacity
        self.n_alternatives = n_alternatives
        self._lock = threading.Lock()
        self._version = 0
        self._pieces: list[str] = []
        # Set of overrides -> its number from 1, in order of first use.
        self._override_sets: dict[tuple[AdapterOverride, ...], int] = {}
        self._n_tokens = self._n_prompt = self._n_logits = self._n_knobs = 0
        self._n_guessed = self._n_hit = 0
        self._logits_clipped = False
        self._finish_reason: FinishReason | None = None
        inner = _row_shapes(n_routed_layers, n_adapters, n_alternatives)
        # Pages of an empty array take no memory before they are written.
        self._arrays: dict[str, NDArray[Any]] = {
            name: np.empty((capacity, *inner.get(name, ())), dtype)
            for name, (dtype, _, _) in ARRAYS.items()
        }
        if n_routed_layers is None:
            # No knob acts on such an arm: the values that change nothing.
            for name, value in _NEUTRAL.items():
                self._arrays[name].fill(value)

    @property
    def version(self) -> int:
        """Grows with every change."""
        with self._lock:
            return self._version

    def append_prompt(self, token_ids: Sequence[int], pieces: Sequence[str]) -> None:
        """Adds the next tokens of the prompt; a long prompt may come in parts.

        Raises:
            RecordError: If ids and pieces differ in number, the record is full or finished, or
                the response has begun.
        """
        if len(token_ids) != len(pieces):
            raise RecordError(f"{len(token_ids)} prompt tokens came with {len(pieces)} pieces")
        with self._lock:
            rows = self._new_rows(len(token_ids))
            if self._n_prompt != self._n_tokens:
                raise RecordError("a prompt cannot grow once the response has begun")
            self._arrays["token_ids"][rows] = token_ids
            for name in ("logprob", "base_logprob", "alternative_logprobs"):
                self._arrays[name][rows] = np.nan
            self._arrays["alternative_ids"][rows] = -1
            self._arrays["seconds"][rows] = 0
            self._pieces += pieces
            self._n_tokens = self._n_prompt = rows.stop
            self._version += 1

    def append(
        self,
        token_id: int,
        piece: str,
        logprob: float,
        base_logprob: float = math.nan,
        alternatives: tuple[Iterable[int], Iterable[float]] | None = None,
        seconds: float = 0.0,
    ) -> None:
        """Adds a token of the response.

        Args:
            token_id: The token.
            piece: The text it completes.
            logprob: Natural log-probability under the arm.
            base_logprob: The same under the base model; NaN when not known.
            alternatives: At most ``n_alternatives`` ids and their log-probabilities.
            seconds: Wall time since the start of the arm.

        Raises:
            RecordError: If the record is full or finished, or there are too many alternatives.
        """
        ids, logprobs = (list(part) for part in alternatives or ((), ()))
        if len(ids) != len(logprobs) or len(ids) > self.n_alternatives:
            raise RecordError(
                f"expected at most {self.n_alternatives} alternatives with as many "
                f"log-probabilities, got {len(ids)} and {len(logprobs)}"
            )
        none = [-1] * (self.n_alternatives - len(ids))
        with self._lock:
            row = self._new_rows(1).start
            self._arrays["token_ids"][row] = token_id
            self._arrays["logprob"][row] = logprob
            self._arrays["base_logprob"][row] = base_logprob
            self._arrays["alternative_ids"][row] = ids + none
            self._arrays["alternative_logprobs"][row] = logprobs + [math.nan] * len(none)
            self._arrays["seconds"][row] = seconds
            self._pieces.append(piece)
            self._n_tokens = row + 1
            self._version += 1

    def set_router_logits(self, start_row: int, logits: Tensor | NDArray[np.floating]) -> None:
        """Adds the router logits of the next tokens.

        They are kept as float16. A logit beyond its range (65504) is kept as the largest one, and
        a warning is logged, once.

        Args:
            start_row: The first of the tokens: the number of rows there are already.
            logits: ``[n, L or 1, K]`` on the CPU.

        Raises:
            RecordError: If rows are left out or written twice, belong to tokens that are not
                there yet, have another shape, or are not finite.
        """
        rows = np.asarray(logits)
        expected = self._arrays["router_logits"].shape[1:]
        if self.arm.kind != "routed":
            raise RecordError(f"a {self.arm.label} arm has no router logits")
        if rows.ndim != 3 or rows.shape[1:] != expected:
            raise RecordError(
                f"router logits must have shape [n, {expected[0]}, {expected[1]}], "
                f"got {list(rows.shape)}"
            )
        if not np.isfinite(rows).all():
            raise RecordError("router logits must be finite (no NaN, no infinity)")
        clipped = np.clip(rows, -_LARGEST_FLOAT16, _LARGEST_FLOAT16)
        with self._lock:
            end = self._next_row("router logits", start_row, self._n_logits, len(rows))
            if not self._logits_clipped and not np.array_equal(clipped, rows):
                self._logits_clipped = True
                logger.warning("router logits beyond float16 are recorded as its largest value")
            self._arrays["router_logits"][start_row:end] = clipped
            self._n_logits = end
            self._version += 1

    def set_knobs(self, start_row: int, n: int, knobs: RoutingKnobs) -> None:
        """Adds the knobs in force at the next n tokens.

        Whether overrides fit the model is for the caller to know: a recorder has no names.

        Raises:
            RecordError: If rows are left out or written twice, or belong to tokens that are not
                there yet, or the arm is not routed.
            ConfigError: If top-k is larger than the number of adapters.
        """
        if self.arm.kind != "routed":
            raise RecordError(f"a {self.arm.label} arm has no knobs")
        knobs.check(self._arrays["router_logits"].shape[-1])
        with self._lock:
            end = self._next_row("knobs", start_row, self._n_knobs, n)
            self._arrays["top_k"][start_row:end] = knobs.top_k or 0
            # A number beyond float32 becomes its nearest: a temperature must not turn into 0.
            temperature = min(max(knobs.temperature, _SMALLEST_FLOAT32), _LARGEST_FLOAT32)
            self._arrays["temperature"][start_row:end] = temperature
            weight = min(max(knobs.global_weight, -_LARGEST_FLOAT32), _LARGEST_FLOAT32)
            self._arrays["global_weight"][start_row:end] = weight
            self._arrays["override_set"][start_row:end] = self._number_of(tuple(knobs.overrides))
            self._n_knobs = end
            self._version += 1

    def count_guess(self, hit: bool) -> None:
        """Counts a token whose scalings were fetched ahead, for a guess of what it would be.

        Args:
            hit: Whether the guess was right.

        Raises:
            RecordError: If the record has ended, the arm is not routed, or there would be more
                guesses than tokens.
        """
        if self.arm.kind != "routed":
            raise RecordError(f"a {self.arm.label} arm has no scalings to guess for")
        with self._lock:
            self._check_open()
            if self._n_guessed == self._n_tokens:
                raise RecordError(f"{self._n_tokens} tokens have at most as many guesses")
            self._n_guessed += 1
            self._n_hit += bool(hit)
            self._version += 1

    def finish(self, reason: FinishReason) -> None:
        """Ends the record.

        Args:
            reason: ``"stop"``, ``"length"``, ``"time"``, ``"cancelled"`` or ``"error"``.

        Raises:
            RecordError: If it has ended before, or a routed arm ends with ``"stop"`` or
                ``"length"`` while rows of routing are missing.
        """
        if reason not in FINISH_REASONS:
            raise RecordError(f"finish reason must be one of {FINISH_REASONS}, got {reason!r}")
        with self._lock:
            self._check_open()
            n_routed = self._n_routed()
            if reason in ("stop", "length") and n_routed < self._n_tokens:
                raise RecordError(
                    f"a finished arm needs the routing of all {self._n_tokens} tokens, "
                    f"got {n_routed}"
                )
            self._finish_reason = reason
            self._version += 1

    def snapshot(self) -> Track:
        """Returns the rows that are complete so far; they never change afterwards."""
        with self._lock:
            counts = {"tokens": self._n_tokens, "rows": self._n_routed()}
            pieces = self._pieces.copy()
            n_prompt, finish_reason = self._n_prompt, self._finish_reason
            override_sets = tuple(self._override_sets)
            n_guessed, n_hit = self._n_guessed, self._n_hit
        # Outside the lock: rows below the counts are never written again.
        cut: dict[str, Any] = {}
        for name, array in self._arrays.items():
            view = array[: counts[ARRAYS[name][2]]]
            view.flags.writeable = False
            cut[name] = view
        if self.arm.kind != "routed":
            cut["router_logits"] = None
        return Track(
            arm=self.arm,
            pieces=pieces,
            n_prompt=n_prompt,
            finish_reason=finish_reason,
            override_sets=override_sets,
            n_guessed=n_guessed,
            n_hit=n_hit,
            **cut,
        )

    def _number_of(self, overrides: tuple[AdapterOverride, ...]) -> int:
        """Returns the number of a set of overrides, a new one if it has none yet; 0: no overrides.

        Called while the lock is held.
        """
        if not overrides:
            return 0
        return self._override_sets.setdefault(overrides, len(self._override_sets) + 1)

    def _n_routed(self) -> int:
        return min(self._n_logits, self._n_knobs) if self.arm.kind == "routed" else self._n_tokens

    def _check_open(self) -> None:
        if self._finish_reason is not None:
            raise RecordError(f"the record has ended ({self._finish_reason})")

    def _new_rows(self, n: int) -> slice:
        """Returns the rows of the next n tokens."""
        self._check_open()
        rows = slice(self._n_tokens, self._n_tokens + n)
        if rows.stop > self.capacity:
            raise RecordError(f"the record is full: it has room for {self.capacity} tokens")
        return rows

    def _next_row(self, what: str, start: int, expected: int, n: int) -> int:
        """Returns the end of n rows from ``start``, which must be the next one."""
        self._check_open()
        if start != expected:
            raise RecordError(f"the next row of {what} is {expected}, got {start}")
        if start + n > self._n_tokens:
            raise RecordError(
                f"{what} came for {start + n} tokens, the record has {self._n_tokens}"
            )
        return start + n


class RunRecorder:
    """Records all arms of a run.

    Args:
        header: What the run is.
        tracks: One recorder per arm.
    """

    def __init__(self, header: RunHeader, tracks: Sequence[TrackRecorder]) -> None:
        self.header = header
        self.tracks = list(tracks)

    @property
    def version(self) -> int:
        """Grows with every change of any track."""
        return sum(track.version for track in self.tracks)

    def snapshot(self) -> Run:
        """Returns the run so far."""
        return Run(self.header, [track.snapshot() for track in self.tracks])
