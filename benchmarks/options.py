"""What the benchmarks of this folder have in common on the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from xlora_core.bench import Report
from xlora_core.cli.benchmark import publish
from xlora_core.cli.options import add_model_options


def new_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Returns a benchmark's parser, with ``--json``, ``--output`` and the model options."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--output", metavar="FILE", help="also write the result there, as JSON")
    add_model_options(parser)
    return parser


def plain_dtype(given: str | None) -> str:
    """Returns what ``--dtype`` comes to on a CPU, by name."""
    return "float32" if given in (None, "auto") else given


def show(report: Report, args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Prints a report, and writes it where ``--output`` says."""
    publish(report, args, command=["python", "-m", "benchmarks", report.name, *argv])


def fail(message: str, hint: str) -> None:
    """Ends the program with a message for whoever started it."""
    print(f"{message}\nhint: {hint}", file=sys.stderr)
    raise SystemExit(2)
