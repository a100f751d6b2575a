"""``xlora generate``: answers a prompt, and keeps how the experts were mixed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlora_core.cli import options
from xlora_core.cli.terminal import TextStream, print_text
from xlora_core.config import Arm, RoutingKnobs, SamplingParams
from xlora_core.errors import ConfigError, PromptError

if TYPE_CHECKING:
    from xlora_core.engine import EventStream
    from xlora_core.recording import Run

_EXAMPLES = """\
  xlora generate --prompt "Solve 3x + 4 = 19."
  xlora generate --prompt "A poem on rain" --top-k 1 --csv rain.csv --bucket-by segment
  xlora generate --prompt "Solve 3x + 4 = 19." --arm routed --arm merged --arm expert:math
  xlora generate --prompt "A poem on rain" --mute math --pin "verse=0.8@*.q_proj"
  xlora generate --raw --prompt "def fib(n):" --max-new-tokens 48 --save fib.safetensors
  cat question.txt | xlora generate --prompt-file - --json
"""
_INTERRUPTED = 130


def add_command(commands: options.Commands) -> None:
    """Adds ``generate``."""
    parser = options.new_command(
        commands,
        "generate",
        summary="answer a prompt and record the scalings",
        description="Answers a prompt token by token, and records how the experts were mixed for "
        "each token.\nThe answer goes to stdout as it comes, everything else to stderr. Ctrl-C "
        "stops and still writes the files.",
        examples=_EXAMPLES,
    )
    parser.set_defaults(run=run)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt; '-' reads it from stdin")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a text file; '-' is stdin")
    parser.add_argument(
        "--raw",
        action="store_true",
        help="give the model the prompt as it is, without the chat template",
    )
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="routed|merged|base|expert:NAME",
        help="a way of running the prompt, repeat to compare (default: routed)",
    )
    options.add_knob_options(parser, otherwise="the model's own")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="most tokens (default: 128)"
    )
    sampling.add_argument(
        "--sampling-temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="of the next token; 0 always takes the most likely one (default: 0)",
    )
    sampling.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample from the top mass P only"
    )
    sampling.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    options.add_export_options(parser)
    parser.add_argument(
        "--save", metavar="FILE", help="write the whole run (.safetensors), see xlora export"
    )
    options.add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Runs ``generate``."""
    prompt = _prompt(args)
    sampling = SamplingParams(
        max_new_tokens=args.max_new_tokens,
        temperature=args.sampling_temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    _check_arms(args.arm)
    options.knobs_over(RoutingKnobs(), args)
    options.check_output_files(args, "csv", "parquet", "save")
    model, tokenizer = options.load(args)
    knobs = options.knobs_over(model.default_knobs, args)
    arms = [_arm(name, knobs) for name in args.arm or ["routed"]]
    from xlora_core.engine import Engine

    with Engine(model, tokenizer, model_id=args.model) as engine:
        stream = engine.stream(
            prompt if args.raw else [{"role": "user", "content": prompt}], arms, sampling
        )
        interrupted = _follow(stream, print_first=not args.json)
        finished = stream.handle.wait()
    files = _write_files(finished, args)
    if args.json:
        options.print_json(summary(finished) | {"files": files})
    else:
        _print_rest(finished, files)
    return _INTERRUPTED if interrupted else 0


def summary(run: Run) -> dict[str, Any]:
    """Returns what a run came to, as plain JSON types."""
    arms = []
    for index, label in enumerate(run.arm_labels):
        track = run.tracks[index]
        n_new = track.n_tokens - track.n_prompt
        seconds = float(track.seconds[-1]) if n_new else 0.0
        of_response = run.scalings(index, effective=True)[track.n_prompt :]
        means = of_response.mean(axis=(0, 1)).tolist() if len(of_response) else []
        arms.append(
            {
                "arm": label,
                "text": run.text(index, stop_token=False),
                "finish_reason": track.finish_reason,
                "n_prompt_tokens": track.n_prompt,
                "n_new_tokens": n_new,
                "seconds": round(seconds, 3),
                "n_guessed": track.n_guessed,
                "n_hit": track.n_hit,
                "mean_effective_scalings": dict(
                    zip(run.header.adapter_names, (round(m, 4) for m in means), strict=False)
                ),
            }
        )
    return {"run_id": run.header.run_id, "model": run.header.model_id, "arms": arms}


def hit_words(of_arm: dict[str, Any]) -> str:
    """Returns how often an arm's prefetched scalings were the right ones; ``""`` without any."""
    n_guessed, n_hit = of_arm["n_guessed"], of_arm["n_hit"]
    if not n_guessed:
        return ""
    return f", prefetch hits {n_hit} of {n_guessed} ({n_hit / n_guessed:.0%})"


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None and args.prompt != "-":
        return str(args.prompt)
    if args.prompt == "-" or args.prompt_file == "-":
        return sys.stdin.read()
    try:
        return Path(args.prompt_file).read_text(encoding="utf-8")
    except OSError as error:
        raise PromptError(
            f"the prompt file {args.prompt_file} cannot be read: {error.strerror}",
            hint="give an existing text file, or the prompt itself with --prompt",
        ) from error
    except UnicodeDecodeError as error:
        raise PromptError(
            f"the prompt file {args.prompt_file} is not UTF-8 text",
            hint="save it as UTF-8",
        ) from error


def _check_arms(names: list[str]) -> None:
    for name in names:
        _arm(name, RoutingKnobs())


def _arm(name: str, knobs: RoutingKnobs) -> Arm:
    kind, _, adapter = name.partition(":")
    if kind == "expert" and adapter:
        return Arm.expert(adapter)
    if name == "routed":
        return Arm.routed(knobs)
    if name in ("merged", "base"):
        return Arm(kind=name)
    raise ConfigError(
        f"--arm must be routed, merged, base or expert:NAME, got {name!r}",
        hint="xlora inspect lists the experts",
    )


def _follow(stream: EventStream, *, print_first: bool) -> bool:
    """Prints the first arm's text as it comes; returns whether Ctrl-C ended the request."""
    from xlora_core.engine import ArmFinished, Started, TokenEvent

    text: TextStream | None = None
    try:
        for event in stream:
            if not print_first:
                continue
            if isinstance(event, Started):
                text = TextStream(header=event.arms[0].label if len(event.arms) > 1 else None)
            elif text is not None and isinstance(event, TokenEvent) and event.arm == 0:
                text.write(event.piece)
            elif text is not None and isinstance(event, ArmFinished) and event.arm == 0:
                text.end(drop_last=event.reason == "stop")
    except KeyboardInterrupt:
        stream.close()
        if text is not None:
            text.end(drop_last=False)
        return True
    return False


def _print_rest(run: Run, files: dict[str, str]) -> None:
    of_arms = summary(run)["arms"]
    for arm in of_arms[1:]:
        print_text(arm["text"], header=arm["arm"])
    print(file=sys.stderr)
    for arm in of_arms:
        mixed = ", ".join(f"{name} {m:.2f}" for name, m in arm["mean_effective_scalings"].items())
        print(
            f"{arm['arm']}: {arm['n_new_tokens']} tokens in {arm['seconds']:.1f} s, "
            f"{arm['finish_reason']}{hit_words(arm)}; mean scalings: {mixed or 'none'}",
            file=sys.stderr,
        )
    for name in files.values():
        print(f"wrote {name}", file=sys.stderr)


def _write_files(run: Run, args: argparse.Namespace) -> dict[str, str]:
    # The run itself first: from it the tables can be made again.
    files = {name: getattr(args, name) for name in ("save", "csv", "parquet")}
    if files["save"]:
        run.save(args.save)
    if files["csv"]:
        run.to_csv(args.csv, by=args.bucket_by, width=args.width)
    if files["parquet"]:
        run.to_parquet(args.parquet, by=args.bucket_by, width=args.width)
    return {name: path for name, path in files.items() if path}
