"""The JSON header of a run file: written in full, read with suspicion."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn, TypeVar

from xlora_core.config import Arm, RoutingKnobs, SamplingParams
from xlora_core.errors import RunFileError, XLoraError
from xlora_core.recording.header import FORMAT_VERSION, RunHeader
from xlora_core.recording.track import FINISH_REASONS, FinishReason, Track

# Far above any real run; a file beyond them is not worth the memory to find out.
MOST_CHARACTERS = 32 * 2**20
MOST_TRACKS = 256

# The prompt is a tensor of its own.
_HEADER_KEYS = tuple(f.name for f in fields(RunHeader) if f.name != "prompt_text")
_TRACK_KEYS = ("arm", "n_prompt", "finish_reason")
_ARM_KEYS = tuple(f.name for f in fields(Arm))

_Settings = TypeVar("_Settings", Arm, RoutingKnobs, SamplingParams)


@dataclass(frozen=True, kw_only=True)
class TrackFacts:
    """What the header says of a track: the fields of ``Track`` that are no arrays."""

    arm: Arm
    n_prompt: int
    finish_reason: FinishReason | None


def to_json(header: RunHeader, tracks: Sequence[Track]) -> str:
    """Returns the header as JSON, in ASCII.

    Raises:
        RunFileError: If a text would not come back as it was.
    """
    values: dict[str, Any] = {key: getattr(header, key) for key in _HEADER_KEYS}
    values["sampling"] = asdict(header.sampling)
    values["tracks"] = [
        {
            "arm": asdict(track.arm),
            "n_prompt": int(track.n_prompt),
            "finish_reason": track.finish_reason,
        }
        for track in tracks
    ]
    text = json.dumps(values, allow_nan=False)
    # JSON joins two halves of a character (lone surrogates) that stand side by side.
    if json.dumps(json.loads(text), ensure_ascii=False) != json.dumps(values, ensure_ascii=False):
        raise RunFileError(
            "the run cannot be saved: a name in its header has two lone surrogates in a row",
            hint="rename the adapter, module or model that has them",
        )
    return text


def check_version(text: object) -> None:
    """Checks, before anything else is looked at, that this version can read the header.

    Raises:
        RunFileError: If the header is no JSON object, or of a newer version.
    """
    version = _parse(text).get("format_version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise RunFileError(f"header: format_version must be a whole number >= 1, got {version!r}")
    if version > FORMAT_VERSION:
        raise RunFileError(
            f"the file has format version {version}, this program reads up to {FORMAT_VERSION}",
            hint="upgrade xlora-explorer to open it",
        )


def from_json(text: str, *, prompt_text: str) -> tuple[RunHeader, list[TrackFacts]]:
    """Returns the header of a run, and what it says of each track.

    Raises:
        RunFileError: If it is no JSON, or a key is missing, unknown or has an impossible value.
    """
    values = _parse(text)
    check_keys("header", values, (*_HEADER_KEYS, "tracks"))
    tracks = values.pop("tracks")
    if not isinstance(tracks, list) or not 1 <= len(tracks) <= MOST_TRACKS:
        raise RunFileError(f"header: tracks must be a list of 1 to {MOST_TRACKS} tracks")
    values["sampling"] = _built(SamplingParams, "header: sampling", values["sampling"])
    try:
        header = RunHeader(**values, prompt_text=prompt_text)
    except XLoraError as error:
        raise RunFileError(error.message) from error
    return header, [_track_facts(f"header: tracks[{n}]", track) for n, track in enumerate(tracks)]


def check_keys(where: str, values: object, expected: Sequence[str]) -> None:
    """Checks that a mapping has exactly the expected keys.

    Raises:
        RunFileError: Naming the first key that is missing or unknown.
    """
    if not isinstance(values, Mapping):
        raise RunFileError(f"{where} must be a JSON object, got {type(values).__name__}")
    for key in expected:
        if key not in values:
            raise RunFileError(f"{where}: key {key!r} is missing")
    for key in values:
        if key not in expected:
            raise RunFileError(f"{where}: key {key!r} is not known")


def _parse(text: object) -> dict[str, Any]:
    if not isinstance(text, str) or len(text) > MOST_CHARACTERS:
        raise RunFileError(f"header must be JSON text of at most {MOST_CHARACTERS:,} characters")
    try:
        values = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise RunFileError(f"header is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise RunFileError(f"header must be a JSON object, got {type(values).__name__}")
    return values


def _no_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _no_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"key {key!r} comes twice")
        values[key] = value
    return values


def _track_facts(where: str, values: object) -> TrackFacts:
    check_keys(where, values, _TRACK_KEYS)
    assert isinstance(values, Mapping)
    arm_values = values["arm"]
    check_keys(f"{where}.arm", arm_values, _ARM_KEYS)
    adapter, knobs = arm_values["adapter"], arm_values["knobs"]
    if adapter is not None and not isinstance(adapter, str):
        raise RunFileError(f"{where}.arm: adapter must be text or null, got {adapter!r}")
    if knobs is not None:
        knobs = _built(RoutingKnobs, f"{where}.arm.knobs", knobs)
    arm = _built(Arm, f"{where}.arm", {**arm_values, "knobs": knobs})
    n_prompt, reason = values["n_prompt"], values["finish_reason"]
    if isinstance(n_prompt, bool) or not isinstance(n_prompt, int):
        raise RunFileError(f"{where}: n_prompt must be a whole number, got {n_prompt!r}")
    if reason is not None and reason not in FINISH_REASONS:
        raise RunFileError(
            f"{where}: finish_reason must be null or one of {', '.join(FINISH_REASONS)}, "
            f"got {reason!r}"
        )
    return TrackFacts(arm=arm, n_prompt=n_prompt, finish_reason=reason)


def _built(kind: type[_Settings], where: str, values: object) -> _Settings:
    """Returns a settings object of ``values``, whose keys must be exactly its fields."""
    check_keys(where, values, tuple(f.name for f in fields(kind)))
    assert isinstance(values, Mapping)
    try:
        return kind(**values)
    except XLoraError as error:
        raise RunFileError(f"{where}: {error}") from error
