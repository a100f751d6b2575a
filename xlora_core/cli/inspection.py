"""``xlora inspect``: what a model, a checkpoint folder or a run file holds."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlora_core.cli import options
from xlora_core.cli.checkpoint_report import (
    checkpoint_report,
    print_checkpoint,
    router_words,
    routing_words,
)
from xlora_core.cli.generation import hit_words, summary
from xlora_core.cli.terminal import safe

if TYPE_CHECKING:
    from xlora_core.model import XLoraModel
    from xlora_core.recording import Run, Track

_EXAMPLES = """\
  xlora inspect
  xlora inspect --modules
  xlora inspect --model path/to/base --checkpoint path/to/xlora --json
  xlora inspect path/to/xlora
  xlora inspect path/to/peft --adapter 0=loras/math --adapter 1=loras/code
  xlora inspect sky.safetensors
"""


def add_command(commands: options.Commands) -> None:
    """Adds ``inspect``."""
    parser = options.new_command(
        commands,
        "inspect",
        summary="show what a model, a checkpoint or a run file holds",
        description="Shows a model's experts, adapted modules and router settings; or, given a "
        "checkpoint folder\n(ours, PEFT's or the original xlora package's), what is in it; or, "
        "given a run file, what was\nrecorded in it.",
        examples=_EXAMPLES,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "file",
        nargs="?",
        metavar="RUN|FOLDER",
        help="a run file or a checkpoint folder, instead of a model",
    )
    parser.add_argument(
        "--modules", action="store_true", help="list every adapted module with each expert's rank"
    )
    options.add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Runs ``inspect``."""
    if args.file is not None and Path(args.file).is_dir():
        from xlora_core.checkpoint import read_checkpoint

        adapters = options.named_values(
            args.adapter, option="--adapter", example="--adapter math=loras/math"
        )
        report = checkpoint_report(read_checkpoint(args.file, adapters), name=args.file)
        print_report = print_checkpoint
    elif args.file is not None:
        from xlora_core.recording import Run

        report = run_report(Run.load(args.file))
        print_report = _print_run
    else:
        report = model_report(options.load(args)[0], name=args.model)
        print_report = _print_model
    if args.json:
        options.print_json(report)
    else:
        print_report(report, with_modules=args.modules)
    return 0


def model_report(model: XLoraModel, *, name: str) -> dict[str, Any]:
    """Returns what a model holds, as plain JSON types.

    An adapter that has no weights in a module has rank 0 there.
    """
    modules = [
        {
            "name": path,
            "type": type(layer.base_layer).__name__,
            # Of one rank: a convolution's kernel and an embedding's rows count as inputs.
            "in_features": layer.lora_A[0].numel(),
            "out_features": layer.lora_B[:, 0].numel(),
            "ranks": {
                adapter: dict(zip(layer.adapter_indices, layer.ranks, strict=True)).get(k, 0)
                for k, adapter in enumerate(model.adapter_names)
            },
        }
        for path, layer in zip(model.lora_layer_names, model.lora_layers, strict=True)
    ]
    config = model.config_xlora.to_dict()
    del config["adapters"]
    base = model.base_model
    return {
        "model": name,
        "architecture": type(base).__name__,
        "n_base_parameters": _n_base_parameters(model),
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": str(base.device),
        "context_length": model.context_length,
        "n_router_parameters": sum(p.numel() for p in model.router.parameters()),
        "config": config,
        "overrides": [override.label for override in model.get_adapter_overrides()],
        "adapters": [_adapter_report(adapter, modules) for adapter in model.adapter_names],
        "modules": modules,
    }


def run_report(run: Run) -> dict[str, Any]:
    """Returns what a run file holds, as plain JSON types."""
    header = run.header
    of_run = summary(run)
    for arm, track in zip(of_run["arms"], run.tracks, strict=True):
        arm["knobs"] = [{"from_token": row} | _knobs(track, row) for row in track.knob_changes()]
    return of_run | {
        "created": header.created,
        "prompt": header.prompt_text,
        "n_modules": header.n_lora_layers,
        "router": header.router,
        "adapters": list(header.adapter_names),
        "sampling": vars(header.sampling),
        "versions": dict(header.versions),
    }


def _knobs(track: Track, row: int) -> dict[str, Any]:
    knobs = track.knobs(row)
    return {
        "top_k": knobs.top_k,
        # Recorded as float32: the digits beyond it were not what anybody set.
        "temperature": float(f"{knobs.temperature:.6g}"),
        "global_weight": float(f"{knobs.global_weight:.6g}"),
        "overrides": [override.label for override in knobs.overrides],
    }


def _n_base_parameters(model: XLoraModel) -> int:
    of_experts = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in model.lora_layers)
    n_all: int = sum(p.numel() for p in model.base_model.parameters())
    return n_all - of_experts


def _adapter_report(adapter: str, modules: list[dict[str, Any]]) -> dict[str, Any]:
    here = [module for module in modules if module["ranks"][adapter]]
    return {
        "name": adapter,
        "n_modules": len(here),
        "ranks": sorted({module["ranks"][adapter] for module in here}),
        "n_parameters": sum(
            m["ranks"][adapter] * (m["in_features"] + m["out_features"]) for m in here
        ),
    }


def _print_model(report: dict[str, Any], *, with_modules: bool) -> None:
    config, modules, adapters = report["config"], report["modules"], report["adapters"]
    _print_fields(
        {
            "model": f"{report['model']} ({report['architecture']}, "
            f"{report['n_base_parameters']:,} parameters, {report['dtype']}, {report['device']})",
            "context": f"{report['context_length']:,} tokens",
            "router": router_words(config, report["n_router_parameters"]),
            "routing": routing_words(config)
            + "".join(f", {safe(label)}" for label in report["overrides"]),
            "modules": f"{len(modules)}: " + _kinds(modules),
        }
    )
    width = max(len(adapter["name"]) for adapter in adapters)
    print(f"adapters    {len(adapters)}:")
    for adapter in adapters:
        ranks = ", ".join(map(str, adapter["ranks"]))
        print(
            f"  {safe(adapter['name']):{width}}  rank {ranks}, {adapter['n_modules']} of "
            f"{len(modules)} modules, {adapter['n_parameters']:,} parameters"
        )
    if with_modules:
        print("ranks by module (0: the adapter is absent there):")
        for module in modules:
            ranks = "  ".join(f"{safe(name)} {r}" for name, r in module["ranks"].items())
            size = f"{module['in_features']} -> {module['out_features']}"
            print(f"  {module['name']}  {module['type']} {size}  {ranks}")


def _kinds(modules: list[dict[str, Any]]) -> str:
    counts = Counter(module["name"].rpartition(".")[2] for module in modules)
    return ", ".join(f"{kind} x {n}" for kind, n in counts.items())


def _print_run(report: dict[str, Any], *, with_modules: bool) -> None:
    del with_modules  # a run file names its modules, their ranks are the model's
    _print_fields(
        {
            "run": f"{report['run_id']}, {report['created']}",
            "model": safe(report["model"]),
            "adapters": safe(", ".join(report["adapters"])),
            "modules": str(report["n_modules"])
            + (", each with a gate of its own" if report["router"] == "per_layer" else ""),
            "prompt": safe(repr(report["prompt"])),
        }
    )
    for arm in report["arms"]:
        means = ", ".join(f"{safe(k)} {v:.2f}" for k, v in arm["mean_effective_scalings"].items())
        print(
            f"{safe(arm['arm'])}: {arm['n_prompt_tokens']} + {arm['n_new_tokens']} tokens, "
            f"{arm['finish_reason']}{hit_words(arm)}; mean scalings: {means or 'none'}"
        )
        for knobs in arm["knobs"]:
            words = [
                f"top-k {knobs['top_k'] or 'all'}",
                f"temperature {knobs['temperature']:g}",
                f"global weight {knobs['global_weight']:g}",
                *knobs["overrides"],
            ]
            print(f"  from token {knobs['from_token']}: {safe(', '.join(words))}")
        print(f"  {safe(repr(arm['text']))}")


def _print_fields(fields: dict[str, str]) -> None:
    for name, value in fields.items():
        print(f"{name:10}  {value}")
