"""Law: passages of software and content licences, from the SPDX list."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from sample_data.build.choice import pick
from sample_data.build.passages import passages
from sample_data.build.rows import Row

_TARGET, _LEAST = 1300, 200
# SPDX marks what may vary: <<var;name=holder;original=THE AUTHOR;match=.+>>.
_VARIABLE = re.compile(r"<<var;.*?original=(.*?);match=.*?>>", flags=re.DOTALL)
_MARK = re.compile(r"<<.*?>>", flags=re.DOTALL)
# Prompts with how often each is taken; the empty one teaches to go on without being asked.
_PROMPTS = {
    "": 3,
    "Continue this agreement.": 2,
    "Write a legal clause.": 2,
    "Draft a clause for the {} licence.": 2,
}


def rows(folders: Mapping[str, Path]) -> Iterator[Row]:
    """A row for every passage of every licence.

    Args:
        folders: ``spdx``: the unpacked package.
    """
    for path in sorted((folders["spdx"] / "spdx" / "data").glob("*.txt")):
        yield from licence_rows(path.stem, decoded(path.read_bytes()))


def licence_rows(name: str, text: str) -> Iterator[Row]:
    """The rows of one licence.

    Args:
        name: Its SPDX identifier, which is also the group.
        text: The licence with SPDX's marks.
    """
    paragraphs = (re.sub(r"[ \t]+", " ", part) for part in re.split(r"\n\s*\n", plain(text)))
    for number, passage in enumerate(passages(paragraphs, _TARGET, _LEAST)):
        prompt = pick(list(_PROMPTS), "law", name, str(number), weights=list(_PROMPTS.values()))
        yield Row("law", name, prompt.format(name), passage)


def decoded(text: bytes) -> str:
    """A licence as text; the few that are not UTF-8 are of the age of Windows-1252."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return text.decode("cp1252", errors="replace")


def plain(text: str) -> str:
    """The text without SPDX's marks, with the original wording where a mark stands for one.

    >>> plain("Copyright <<var;name=c;original=<year> <owner>;match=.+>>.<<beginOptional>> Yes.")
    'Copyright <year> <owner>. Yes.'
    """
    return _MARK.sub("", _VARIABLE.sub(r"\1", text))
