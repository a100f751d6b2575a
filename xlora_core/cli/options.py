"""Options that several commands share, and what they become."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlora_core.config import AdapterOverride, RoutingKnobs
from xlora_core.errors import ConfigError
from xlora_core.startup import without_collector

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from transformers import PreTrainedTokenizerBase

    from xlora_core.model import XLoraModel

    Commands = _SubParsersAction[argparse.ArgumentParser]

BUCKETS = ("position", "segment", "seq_len", "token")
# The name may hold both signs: the last "=" and the last "@" count.
_VALUED = re.compile(r"(?P<name>.+)=(?P<value>[^=@]+)(?:@(?P<modules>.+))?")
_NAMED = re.compile(r"(?P<name>.+?)(?:@(?P<modules>[^@]+))?")


def new_command(
    commands: Commands, name: str, *, summary: str, description: str, examples: str
) -> argparse.ArgumentParser:
    """Returns the parser of a command, with ``--json``."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of text, for programs"
    )
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which model to load."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="demo",
        metavar="DEMO|FOLDER",
        help="'demo', or the folder of a Hugging Face base model (default: demo)",
    )
    group.add_argument(
        "--checkpoint",
        metavar="FOLDER",
        help="X-LoRA checkpoint folder: router and experts for that base model",
    )
    group.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="a LoRA expert, repeat for more: without --checkpoint they get a fresh, untrained "
        "router; with it they replace the checkpoint's experts of those names",
    )
    group.add_argument(
        "--device",
        help="such as cpu or cuda:0 (default: cuda if there is one); auto spreads a model that is "
        "too large for one GPU over all of them, and the rest over memory and disk",
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the base model's weights (default: auto, float32 on a CPU, bfloat16 on a GPU)",
    )
    group.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="most threads that compute on the CPU (default: OMP_NUM_THREADS, or one per core "
        "that this process may use)",
    )


def add_knob_options(parser: argparse.ArgumentParser, *, otherwise: str) -> None:
    """Adds the router's knobs.

    Args:
        parser: The command.
        otherwise: What holds for a knob that is not given, for the help text.
    """
    group = parser.add_argument_group("routing", f"A knob that is not given is {otherwise}.")
    group.add_argument(
        "--top-k",
        type=_top_k,
        metavar="K|all",
        help="keep only the K largest scalings per token and module",
    )
    group.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="of the router's softmax: below 1 sharper, above 1 more even",
    )
    group.add_argument(
        "--global-weight",
        type=float,
        metavar="G",
        help="factor on all scalings; 0 is the base model",
    )
    for option, what, parse, form in (
        ("--mute", "switch an adapter off", _mute, "NAME[@PATTERN]"),
        ("--pin", "hold an adapter's scaling at a value", _pin, "NAME=VALUE[@PATTERN]"),
        ("--rescale", "multiply an adapter's scalings", _rescale, "NAME=FACTOR[@PATTERN]"),
    ):
        group.add_argument(
            option,
            dest="overrides",  # one list for all three, since the last one given holds
            action="append",
            type=parse,
            metavar=form,
            help=f"{what}, in all modules or in those whose path matches, such as "
            "'*.q_proj'; repeat for more",
        )


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of exported tables."""
    group = parser.add_argument_group("tables")
    group.add_argument("--csv", metavar="FILE", help="write the scalings as CSV")
    group.add_argument("--parquet", metavar="FILE", help="write the scalings as Parquet")
    group.add_argument(
        "--bucket-by",
        choices=BUCKETS,
        default="position",
        help="position: buckets of --width tokens (default); segment: prompt and response; "
        "seq_len: one bucket per forward call, as PEFT's log; token: no buckets, the raw table",
    )
    group.add_argument(
        "--width", type=int, default=16, metavar="N", help="tokens per bucket (default: 16)"
    )


def load(args: argparse.Namespace) -> tuple[XLoraModel, PreTrainedTokenizerBase]:
    """Returns the model and the tokenizer that the model options name.

    Raises:
        XLoraError: If they cannot be loaded.
    """
    adapters = named_values(args.adapter, option="--adapter", example="--adapter math=loras/math")
    with without_collector():
        from transformers.utils import logging

        from xlora_core.demo import load_model
        from xlora_core.threads import set_threads

        set_threads(args.threads)
        logging.disable_progress_bar()  # a command's stderr is for what the user has to know
        return load_model(
            args.model,
            checkpoint=args.checkpoint,
            adapters=adapters or None,
            device=args.device,
            dtype=args.dtype,
        )


def named_values(items: Sequence[str], *, option: str, example: str) -> dict[str, str]:
    """Returns the ``NAME=VALUE`` arguments of an option as a dict, in order.

    Raises:
        ConfigError: If one has no name or value, or a name comes twice.
    """
    values: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise ConfigError(
                f"{option} must be of the form NAME=VALUE, got {item!r}",
                hint=f"for example: {example}",
            )
        if name.strip() in values:
            raise ConfigError(
                f"{option} names {name.strip()!r} twice", hint="give every adapter its own name"
            )
        values[name.strip()] = value.strip()
    return values


def knobs_are_given(args: argparse.Namespace) -> bool:
    """Whether any of the router's knobs was given."""
    given = (args.top_k, args.temperature, args.global_weight, args.overrides)
    return any(value is not None for value in given)


def knobs_over(default: RoutingKnobs, args: argparse.Namespace) -> RoutingKnobs:
    """Returns the knobs given, over those of ``default``; overrides are added to its own.

    Raises:
        ConfigError: If one is out of range.
    """
    given: dict[str, Any] = {
        name: getattr(args, name)
        for name in ("temperature", "global_weight")
        if getattr(args, name) is not None
    }
    if args.top_k is not None:
        given["top_k"] = None if args.top_k == "all" else args.top_k
    if args.overrides is not None:
        given["overrides"] = (*default.overrides, *args.overrides)
    return replace(default, **given)


def check_output_files(args: argparse.Namespace, *options: str) -> None:
    """Refuses output that cannot be written, before the work whose results it holds.

    Raises:
        ConfigError: Listing every file whose folder is missing, or that is a folder; and a
            bucket width below 1.
    """
    faults = [] if args.width >= 1 else [f"--width must be at least 1, got {args.width}"]
    for option in options:
        name = getattr(args, option)
        if name is None or name == "-":
            continue
        path = Path(name)
        if path.is_dir():
            faults.append(f"--{option} {name}: that is a folder, a file name was expected")
        elif not path.parent.is_dir():
            faults.append(f"--{option} {name}: the folder {path.parent} does not exist")
    if faults:
        raise ConfigError(
            faults,
            hint="give a file name in a folder that exists, and buckets of at least one token",
        )


def print_json(value: object) -> None:
    """Prints a value as JSON, readable for people, too."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def _top_k(text: str) -> int | str:
    return "all" if text == "all" else int(text)


def _mute(text: str) -> AdapterOverride:
    match = _NAMED.fullmatch(text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected NAME[@PATTERN], got {text!r}")
    return _override(AdapterOverride.mute, match["name"], modules=match["modules"])


def _pin(text: str) -> AdapterOverride:
    return _override(AdapterOverride.pin, *_named_number(text, "VALUE"))


def _rescale(text: str) -> AdapterOverride:
    return _override(AdapterOverride.scale, *_named_number(text, "FACTOR"))


def _override(make: Callable[..., AdapterOverride], *of: Any, **further: Any) -> AdapterOverride:
    try:
        return make(*of, **further)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(error.message) from error


def _named_number(text: str, what: str) -> tuple[str, float, str | None]:
    match = _VALUED.fullmatch(text)
    try:
        if match:
            return match["name"], float(match["value"]), match["modules"]
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(
        f"expected NAME={what}[@PATTERN] with a number {what}, got {text!r}"
    )
