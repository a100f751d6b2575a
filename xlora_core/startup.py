"""What a program does for itself where it starts and ends. Needs no PyTorch.

For programs, such as the command line and the app; importing the library changes nothing.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collector() -> Iterator[None]:
    """Keeps the garbage collector from running, for a block that imports or loads a model.

    Such a block makes millions of objects and next to no garbage, and the collector would look
    through all of them again and again: a fifth of the time that PyTorch and transformers take
    to import. What is there at the end counts as old, and is not looked through at once.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()  # into the oldest generation
        if enabled:
            gc.enable()


def leave_quickly() -> None:
    """Spares a process that is about to end the search for garbage, of more than a second.

    Not where triton was imported: its bindings print a list of everything that was not collected.
    """
    if "triton" not in sys.modules:
        gc.freeze()
