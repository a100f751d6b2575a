"""The place in a model card where the figures of an evaluation go."""

from __future__ import annotations

from pathlib import Path

from xlora_core.errors import ConfigError

_START, _END = "<!-- evaluation -->", "<!-- /evaluation -->"


def write_into_card(card: Path, text: str) -> None:
    """Replaces what stands between the card's evaluation marks.

    Raises:
        ConfigError: If the card has no such marks.
    """
    head, tail = _around(card)
    card.write_text(f"{head}{_START}\n{text}\n{_END}{tail}", encoding="utf-8")


def check_card(card: Path) -> None:
    """Checks that a card has a place for figures.

    Raises:
        ConfigError: If it has not.
    """
    _around(card)


def _around(card: Path) -> tuple[str, str]:
    old = card.read_text(encoding="utf-8") if card.is_file() else ""
    head, start, rest = old.partition(_START)
    _, end, tail = rest.partition(_END)
    if not start or not end:
        raise ConfigError(
            f"{card} has no lines {_START} and {_END} for the tables to stand between",
            hint="write these two lines where the tables shall go",
        )
    return head, tail
