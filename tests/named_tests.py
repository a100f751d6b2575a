"""Tests that a page of the docs names (`tests/unit/test_x.py::test_y`), and if they exist."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMED = re.compile(r"`(tests/(?:\w+/)*test_\w+\.py(?:::\w+)*)`")


def named_tests(text: str) -> list[str]:
    """Returns every test, class of tests or file of tests that a text names."""
    return NAMED.findall(text)


def exists(name: str) -> bool:
    """Returns whether a name stands for a test, or for a class or file that holds some."""
    file, *path = name.split("::")
    return (ROOT / file).is_file() and "::".join(path) in _names_in(ROOT / file)


@functools.cache
def _names_in(file: Path) -> frozenset[str]:
    """Returns the names of what pytest collects in a file, and "" for the file itself."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            names.add(node.name)
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            members = [f.name for f in node.body if isinstance(f, ast.FunctionDef)]
            names |= {node.name, *(f"{node.name}::{m}" for m in members if m.startswith("test_"))}
    return frozenset(names | {""}) if names else frozenset()
