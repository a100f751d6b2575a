"""What the commands do: load, train, save, evaluate; and the recipe of the demo."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlora_core.checkpoint import read_checkpoint
from xlora_core.config.training import ExpertTrainConfig, RouterTrainConfig
from xlora_core.demo import load_base
from xlora_core.model import XLoraModel
from xlora_core.training.data import encode_rows, pad_id, read_splits
from xlora_core.training.experts import import_peft, train_expert
from xlora_core.training.identity import router_identity, run_identity
from xlora_core.training.log import TrainingLog, finished_run
from xlora_core.training.progress import LineProgress, Progress, Report, silent
from xlora_core.training.report import example_groups, run_evaluation
from xlora_core.training.router import (
    fit_router,
    fresh_model,
    router_examples,
    work_folder,
)
from xlora_core.training.tables import tables

DEMO = "demo"
DEMO_BASE_NAME = "SmolLM2-135M-Instruct"
# Programs, scenes and clauses fill their rows; the answers of the other domains are short.
DEMO_EXPERTS = (
    ExpertTrainConfig(domain="math", steps=120, rows=10, max_length=256),
    ExpertTrainConfig(domain="chemistry", steps=120, rows=8, max_length=288),
    ExpertTrainConfig(domain="quantum", steps=120, rows=8, max_length=256),
    ExpertTrainConfig(domain="protein", steps=100, rows=8, max_length=256),
    ExpertTrainConfig(domain="biology", steps=120, rows=8, max_length=256),
    ExpertTrainConfig(domain="python", steps=100, rows=6, max_length=320),
    ExpertTrainConfig(domain="law", steps=120, rows=8, max_length=256),
    ExpertTrainConfig(domain="verse", steps=80, rows=8, max_length=256),
)
DEMO_ROUTER = RouterTrainConfig(
    depth=2,
    size=1024,
    global_scaling_weight=1.15,
    label_start_rows=2400,
    label_start_steps=900,
    label_start_learning_rate=1e-3,
    label_start_smoothing=0.1,
    steps=80,
    rows=8,
    max_length=224,
    learning_rate=1e-4,
    save_every=20,
)
DEMO_GATES = RouterTrainConfig(
    router="per_layer", steps=80, rows=6, max_length=224, label_loss=0.1, eval_every=20
)
_HELD_OUT_ROWS = 16  # of the curve of an expert
_HELD_OUT_ROWS_EACH = 3  # of each domain, of the curve of a router


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a command finds its model and its rows.

    Attributes:
        data: JSON-lines file, or folder of them.
        heldout: The held-out rows, if they are not in ``data``.
        base: ``"demo"``, or the folder of a base model.
        device: Where it goes; None is ``cuda`` if there is one, else ``cpu``.
    """

    data: Path
    heldout: Path | None = None
    base: str = DEMO
    device: str | None = None

    def load(self, dtype: str) -> tuple[Any, Any]:
        """Returns the base model and its tokenizer."""
        return load_base(self.base, dtype, self.device)


def run_expert(
    settings: ExpertTrainConfig,
    source: Source,
    *,
    out: Path,
    base_name: str = "",
    command: str = "",
    progress: Progress | None = None,
) -> TrainingLog:
    """Trains one expert, unless ``out`` holds the same already.

    Raises:
        ConfigError: If ``out`` holds the result of another run, there are no rows, or peft is
            missing.
    """
    progress = progress or Progress()
    import_peft()  # before the work that would be lost
    rows = read_splits(source.data, [settings.domain], source.heldout)
    base, tokenizer = source.load(settings.dtype)
    train = encode_rows(
        rows["train"][settings.domain],
        tokenizer,
        settings.max_length,
        limit=2 * settings.rows * settings.accumulation * settings.steps,
        join_share=settings.join_share,
        seed=settings.seed,
    )
    heldout = encode_rows(
        rows["heldout"][settings.domain], tokenizer, settings.max_length, limit=_HELD_OUT_ROWS
    )
    done = finished_run(out, run_identity(base, train, heldout, settings))
    if done is not None:
        progress.note(f"is trained already: {out.name}")
        return done
    return train_expert(
        base,
        pad_id(tokenizer),
        train,
        heldout,
        out,
        settings,
        base_name=base_name or (DEMO_BASE_NAME if source.base == DEMO else Path(source.base).name),
        command=command,
        progress=progress,
    )


def run_router(
    settings: RouterTrainConfig,
    adapters: Mapping[str, str],
    source: Source,
    *,
    out: Path,
    work: Path | None = None,
    bundle: bool = True,
    command: str = "",
    progress: Progress | None = None,
) -> TrainingLog:
    """Trains a router over experts and writes the checkpoint, unless ``out`` holds it already.

    The experts' names are the domains whose rows are read. Frozen experts under a bfloat16 base
    are rounded while the router trains; the checkpoint is written from a float32 model, so they
    keep every bit.

    Args:
        settings: How to train, and the router's shape.
        adapters: Name -> folder of the experts, in the router's output order.
        source: Base model and rows.
        out: Folder of the checkpoint and ``training.json``.
        work: Folder of the trainer's checkpoints; None is beside ``out``.
        bundle: Copy the experts into ``out``; False refers to them, as seen from there.
        command: The command line, for the log.
        progress: Shows how it gets on.

    Raises:
        ConfigError: If ``out`` holds the result of another run, or there are no rows.
    """
    progress = progress or Progress()
    rows = read_splits(source.data, list(adapters), source.heldout)
    base, tokenizer = source.load(settings.dtype)
    model = fresh_model(base, adapters, settings)
    train = router_examples(rows["train"], tokenizer, settings)
    groups = example_groups(rows["heldout"], tokenizer, rows_each=_HELD_OUT_ROWS_EACH, seed=1)
    heldout = [example for group in groups.values() for example in group]
    done = finished_run(out, router_identity(model, train, heldout, settings))
    if done is not None:
        progress.note(f"is trained already: {out.name}")
        return done
    work = work or work_folder(out)
    log = fit_router(
        model,
        pad_id(tokenizer),
        train,
        heldout,
        work,
        settings,
        command=command,
        progress=progress,
    )
    if settings.dtype != "float32" and not settings.train_adapters:
        trained = router_weights(model)
        del model, base
        model = fresh_model(source.load("float32")[0], adapters, settings)
        model.load_state_dict(trained, strict=False)
    model.save_pretrained(out, bundle=bundle, relative=not bundle)
    log.write(out)
    shutil.rmtree(work, ignore_errors=True)
    return log


def router_weights(model: XLoraModel) -> dict[str, Any]:
    """Returns name -> weight of what learns in a model."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def run_demo(
    *, data: Path, out: Path, work: Path, rows: Path, base: str = DEMO, report: Report = silent
) -> str:
    """Trains the demo's experts and both its routers, and evaluates them; returns the tables.

    Goes on where an earlier call with the same ``work`` was cut off.

    Args:
        data: Folder of ``DOMAIN.train.jsonl.gz`` and ``DOMAIN.heldout.jsonl.gz``.
        out: Gets ``demo/``, ``demo-per-layer/``, ``training/``, the figures and their tables.
        work: The trained experts, and the checkpoints of what is not finished.
        rows: The rows of the evaluation, as ``data``.
        base: ``"demo"``, or the folder of a base model.
        report: Gets a line per step.
    """
    command = "python -m xlora_core.training demo"
    source = Source(data=data, base=base)
    logs = out / "training"
    logs.mkdir(parents=True, exist_ok=True)
    trained = {}
    for settings in DEMO_EXPERTS:
        folder = work / "experts" / settings.domain
        log = run_expert(
            settings,
            source,
            out=folder,
            base_name=DEMO_BASE_NAME,
            command=command,
            progress=LineProgress(report, settings.domain),
        )
        log.write(logs, f"{settings.domain}.json")
        trained[settings.domain] = str(folder)
    for name, router, folder in (
        ("router", DEMO_ROUTER, out / "demo"),
        ("router-per-layer", DEMO_GATES, out / "demo-per-layer"),
    ):
        log = run_router(
            router,
            trained,
            source,
            out=folder,
            work=work / name,
            bundle=folder == out / "demo",
            command=command,
            progress=LineProgress(report, name),
        )
        log.write(logs, f"{name}.json")
        # What the second one refers to: the experts that the first one brought along.
        trained = dict(read_checkpoint(folder).config.adapters)
    # Half the time of float32 on a CPU, and every arm is rounded alike.
    model, tokenizer = source.load("bfloat16")
    record = run_evaluation(
        XLoraModel.from_pretrained(model, out / "demo"),
        tokenizer,
        data=rows,
        out=out / "evaluation.json",
        card=out / "MODEL_CARD.md",
        command=command,
        report=report,
    )
    return tables(record)
