"""The run file: a ``.safetensors`` file whose metadata holds a versioned JSON header.

Metadata: ``format`` (``"xlora-run"``), ``header`` (JSON, see ``header_json``) and ``sha256``.
Tensors: ``prompt_text`` and, per track n, ``tracks.n.<field>`` for the arrays of ``Track``;
``tracks.n.piece_bytes`` and ``tracks.n.piece_ends`` are the pieces, as UTF-8 (a lone surrogate has
three bytes) and as the byte where each one ends. Texts are tensors because JSON cannot hold every
Python text.

Reading trusts nothing: everything is checked before a ``Run`` is made, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from xlora_core.errors import RunFileError
from xlora_core.recording import header_json, texts
from xlora_core.recording.atomic_file import atomic_file
from xlora_core.recording.header import RunHeader
from xlora_core.recording.track import ARRAYS, Track, shape_faults, value_faults

FORMAT = "xlora-run"
METADATA_KEYS = ("format", "header", "sha256")
MOST_BYTES = 4 * 2**30
MOST_HEADER_BYTES = 100_000_000  # safetensors' own limit
_DAMAGED = "the file is damaged, cut off or edited; copy or download it again"
_FOREIGN = "run files are written by Run.save, xlora generate --save or the app"
# Pickle protocols 2 to 5, and the zip archive that torch.save writes.
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")

Arrays = dict[str, NDArray[Any]]


def write(header: RunHeader, tracks: Sequence[Track], path: Path) -> None:
    """Writes a run file; one of that name is replaced at once or not at all.

    Raises:
        RunFileError: If it cannot be written, or the run holds values that it may not.
    """
    data = encode(header, tracks)
    try:
        with atomic_file(path) as file:
            file.write(data)
    except OSError as error:
        raise RunFileError(
            f"cannot write {path}: {error.strerror or error}",
            hint="choose a folder that exists, may be written and has room",
        ) from error


def read(path: Path) -> tuple[RunHeader, list[Track]]:
    """Returns the contents of a run file.

    Raises:
        RunFileError: If it is missing, truncated, doctored, or of a newer version.
    """
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise RunFileError(
                f"{path}: {size:,} bytes are more than a run file may have ({MOST_BYTES:,})",
                hint=_FOREIGN,
            )
        data = path.read_bytes()
    except OSError as error:
        raise RunFileError(
            f"cannot read {path}: {error.strerror or error}", hint="check the path of the run file"
        ) from error
    return decode(data, str(path))


def encode(header: RunHeader, tracks: Sequence[Track]) -> bytes:
    """Returns the bytes of a run file.

    Raises:
        RunFileError: If the run holds values that a run file may not.
    """
    faults = [
        f"track {n}: {fault}"
        for n, track in enumerate(tracks)
        for fault in value_faults(track, header)
    ]
    if faults:
        raise RunFileError(
            "the run cannot be saved: " + "; ".join(faults), hint="record the run again"
        )
    arrays: Arrays = {"prompt_text": _to_array(texts.to_bytes(header.prompt_text))}
    stored = _stored(header_json.needed_version(header, tracks))
    for n, track in enumerate(tracks):
        pieces = [texts.to_bytes(piece) for piece in track.pieces]
        ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        of_track = {name: array for name, array in track.arrays().items() if name in stored}
        of_track |= {"piece_bytes": _to_array(b"".join(pieces)), "piece_ends": ends}
        arrays |= {f"tracks.{n}.{name}": array for name, array in of_track.items()}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    text = header_json.to_json(header, tracks)
    metadata = {"format": FORMAT, "header": text, "sha256": _digest(text, arrays)}
    return safetensors_numpy.save(arrays, metadata=metadata)


def decode(data: bytes, name: str) -> tuple[RunHeader, list[Track]]:
    """Returns the contents of a run file's bytes.

    Args:
        data: The bytes.
        name: What errors call the file.

    Raises:
        RunFileError: If they are truncated, doctored, or of a newer version.
    """
    try:
        metadata = _metadata(data)
        arrays = _arrays(data)
        header_json.check_keys("metadata", metadata, METADATA_KEYS)
        header, facts = header_json.from_json(
            metadata["header"], prompt_text=_text(arrays.get("prompt_text"), "prompt_text")
        )
        stored = _stored(header_json.check_version(metadata["header"]))
        expected = (_names(n, fact, stored) for n, fact in enumerate(facts))
        _check_names(arrays, {"prompt_text"}.union(*expected))
        tracks = [_track(header, n, fact, arrays) for n, fact in enumerate(facts)]
        if metadata["sha256"] != _digest(metadata["header"], arrays):
            raise RunFileError("the contents do not have the checksum that 'sha256' says")
    except RunFileError as error:
        raise RunFileError(f"{name}: {error.message}", hint=error.hint or _DAMAGED) from error
    return header, tracks


def _metadata(data: bytes) -> dict[str, Any]:
    """Returns the metadata of a run file of a version that this program reads.

    Tensors are not looked at, since a newer version's may be of a kind that is not known here.
    """
    n_header = int.from_bytes(data[:8], "little")
    try:
        if n_header > MOST_HEADER_BYTES:
            raise ValueError(f"a header has at most {MOST_HEADER_BYTES:,} bytes")
        if len(data) < 8 + n_header:
            raise ValueError(f"the header ends at byte {8 + n_header:,}, the file at {len(data):,}")
        found = json.loads(data[8 : 8 + n_header].decode("utf-8"))
        metadata = found.get("__metadata__") if isinstance(found, dict) else None
    except (ValueError, RecursionError) as error:
        if data.startswith(_PICKLES):
            raise RunFileError(
                "this is a pickle or an archive, which is never opened", hint=_FOREIGN
            ) from error
        raise RunFileError(
            f"not a readable safetensors file, perhaps truncated ({error})"
        ) from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise RunFileError(
            f"not a run file: the metadata does not say that 'format' is {FORMAT!r}", hint=_FOREIGN
        )
    if "header" not in metadata:
        raise RunFileError("metadata: key 'header' is missing")
    header_json.check_version(metadata["header"])
    return metadata


def _arrays(data: bytes) -> Arrays:
    try:
        arrays = safetensors_numpy.load(data)
    except (SafetensorError, ValueError) as error:
        raise RunFileError(
            f"not a readable safetensors file, perhaps truncated ({error})"
        ) from error
    except KeyError as error:
        raise RunFileError(f"tensor type {error} is not one of a run file") from error
    for array in arrays.values():
        array.flags.writeable = False
    return arrays


def _stored(version: int) -> set[str]:
    """Returns which arrays of a track a file of a format version has."""
    later = {"override_set"} if version < header_json.OVERRIDES_SINCE else set()
    return set(ARRAYS) - later


def _names(n: int, facts: header_json.TrackFacts, stored: set[str]) -> set[str]:
    fields = {*stored, "piece_bytes", "piece_ends"}
    if facts.arm.kind != "routed":
        fields.remove("router_logits")
    return {f"tracks.{n}.{field}" for field in fields}


def _check_names(arrays: Arrays, expected: set[str]) -> None:
    for name in sorted(expected - set(arrays)):
        raise RunFileError(f"tensor {name!r} is missing")
    for name in sorted(set(arrays) - expected):
        raise RunFileError(f"tensor {name!r} is not known")


def _track(header: RunHeader, n: int, facts: header_json.TrackFacts, arrays: Arrays) -> Track:
    fields = {name: arrays.get(f"tracks.{n}.{name}") for name in ARRAYS}
    if fields["override_set"] is None:
        # A file of version 1, which knew no overrides.
        fields["override_set"] = np.zeros(arrays[f"tracks.{n}.top_k"].shape, dtype=np.int32)
    for name, array in fields.items():
        n_dimensions = ARRAYS[name][1]
        if array is not None and array.ndim != n_dimensions:
            raise RunFileError(
                f"track {n}: {name}: expected {n_dimensions} dimensions, got {array.ndim}"
            )
    track = Track(
        arm=facts.arm,
        n_prompt=facts.n_prompt,
        finish_reason=facts.finish_reason,
        pieces=_pieces(n, arrays),
        override_sets=facts.override_sets,
        n_guessed=facts.n_guessed,
        n_hit=facts.n_hit,
        **fields,  # type: ignore[arg-type]  # _check_names has left None to router_logits alone
    )
    faults = shape_faults(track, header) or value_faults(track, header)
    if faults:
        raise RunFileError(f"track {n}: " + "; ".join(faults))
    return track


def _pieces(n: int, arrays: Arrays) -> list[str]:
    data, ends = arrays[f"tracks.{n}.piece_bytes"], arrays[f"tracks.{n}.piece_ends"]
    if data.dtype != np.uint8 or data.ndim != 1:
        raise RunFileError(f"track {n}: piece_bytes: expected uint8 of one dimension")
    if ends.dtype != np.int64 or ends.ndim != 1:
        raise RunFileError(f"track {n}: piece_ends: expected int64 of one dimension")
    bounds = np.concatenate([[0], ends])
    # Compared, not subtracted: numbers near 2**63 would wrap around.
    if (bounds[1:] < bounds[:-1]).any() or bounds[-1] != len(data):
        raise RunFileError(
            f"track {n}: piece_ends: must rise to {len(data)}, the number of piece_bytes"
        )
    raw = data.tobytes()
    try:
        return [texts.from_bytes(raw[a:b]) for a, b in pairwise(bounds.tolist())]
    except UnicodeDecodeError as error:
        raise RunFileError(f"track {n}: piece_bytes: not UTF-8 ({error.reason})") from error


def _text(array: NDArray[Any] | None, name: str) -> str:
    if array is None:
        raise RunFileError(f"tensor {name!r} is missing")
    if array.dtype != np.uint8 or array.ndim != 1:
        raise RunFileError(f"{name}: expected uint8 of one dimension")
    try:
        return texts.from_bytes(array.tobytes())
    except UnicodeDecodeError as error:
        raise RunFileError(f"{name}: not UTF-8 ({error.reason})") from error


def _to_array(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, dtype=np.uint8)


def _digest(header: str, arrays: Arrays) -> str:
    """Returns SHA-256 over the header and every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(header.encode("utf-8", "surrogatepass"))
    for name, array in sorted(arrays.items()):
        digest.update(
            f"\n{name} {array.dtype.name} {list(array.shape)}\n".encode("utf-8", "surrogatepass")
        )
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
