"""A model's text on a terminal, which must not take orders from it."""

from __future__ import annotations

import re
import sys

# Control characters but tab and newline: on a terminal they move the cursor, retitle the window
# or worse. They come from the model, so from whoever wrote its prompt or its weights.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def safe(text: str) -> str:
    """Returns the text as stdout may show it: as it is in a file or pipe, tamed on a terminal."""
    if sys.stdout.isatty():
        text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, errors="replace").decode(encoding)


def print_text(text: str, *, header: str | None = None) -> None:
    """Prints a whole answer, under a header if there are several."""
    if header is not None:
        print(f"--- {header} ---")
    print(safe(text))


class TextStream:
    """Prints an answer as it comes.

    One piece is held back: the last may turn out to be the token that only ends the answer.

    Args:
        header: Printed first, if there are several answers.
    """

    def __init__(self, *, header: str | None = None) -> None:
        self._held = ""
        if header is not None:
            print(f"--- {header} ---", flush=True)

    def write(self, piece: str) -> None:
        """Adds a piece."""
        print(safe(self._held), end="", flush=True)
        self._held = piece

    def end(self, *, drop_last: bool) -> None:
        """Prints what is held back, unless it is to be dropped, and a newline."""
        print("" if drop_last else safe(self._held), flush=True)
        self._held = ""
