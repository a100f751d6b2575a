"""``xlora train-expert`` and ``xlora train``."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlora_core.cli import options
from xlora_core.config.training import (
    GRADIENT_CHECKPOINTING,
    TRAINING_DTYPES,
    ExpertTrainConfig,
    RouterTrainConfig,
    TrainConfig,
)
from xlora_core.errors import ConfigError

if TYPE_CHECKING:
    from xlora_core.training.log import TrainingLog
    from xlora_core.training.recipes import Source

ROWS_HELP = """\
Rows are JSON lines, plain or .gz, in one of three forms:
  {"domain": "math", "id": "1", "user": "2+2?", "assistant": "4"}
  {"domain": "math", "messages": [{"role": "user", "content": "2+2?"}, ...]}
  {"text": "plain text to continue"}
The loss covers the answers only (all of a plain text). A folder holds DOMAIN.train.jsonl and
DOMAIN.heldout.jsonl of every domain, or train.jsonl and heldout.jsonl."""
_RESUME = """\
Ctrl-C ends the run after its step. The same command goes on where a run was cut off, bit for
bit: until it ends, OUT.training holds a checkpoint of what learns, in safetensors and JSON."""
_EXPERT_EXAMPLES = """\
  xlora train-expert --name math --data rows/ --out experts/math
  xlora train-expert --name law --data law.jsonl --heldout law-test.jsonl --out experts/law
  xlora train-expert --base path/to/base --name law --data law.jsonl --out experts/law \\
      --steps 400 --rows 4 --accumulation 4 --gradient-checkpointing non-reentrant
"""
_ROUTER_EXAMPLES = """\
  xlora train --adapters math=experts/math law=experts/law --data rows/ --out my-xlora
  xlora train --adapters math=experts/math law=experts/law --data rows/ --out my-xlora \\
      --steps 300 --depth 2 --size 512 --label-loss 0.1 --label-steps 100
  xlora generate --model demo --checkpoint my-xlora --prompt "What is 15% of 80?"
"""
_HELP = {
    "steps": "optimiser steps",
    "rows": "rows of one forward pass",
    "accumulation": "forward passes of one step",
    "max_length": "longest row in tokens; longer answers are cut",
    "learning_rate": "peak of AdamW's learning rate",
    "warmup_steps": "steps of linear warm-up before the cosine decay",
    "weight_decay": "AdamW's weight decay",
    "max_grad_norm": "norm that gradients are clipped to, 0 for none",
    "dtype": "of the base weights; the weights that learn are float32",
    "autocast": "run under bfloat16 autocast; the router stays in float32",
    "gradient_checkpointing": "less memory for more time, same gradients",
    "seed": "of initial weights, order of rows and dropout",
    "eval_every": "steps between held-out losses",
    "save_every": "steps between checkpoints (default: as --eval-every)",
    "rank": "LoRA rank of every linear module",
    "alpha": "LoRA alpha; the adapter is scaled by alpha / rank",
    "dropout": "LoRA dropout",
    "join_share": "share of rows that ask two questions in one prompt",
    "mixed_share": "share of rows whose domain changes midway",
    "balanced": "every domain of a step counts the same, however long its answers",
    "balance_loss": "weight of the load-balance loss",
    "label_loss": "weight of the loss that pulls each answer to its domain's expert",
    "label_steps": "steps after which the label loss is off (default: never)",
    "label_start_rows": "rows from whose labels a classifier learns alone at first; cheap",
    "label_start_steps": "its optimiser steps",
    "label_start_learning_rate": "its learning rate (default: as --learning-rate)",
    "label_start_smoothing": "share of each label that all experts divide",
    "global_scaling_weight": "factor of all scalings; above 1 an expert can be stronger than alone",
    "router": "one classifier behind a scaling pass, or a gate in every module",
    "depth": "linear layers of the classifier",
    "size": "width of its hidden layers",
    "layerwise": "scalings of their own for each module",
    "train_adapters": "let the experts learn, too",
}
_CHOICES = {
    "dtype": TRAINING_DTYPES,
    "gradient_checkpointing": GRADIENT_CHECKPOINTING,
    "router": ("classifier", "per_layer"),
}
_NUMBERS = {  # whose default is None
    "save_every": int,
    "label_steps": int,
    "label_start_learning_rate": float,
}


def add_command(commands: options.Commands) -> None:
    """Adds ``train-expert`` and ``train``."""
    _add_expert(commands)
    _add_router(commands)


def _add_expert(commands: options.Commands) -> None:
    parser = options.new_command(
        commands,
        "train-expert",
        summary="train one LoRA expert",
        description="Trains one LoRA on a base model and writes it in PEFT's format. Needs the "
        f"extra 'train':\npip install 'xlora-explorer[train]'\n\n{ROWS_HELP}\n\n{_RESUME}",
        examples=_EXPERT_EXAMPLES,
    )
    parser.set_defaults(run=_run_expert)
    parser.add_argument(
        "--name",
        "--domain",
        dest="domain",
        required=True,
        help="name of the expert; rows of another domain are left out",
    )
    parser.add_argument(
        "--base-name", default="", metavar="TEXT", help="public name of the base model, to record"
    )
    _add_places(parser, out="folder of the LoRA")
    _add_settings(parser, ExpertTrainConfig(domain="any"))


def _add_router(commands: options.Commands) -> None:
    parser = options.new_command(
        commands,
        "train",
        summary="train a router over LoRA experts",
        description="Trains an X-LoRA router over finished LoRA experts and writes a checkpoint "
        "with router and experts.\nThe experts stay as they are, unless --train-adapters lets "
        f"them learn, too.\n\n{ROWS_HELP}\nThe experts' names are the domains whose rows are "
        f"read.\n\n{_RESUME}",
        examples=_ROUTER_EXAMPLES,
    )
    parser.set_defaults(run=_run_router)
    parser.add_argument(
        "--adapters",
        nargs="+",
        required=True,
        metavar="NAME=FOLDER",
        help="the LoRA experts, in the router's output order",
    )
    _add_places(parser, out="folder of the X-LoRA checkpoint")
    _add_settings(parser, RouterTrainConfig())


def _add_places(parser: argparse.ArgumentParser, *, out: str) -> None:
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FILE|FOLDER", help="the rows to train on"
    )
    parser.add_argument(
        "--heldout",
        type=Path,
        metavar="FILE|FOLDER",
        help="the held-out rows (default: those of the folder, or one in 16 of the file)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help=out)
    parser.add_argument(
        "--base",
        default="demo",
        metavar="DEMO|FOLDER",
        help="'demo', or the folder of a Hugging Face base model (default: demo)",
    )
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: cuda if there is one)")


def _add_settings(parser: argparse.ArgumentParser, defaults: TrainConfig) -> None:
    group = parser.add_argument_group("settings")
    for field in fields(defaults):
        default = getattr(defaults, field.name)
        if field.name not in _HELP:
            continue
        text = _HELP[field.name]
        how: dict[str, Any] = {"type": _NUMBERS.get(field.name) or type(default), "metavar": "N"}
        if isinstance(default, bool):
            how = {"action": argparse.BooleanOptionalAction}
            text += f" (default: {'on' if default else 'off'})"
        elif default is not None:
            text += f" (default: {default})"
        if field.name in _CHOICES:
            how = {"choices": _CHOICES[field.name]}
        option = f"--{field.name.replace('_', '-')}"
        group.add_argument(option, default=default, help=text, **how)


def _given(args: argparse.Namespace, cls: type[TrainConfig]) -> dict[str, Any]:
    return {f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)}


def _source(args: argparse.Namespace) -> Source:
    from xlora_core.training.recipes import Source

    return Source(data=args.data, heldout=args.heldout, base=args.base, device=args.device)


def _command(args: argparse.Namespace) -> str:
    from xlora_core.training.log import public_command

    return public_command("xlora", args.argv)


def _quieten() -> None:
    """Leaves stderr to what the user has to know."""
    from transformers.utils import logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.disable_progress_bar()


def _run_expert(args: argparse.Namespace) -> int:
    settings = ExpertTrainConfig(**_given(args, ExpertTrainConfig))
    _check_out(args)
    _quieten()
    from xlora_core.training import recipes
    from xlora_core.training.progress import progress_on

    log = recipes.run_expert(
        settings,
        _source(args),
        out=args.out,
        base_name=args.base_name,
        command=_command(args),
        progress=progress_on(sys.stderr, settings.domain),
    )
    return _print_log(args, log)


def _run_router(args: argparse.Namespace) -> int:
    settings = RouterTrainConfig(**_given(args, RouterTrainConfig))
    adapters = options.named_values(
        args.adapters, option="--adapters", example="--adapters math=experts/math law=experts/law"
    )
    _check_out(args)
    _quieten()
    from xlora_core.training import recipes
    from xlora_core.training.progress import progress_on

    log = recipes.run_router(
        settings,
        adapters,
        _source(args),
        out=args.out,
        command=_command(args),
        progress=progress_on(sys.stderr, "router"),
    )
    return _print_log(args, log)


def _check_out(args: argparse.Namespace) -> None:
    if args.out.exists() and not args.out.is_dir():
        raise ConfigError(f"--out {args.out} is a file, a folder was expected")


def _print_log(args: argparse.Namespace, log: TrainingLog) -> int:
    heldout = [loss for _, loss in log.heldout_loss]
    if args.json:
        options.print_json(
            {
                "out": str(args.out),
                "steps": len(log.train_loss),
                "seconds": log.seconds,
                "heldout_loss_before": heldout[0] if heldout else None,
                "heldout_loss_after": heldout[-1] if heldout else None,
                "routing": log.heldout_routing[-1][1] if log.heldout_routing else None,
            }
        )
        return 0
    change = f", held-out loss {heldout[0]:.3f} -> {heldout[-1]:.3f} nats a token"
    print(
        f"wrote {args.out}: {len(log.train_loss)} steps in {log.seconds:.0f} s"
        f"{change if heldout else ''}",
        file=sys.stderr,
    )
    return 0
