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
from xlora_core.routing import effective_scalings, scalings_from_logits

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
        effective: After top-k and global weight, instead of before.

    Returns:
        ``[R, L, K]`` float32; ``[R, 1, K]`` if all modules share them.

    Raises:
        ConfigError: If top-k is larger than the number of adapters.
    """
    if track.router_logits is None:
        return _constant(header, track)
    if knobs is not None:
        knobs.check(header.n_adapters)
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
            global_weight=global_weight,
        )
    return np.asarray(scalings.numpy(), dtype=np.float32)


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
