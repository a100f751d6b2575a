"""Cuts long texts into passages of whole paragraphs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def passages(paragraphs: Iterable[str], target: int, least: int) -> Iterator[str]:
    """Packs paragraphs, in order, until a passage has more than ``target`` characters.

    The last passage may be shorter; one of ``least`` characters or fewer is dropped. Paragraphs are
    stripped after they were counted, and joined by an empty line.

    Args:
        paragraphs: The text, paragraph by paragraph.
        target: Characters of a passage that is full, blank lines between paragraphs not counted.
        least: Characters a last passage must exceed.
    """
    packed: list[str] = []
    characters = 0
    for paragraph in paragraphs:
        packed.append(paragraph.strip())
        characters += len(paragraph)
        if characters > target:
            yield _joined(packed)
            packed, characters = [], 0
    if characters > least:
        yield _joined(packed)


def _joined(paragraphs: list[str]) -> str:
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
