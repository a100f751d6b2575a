"""Bucketed scalings: statistics over stretches of tokens, per module and adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from xlora_core.config import RoutingKnobs
from xlora_core.errors import ConfigError
from xlora_core.recording.reroute import FloatArray, track_scalings
from xlora_core.recording.summaries import top1_share
from xlora_core.recording.texts import categorical
from xlora_core.recording.track import Track

if TYPE_CHECKING:
    import pandas as pd

    from xlora_core.recording.run import Run

BucketBy = Literal["position", "segment", "seq_len"]
BUCKET_BY: tuple[str, ...] = get_args(BucketBy)
BUCKET_COLUMNS = (
    "run_id",
    "arm",
    "bucket_by",
    "bucket",
    "bucket_start",
    "bucket_end",
    "n_tokens",
    "layer_index",
    "layer_name",
    "adapter",
    "mean_scaling",
    "std_scaling",
    "min_scaling",
    "max_scaling",
    "mean_effective_scaling",
    "share_top1",
)
SEGMENTS = ("prompt", "response")

Statistics = dict[str, NDArray[np.floating]]


def bucketed_tables(
    run: Run,
    by: BucketBy,
    *,
    width: int = 16,
    knobs: RoutingKnobs | None = None,
    arm: int | None = None,
) -> Iterator[pd.DataFrame]:
    """Yields the table of each arm: one row per bucket, module and adapter.

    The columns are ``BUCKET_COLUMNS``; all frames have the same categories.

    A bucket covers the tokens ``bucket_start <= t < bucket_end``; ``bucket`` is

    * ``position``: its number; buckets are ``width`` tokens wide, the last one may be shorter;
    * ``segment``: ``"prompt"`` or ``"response"``;
    * ``seq_len``: a sequence length s, and the bucket covers the tokens ``[0, s)``. There is one
      per forward call of an uncached generation, as in PEFT's log: s is the number of prompt
      tokens for the first token written, then one more for each. The last token written is read
      by no such call, so it is in no such bucket.

    Scalings are what PEFT logs. ``mean_effective_scaling`` is after top-k and global weight, and
    0 where the module has no weights of the adapter. ``std_scaling`` is the population's.
    ``share_top1`` is the share of the bucket's tokens at which the adapter has the module's
    largest scaling (what top-k 1 keeps); tokens with a tie count for each in equal parts, tokens
    where all scalings are 0 for none. Tokens whose routing is not known are not counted.

    Args:
        run: The run.
        by: How tokens are bucketed.
        width: Tokens per bucket by position, >= 1.
        knobs: For all tokens, instead of those in force at each token.
        arm: Only this arm; None takes all.

    Raises:
        ConfigError: If an argument is out of range.
    """
    if by not in BUCKET_BY:
        raise ConfigError(f"by must be one of {', '.join(BUCKET_BY)}, got {by!r}")
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        raise ConfigError(f"width must be a whole number of tokens >= 1, got {width!r}")
    if arm is not None:
        run.track(arm)
    arms = range(len(run.tracks)) if arm is None else [arm]
    for index in arms:
        yield _arm_table(run, index, by, width, knobs)


def _arm_table(
    run: Run, arm: int, by: BucketBy, width: int, knobs: RoutingKnobs | None
) -> pd.DataFrame:
    import pandas as pd

    header, track = run.header, run.tracks[arm]
    bounds = bucket_bounds(track, by, width)
    statistics = _statistics(
        track_scalings(header, track, knobs),
        track_scalings(header, track, knobs, effective=True),
        bounds,
        cumulative=by == "seq_len",
    )
    statistics["mean_effective_scaling"] = statistics["mean_effective_scaling"] * np.array(
        header.present
    )
    n_layers, n_adapters = header.n_lora_layers, header.n_adapters
    shape = (len(bounds) - 1, n_layers, n_adapters)
    bucket, layer, adapter = (index.ravel() for index in np.indices(shape))
    starts = np.zeros(shape[0], dtype=np.int64) if by == "seq_len" else bounds[:-1]
    ends = bounds[1:]
    labels: NDArray[np.int64] | pd.Categorical = bucket
    if by == "segment":
        labels = categorical((starts >= track.n_prompt)[bucket], SEGMENTS)
    elif by == "seq_len":
        labels = ends[bucket]
    one = np.zeros(len(bucket), dtype=np.int64)
    columns = {
        "run_id": categorical(one, [header.run_id]),
        "arm": categorical(one + arm, run.arm_labels),
        "bucket_by": categorical(one, [by]),
        "bucket": labels,
        "bucket_start": starts[bucket],
        "bucket_end": ends[bucket],
        "n_tokens": (ends - starts)[bucket],
        "layer_index": layer,
        "layer_name": categorical(layer, header.layer_names),
        "adapter": categorical(adapter, header.adapter_names),
    }
    columns |= {name: np.broadcast_to(v, shape).ravel() for name, v in statistics.items()}
    return pd.DataFrame(columns, columns=pd.Index(BUCKET_COLUMNS))


def bucket_bounds(track: Track, by: BucketBy, width: int) -> NDArray[np.int64]:
    """Returns N + 1 token indices, 0 first, that cut a track's routed tokens into N blocks.

    Blocks are never empty. They are the buckets; by ``seq_len`` bucket n is the blocks up to and
    including the n-th.
    """
    n_routed, n_prompt = track.n_routed, track.n_prompt
    if by == "position":
        ends = [*range(width, n_routed, width), n_routed]
    elif by == "segment":
        ends = [min(n_prompt, n_routed), n_routed]
    else:
        last = min(n_routed, max(n_prompt, track.n_tokens - 1))
        ends = list(range(n_prompt, last + 1))
    return np.array(sorted({0, *ends}), dtype=np.int64)


def _statistics(
    scalings: FloatArray, effective: FloatArray, bounds: NDArray[np.int64], *, cumulative: bool
) -> Statistics:
    """Returns column name -> ``[N, L or 1, K]``, one row per bucket.

    Args:
        scalings: ``[R, L or 1, K]``.
        effective: ``[R, L or 1, K]``.
        bounds: ``[N + 1]``, as ``bucket_bounds`` makes them.
        cumulative: Bucket n covers the blocks 0 to n, instead of block n alone.
    """
    starts, end = bounds[:-1], bounds[-1]
    if len(starts) == 0:
        empty = np.zeros((0, *scalings.shape[1:]))
        return dict.fromkeys(BUCKET_COLUMNS[-6:], empty)
    n_tokens = (bounds[1:] if cumulative else np.diff(bounds))[:, None, None]

    def reduced(ufunc: np.ufunc, values: NDArray[np.floating]) -> NDArray[np.floating]:
        blocks = ufunc.reduceat(values, starts, axis=0)
        return ufunc.accumulate(blocks, axis=0) if cumulative else blocks

    def mean(values: NDArray[np.floating]) -> NDArray[np.floating]:
        return reduced(np.add, values.astype(np.float64)) / n_tokens

    scalings, effective = scalings[:end], effective[:end]
    # Sums of differences from the first token: exact for scalings that never change, and no
    # cancellation for those that hardly do.
    difference = scalings.astype(np.float64) - scalings[0]
    mean_difference = mean(difference)
    variance = mean(difference**2) - mean_difference**2
    return {
        "mean_scaling": scalings[0] + mean_difference,
        "std_scaling": np.sqrt(np.maximum(variance, 0)),
        "min_scaling": reduced(np.minimum, scalings),
        "max_scaling": reduced(np.maximum, scalings),
        "mean_effective_scaling": mean(effective),
        "share_top1": mean(top1_share(scalings)),
    }
