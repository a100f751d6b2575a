"""``xlora convert``: a checkpoint from one layout into another."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlora_core.cli import options
from xlora_core.cli.checkpoint_report import LAYOUT_NAMES
from xlora_core.cli.terminal import safe
from xlora_core.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from xlora_core.checkpoint import Checkpoint

_DESCRIPTION = """\
Writes an X-LoRA checkpoint, router and experts, in another layout. The layout of SOURCE is found
out by itself.

  ours      xlora.json, classifier.safetensors, adapters/: names, module order, hashes
  peft      what PeftModel.from_pretrained loads: numbered experts, a whole classifier
  original  what the xlora package and mistral.rs load, with an ordering file

PEFT 0.20 and later lose parts of the router when they save it. They are recovered from the
expert folders 0, 1, ... that PEFT wrote beside it, or the checkpoint is refused by name:
converting such a checkpoint from peft to peft mends it.

PEFT's and the original layout do not say which modules the router's outputs belong to. They are
in the base model's order, so our layout needs --base once; an --ordering file says it where they
are not.
"""
_EXAMPLES = """\
  xlora convert path/to/peft my-xlora --to ours --base path/to/base
  xlora convert path/to/peft my-xlora --to ours --base demo \\
      --adapters math=loras/math code=loras/code
  xlora convert path/to/broken-peft whole-peft --to peft
  xlora convert sample_data/demo for-peft --to peft
  xlora convert path/to/original my-xlora --to ours --base path/to/base --ordering order.json
"""


def add_command(commands: options.Commands) -> None:
    """Adds ``convert``."""
    parser = options.new_command(
        commands,
        "convert",
        summary="write a checkpoint in PEFT's, the original package's or our layout",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.set_defaults(run=run)
    parser.add_argument("source", metavar="SOURCE", help="an X-LoRA checkpoint folder")
    parser.add_argument("target", metavar="TARGET", help="a new or empty folder")
    parser.add_argument(
        "--to", required=True, choices=tuple(LAYOUT_NAMES), help="the layout to write"
    )
    parser.add_argument(
        "--base",
        metavar="demo|FOLDER",
        help="the base model: its config is read, for names and order of its modules, and the "
        "experts are checked against it; its weights are not loaded",
    )
    parser.add_argument(
        "--adapters",
        "--adapter",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FOLDER",
        help="where experts are now, if not where the checkpoint says; as many other names "
        "rename experts that are only numbered, in order",
    )
    parser.add_argument(
        "--ordering",
        metavar="FILE",
        help="mistral.rs's ordering file, where the router's outputs are not in the base model's "
        "order of modules",
    )
    parser.add_argument(
        "--reference",
        action="store_true",
        help="to ours: point to the experts where they are, with a hash, instead of copying them",
    )
    parser.add_argument(
        "--relative-paths",
        action="store_true",
        help="to peft: write the experts' paths so that the folder may be moved; PEFT finds them "
        "only when it runs in that folder (default: absolute paths)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs ``convert``."""
    faults = [
        f"{option} goes with --to {layout}, not with --to {args.to}"
        for option, given, layout in (
            ("--reference", args.reference, "ours"),
            ("--relative-paths", args.relative_paths, "peft"),
        )
        if given and args.to != layout
    ]
    if faults:
        raise ConfigError(faults, hint="leave it out")
    adapters = options.named_values(
        args.adapters, option="--adapters", example="--adapters math=loras/math"
    )
    from xlora_core.checkpoint import check_fits, read_checkpoint

    checkpoint = read_checkpoint(args.source, adapters, ordering=args.ordering)
    if args.base is not None:
        checkpoint = check_fits(args.source, checkpoint, _base_skeleton(args.base))
    elif checkpoint.layer_names is None and args.to == "ours":
        raise CheckpointError(
            f"{args.source} does not say which modules its router's outputs belong to, nor which "
            "base model it is for; our layout stores both",
            hint="name the base model: --base path/to/base",
        )
    _write(checkpoint, args)
    report = _report(checkpoint, args)
    if args.json:
        options.print_json(report)
    else:
        for note in report["notes"]:
            print(f"note: {safe(note)}", file=sys.stderr)
        print(
            f"wrote {args.target} in {LAYOUT_NAMES[args.to]}: "
            f"{safe(', '.join(report['adapters']))}",
            file=sys.stderr,
        )
    return 0


def _base_skeleton(base: str) -> PreTrainedModel:
    """Returns a base model's modules without their weights, from its config alone."""
    import torch
    import transformers

    from xlora_core.base_model import local_folder
    from xlora_core.demo import DEMO, demo_base_folder

    folder = demo_base_folder() if base == DEMO else local_folder(base)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        (architecture,) = config.architectures or ["AutoModelForCausalLM"]
        model_class = getattr(transformers, architecture)
        build = getattr(model_class, "from_config", model_class)
        with torch.device("meta"):
            model: PreTrainedModel = build(config)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder} cannot be read as a base model: {error}",
            hint="give the folder of a Hugging Face model, with its config.json",
        ) from error
    return model


def _write(checkpoint: Checkpoint, args: argparse.Namespace) -> None:
    from xlora_core.checkpoint import write_checkpoint, write_original, write_peft

    target = Path(args.target)
    if args.to == "ours":
        write_checkpoint(target, checkpoint, bundle=not args.reference)
    elif args.to == "peft":
        write_peft(target, checkpoint, relative_paths=args.relative_paths)
    else:
        write_original(target, checkpoint)


def _report(checkpoint: Checkpoint, args: argparse.Namespace) -> dict[str, Any]:
    from xlora_core.checkpoint import n_lora_layers, peft_notes

    of_target = peft_notes(checkpoint.adapters) if args.to == "peft" else []
    return {
        "source": args.source,
        "from": str(checkpoint.layout),
        "target": args.target,
        "to": args.to,
        "adapters": [adapter.name for adapter in checkpoint.adapters],
        "n_modules": n_lora_layers(checkpoint),
        "notes": [*checkpoint.notes, *of_target],
    }
