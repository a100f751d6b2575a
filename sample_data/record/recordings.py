"""What to record: ``recordings.json``, read and checked."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from sample_data.record.errors import RecordingError
from xlora_core.config import AdapterOverride, Arm, RoutingKnobs, SamplingParams
from xlora_core.errors import XLoraError

RECORDINGS = Path(__file__).resolve().parents[1] / "recordings.json"

Role = Literal["system", "user", "assistant"]
# A run's id is the name of its file.
_ID = re.compile(r"[a-z0-9-]{1,64}")
_PARAGRAPH = re.compile(r"\S.*?(?=\s*(?:\n\s*\n|\Z))", re.DOTALL)
_REQUIRED = ("id", "title", "look_at", "messages", "experts", "sampling")
_OPTIONAL = ("answer", "arms", "changes")
# What may be edited without recording anew.
_WORDS = ("title", "look_at", "experts", "answer")

_Settings = TypeVar("_Settings", RoutingKnobs, SamplingParams)


@dataclass(frozen=True, kw_only=True)
class Change:
    """Knobs turned while a run grows.

    Attributes:
        at: Number of the answer's token, from 0, that is the first to be read with them; >= 1,
            since the first one is read with what the arm started with.
        arm: Number of the arm.
        knobs: What is in force from there on; a knob that is not named is off.
    """

    at: int
    arm: int
    knobs: RoutingKnobs


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One run to record.

    Attributes:
        id: Name of its file, and id of its run.
        title: A short name for people.
        look_at: One line: what to look at.
        messages: The chat, ``role`` and ``content`` each.
        experts: For every paragraph of the messages, in order, the adapter that should lead
            there; None where none is expected.
        answer: The adapter that should lead in the answer; None where none is expected.
        arms: Ways of running it.
        changes: Knobs turned on the way, by rising token.
        sampling: How tokens are picked.
        settings: 16 hex digits of everything that the run depends on.
    """

    id: str
    title: str
    look_at: str
    messages: tuple[dict[str, str], ...]
    experts: tuple[str | None, ...]
    answer: str | None
    arms: tuple[Arm, ...]
    changes: tuple[Change, ...]
    sampling: SamplingParams
    settings: str


def read_recordings(path: Path = RECORDINGS) -> list[Recording]:
    """Returns the recordings of a list, in its order.

    Raises:
        RecordingError: If the file cannot be read, or an entry is malformed; names the entry and
            the field.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordingError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise RecordingError(f"{path}: expected a list of recordings")
    recordings = [_recording(f"{path.name}[{n}]", entry) for n, entry in enumerate(entries)]
    for name in ("id", "title"):
        values = [getattr(recording, name) for recording in recordings]
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise RecordingError(f"{path.name}: {name} {twice[0]!r} comes twice")
    return recordings


def paragraphs(text: str) -> list[tuple[int, int]]:
    r"""Returns where the paragraphs of a text begin and end; blank lines part them.

    Example:
        >>> paragraphs("one\n\ntwo\nthree")
        [(0, 3), (5, 14)]
    """
    return [match.span() for match in _PARAGRAPH.finditer(text)]


def _recording(where: str, entry: object) -> Recording:
    values = _checked(where, entry, required=_REQUIRED, optional=_OPTIONAL)
    for name in ("id", "title", "look_at"):
        if not isinstance(values[name], str) or not values[name].strip():
            raise RecordingError(f"{where}: {name} must be text, got {values[name]!r}")
    if not _ID.fullmatch(values["id"]):
        raise RecordingError(
            f"{where}: id must be 1 to 64 of a-z, 0-9 and '-', got {values['id']!r}"
        )
    where = f"{where} ({values['id']})"
    messages = _messages(f"{where}: messages", values["messages"])
    try:
        arms = tuple(
            _arm(f"{where}: arms[{n}]", arm)
            for n, arm in enumerate(values.get("arms", [{"kind": "routed"}]))
        )
        return Recording(
            id=values["id"],
            title=values["title"],
            look_at=values["look_at"],
            messages=messages,
            experts=_experts(where, values["experts"], messages),
            answer=values.get("answer"),
            arms=arms,
            changes=_changes(where, values.get("changes", []), arms),
            sampling=_built(SamplingParams, f"{where}: sampling", values["sampling"]),
            settings=_settings(values),
        )
    except XLoraError as error:
        if isinstance(error, RecordingError):
            raise
        raise RecordingError(f"{where}: {error.message}", hint=error.hint) from error


def _messages(where: str, values: object) -> tuple[dict[str, str], ...]:
    if not isinstance(values, list) or not values:
        raise RecordingError(f"{where}: expected at least one message")
    for n, message in enumerate(values):
        found = _checked(f"{where}[{n}]", message, required=("role", "content"))
        if found["role"] not in get_args(Role) or not isinstance(found["content"], str):
            raise RecordingError(
                f"{where}[{n}]: expected a role of {', '.join(get_args(Role))} and a content text"
            )
    return tuple(values)


def _experts(
    where: str, values: object, messages: Sequence[Mapping[str, str]]
) -> tuple[str | None, ...]:
    n_paragraphs = sum(len(paragraphs(message["content"])) for message in messages)
    if not isinstance(values, list) or len(values) != n_paragraphs:
        raise RecordingError(
            f"{where}: experts must name an adapter, or null, for each of the {n_paragraphs} "
            f"paragraphs, got {values!r}"
        )
    return tuple(values)


def _arm(where: str, values: object) -> Arm:
    found = _checked(where, values, required=("kind",), optional=("adapter", "knobs"))
    knobs = found.get("knobs")
    return Arm(
        kind=found["kind"],
        adapter=found.get("adapter"),
        knobs=None if knobs is None else _knobs(f"{where}: knobs", knobs),
    )


def _changes(where: str, values: object, arms: Sequence[Arm]) -> tuple[Change, ...]:
    if not isinstance(values, list):
        raise RecordingError(f"{where}: changes must be a list, got {values!r}")
    changes = []
    for n, value in enumerate(values):
        here = f"{where}: changes[{n}]"
        found = _checked(here, value, required=("at", "knobs"), optional=("arm",))
        at, arm = found["at"], found.get("arm", 0)
        if not isinstance(at, int) or at < 1:
            raise RecordingError(f"{here}: at must be a token of the answer, >= 1, got {at!r}")
        if not isinstance(arm, int) or not 0 <= arm < len(arms) or arms[arm].kind != "routed":
            raise RecordingError(f"{here}: arm must be the number of a routed arm, got {arm!r}")
        changes.append(Change(at=at, arm=arm, knobs=_knobs(f"{here}: knobs", found["knobs"])))
    return tuple(sorted(changes, key=lambda change: change.at))


def _knobs(where: str, values: object) -> RoutingKnobs:
    found = dict(_checked(where, values, optional=tuple(f.name for f in fields(RoutingKnobs))))
    keys = {field.name for field in fields(AdapterOverride)}
    overrides = [
        AdapterOverride(
            **_checked(
                f"{where}: overrides[{n}]",
                override,
                required=("adapter", "kind"),
                optional=tuple(keys - {"adapter", "kind"}),
            )
        )
        for n, override in enumerate(found.pop("overrides", []))
    ]
    return _built(RoutingKnobs, where, {**found, "overrides": overrides})


def _built(kind: type[_Settings], where: str, values: object) -> _Settings:
    return kind(**_checked(where, values, optional=tuple(f.name for f in fields(kind))))


def _checked(
    where: str, values: object, *, required: Sequence[str] = (), optional: Sequence[str] = ()
) -> dict[str, Any]:
    """Returns a JSON object that has the required keys and no unknown ones."""
    if not isinstance(values, dict):
        raise RecordingError(f"{where}: expected a JSON object, got {values!r:.80}")
    missing = [key for key in required if key not in values]
    unknown = [key for key in values if key not in (*required, *optional)]
    if missing or unknown:
        what = f"{missing[0]!r} is missing" if missing else f"{unknown[0]!r} is not known"
        raise RecordingError(
            f"{where}: key {what}; the keys are {', '.join((*required, *optional))}"
        )
    return values


def _settings(entry: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in sorted(entry.items()) if key not in _WORDS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
