"""Run -> the bytes that the heatmap component reads.

Layout: ``b"XLH1"``, the header's length as little-endian uint32, the header as UTF-8 JSON, padding
to 4 bytes, then the planes one after another, each padded to 4 bytes. The header's ``arrays`` lists
name, dtype, shape and offset (from the first plane) of each. ``payload.js`` is the reader.

Scalings travel as uint8 over the range the header states: a value is off by at most 1/510 of that
range, which no colour and no two-digit number shows. Every message carries the whole state, since
Streamlit may drop any message but the last.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from app import colors, frames
from app.components.heatmap.planes import Planes

if TYPE_CHECKING:
    from xlora_core import RoutingKnobs, Run

MAGIC = b"XLH1"
_ALIGN = 4


def pack(header: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> bytes:
    """Returns header and arrays as one message."""
    blobs: list[bytes] = []
    listing = []
    offset = 0
    for name, array in arrays.items():
        data = np.ascontiguousarray(array).tobytes()
        listing.append(
            {"name": name, "dtype": str(array.dtype), "shape": list(array.shape), "offset": offset}
        )
        padded = data + b"\0" * (-len(data) % _ALIGN)
        blobs.append(padded)
        offset += len(padded)
    text = json.dumps({**header, "arrays": listing}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGN)
    return b"".join([MAGIC, struct.pack("<I", len(text)), text, *blobs])


def unpack(message: bytes) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Returns header and arrays of a message; the inverse of ``pack``, for tests."""
    if message[:4] != MAGIC:
        raise ValueError("not a heatmap message")
    (length,) = struct.unpack_from("<I", message, 4)
    header = json.loads(message[8 : 8 + length])
    start = 8 + length
    arrays = {}
    for entry in header["arrays"]:
        count = int(np.prod(entry["shape"], dtype=np.int64))
        flat = np.frombuffer(message, entry["dtype"], count, start + entry["offset"])
        arrays[entry["name"]] = flat.reshape(entry["shape"])
    return header, arrays


def message(
    run: Run,
    *,
    version: int,
    live: bool,
    expected_tokens: int | None = None,
    knobs: RoutingKnobs | None = None,
    planes: Planes | None = None,
) -> bytes:
    """Returns what the component needs to draw ``run``.

    Args:
        run: A finished run or a snapshot of a live one.
        version: Grows with every change; the component skips what it has already drawn.
        live: The run still grows.
        expected_tokens: Tokens the time axis will need at most; None for a finished run.
        knobs: Draw the recorded logits under these instead of the recorded knobs.
        planes: What earlier messages of the same run and knobs have computed.
    """
    arm = frames.routed_arm(run)
    modules = frames.module_table(run.header.layer_names)
    header: dict[str, Any] = {
        "run_id": run.header.run_id,
        "version": version,
        "live": live,
        "rerouted": knobs is not None,
        "adapters": list(run.header.adapter_names),
        "palette": colors.palette(len(run.header.adapter_names)),
        "modules": {
            "name": modules["layer_name"].tolist(),
            "block": modules["block"].tolist(),
            "kind": modules["kind"].tolist(),
        },
        "layerwise": run.header.layerwise,
        "softmax": run.header.enable_softmax,
        "expected_tokens": expected_tokens,
        "routed_arm": arm,
        "arms": [_arm(run, i, arm) for i in range(len(run.tracks))],
        "knob_changes": [],
        "knobs": [],
        "effective": "none",
        "steered": False,
    }
    if arm is None:
        return pack(header, {})
    planes = planes or Planes()
    planes.read(run, arm, knobs)
    header["range"] = planes.range
    header["effective_range"] = planes.effective_range
    header["effective"] = "derived" if planes.derived else "plane"
    header["layerwise"] = planes.per_module
    header["steered"] = bool(frames.overrides(run, arm, knobs))
    if knobs is None:
        changes = frames.knob_changes(run, arm)
        header["knobs"] = [(t, label) for t, _, label in changes]
        header["knob_changes"] = [(t, changed) for t, changed, _ in changes[1:]]
    else:
        header["knobs"] = [(0, " · ".join(frames.knob_texts(knobs)))]
    return pack(header, planes.arrays())


def _arm(run: Run, index: int, reference: int | None) -> dict[str, Any]:
    """Returns one arm's text and facts. Only the first arm carries the prompt's pieces."""
    track = run.tracks[index]
    start = 0 if index == (reference or 0) else track.n_prompt
    compared = reference is not None and index != reference
    return {
        "label": track.arm.label,
        "title": frames.arm_title(track.arm),
        "kind": track.arm.kind,
        "n_prompt": int(track.n_prompt),
        "first": start,
        "pieces": list(track.pieces[start:]),
        "probability": _rounded(np.exp(track.logprob[track.n_prompt :])),
        "base_probability": _rounded(np.exp(track.base_logprob[track.n_prompt :])),
        "tokens_per_second": frames.tokens_per_second(run, index),
        "finish_reason": track.finish_reason,
        "seconds": frames.seconds(run, index),
        "first_difference": (
            frames.first_difference(run, index, reference or 0) if compared else None
        ),
    }


def _rounded(values: NDArray[np.float32]) -> list[float | None]:
    return [round(float(v), 3) if np.isfinite(v) else None for v in values]
