"""What the commands do: load, train, save, evaluate; and the recipe of the demo."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from xlora_core.demo import load_base
from xlora_core.errors import ConfigError
from xlora_core.model import XLoraModel
from xlora_core.training.data import (
    Example,
    encode_rows,
    mixed_examples,
    read_domain,
)
from xlora_core.training.evaluation import MIXED, evaluate, table
from xlora_core.training.experts import ExpertSettings, train_expert
from xlora_core.training.loop import Report, silent
from xlora_core.training.router import (
    RouterSettings,
    fresh_model,
    router_examples,
    train_router,
)

DEMO = "demo"
DEMO_BASE_NAME = "SmolLM2-135M-Instruct"
# Rows and lengths differ so that a step costs about the same: programs and scenes are long.
DEMO_EXPERTS = (
    ExpertSettings(domain="math", steps=80, rows=10, max_length=256),
    ExpertSettings(domain="chemistry", steps=70, rows=8, max_length=288),
    ExpertSettings(domain="python", steps=50, rows=4, max_length=320),
    ExpertSettings(domain="verse", steps=40, rows=4, max_length=288),
)
DEMO_ROUTER = RouterSettings(steps=100, rows=6, max_length=224, eval_every=50)
EVALUATION_LENGTH = 288

# Rows that cite tables whose licence was not found are left out of the committed sample.
_UNLICENSED = re.compile(r"melts at|boils at|log P is|IUPAC name \)")


def pad_id(tokenizer: Any) -> int:
    """Returns the token id to pad with; padding is masked, so any will do."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def run_expert(
    settings: ExpertSettings,
    *,
    data: Path,
    out: Path,
    base: str = DEMO,
    base_name: str = "",
    command: str = "",
    report: Report = silent,
) -> None:
    """Trains one expert, unless ``out`` holds it already with the same settings."""
    done = out / "training.json"
    if done.is_file() and json.loads(done.read_text())["settings"] == asdict(settings):
        report(f"{settings.domain} is trained already: {out}")
        return
    model, tokenizer = load_base(base, settings.dtype)
    train = encode_rows(
        read_domain(data, settings.domain, "train"),
        tokenizer,
        settings.max_length,
        limit=2 * settings.rows * settings.steps,
        join_share=settings.join_share,
        seed=settings.seed,
    )
    heldout = encode_rows(
        read_domain(data, settings.domain, "heldout"), tokenizer, settings.max_length, limit=16
    )
    train_expert(
        model,
        pad_id(tokenizer),
        train,
        heldout,
        out,
        settings,
        base_name=base_name or (DEMO_BASE_NAME if base == DEMO else Path(base).name),
        command=command,
        report=lambda line: report(f"{settings.domain}  {line}"),
    )


def run_router(
    settings: RouterSettings,
    adapters: Mapping[str, str],
    *,
    data: Path,
    out: Path,
    work: Path,
    base: str = DEMO,
    command: str = "",
    report: Report = silent,
) -> None:
    """Trains a router over experts and writes the whole checkpoint to ``out``.

    The experts' names are the domains whose rows are read. Training may run in bfloat16; the
    checkpoint is written from a float32 model, so the experts keep every bit.
    """
    model, tokenizer = load_base(base, settings.dtype)
    rows = {name: read_domain(data, name, "train") for name in adapters}
    xlora = fresh_model(model, adapters, settings)
    heldout = evaluation_groups(data, list(adapters), tokenizer, rows=3, seed=1)
    train_router(
        xlora,
        pad_id(tokenizer),
        router_examples(rows, tokenizer, settings),
        [example for group in heldout.values() for example in group],
        work,
        settings,
        command=command,
        report=lambda line: report(f"router  {line}"),
    )
    trained = xlora.classifier.state_dict()
    del xlora, model
    full = fresh_model(load_base(base, "float32")[0], adapters, settings)
    full.classifier.load_state_dict(trained)
    full.save_pretrained(out)


def evaluation_groups(
    data: Path, domains: Sequence[str], tokenizer: Any, *, rows: int, seed: int = 0
) -> dict[str, list[Example]]:
    """Returns held-out examples: ``rows`` of each domain, and ``rows`` that change domain."""
    by_domain = {domain: read_domain(data, domain, "heldout") for domain in domains}
    groups = {
        domain: encode_rows(group, tokenizer, EVALUATION_LENGTH, limit=rows, seed=seed)
        for domain, group in by_domain.items()
    }
    if len(domains) > 1:
        groups[MIXED] = mixed_examples(by_domain, tokenizer, EVALUATION_LENGTH, rows, seed=seed)
    return groups


def run_evaluation(
    checkpoint: Path,
    *,
    data: Path,
    out: Path,
    card: Path | None = None,
    base: str = DEMO,
    rows: int = 16,
    command: str = "",
    report: Report = silent,
) -> str:
    """Evaluates a checkpoint in float32; writes JSON, and the table into a model card.

    Returns:
        The table.

    Raises:
        ConfigError: If the card has no place for the table.
    """
    model, tokenizer = load_base(base, "float32")
    xlora = XLoraModel.from_pretrained(model, checkpoint)
    groups = evaluation_groups(data, xlora.adapter_names, tokenizer, rows=rows)
    results = evaluate(xlora, groups, pad_id(tokenizer), report=report)
    values = {name: asdict(result) for name, result in results.items()}
    record = {
        "command": command,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "rows_per_domain": rows,
        "max_length": EVALUATION_LENGTH,
        "results": values,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    text = table(values)
    if card is not None:
        write_into_card(card, text)
    return text


def write_into_card(card: Path, text: str) -> None:
    """Replaces what stands between the card's evaluation marks.

    Raises:
        ConfigError: If the card has no such marks.
    """
    start, end = "<!-- evaluation -->", "<!-- /evaluation -->"
    old = card.read_text(encoding="utf-8")
    if start not in old or end not in old:
        raise ConfigError(f"{card} has no lines {start} and {end} for the table to stand between")
    head, _, rest = old.partition(start)
    tail = rest.partition(end)[2]
    card.write_text(f"{head}{start}\n{text}\n{end}{tail}", encoding="utf-8")


def write_sample(
    data: Path, domains: Sequence[str], out: Path, *, train: int, heldout: int, seed: int = 0
) -> None:
    """Writes a small, fixed sample of rows for tests, tutorials and the evaluation.

    Only rows that may be shared are taken; they are drawn from those short enough to be used
    whole.
    """
    out.mkdir(parents=True, exist_ok=True)
    for domain in domains:
        for split, count in (("train", train), ("heldout", heldout)):
            rows = [
                row
                for row in read_domain(data, domain, split)
                if not _UNLICENSED.search(row.assistant) and len(row.user + row.assistant) < 1600
            ]
            chosen = random.Random(seed).sample(rows, min(count, len(rows)))
            lines = [json.dumps(asdict(row), ensure_ascii=False) for row in chosen]
            path = out / f"{domain}.{split}.jsonl.gz"
            # mtime and name fixed: the same rows make the same file
            with path.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:
                packed.write(("\n".join(lines) + "\n").encode())


def run_demo(
    *, data: Path, out: Path, work: Path, base: str = DEMO, report: Report = silent
) -> str:
    """Trains the demo's experts and router, and evaluates them; returns the table.

    Goes on where an earlier call with the same ``work`` was cut off.
    """
    module = "python -m xlora_core.training"
    adapters = {}
    for settings in DEMO_EXPERTS:
        folder = work / "experts" / settings.domain
        run_expert(
            settings,
            data=data,
            out=folder,
            base=base,
            base_name=DEMO_BASE_NAME,
            command=f"{module} demo",
            report=report,
        )
        adapters[settings.domain] = str(folder)
    run_router(
        DEMO_ROUTER,
        adapters,
        data=data,
        out=out / "demo",
        work=work / "router",
        base=base,
        command=f"{module} demo",
        report=report,
    )
    logs = out / "training"
    logs.mkdir(parents=True, exist_ok=True)
    for name, trained in {**adapters, "router": str(work / "router")}.items():
        (logs / f"{name}.json").write_bytes((Path(trained) / "training.json").read_bytes())
    write_sample(data, list(adapters), out / "rows", train=32, heldout=16)
    return run_evaluation(
        out / "demo",
        data=out / "rows",
        out=out / "evaluation.json",
        card=out / "MODEL_CARD.md",
        base=base,
        command=f"{module} evaluate",
        report=report,
    )
