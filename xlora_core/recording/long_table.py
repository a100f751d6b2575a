"""The raw long table: one row per token, module and adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xlora_core.config import AdapterOverride, RoutingKnobs
from xlora_core.recording.buckets import SEGMENTS
from xlora_core.recording.reroute import FloatArray, track_scalings
from xlora_core.recording.texts import categorical

if TYPE_CHECKING:
    import pandas as pd

    from xlora_core.recording.run import Run

LONG_COLUMNS = (
    "run_id",
    "arm",
    "token_index",
    "segment",
    "token_id",
    "text",
    "layer_index",
    "layer_name",
    "adapter",
    "present",
    "scaling",
    "effective_scaling",
    "top_k",
    "temperature",
    "global_weight",
    "overrides",
)
# Rows per frame: some ten megabytes at a time, however long the run.
FRAME_ROWS = 200_000


def long_tables(
    run: Run,
    knobs: RoutingKnobs | None = None,
    *,
    arm: int | None = None,
    frame_rows: int = FRAME_ROWS,
) -> Iterator[pd.DataFrame]:
    r"""Yields the long table in frames, with the columns ``LONG_COLUMNS``; at least one frame.

    * ``text``: the token's piece; lone surrogates are written out as ``\udxxx``.
    * ``present``: False where the module has no weights of the adapter.
    * ``scaling``: what PEFT logs; ``effective_scaling``: after top-k, overrides and global
      weight, and 0 where absent. Missing for a last token that was not read.
    * ``top_k`` (0 keeps all), ``temperature``, ``global_weight``, ``overrides`` (in words, such
      as ``"math muted; code pinned at 0.5 in *.q_proj"``; empty without any): in force at the
      token; missing for an arm that has no knobs.

    Args:
        run: The run.
        knobs: For all tokens, instead of those in force at each token.
        arm: Only this arm; None takes all.
        frame_rows: About how many rows a frame has.

    Raises:
        ConfigError: If there is no such arm, or knobs do not fit the run.
    """
    if arm is not None:
        run.track(arm)
    row_tokens = run.header.n_lora_layers * run.header.n_adapters
    step = max(1, frame_rows // row_tokens)
    for index in range(len(run.tracks)) if arm is None else [arm]:
        tokens = _TokenColumns(run, index, knobs)
        # An arm without tokens has one frame, too, an empty one.
        for start in range(0, max(1, run.tracks[index].n_tokens), step):
            yield tokens.frame(start, start + step)


class _TokenColumns:
    """One arm, ready to be cut into frames.

    Args:
        run: The run.
        arm: Index of the arm.
        knobs: As in ``long_tables``.
    """

    def __init__(self, run: Run, arm: int, knobs: RoutingKnobs | None) -> None:
        self._run, self._arm, self._track = run, arm, run.tracks[arm]
        self._scalings = track_scalings(run.header, self._track, knobs)
        self._effective = track_scalings(run.header, self._track, knobs, effective=True)
        self._knobs = _knob_columns(run, arm, knobs)
        self._overrides, self._override_texts = _override_column(run, arm, knobs)
        # Frames of all arms share their categories, so that they can be joined.
        self._first_text = sum(track.n_tokens for track in run.tracks[:arm])
        self._texts = [piece for track in run.tracks for piece in track.pieces]

    def frame(self, start: int, end: int) -> pd.DataFrame:
        """Returns the rows of the tokens ``start <= t < end``."""
        import pandas as pd

        header, track = self._run.header, self._track
        end = min(end, track.n_tokens)
        shape = (end - start, header.n_lora_layers, header.n_adapters)
        token, layer, adapter = (index.ravel() for index in np.indices(shape))
        token += start
        present = np.array(header.present)
        one = np.zeros(len(token), dtype=np.int64)
        columns = {
            "run_id": categorical(one, [header.run_id]),
            "arm": categorical(one + self._arm, self._run.arm_labels),
            "token_index": token,
            "segment": categorical(token >= track.n_prompt, SEGMENTS),
            "token_id": track.token_ids[token],
            "text": categorical(token + self._first_text, self._texts),
            "layer_index": layer,
            "layer_name": categorical(layer, header.layer_names),
            "adapter": categorical(adapter, header.adapter_names),
            "present": np.broadcast_to(present, shape).ravel(),
            "scaling": _filled(self._scalings[start:end], shape),
            "effective_scaling": _filled(self._effective[start:end] * present, shape),
        }
        for name, values in self._knobs.items():
            columns[name] = _nullable(values, token)
        # Beyond the last known row: the code of a missing value.
        known = np.append(self._overrides, -1)
        codes = known[np.minimum(token, len(self._overrides))]
        columns["overrides"] = categorical(codes, self._override_texts)
        return pd.DataFrame(columns, columns=pd.Index(LONG_COLUMNS))


def _knob_columns(run: Run, arm: int, knobs: RoutingKnobs | None) -> dict[str, NDArray[Any]]:
    """Returns knob -> ``[R]`` in force, R = 0 for an arm that has no knobs."""
    track = run.tracks[arm]
    n_rows = track.n_routed if track.router_logits is not None else 0
    recorded = {name: getattr(track, name) for name in ("top_k", "temperature", "global_weight")}
    if knobs is None:
        return {name: values[:n_rows] for name, values in recorded.items()}
    override = {
        "top_k": knobs.top_k or 0,
        "temperature": knobs.temperature,
        "global_weight": knobs.global_weight,
    }
    return {
        name: np.full(n_rows, override[name], dtype=values.dtype)
        for name, values in recorded.items()
    }


def _override_column(
    run: Run, arm: int, knobs: RoutingKnobs | None
) -> tuple[NDArray[np.int64], list[str]]:
    """Returns each row's number ``[R]`` of a text, and the texts of all overrides of the run."""
    track = run.tracks[arm]
    n_rows = track.n_routed if track.router_logits is not None else 0
    if knobs is not None:
        return np.zeros(n_rows, dtype=np.int64), [override_text(knobs.overrides)]
    # Frames of all arms share their categories, so that they can be joined.
    texts = [override_text(found) for t in run.tracks for found in ((), *t.override_sets)]
    first = sum(1 + len(t.override_sets) for t in run.tracks[:arm])
    return track.override_set[:n_rows].astype(np.int64) + first, texts


def override_text(overrides: Sequence[AdapterOverride]) -> str:
    """Returns overrides in words; of two for the same adapter and module the later one holds."""
    return "; ".join(override.label for override in overrides)


def _filled(values: FloatArray, shape: tuple[int, int, int]) -> FloatArray:
    """Returns ``[n, L or 1, K]`` as a flat column of ``shape``, NaN for tokens without a row."""
    column = np.full(shape, np.nan, dtype=np.float32)
    column[: len(values)] = values
    return column.ravel()


def _nullable(values: NDArray[Any], token: NDArray[np.int64]) -> pd.Series[Any]:
    """Returns the values of the tokens, missing for tokens beyond the last value."""
    import pandas as pd

    missing = token >= len(values)
    taken = np.zeros(len(token), dtype=values.dtype)
    taken[~missing] = values[token[~missing]]
    kind = {"int16": "Int16", "float32": "Float32"}[values.dtype.name]
    return pd.Series(taken, dtype=kind).mask(missing)
