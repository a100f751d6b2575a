"""``xlora bench``: how fast a model runs on this machine, each figure against another."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlora_core.cli import benchmark_kinds, options
from xlora_core.errors import ConfigError

if TYPE_CHECKING:
    from xlora_core.bench import Report

_DESCRIPTION = """\
Measures a model on this machine. Every benchmark prints a table of ratios, both sides of each
taken in turns in one run, and says what they depend on: machine, threads, load, dtype, context,
adapters, ranks, hit rate. Let nothing else run meanwhile, and look at the load in the output.

  decode     a routed token beside Hugging Face's cached decoding of the base model
  arms       several arms of one prompt beside the routed arm alone
  requests   several people at once beside one
  adapters   16 experts beside 2, random ones on the same base
  reroute    other knobs over a recorded run, without the model
  start      from the start of a process to the first token
  bandwidth  random-weight models of 1 to 8 billion parameters beside one read of their weights
"""
_EXAMPLES = """\
examples:
  xlora bench decode
  xlora bench decode --model path/to/base --checkpoint path/to/xlora --dtype bfloat16
  xlora bench decode --contexts 128 4000 --prompts my-prompts.json --output decode.json
  xlora bench requests --counts 1 8 32
  xlora bench bandwidth --sizes 1b 8b --device cuda
"""


def add_command(commands: options.Commands) -> None:
    """Adds ``bench`` with a command of its own per benchmark."""
    bench = commands.add_parser(
        "bench",
        help="measure speed on this machine, against other ways of running the model",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benchmarks = bench.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for add in benchmark_kinds.ALL:
        add(benchmarks).set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark that the arguments name, and prints its report."""
    _check(args)
    publish(args.measure(args), args, command=["xlora", *args.argv])
    return 0


def publish(report: Report, args: argparse.Namespace, *, command: Sequence[str]) -> None:
    """Prints a report, as text or with ``--json``, and writes it where ``--output`` says.

    Args:
        report: What was measured.
        args: With ``json`` and ``output``.
        command: What was called, word by word.
    """
    from xlora_core.bench.machine import machine, machine_words

    facts = machine()
    document = report.document(facts, shlex.join(command))
    if args.output:
        Path(args.output).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if args.json:
        options.print_json(document)
        return
    print(f"{report.name}: {report.method}\n")
    print(report.table(), end="\n\n")
    for note in report.notes:
        print(note)
    print(", ".join(f"{name} {_words(value)}" for name, value in report.facts.items()))
    print(machine_words(facts))


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _check(args: argparse.Namespace) -> None:
    """Refuses numbers and files that no benchmark can work with, before anything is loaded.

    Raises:
        ConfigError: Listing every one.
    """
    least = {"tokens": 2, "rounds": 1, "texts": 1, "contexts": 1, "counts": 1}
    least |= {"rank": 1, "experts": 1, "modules": 1, "context": 1}
    faults = []
    for name, smallest in least.items():
        given = getattr(args, name, smallest)
        if min(given if isinstance(given, list) else [given]) < smallest:
            faults.append(f"--{name} must be at least {smallest}, got {_words(given)}")
    if args.output and not Path(args.output).parent.is_dir():
        faults.append(f"--output {args.output}: the folder {Path(args.output).parent} is not there")
    if faults:
        raise ConfigError(faults, hint=f"xlora bench {args.benchmark} --help explains the options")
