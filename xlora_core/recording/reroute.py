"""A track's scalings, recomputed from its router logits without the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xlora_core.config import RoutingKnobs
from xlora_core.recording.header import RunHeader
from xlora_core.recording.track import Track
from xlora_core.routing import (
    OverrideMatrix,
    effective_scalings,
    override_matrix,
    scalings_from_logits,
)

FloatArray = NDArray[np.float32]


def track_scalings(
    header: RunHeader, track: Track, knobs: RoutingKnobs | None = None, *, effective: bool = False
) -> FloatArray:
    """Returns a track's scalings as far as modules differ in them.

    Absent (module, adapter) pairs are still in them.

    Args:
        header: The run's header.
        track: One of the run's tracks.
        knobs: For all tokens, instead of those in force at each token. Without effect on an arm
            that is not routed.
        effective: After top-k, overrides and global weight, instead of before.

    Returns:
        ``[R, L, K]`` float32; ``[R, 1, K]`` if all modules share them.

    Raises:
        ConfigError: If knobs do not fit the run's adapters and modules.
    """
    if track.router_logits is None:
        return _constant(header, track)
    if knobs is not None:
        knobs.check_names(header.adapter_names, header.layer_names)
        top_k: int | Tensor | None = knobs.top_k
        temperature: float | Tensor = knobs.temperature
        global_weight: float | Tensor = knobs.global_weight
    else:
        recorded = _shortest(track.top_k)
        top_k = recorded if isinstance(recorded, Tensor) else int(recorded) or None
        temperature = _shortest(track.temperature)
        global_weight = _shortest(track.global_weight)
    logits = torch.from_numpy(track.router_logits.astype(np.float32))
    scalings = scalings_from_logits(
        logits, enable_softmax=header.enable_softmax, temperature=temperature
    )
    if effective:
        scalings = effective_scalings(
            scalings,
            top_k=top_k,
            enable_softmax_topk=header.enable_softmax_topk,
            overrides=_overrides(header, track, knobs),
            global_weight=global_weight,
        )
    return np.asarray(scalings.numpy(), dtype=np.float32)


def _overrides(
    header: RunHeader, track: Track, knobs: RoutingKnobs | None
) -> OverrideMatrix | None:
    """Returns the overrides of given knobs, or those in force at each token; None: there are none.

    ``[L or 1, K]`` if they are the same for all tokens, else ``[R, L or 1, K]``.
    """
    names = header.layer_names, header.adapter_names
    if knobs is not None:
        return override_matrix(knobs, *names)
    numbers, which = np.unique(track.override_set, return_inverse=True)
    if not numbers.any():
        return None
    sets = [track.override_sets[n - 1] if n else () for n in numbers.tolist()]
    found = [override_matrix(RoutingKnobs(overrides=overrides), *names) for overrides in sets]
    if len(found) == 1:
        return found[0]
    n_rows = max(len(matrix.factor) for matrix in found if matrix is not None)
    shape = (len(sets), n_rows, header.n_adapters)
    factor, pin = torch.ones(shape), torch.zeros(shape)
    for n, matrix in enumerate(found):
        if matrix is not None:
            factor[n], pin[n] = matrix
    rows = torch.from_numpy(which)
    return OverrideMatrix(factor[rows], pin[rows])


def _constant(header: RunHeader, track: Track) -> FloatArray:
    row = np.zeros(header.n_adapters, dtype=np.float32)
    if track.arm.kind == "merged":
        row[:] = 1 / header.n_adapters
    elif track.arm.kind == "expert":
        row[list(header.adapter_names).index(str(track.arm.adapter))] = 1
    return np.broadcast_to(row, (track.n_tokens, 1, header.n_adapters))


def _shortest(values: NDArray[Any]) -> float | Tensor:
    """Returns one number if all are the same (most runs: it routes faster), else ``[R]``."""
    if len(values) == 0 or (values == values[0]).all():
        return float(values[0]) if len(values) else 1.0
    return torch.from_numpy(values.copy())
