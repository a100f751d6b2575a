"""The ``xlora`` command: parses arguments, runs a command, turns errors into messages."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from xlora_core.cli import (
    benchmark,
    conversion,
    editing,
    evaluation,
    export,
    generation,
    inspection,
    merging,
    training,
)
from xlora_core.errors import XLoraError
from xlora_core.startup import leave_quickly

_DESCRIPTION = """\
X-LoRA: a language model whose LoRA experts are mixed anew for every token.

The commands work on the demo model that comes with the project (--model demo, the default)
or on your own: a Hugging Face model folder with a checkpoint of this project, or with LoRA
adapters and a fresh, untrained router.
"""
_EXAMPLES = """\
examples:
  xlora inspect
  xlora generate --prompt "Why is the sky blue?" --csv scalings.csv
  xlora generate --prompt "Why is the sky blue?" --save sky.safetensors
  xlora export sky.safetensors --csv sky.csv --bucket-by segment
  xlora merge --output merged-model
  xlora inspect --model path/to/base --checkpoint path/to/xlora
  xlora convert path/to/peft my-xlora --to ours --base path/to/base
  xlora edit my-xlora --out smaller --remove verse --base path/to/base
  xlora train --adapters math=experts/math law=experts/law --data rows/ --out my-xlora
  xlora bench decode

Each command teaches more: xlora generate --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: The arguments; None takes the process's.

    Returns:
        The exit status: 0; 2 for anything the user can mend, told on stderr; 130 after Ctrl-C.
    """
    if argv is None:
        try:
            return main(sys.argv[1:])
        finally:
            leave_quickly()
    argv = list(argv)
    args = _parser().parse_args(argv, argparse.Namespace(argv=argv))
    try:
        status: int = args.run(args)
        sys.stdout.flush()
    except XLoraError as error:
        hint = error.hint or f"xlora {args.command} --help explains the options"
        print(f"xlora {args.command}: error: {error.message}\nhint: {hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"xlora {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has enough (``xlora inspect | head``). Python would complain
        # once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xlora",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (
        inspection,
        generation,
        export,
        merging,
        conversion,
        editing,
        training,
        evaluation,
        benchmark,
    ):
        command.add_command(commands)
    return parser
