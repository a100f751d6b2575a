"""Mathematics: terse answers to school exercises, and worked word problems."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from sample_data.build.environments import generate
from sample_data.build.rows import Row

# How a word problem asks for a bare number, and how its solution gives one.
_BARE = re.compile(r" Give (?:the|your) .*$", flags=re.DOTALL)
_FINAL = re.compile(r"\n?#### *(?=[^\n]*$)")


def rows(folders: Mapping[str, Path]) -> Iterator[Row]:
    """A row for every generated exercise; both generators are seeded.

    Args:
        folders: ``mathematics-dataset``, ``reasoning-gym``: the unpacked packages. Each generator
            runs in an environment of its own beside them.

    Raises:
        CorpusError: If an environment cannot be made or a generator fails.
    """
    for package in ("mathematics-dataset", "reasoning-gym"):
        for line in generate(package, folders[package]):
            exercise = json.loads(line)
            yield exercise_row(exercise["question"], exercise["answer"])


def exercise_row(question: str, answer: str) -> Row:
    """An exercise's row, without the generators' advice on how to format an answer.

    Args:
        question: The exercise; what follows its first line is such advice, and so is a sentence
            that begins with "Give the result".
        answer: The bare result, or a worked solution that ends in ``#### result``.
    """
    asked = _BARE.sub("", question.partition("\n")[0]).strip()
    return Row("math", asked, asked, _FINAL.sub("\nThe answer is ", answer.strip()).strip())
