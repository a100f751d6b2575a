"""``xlora merge``: the experts baked into a plain model."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from xlora_core.cli import options
from xlora_core.errors import CheckpointError, ConfigError

_EXAMPLES = """\
  xlora merge --output merged-model
  xlora merge --output mostly-math --weights math=0.7 python=0.3
  xlora merge --model path/to/base --adapter math=loras/math --adapter code=loras/code \\
      --output merged-model
"""


def add_command(commands: options.Commands) -> None:
    """Adds ``merge``."""
    parser = options.new_command(
        commands,
        "merge",
        summary="bake the experts into a plain model folder",
        description="Writes a plain Hugging Face model with a constant mixture of the experts "
        "baked into its weights.\nIt cannot route any more: every token gets the same mixture.",
        examples=_EXAMPLES,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument(
        "--weights",
        nargs="+",
        default=[],
        metavar="NAME=WEIGHT",
        help="weight of each expert, 0 for those not named (default: all equal, 1/K)",
    )
    options.add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Runs ``merge``."""
    output = Path(args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(
            f"{output} exists and is not empty", hint="choose a new or empty folder"
        )
    weights = _weights(args.weights)
    model, tokenizer = options.load(args)
    names = model.adapter_names
    merged = model.merge_and_unload(weights)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
        try:
            merged.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            staging.chmod(0o755)
            os.replace(staging, output)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{output} cannot be written: {error}") from error
    used = {name: 1 / len(names) if weights is None else weights.get(name, 0.0) for name in names}
    if args.json:
        options.print_json({"output": str(output), "weights": used})
    else:
        mixture = ", ".join(f"{name} {weight:g}" for name, weight in used.items())
        print(f"wrote {output}: base model with {mixture}", file=sys.stderr)
    return 0


def _weights(items: list[str]) -> dict[str, float] | None:
    named = options.named_values(items, option="--weights", example="--weights math=0.7 code=0.3")
    try:
        return {name: float(value) for name, value in named.items()} or None
    except ValueError as error:
        raise ConfigError(
            f"--weights: {error}", hint="weights are numbers: --weights math=0.7 code=0.3"
        ) from error
