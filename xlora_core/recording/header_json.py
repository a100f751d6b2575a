"""The JSON header of a run file: written in full, read with suspicion.

Version 2 knows overrides (``overrides`` in an arm's knobs and ``override_sets`` in a track) and
other routers than the classifier (``router``, left out for the classifier). Version 3 knows what
was guessed (``n_guessed`` and ``n_hit`` in a track) and tracks that ended with ``"time"``. A run is
written in the oldest version that can hold it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn, TypeVar

from xlora_core.config import AdapterOverride, Arm, RoutingKnobs, SamplingParams
from xlora_core.config.checks import is_int
from xlora_core.config.overrides import matching_cost
from xlora_core.errors import RunFileError, XLoraError
from xlora_core.recording.header import FORMAT_VERSION, RunHeader
from xlora_core.recording.track import FINISH_REASONS, FinishReason, Track

# Far above any real run; a file beyond them is not worth the memory to find out.
MOST_CHARACTERS = 32 * 2**20
MOST_TRACKS = 256
# Of holding the overrides' patterns against the modules' paths: some seconds of work.
MOST_MATCHING = 2**31
OVERRIDES_SINCE = 2
ROUTERS_SINCE = 2
GUESSES_SINCE = 3

# The prompt is a tensor of its own; the router is only named if it is not the classifier.
_HEADER_KEYS = tuple(f.name for f in fields(RunHeader) if f.name not in ("prompt_text", "router"))
_TRACK_KEYS = ("arm", "n_prompt", "finish_reason")
_COUNTS_OF_GUESSES = ("n_guessed", "n_hit")
_REASONS_BEFORE_TIME = tuple(reason for reason in FINISH_REASONS if reason != "time")
_KNOB_KEYS = tuple(f.name for f in fields(RoutingKnobs))
_KNOB_KEYS_BEFORE = tuple(key for key in _KNOB_KEYS if key != "overrides")
_ARM_KEYS = tuple(f.name for f in fields(Arm))

_Settings = TypeVar("_Settings", AdapterOverride, Arm, RoutingKnobs, SamplingParams)


@dataclass(frozen=True, kw_only=True)
class TrackFacts:
    """What the header says of a track: the fields of ``Track`` that are no arrays."""

    arm: Arm
    n_prompt: int
    finish_reason: FinishReason | None
    override_sets: tuple[tuple[AdapterOverride, ...], ...]
    n_guessed: int
    n_hit: int


def to_json(header: RunHeader, tracks: Sequence[Track]) -> str:
    """Returns the header as JSON, in ASCII.

    Raises:
        RunFileError: If a text would not come back as it was.
    """
    version = needed_version(header, tracks)
    values: dict[str, Any] = {key: getattr(header, key) for key in _HEADER_KEYS}
    if header.router != "classifier":
        values["router"] = header.router
    values["format_version"] = version
    values["sampling"] = asdict(header.sampling)
    values["tracks"] = [_of_track(track, version) for track in tracks]
    text = json.dumps(values, allow_nan=False)
    # JSON joins two halves of a character (lone surrogates) that stand side by side.
    if json.dumps(json.loads(text), ensure_ascii=False) != json.dumps(values, ensure_ascii=False):
        raise RunFileError(
            "the run cannot be saved: a name in its header has two lone surrogates in a row",
            hint="rename the adapter, module or model that has them",
        )
    return text


def needed_version(header: RunHeader, tracks: Sequence[Track]) -> int:
    """Returns the oldest format version that can hold a run."""
    overridden = any(
        track.override_sets or (track.arm.knobs is not None and track.arm.knobs.overrides)
        for track in tracks
    )
    other_router = header.router != "classifier"
    guessed = any(track.n_guessed or track.finish_reason == "time" for track in tracks)
    return max(
        OVERRIDES_SINCE if overridden else 1,
        ROUTERS_SINCE if other_router else 1,
        GUESSES_SINCE if guessed else 1,
    )


def _of_track(track: Track, version: int) -> dict[str, Any]:
    arm = asdict(track.arm)
    values = {"arm": arm, "n_prompt": int(track.n_prompt), "finish_reason": track.finish_reason}
    if version >= OVERRIDES_SINCE:
        values["override_sets"] = [
            [asdict(o) for o in overrides] for overrides in track.override_sets
        ]
    elif arm["knobs"] is not None:
        del arm["knobs"]["overrides"]
    if version >= GUESSES_SINCE:
        values |= {"n_guessed": int(track.n_guessed), "n_hit": int(track.n_hit)}
    return values


def check_version(text: object) -> int:
    """Returns the header's version; checked before anything else is looked at.

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
    return version


def from_json(text: str, *, prompt_text: str) -> tuple[RunHeader, list[TrackFacts]]:
    """Returns the header of a run, and what it says of each track.

    Raises:
        RunFileError: If it is no JSON, or a key is missing, unknown or has an impossible value.
    """
    version = check_version(text)
    values = _parse(text)
    names_router = version >= ROUTERS_SINCE and "router" in values
    check_keys("header", values, (*_HEADER_KEYS, "tracks", *(["router"] if names_router else [])))
    values["format_version"] = FORMAT_VERSION
    tracks = values.pop("tracks")
    if not isinstance(tracks, list) or not 1 <= len(tracks) <= MOST_TRACKS:
        raise RunFileError(f"header: tracks must be a list of 1 to {MOST_TRACKS} tracks")
    values["sampling"] = _built(SamplingParams, "header: sampling", values["sampling"])
    try:
        header = RunHeader(**values, prompt_text=prompt_text)
    except XLoraError as error:
        raise RunFileError(error.message) from error
    facts = [_track_facts(f"header: tracks[{n}]", track, version) for n, track in enumerate(tracks)]
    overrides = [o for fact in facts for found in _all_overrides(fact) for o in found]
    if matching_cost(overrides, header.layer_names) > MOST_MATCHING:
        raise RunFileError(
            f"header: {len(overrides):,} overrides for {header.n_lora_layers:,} modules are more "
            "than a run file may have"
        )
    return header, facts


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


def _all_overrides(facts: TrackFacts) -> list[Sequence[AdapterOverride]]:
    knobs = facts.arm.knobs
    return [*facts.override_sets, *([knobs.overrides] if knobs is not None else [])]


def _track_facts(where: str, values: object, version: int) -> TrackFacts:
    has_overrides, has_guesses = version >= OVERRIDES_SINCE, version >= GUESSES_SINCE
    later_keys = [*(["override_sets"] if has_overrides else [])]
    later_keys += _COUNTS_OF_GUESSES if has_guesses else []
    check_keys(where, values, (*_TRACK_KEYS, *later_keys))
    assert isinstance(values, Mapping)
    arm_values = values["arm"]
    check_keys(f"{where}.arm", arm_values, _ARM_KEYS)
    adapter, knobs = arm_values["adapter"], arm_values["knobs"]
    if adapter is not None and not isinstance(adapter, str):
        raise RunFileError(f"{where}.arm: adapter must be text or null, got {adapter!r}")
    if knobs is not None:
        knobs = _knobs(f"{where}.arm.knobs", knobs, has_overrides=has_overrides)
    arm = _built(Arm, f"{where}.arm", {**arm_values, "knobs": knobs})
    counts = {name: values.get(name, 0) for name in ("n_prompt", *_COUNTS_OF_GUESSES)}
    for name, count in counts.items():
        if not is_int(count):
            raise RunFileError(f"{where}: {name} must be a whole number, got {count!r}")
    reason, reasons = (
        values["finish_reason"],
        FINISH_REASONS if has_guesses else _REASONS_BEFORE_TIME,
    )
    if reason is not None and reason not in reasons:
        raise RunFileError(
            f"{where}: finish_reason must be null or one of {', '.join(reasons)}, got {reason!r}"
        )
    sets = values["override_sets"] if has_overrides else []
    if not isinstance(sets, list):
        raise RunFileError(f"{where}: override_sets must be a list, got {sets!r}")
    return TrackFacts(
        arm=arm,
        **counts,
        finish_reason=reason,
        override_sets=tuple(
            _overrides(f"{where}.override_sets[{n}]", found) for n, found in enumerate(sets)
        ),
    )


def _knobs(where: str, values: object, *, has_overrides: bool) -> RoutingKnobs:
    check_keys(where, values, _KNOB_KEYS if has_overrides else _KNOB_KEYS_BEFORE)
    assert isinstance(values, Mapping)
    overrides = _overrides(f"{where}.overrides", values.get("overrides", []))
    return _built(RoutingKnobs, where, {**values, "overrides": overrides})


def _overrides(where: str, values: object) -> tuple[AdapterOverride, ...]:
    if not isinstance(values, list):
        raise RunFileError(f"{where} must be a list of overrides, got {values!r}")
    return tuple(_built(AdapterOverride, f"{where}[{n}]", o) for n, o in enumerate(values))


def _built(kind: type[_Settings], where: str, values: object) -> _Settings:
    """Returns a settings object of ``values``, whose keys must be exactly its fields."""
    check_keys(where, values, tuple(f.name for f in fields(kind)))
    assert isinstance(values, Mapping)
    try:
        return kind(**values)
    except XLoraError as error:
        raise RunFileError(f"{where}: {error}") from error
