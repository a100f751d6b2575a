"""``python -m xlora_core.training demo``: trains and evaluates the whole demo model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from xlora_core.errors import XLoraError
from xlora_core.training import recipes

_PROGRAM = "python -m xlora_core.training"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the recipe; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        text = recipes.run_demo(
            data=options.data,
            out=options.out,
            work=options.work,
            rows=options.rows,
            base=options.base,
            report=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except XLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from there", file=sys.stderr)
        return 130
    print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="The recipe of the demo model. To train your own: xlora train-expert --help, "
        "xlora train --help.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser("demo", help="train and evaluate the whole demo model")
    demo.add_argument("--data", type=Path, required=True, help="folder of DOMAIN.SPLIT.jsonl.gz")
    demo.add_argument("--out", type=Path, default=Path("sample_data"))
    demo.add_argument("--work", type=Path, default=Path(".train-demo"), help="kept between calls")
    demo.add_argument(
        "--rows", type=Path, default=Path("sample_data/rows"), help="rows of the evaluation"
    )
    demo.add_argument("--base", default=recipes.DEMO)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
