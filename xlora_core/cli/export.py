"""``xlora export``: a recorded run as tables, without the model."""

from __future__ import annotations

import argparse
import sys

from xlora_core.cli import options
from xlora_core.config import RoutingKnobs
from xlora_core.errors import ConfigError

_EXAMPLES = """\
  xlora export sky.safetensors --csv sky.csv
  xlora export sky.safetensors --parquet sky.parquet --bucket-by token
  xlora export sky.safetensors --csv - --bucket-by segment --top-k 1 --temperature 0.5
"""


def add_command(commands: options.Commands) -> None:
    """Adds ``export``."""
    parser = options.new_command(
        commands,
        "export",
        summary="write a recorded run as CSV or Parquet",
        description="Writes the scalings of a run file as a table. Needs no model. With routing "
        "knobs the recorded\nrouter logits are routed anew: what the mixture would have been for "
        "the same tokens.",
        examples=_EXAMPLES,
    )
    parser.set_defaults(run=run)
    parser.add_argument("run_file", metavar="RUN", help="as xlora generate --save wrote it")
    options.add_export_options(parser)
    options.add_knob_options(
        parser, otherwise="as recorded; once one is given, the others are off (all, 1, 1)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs ``export``."""
    if not args.csv and not args.parquet:
        raise ConfigError(
            "say where to write: --csv FILE, --parquet FILE, or both",
            hint="--csv - writes to stdout",
        )
    if args.json and args.csv == "-":
        raise ConfigError("--json and --csv - both write to stdout", hint="give --csv a file")
    knobs = options.knobs_over(RoutingKnobs(), args) if options.knobs_are_given(args) else None
    options.check_output_files(args, "csv", "parquet")
    from xlora_core.recording import Run

    recorded = Run.load(args.run_file)
    files = {}
    if args.csv == "-":
        sys.stdout.write(recorded.to_csv_text(by=args.bucket_by, width=args.width, knobs=knobs))
    elif args.csv:
        recorded.to_csv(args.csv, by=args.bucket_by, width=args.width, knobs=knobs)
        files["csv"] = args.csv
    if args.parquet:
        recorded.to_parquet(args.parquet, by=args.bucket_by, width=args.width, knobs=knobs)
        files["parquet"] = args.parquet
    if args.json:
        options.print_json({"run_id": recorded.header.run_id, "files": files})
    else:
        for name in files.values():
            print(f"wrote {name}", file=sys.stderr)
    return 0
