"""Runs the benchmarks named on the command line, or all."""

from __future__ import annotations

import sys

from benchmarks import decode, memory

_ALL = {"memory": memory.main, "decode": decode.main}


def main(argv: list[str]) -> int:
    """Runs ``[NAME] [OPTIONS]``; without a name every benchmark runs with its defaults."""
    if argv and argv[0] in _ALL:
        _ALL[argv[0]](argv[1:])
        return 0
    if argv:
        print(f"usage: python -m benchmarks [{'|'.join(_ALL)}] [--help]", file=sys.stderr)
        return 0 if argv[0] in ("-h", "--help") else 2
    for benchmark in _ALL.values():
        benchmark([])
    return 0


sys.exit(main(sys.argv[1:]))
