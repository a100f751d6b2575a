"""``xlora eval``: how every way to run the experts does on held-out rows."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from xlora_core.cli import options
from xlora_core.cli.training import ROWS_HELP
from xlora_core.errors import ConfigError

_EXAMPLES = """\
  xlora eval --data rows/
  xlora eval --checkpoint my-xlora --data heldout.jsonl --rows 64 --out figures.json
  xlora eval --model path/to/base --checkpoint my-xlora --data rows/ --json
  xlora eval --checkpoint my-xlora-per-layer --data rows/ --arms routed
"""


def add_command(commands: options.Commands) -> None:
    """Adds ``eval``."""
    parser = options.new_command(
        commands,
        "eval",
        summary="held-out losses of every way to run the experts, as tables",
        description="Measures the loss on held-out answers, in nats a token: base model, uniform "
        "merge, best weighted\nmerge, each expert alone, X-LoRA, and the right expert for each "
        "row; how much of the mixture\ngoes to the right expert, and how often it leads.\nThe best "
        "merge has one weight for each expert, the same for all text, fitted on the training\n"
        "rows of the data folder. Where a domain's answers can be checked (math, chemistry, "
        "quantum,\nprotein, python), base, merges, X-LoRA and the right expert also answer "
        f"questions.\n\n{ROWS_HELP}",
        examples=_EXAMPLES,
    )
    parser.set_defaults(run=_run)
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FILE|FOLDER", help="the held-out rows"
    )
    parser.add_argument(
        "--rows", type=int, default=16, metavar="N", help="rows of each domain (default: 16)"
    )
    parser.add_argument(
        "--arms",
        choices=("all", "routed"),
        default="all",
        help="routed: only X-LoRA's losses and routing, no answers; all else is the same under "
        "every\nrouter over the same experts (default: all)",
    )
    parser.add_argument(
        "--merge-steps",
        type=int,
        default=16,
        metavar="N",
        help="most steps that fit the best merge; it ends earlier where a step gains nothing; "
        "0 leaves it out (default: 16)",
    )
    parser.add_argument(
        "--answers",
        type=int,
        default=16,
        metavar="N",
        help="questions of each check that every arm answers; 0: none (default: 16)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=256,
        metavar="N",
        help="most tokens of an answer; rows whose own answer is longer are not asked "
        "(default: 256)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument(
        "--answers-file", type=Path, metavar="FILE", help="write the answers as JSON lines"
    )
    parser.add_argument(
        "--card", type=Path, metavar="FILE", help="write the tables into this Markdown file"
    )
    options.add_model_options(parser)


def _run(args: argparse.Namespace) -> int:
    faults = [] if args.rows >= 1 else [f"--rows must be at least 1, got {args.rows}"]
    for option, least in (("merge_steps", 0), ("answers", 0), ("max_new_tokens", 1)):
        value = getattr(args, option)
        if value < least:
            faults.append(f"--{option.replace('_', '-')} must be at least {least}, got {value}")
    if args.arms == "routed" and args.answers_file is not None:
        faults.append("--answers-file needs answers, and --arms routed has none")
    for option in ("out", "card", "answers_file"):
        path = getattr(args, option)
        if path is not None and not path.parent.is_dir():
            faults.append(
                f"--{option.replace('_', '-')} {path}: the folder {path.parent} does not exist"
            )
    if faults:
        raise ConfigError(faults)
    model, tokenizer = options.load(args)
    from xlora_core.training import report
    from xlora_core.training.answer_questions import AnswerSettings
    from xlora_core.training.log import public_command
    from xlora_core.training.merge_fit import MergeFitSettings
    from xlora_core.training.tables import tables

    record = report.run_evaluation(
        model,
        tokenizer,
        data=args.data,
        out=args.out,
        card=args.card,
        rows=args.rows,
        merge=MergeFitSettings(steps=args.merge_steps) if args.merge_steps else None,
        answers=AnswerSettings(rows=args.answers, max_new_tokens=args.max_new_tokens)
        if args.answers
        else None,
        answers_file=args.answers_file,
        routed_only=args.arms == "routed",
        command=public_command("xlora", args.argv),
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if args.json:
        options.print_json(record)
    else:
        print(tables(record))
    return 0
