"""Prompts to start with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PATH = Path(__file__).resolve().parents[1] / "sample_data" / "presets.json"


@dataclass(frozen=True)
class Preset:
    """A prompt and what to watch for while it runs."""

    id: str
    title: str
    prompt: str
    look_at: str = ""


_BUILT_IN = (
    Preset(
        "math",
        "Word problem",
        "A shop sells pencils for 3 dollars each. Tom buys 4 pencils and pays with a 20 dollar "
        "note. How much change does he get?",
        "Does the math adapter lead while the steps are worked out?",
    ),
    Preset(
        "python",
        "Python function",
        "Write a Python function that returns the n-th Fibonacci number.",
        "The mixture should turn when the answer moves from prose to code.",
    ),
    Preset(
        "chemistry",
        "Chemistry",
        "Why does salt dissolve in water?",
        "Look for modules where chemistry leads from the first token on.",
    ),
    Preset(
        "verse",
        "Verse",
        "Write four lines of verse about the sea at night.",
        "Line ends often carry another mixture than the words between.",
    ),
)


@cache
def load() -> tuple[Preset, ...]:
    """Returns the presets of the sample data, or a few built-in ones without it."""
    if not PATH.exists():
        return _BUILT_IN
    rows = json.loads(PATH.read_text(encoding="utf-8"))
    fields = Preset.__dataclass_fields__
    return tuple(Preset(**{k: v for k, v in row.items() if k in fields}) for row in rows)


def by_title(title: str | None) -> Preset | None:
    """Returns the preset of that title."""
    return next((preset for preset in load() if preset.title == title), None)
