"""Training rows: JSON lines -> questions and answers, each fault named by its line."""

from __future__ import annotations

import functools
import gzip
import json
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xlora_core.errors import ConfigError

SPLITS = ("train", "heldout")
_HELD_OUT = 16  # one row in so many is held out of a file that has no held-out rows beside it
_MOST_HELD_OUT = 64
_FAULTS_SHOWN = 100
_FORMS = (
    "a row has user and assistant, or messages, or text: "
    '{"domain": "math", "user": "2+2?", "assistant": "4"}'
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One question and its answer; ``user`` empty means plain text to continue.

    Attributes:
        domain: What it is about; "" if the row does not say.
        id: The key that keeps training and held-out rows apart.
        user: The last question.
        assistant: Its answer.
        history: ``(role, content)`` of the messages before the last question.
    """

    domain: str
    id: str
    user: str
    assistant: str
    history: tuple[tuple[str, str], ...] = ()

    @property
    def messages(self) -> list[tuple[str, str]]:
        """``(role, content)`` of the whole conversation; empty for plain text."""
        if not self.user:
            return []
        return [*self.history, ("user", self.user), ("assistant", self.assistant)]


class _RowError(ValueError):
    """What is wrong with one row."""


def read_rows(path: str | Path) -> list[Row]:
    """Reads one JSON-lines file, plain or ``.gz``.

    A row is ``{"user", "assistant"}``, ``{"messages": [{"role", "content"}, ...]}`` that ends with
    the assistant's, or ``{"text"}``; ``domain`` and ``id`` are optional, other keys are left alone.

    Raises:
        ConfigError: If the file is missing or damaged; or listing every line that is not a row.
    """
    path = Path(path)
    rows: list[Row] = []
    faults: list[str] = []
    for number, line in _lines(path):
        try:
            rows.append(_row(json.loads(line), number))
        except RecursionError:
            faults.append(f"{path.name}, line {number}: nested too deeply")
        except _RowError as fault:
            faults.append(f"{path.name}, line {number}: {fault}")
        except ValueError as error:
            faults.append(f"{path.name}, line {number}: not JSON: {error}")
    if len(faults) > _FAULTS_SHOWN:
        faults = [*faults[:_FAULTS_SHOWN], f"and {len(faults) - _FAULTS_SHOWN} more lines"]
    if faults:
        raise ConfigError(faults, hint=_FORMS)
    if not rows:
        raise ConfigError(f"{path.name} has no rows", hint=_FORMS)
    return rows


def read_domain(data: str | Path, domain: str, split: str) -> list[Row]:
    """Reads the rows of a domain from a file, or from a folder.

    Rows that name no domain belong to it.

    Args:
        data: A file; or a folder with ``{domain}.{split}.jsonl`` or ``{split}.jsonl``, plain or
            ``.gz``.
        domain: The domain to read.
        split: ``"train"`` or ``"heldout"``; only used for a folder.

    Raises:
        ConfigError: If there are no such rows.
    """
    path = _file_of(Path(data), domain, split)
    return _of_domain(read_rows(path), domain, path.name)


def read_splits(
    data: str | Path, domains: Sequence[str], heldout: str | Path | None = None
) -> dict[str, dict[str, list[Row]]]:
    """Reads the training and the held-out rows of domains.

    Args:
        data: A folder as for ``read_domain``, or a file. One row in 16 of a file, at most 64 of a
            domain, is held out, unless ``heldout`` is given.
        domains: The domains to read. Rows of a file that name no domain belong to the only one.
        heldout: File or folder of the held-out rows.

    Returns:
        ``{"train": {domain: rows}, "heldout": {domain: rows}}``; no ``id`` is on both sides of a
        file that was split here.

    Raises:
        ConfigError: If a domain has no rows on a side.
    """
    data = Path(data)
    sources = {"train": data, "heldout": data if heldout is None else Path(heldout)}
    files = functools.cache(read_rows)  # one file may hold several domains
    splits: dict[str, dict[str, list[Row]]] = {split: {} for split in SPLITS}
    for domain in domains:
        for split in SPLITS:
            path = _file_of(sources[split], domain, split)
            rows = files(path)
            if len(domains) > 1 and sources[split].is_file():
                _check_named(rows, domains, path.name)
            splits[split][domain] = _of_domain(rows, domain, path.name)
        if heldout is None and data.is_file():
            rows = splits["train"][domain]
            splits["train"][domain], splits["heldout"][domain] = _hold_out(rows, data.name)
    return splits


def has_split(data: str | Path, domain: str, split: str) -> bool:
    """Returns whether a folder holds rows of a domain's split; a single file never says.

    Raises:
        ConfigError: If the file is damaged.
    """
    if not Path(data).is_dir():
        return False
    files = [path for path in _candidates(data, domain, split) if path.is_file()]
    return bool(files) and any(row.domain in ("", domain) for row in read_rows(files[0]))


def _candidates(data: str | Path, domain: str, split: str) -> list[Path]:
    stems = (f"{domain}.{split}", split)
    return [Path(data) / f"{stem}.jsonl{end}" for stem in stems for end in (".gz", "")]


def _file_of(data: Path, domain: str, split: str) -> Path:
    if not data.is_dir():
        return data
    paths = _candidates(data, domain, split)
    for path in paths:
        if path.is_file():
            return path
    raise ConfigError(
        f"no {domain}.{split}.jsonl in {data}",
        hint=f"the folder must hold one of {', '.join(path.name for path in paths)}",
    )


def _check_named(rows: Sequence[Row], domains: Sequence[str], name: str) -> None:
    unnamed = sum(not row.domain for row in rows)
    if unnamed:
        raise ConfigError(
            f"{unnamed} rows of {name} name no domain, so it is not known which of "
            f"{', '.join(domains)} they belong to",
            hint='give each row its "domain"',
        )


def _of_domain(rows: Sequence[Row], domain: str, name: str) -> list[Row]:
    chosen = [
        replace(row, domain=domain) if not row.domain else row
        for row in rows
        if row.domain in ("", domain)
    ]
    if not chosen:
        others = sorted({row.domain for row in rows})
        raise ConfigError(
            f"{name} has no rows of the domain {domain!r}",
            hint=f"the domains in it are {', '.join(others)}",
        )
    return chosen


def _hold_out(rows: Sequence[Row], name: str) -> tuple[list[Row], list[Row]]:
    """Splits by ``id``: the same ids are held out whenever the file is read."""
    keys = sorted({row.id for row in rows})
    if len(keys) < 2:
        raise ConfigError(
            f"{name} has only one id, so no row can be held out",
            hint="give a second file with --heldout",
        )
    count = max(1, min(len(keys) // _HELD_OUT, _MOST_HELD_OUT))
    held = set(random.Random(0).sample(keys, count))
    return [r for r in rows if r.id not in held], [r for r in rows if r.id in held]


def _lines(path: Path) -> list[tuple[int, str]]:
    """Returns the lines that are not blank, with their numbers.

    Raises:
        ConfigError: If the file is missing, damaged, or not UTF-8.
    """
    if not path.is_file():
        raise ConfigError(f"training data not found: {path}", hint=f"give a .jsonl file; {_FORMS}")
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            return [(n, line) for n, line in enumerate(lines, start=1) if line.strip()]
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path.name} is not UTF-8 text: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(
            f"{path.name} cannot be read: {error}", hint="copy or download it again"
        ) from error


def _row(values: object, number: int) -> Row:
    if not isinstance(values, Mapping):
        raise _RowError(f"expected a JSON object, got {type(values).__name__}")
    domain = _text(values, "domain", default="")
    identity = values.get("id", number)
    if not isinstance(identity, str | int):
        raise _RowError(f"id must be text or a number, got {type(identity).__name__}")
    history: tuple[tuple[str, str], ...] = ()
    if "messages" in values:
        *history_, (_, user), (_, assistant) = _messages(values["messages"])
        history = tuple(history_)
    elif "assistant" in values:
        user, assistant = _text(values, "user"), _text(values, "assistant")
    elif "text" in values:
        user, assistant = "", _text(values, "text")
    else:
        keys = ", ".join(map(str, values)) or "none"
        raise _RowError(f"expected user and assistant, or messages, or text; its keys are {keys}")
    if not assistant.strip():
        raise _RowError(f"{'text' if 'assistant' not in values else 'assistant'} is empty")
    return Row(domain=domain, id=str(identity), user=user, assistant=assistant, history=history)


def _text(values: Mapping[str, Any], key: str, default: str | None = None) -> str:
    if key not in values and default is None:
        raise _RowError(f"{key} is missing")
    value = values.get(key, default)
    if not isinstance(value, str):
        raise _RowError(f"{key} must be text, got {type(value).__name__}")
    return value


def _messages(messages: object) -> list[tuple[str, str]]:
    """Returns ``(role, content)`` of a conversation that ends with a question and its answer."""
    if not isinstance(messages, list) or not messages:
        raise _RowError("messages must be a list of objects with role and content")
    turns = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise _RowError("messages must be a list of objects with role and content")
        role, content = _text(message, "role"), _text(message, "content")
        if role not in ("system", "user", "assistant"):
            raise _RowError(f"messages: role must be system, user or assistant, got {role!r}")
        if role != "system" and not content.strip():
            raise _RowError(f"messages: a message of the {role} is empty")
        turns.append((role, content))
    if [role for role, _ in turns[-2:]] != ["user", "assistant"]:
        raise _RowError("messages must end with one of the user and one of the assistant")
    return turns
