"""``python -m xlora_core.training``: expert, router, evaluate, sample, demo."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from xlora_core.errors import ConfigError, XLoraError
from xlora_core.training import recipes
from xlora_core.training.experts import ExpertSettings
from xlora_core.training.loop import LoopSettings
from xlora_core.training.router import RouterSettings

_PROGRAM = "python -m xlora_core.training"
_HELP = {
    "steps": "optimiser steps",
    "rows": "rows of a step",
    "max_length": "longest row in tokens; longer answers are cut",
    "learning_rate": "peak of the learning rate",
    "warmup_steps": "steps of linear warm-up before the cosine decay",
    "dtype": "bfloat16 or float32, of the base weights while training",
    "seed": "of the initial weights and the order of rows",
    "eval_every": "steps between held-out losses and checkpoints",
    "rank": "LoRA rank of every adapted module",
    "alpha": "LoRA alpha",
    "join_share": "share of rows that ask two questions in one prompt",
    "mixed_share": "share of rows whose domain changes midway",
    "depth": "linear layers of the classifier",
    "size": "width of its hidden layers",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    try:
        options.run(options, public_command(arguments))
    except XLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def public_command(arguments: Sequence[str]) -> str:
    """Returns the command for the record, folders outside the project by their last name only."""
    public = []
    for argument in arguments:
        name, equals, value = argument.rpartition("=")
        if value.startswith(("/", "..", "~")):
            value = Path(value).name
        public.append(f"{name}{equals}{value}")
    return f"{_PROGRAM} {shlex.join(public)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM, description="Train LoRA experts and an X-LoRA router over them."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    expert = commands.add_parser(
        "expert",
        help="train one LoRA expert (needs the extra 'train')",
        epilog=f"example: {_PROGRAM} expert --domain math --data rows/ --out experts/math",
    )
    expert.add_argument("--domain", required=True, help="name of the expert, 'domain' of its rows")
    expert.add_argument("--base-name", default="", help="public name of the base model to record")
    _add_common(expert, out="folder of the adapter")
    _add_settings(expert, ExpertSettings(domain=""))
    expert.set_defaults(run=_expert)

    router = commands.add_parser(
        "router",
        help="train a router over finished experts",
        epilog=f"example: {_PROGRAM} router --adapters math=experts/math verse=experts/verse "
        "--data rows/ --out my-xlora",
    )
    router.add_argument("--adapters", nargs="+", required=True, metavar="NAME=FOLDER")
    router.add_argument("--work", type=Path, help="folder of log and checkpoints [OUT.training]")
    router.add_argument("--shared", action="store_true", help="one set of scalings for all modules")
    _add_common(router, out="folder of the X-LoRA checkpoint")
    _add_settings(router, RouterSettings())
    router.set_defaults(run=_router)

    evaluation = commands.add_parser("evaluate", help="held-out losses of every arm, as a table")
    evaluation.add_argument("--model", type=Path, default=Path("sample_data/demo"))
    evaluation.add_argument("--base", default=recipes.DEMO)
    evaluation.add_argument("--data", type=Path, default=Path("sample_data/rows"))
    evaluation.add_argument("--out", type=Path, default=Path("evaluation.json"))
    evaluation.add_argument("--card", type=Path, help="Markdown file to write the table into")
    evaluation.add_argument("--rows", type=int, default=16, help="rows of each domain")
    evaluation.set_defaults(run=_evaluate)

    sample = commands.add_parser("sample", help="draw the small sample of rows that is committed")
    sample.add_argument("--data", type=Path, required=True)
    sample.add_argument("--out", type=Path, default=Path("sample_data/rows"))
    sample.add_argument("--domains", nargs="+", default=[e.domain for e in recipes.DEMO_EXPERTS])
    sample.set_defaults(run=_sample)

    demo = commands.add_parser("demo", help="train and evaluate the whole demo model")
    demo.add_argument("--data", type=Path, required=True, help="folder of DOMAIN.SPLIT.jsonl.gz")
    demo.add_argument("--out", type=Path, default=Path("sample_data"))
    demo.add_argument("--work", type=Path, default=Path(".train-demo"), help="kept between calls")
    demo.add_argument("--base", default=recipes.DEMO)
    demo.set_defaults(run=_demo)
    return parser


def _add_common(parser: argparse.ArgumentParser, *, out: str) -> None:
    parser.add_argument("--data", type=Path, required=True, help="JSON lines, or a folder of them")
    parser.add_argument("--out", type=Path, required=True, help=out)
    parser.add_argument("--base", default=recipes.DEMO, help="base model folder, or 'demo'")


def _add_settings(parser: argparse.ArgumentParser, defaults: LoopSettings) -> None:
    for field in fields(defaults):
        default = getattr(defaults, field.name)
        if field.name in _HELP:
            parser.add_argument(
                f"--{field.name.replace('_', '-')}",
                type=type(default),
                default=default,
                help=f"{_HELP[field.name]} [{default}]",
            )


def _settings(options: argparse.Namespace, cls: type[LoopSettings]) -> dict[str, Any]:
    return {f.name: getattr(options, f.name) for f in fields(cls) if f.name in _HELP}


def _report(line: str) -> None:
    print(line, flush=True)


def _expert(options: argparse.Namespace, command: str) -> None:
    recipes.run_expert(
        ExpertSettings(domain=options.domain, **_settings(options, ExpertSettings)),
        data=options.data,
        out=options.out,
        base=options.base,
        base_name=options.base_name,
        command=command,
        report=_report,
    )


def _router(options: argparse.Namespace, command: str) -> None:
    adapters = dict(text.partition("=")[::2] for text in options.adapters)
    if len(adapters) < len(options.adapters) or not all(adapters.values()):
        raise ConfigError("--adapters takes NAME=FOLDER for each expert, each name once")
    recipes.run_router(
        RouterSettings(layerwise=not options.shared, **_settings(options, RouterSettings)),
        adapters,
        data=options.data,
        out=options.out,
        work=options.work or options.out.with_name(f"{options.out.name}.training"),
        base=options.base,
        command=command,
        report=_report,
    )


def _evaluate(options: argparse.Namespace, command: str) -> None:
    print(
        recipes.run_evaluation(
            options.model,
            data=options.data,
            out=options.out,
            card=options.card,
            base=options.base,
            rows=options.rows,
            command=command,
            report=_report,
        )
    )


def _sample(options: argparse.Namespace, _command: str) -> None:
    recipes.write_sample(options.data, options.domains, options.out, train=32, heldout=16)


def _demo(options: argparse.Namespace, _command: str) -> None:
    print(
        recipes.run_demo(
            data=options.data,
            out=options.out,
            work=options.work,
            base=options.base,
            report=_report,
        )
    )


if __name__ == "__main__":
    raise SystemExit(main())
