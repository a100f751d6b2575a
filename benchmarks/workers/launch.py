"""Runs the script that its argument names, in a process that ends with the one that started it.

A process that is stopped does not see that nobody asks it any more.
"""

from __future__ import annotations

import ctypes
import runpy
import signal
import sys

_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def main() -> None:
    """Sees to the end, then runs the script."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, int(signal.SIGKILL))
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
