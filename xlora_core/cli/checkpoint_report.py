"""What a checkpoint folder holds, told without its base model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from xlora_core.cli.terminal import safe

if TYPE_CHECKING:
    from xlora_core.adapters import LoraAdapter
    from xlora_core.checkpoint import Checkpoint

LAYOUT_NAMES = {
    "ours": "our own layout",
    "peft": "PEFT's layout",
    "original": "the original xlora package's layout",
}


def checkpoint_report(checkpoint: Checkpoint, *, name: str) -> dict[str, Any]:
    """Returns what a checkpoint holds, as plain JSON types.

    Args:
        checkpoint: As it was read.
        name: What the user calls it.
    """
    from xlora_core.checkpoint import n_lora_layers

    config = checkpoint.config.to_dict()
    folders = config.pop("adapters")
    del config["adapter_overrides"]
    names = checkpoint.layer_names
    return {
        "checkpoint": name,
        "layout": str(checkpoint.layout),
        "base": None if checkpoint.base is None else dict(checkpoint.base),
        "n_router_parameters": sum(t.numel() for t in checkpoint.classifier.values()),
        "n_modules": n_lora_layers(checkpoint),
        "modules": None if names is None else list(names),
        "config": config,
        "overrides": [override.label for override in checkpoint.config.adapter_overrides],
        "adapters": [
            {
                "name": adapter.name,
                "folder": folders[adapter.name],
                "n_modules": len(adapter.paths),
                "ranks": sorted({weights.rank for weights in adapter.modules.values()}),
                "n_parameters": _n_parameters(adapter),
            }
            for adapter in checkpoint.adapters
        ],
        "notes": list(checkpoint.notes),
    }


def _n_parameters(adapter: LoraAdapter) -> int:
    low_rank = [t for w in adapter.modules.values() for t in (w.lora_A, w.lora_B, w.bias)]
    whole = [t for m in adapter.saved_modules.values() for t in (m.weight, m.bias)]
    return sum(tensor.numel() for tensor in [*low_rank, *whole] if tensor is not None)


def print_checkpoint(report: dict[str, Any], *, with_modules: bool) -> None:
    """Prints a report for people."""
    config, base, n_modules = report["config"], report["base"], report["n_modules"]
    count = "not known without the base model" if n_modules is None else str(n_modules)
    names = "" if report["modules"] else " (names not stored: the base model's order)"
    fields = {
        "checkpoint": f"{report['checkpoint']} ({LAYOUT_NAMES[report['layout']]})",
        "base": "not stored" if base is None else ", ".join(f"{k} {v}" for k, v in base.items()),
        "router": router_words(config, report["n_router_parameters"]),
        "routing": ", ".join([routing_words(config), *report["overrides"]]),
        "modules": count + names,
        "adapters": f"{len(report['adapters'])}:",
    }
    for label, text in fields.items():
        print(f"{label:10}  {safe(text)}")
    width = max(len(adapter["name"]) for adapter in report["adapters"])
    for adapter in report["adapters"]:
        ranks = ", ".join(map(str, adapter["ranks"]))
        print(
            f"  {safe(adapter['name']):{width}}  rank {ranks}, {adapter['n_modules']} modules, "
            f"{adapter['n_parameters']:,} parameters, {safe(adapter['folder'])}"
        )
    for note in report["notes"]:
        print(f"note: {safe(note)}")
    if with_modules and report["modules"]:
        print("modules in the router's order:")
        for module in report["modules"]:
            print(f"  {safe(module)}")


def router_words(config: Mapping[str, Any], n_parameters: int) -> str:
    """Returns a router's size and shape in words."""
    if config["router"] != "classifier":
        return f"{n_parameters:,} parameters, one gate per module"
    sort = "one mixture per module" if config["layerwise_scalings"] else "one for all modules"
    return f"{n_parameters:,} parameters, depth {config['xlora_depth']}, {sort}"


def routing_words(config: Mapping[str, Any]) -> str:
    """Returns how logits become scalings, in words."""
    if config["enable_softmax_topk"]:
        softmax = "softmax over the kept"
    elif config["enable_softmax"]:
        softmax = f"softmax at temperature {config['softmax_temperature']:g}"
    else:
        softmax = "no softmax"
    words = (
        f"{softmax}, top-k {config['top_k_lora'] or 'all'}, global weight "
        f"{config['global_scaling_weight']:g}"
    )
    if config["router"] == "per_layer":
        return words
    return f"{words}, scaling pass {config['scaling_pass_value']:g}"
