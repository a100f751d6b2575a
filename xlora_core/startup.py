"""What a process does for itself when it starts to run a model. Needs no PyTorch.

For programs, such as the command line and the app; importing the library changes nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# What says how idle OpenMP threads wait; any of them is the user's own choice.
_WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@contextmanager
def without_collector() -> Iterator[None]:
    """Keeps the garbage collector from running, for a block that imports or loads a model.

    Such a block makes millions of objects and next to no garbage, and the collector would look
    through all of them again and again: a fifth of the time that PyTorch and transformers take
    to import.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
