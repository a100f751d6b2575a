"""``xlora merge``: a constant mixture of the experts, weighed, measured and written."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlora_core.cli import options
from xlora_core.config import RoutingKnobs
from xlora_core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from xlora_core.freezing import ApproximationReport, FrozenMixture, TokenChoice
    from xlora_core.merge import SingleLora
    from xlora_core.model import XLoraModel
    from xlora_core.recording import Run
    from xlora_core.training.data import Example

_EXAMPLES = """\
  xlora merge --output merged-model
  xlora merge --output mostly-math --weights math=0.7 python=0.3
  xlora merge --output math-lora --as lora --from-run math-run.safetensors
  xlora merge --output small-lora --as lora --rank 8 --from-data questions.jsonl \\
      --report heldout.jsonl
  xlora merge --from-run math-run.safetensors --save-weights math.json --report heldout.jsonl
  xlora merge --output math-model --weights math.json
  xlora merge --model path/to/base --adapter math=loras/math --adapter code=loras/code \\
      --output merged-model
"""
_DESCRIPTION = """\
Takes the router away: every token gets the same mixture of the experts from then on.

Choose the mixture with --weights, or freeze what the router did: --from-run takes the mean
over a recorded run, --from-data over texts; both give every module weights of its own.
--report says what is lost against the routed model, on text of your choice, before you
write anything. --as model writes a plain Hugging Face model; --as lora writes one LoRA
adapter in PEFT's format, exact (the experts' ranks add up) or cut to --rank.
"""


def add_command(commands: options.Commands) -> None:
    """Adds ``merge``."""
    parser = options.new_command(
        commands,
        "merge",
        summary="freeze the mixture: write a plain model or one LoRA",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--output", metavar="FOLDER", help="what to write: a new or empty folder")
    parser.add_argument(
        "--as",
        dest="form",
        choices=("model", "lora"),
        default="model",
        help="model: the whole model with the experts baked in (default); lora: one adapter for "
        "the base model, in PEFT's format",
    )
    parser.add_argument(
        "--rank",
        type=int,
        metavar="R",
        help="cut the LoRA to this rank in every module, by singular values (default: exact)",
    )
    mixture = parser.add_argument_group("mixture")
    origin = mixture.add_mutually_exclusive_group()
    origin.add_argument(
        "--weights",
        nargs="+",
        default=[],
        metavar="uniform|NAME=WEIGHT|FILE",
        help="uniform: 1/K each (default); a weight by expert, 0 for those not named; or a file "
        "that --save-weights wrote",
    )
    origin.add_argument("--from-run", metavar="FILE", help="as xlora generate --save wrote it")
    origin.add_argument(
        "--from-data",
        nargs="+",
        default=[],
        metavar="FILE",
        help="rows as for training (.jsonl, .jsonl.gz), or one text a line (.txt)",
    )
    mixture.add_argument(
        "--arm", type=int, metavar="N", help="arm of the run, counted from 0 (default: 0)"
    )
    mixture.add_argument(
        "--tokens",
        choices=("response", "prompt", "all"),
        help="whose scalings to average, with --from-run and --from-data (default: response); a "
        "text without a prompt is all response",
    )
    mixture.add_argument(
        "--save-weights", metavar="FILE", help="write the mixture itself, for --weights (.json)"
    )
    report = parser.add_argument_group("what is lost")
    report.add_argument(
        "--report",
        nargs="+",
        default=[],
        metavar="FILE",
        help="compare with the routed, the uniformly merged and the base model on the responses "
        "in these files, of the kinds that --from-data reads",
    )
    report.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="cut rows to N tokens (default: refuse rows longer than the model's context)",
    )
    options.add_knob_options(
        parser,
        otherwise="the model's own; with --from-run as recorded,\nand once one is given, the "
        "others are off (all, 1, 1)",
    )
    options.add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Runs ``merge``."""
    _check(args)
    chosen = _named_weights(args.weights)
    from xlora_core.freezing import (
        FrozenMixture,
        approximation_loss,
        lora_of_mixture,
        read_texts,
        token_rows,
    )
    from xlora_core.freezing.export import refuse_existing
    from xlora_core.recording import Run

    if args.output:
        refuse_existing(args.output)
    recorded = Run.load(args.from_run) if args.from_run else None
    frozen = FrozenMixture.load(chosen) if isinstance(chosen, str) else None
    texts = {path: read_texts(path) for path in [*args.from_data, *args.report]}
    model, tokenizer = options.load(args)
    knobs = model.check_knobs(_knobs(args, recorded, model))
    rows = {
        path: token_rows(
            of_file, tokenizer, context_length=model.context_length, cut_at=args.max_length
        )
        for path, of_file in texts.items()
    }
    if recorded is not None:
        frozen = _freeze_run(args, recorded)
    elif args.from_data:
        frozen = _freeze_data(args, model, rows, knobs)
    elif frozen is None:
        frozen = _as_mixture(model, chosen)
    _note_other_experts(frozen, model)
    weights = frozen.matrix(model.adapter_names, model.lora_layer_names)
    lora = lora_of_mixture(model, weights, rank=args.rank) if args.form == "lora" else None
    reports = {
        path: approximation_loss(
            model, weights, rows[path], knobs=knobs, lora=lora if args.rank else None
        )
        for path in args.report
    }
    if args.save_weights:
        frozen.save(args.save_weights)
    if args.output:
        _write(args, model, tokenizer, weights)
    if args.json:
        options.print_json(_summary(args, frozen, lora, reports))
    else:
        _print(args, frozen, lora, reports)
    return 0


# -------------------------------------------------------------------- the mixture


def _check(args: argparse.Namespace) -> None:
    faults = []
    if not args.output and not args.save_weights and not args.report:
        faults.append("say what to do: --output FOLDER, --save-weights FILE or --report FILE")
    if args.rank is not None and args.form != "lora":
        faults.append("--rank is for --as lora; a plain model has no rank")
    if args.rank is not None and args.rank < 1:
        faults.append(f"--rank must be at least 1, got {args.rank}")
    if args.arm is not None and not args.from_run:
        faults.append("--arm is for --from-run")
    if args.tokens is not None and not (args.from_run or args.from_data):
        faults.append("--tokens is for --from-run and --from-data")
    if options.knobs_are_given(args) and not (args.from_run or args.from_data or args.report):
        faults.append(
            "routing knobs say what the router does: they need --from-run, --from-data or --report"
        )
    if args.max_length is not None and args.max_length < 2:
        faults.append(f"--max-length must be at least 2, got {args.max_length}")
    if args.save_weights and not Path(args.save_weights).absolute().parent.is_dir():
        faults.append(f"--save-weights {args.save_weights}: its folder does not exist")
    if faults:
        raise ConfigError(faults)


def _named_weights(items: list[str]) -> dict[str, float] | str | None:
    """Returns adapter name -> weight, the name of a file, or None for the uniform mixture."""
    if len(items) == 1 and "=" not in items[0]:
        return None if items[0] == "uniform" else items[0]
    example = "--weights math=0.7 code=0.3"
    named = options.named_values(items, option="--weights", example=example)
    try:
        return {name: float(value) for name, value in named.items()} or None
    except ValueError as error:
        raise ConfigError(f"--weights: {error}", hint=f"weights are numbers: {example}") from error


def _knobs(args: argparse.Namespace, recorded: Run | None, model: XLoraModel) -> RoutingKnobs:
    """Returns the knobs of the routed model that the mixture is to stand for."""
    if recorded is None:
        return options.knobs_over(model.default_knobs, args)
    given = _knobs_for_run(args)
    return given or recorded.track(args.arm or 0).arm.knobs or model.default_knobs


def _knobs_for_run(args: argparse.Namespace) -> RoutingKnobs | None:
    """Returns the knobs to route a run anew with; None takes those recorded at each token."""
    return options.knobs_over(RoutingKnobs(), args) if options.knobs_are_given(args) else None


def _freeze_run(args: argparse.Namespace, recorded: Run) -> FrozenMixture:
    from xlora_core.freezing import freeze_run

    tokens: TokenChoice = args.tokens or "response"
    return freeze_run(recorded, args.arm or 0, tokens=tokens, knobs=_knobs_for_run(args))


def _freeze_data(
    args: argparse.Namespace,
    model: XLoraModel,
    rows: dict[str, list[Example]],
    knobs: RoutingKnobs,
) -> FrozenMixture:
    from xlora_core.freezing import freeze_rows

    examples = [example for path in args.from_data for example in rows[path]]
    name = ", ".join(Path(path).name for path in args.from_data)
    return freeze_rows(model, examples, tokens=args.tokens or "response", knobs=knobs, name=name)


def _as_mixture(model: XLoraModel, chosen: Any) -> FrozenMixture:
    from xlora_core.freezing import FrozenMixture
    from xlora_core.merge import weight_matrix

    return FrozenMixture(
        adapter_names=model.adapter_names,
        layer_names=model.lora_layer_names,
        weights=weight_matrix(chosen, model.adapter_names, model.lora_layer_names),
        source="uniform" if chosen is None else "chosen by hand",
    )


def _note_other_experts(frozen: FrozenMixture, model: XLoraModel) -> None:
    """Says so if the experts have changed since the mixture was frozen."""
    from xlora_core.engine.identity import adapter_fingerprints

    now = adapter_fingerprints(model)
    other = [name for name, then in frozen.adapter_hashes.items() if now.get(name, then) != then]
    if other:
        print(
            f"note: the mixture was frozen with other weights of {', '.join(other)}, or in "
            "another dtype",
            file=sys.stderr,
        )


# -------------------------------------------------------------------- what becomes of it


def _write(args: argparse.Namespace, model: XLoraModel, tokenizer: Any, weights: Tensor) -> None:
    from xlora_core.freezing import save_merged_lora, save_merged_model

    if args.form == "lora":
        save_merged_lora(model, args.output, weights, rank=args.rank)
    else:
        save_merged_model(model, args.output, weights, tokenizer=tokenizer)


def _summary(
    args: argparse.Namespace,
    frozen: FrozenMixture,
    lora: SingleLora | None,
    reports: dict[str, ApproximationReport],
) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "output": args.output,
        "as": args.form,
        "save_weights": args.save_weights,
        "source": frozen.source,
        "n_tokens": frozen.n_tokens,
        "weights": frozen.adapter_means(),
        "reports": {path: report.to_dict() for path, report in reports.items()},
    }
    if lora is not None:
        summary["lora"] = {
            "ranks": {path: weights.rank for path, weights in lora.modules.items()},
            "kept": lora.kept,
            "kept_in_total": lora.kept_in_total,
        }
    return summary


def _print(
    args: argparse.Namespace,
    frozen: FrozenMixture,
    lora: SingleLora | None,
    reports: dict[str, ApproximationReport],
) -> None:
    for path, report in reports.items():
        print(f"{Path(path).name}\n{report.table()}\n")
    mixture = ", ".join(f"{name} {weight:.3g}" for name, weight in frozen.adapter_means().items())
    of_modules = " (mean over modules)" if frozen.n_tokens else ""
    print(f"mixture: {mixture}{of_modules}; {frozen.source}", file=sys.stderr)
    if lora is not None:
        print(f"one LoRA: {_describe(lora)}", file=sys.stderr)
    for name in (args.save_weights, args.output):
        if name:
            print(f"wrote {name}", file=sys.stderr)


def _describe(lora: SingleLora) -> str:
    ranks = sorted({weights.rank for weights in lora.modules.values()})
    rank = f"rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
    cut = {path: kept for path, kept in lora.kept.items() if lora.cut[path]}
    if not cut:
        return f"{rank}, {len(lora.modules)} modules, exact"
    worst = min(cut, key=lambda path: cut[path])
    return (
        f"{rank}, {len(lora.modules)} modules, {lora.kept_in_total:.1%} of the squared norm kept, "
        f"least {cut[worst]:.1%} in {worst}"
    )
