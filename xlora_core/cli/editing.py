"""``xlora edit``: adapters of a checkpoint added, removed, renamed, put in another order."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from xlora_core.cli import options
from xlora_core.cli.terminal import safe
from xlora_core.errors import ConfigError

if TYPE_CHECKING:
    from xlora_core.model import XLoraModel

_DESCRIPTION = """\
Changes which adapters a checkpoint mixes, and writes the result as a new checkpoint. The router
needs no new training for what stays: its rows follow their adapters, bit by bit.

  --remove  the others share out its part of the mixture, as the softmax does
  --rename  changes the name and nothing else
  --add     the new adapter starts with at most --share of every token's mixture: the router has
            yet to learn when to use it (xlora train), until then it hardly acts
  --order   changes the order and nothing else

They are done in this order, whatever the order of the options: --add may take a name that
--remove or --rename made free, and --order takes the names as they are in the end.
"""
_EXAMPLES = """\
  xlora edit my-xlora --out smaller --remove verse --base path/to/base
  xlora edit my-xlora --out larger --add law=loras/law medicine=loras/medicine \\
      --share 0.05 --base path/to/base
  xlora edit my-xlora --out updated --remove math --add math=loras/math-v2 --base path/to/base
  xlora edit demo --out renamed --rename math=arithmetic
"""


def add_command(commands: options.Commands) -> None:
    """Adds ``edit``."""
    parser = options.new_command(
        commands,
        "edit",
        summary="add, remove, rename or reorder the adapters of a checkpoint",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="an X-LoRA checkpoint folder of any layout; or 'demo', the demo's",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="FOLDER",
        help="what to write, in our layout: a new or empty folder, or a checkpoint to replace "
        "(CHECKPOINT itself, too)",
    )
    parser.add_argument(
        "--base",
        default="demo",
        metavar="demo|FOLDER",
        help="the base model that the checkpoint is for (default: demo)",
    )
    edits = parser.add_argument_group("edits")
    edits.add_argument("--remove", nargs="+", action="extend", default=[], metavar="NAME")
    edits.add_argument("--rename", nargs="+", action="extend", default=[], metavar="OLD=NEW")
    edits.add_argument(
        "--add",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FOLDER",
        help="a LoRA folder as PEFT writes it; it becomes the last adapter",
    )
    edits.add_argument(
        "--share",
        type=float,
        metavar="P",
        help="of --add: the most that each new adapter takes of a token's mixture at first "
        "(default: 0.01)",
    )
    edits.add_argument(
        "--order",
        nargs="+",
        metavar="A,B,C",
        help="all names in the new order, with commas or spaces between them",
    )


def run(args: argparse.Namespace) -> int:
    """Runs ``edit``."""
    renamed = options.named_values(args.rename, option="--rename", example="--rename math=maths")
    added = options.named_values(args.add, option="--add", example="--add law=loras/law")
    if not (args.remove or renamed or added or args.order):
        raise ConfigError(
            "say what to change: --remove, --rename, --add or --order",
            hint="to write a checkpoint in another layout: xlora convert",
        )
    if args.share is not None and not added:
        raise ConfigError("--share goes with --add", hint="leave it out")
    model = _load(args)
    before = _summary(model)
    _edit(model, args, renamed, added)
    model.save_pretrained(args.out)
    after = _summary(model)
    if args.json:
        options.print_json(
            {"checkpoint": args.checkpoint, "out": args.out, "before": before, "after": after}
        )
    else:
        for name, summary in (("before", before), ("after", after)):
            listed = safe(", ".join(summary["adapters"]))
            print(f"{name + ':':8}{listed} on {summary['n_modules']} modules", file=sys.stderr)
        print(f"wrote {args.out}", file=sys.stderr)
    return 0


def _load(args: argparse.Namespace) -> XLoraModel:
    from transformers.utils import logging

    from xlora_core.demo import DEMO, load_model

    logging.disable_progress_bar()  # a command's stderr is for what the user has to know
    checkpoint = None if args.checkpoint == args.base == DEMO else args.checkpoint
    # float32, whatever the base model is kept in: the experts must come out as they went in.
    model, _ = load_model(args.base, checkpoint=checkpoint, device="cpu", dtype="float32")
    return model


def _edit(
    model: XLoraModel, args: argparse.Namespace, renamed: dict[str, str], added: dict[str, str]
) -> None:
    for name in args.remove:
        model.remove_adapter(name)
    for old, new in renamed.items():
        model.rename_adapter(old, new)
    share = {} if args.share is None else {"share": args.share}
    for name, folder in added.items():
        model.add_adapter(name, folder, **share)
    if args.order:
        only = args.order[0]
        one = len(args.order) == 1 and only not in model.adapter_names
        names = [name.strip() for name in only.split(",")] if one else args.order
        model.reorder_adapters(names)


def _summary(model: XLoraModel) -> dict[str, Any]:
    return {"adapters": model.adapter_names, "n_modules": len(model.lora_layer_names)}
