"""What ``xlora eval`` does: reads rows, measures, writes JSON and the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from xlora_core.errors import ConfigError
from xlora_core.model import XLoraModel
from xlora_core.training.card import check_card, write_into_card
from xlora_core.training.data import (
    Example,
    Row,
    encode_rows,
    has_split,
    mixed_examples,
    pad_id,
    read_domain,
)
from xlora_core.training.evaluation import MIXED, evaluate, mean_losses
from xlora_core.training.merge_fit import MergeFit, MergeFitSettings, fit_merge
from xlora_core.training.progress import Report, silent
from xlora_core.training.tables import tables

EVALUATION_LENGTH = 288  # longest example in tokens


def example_groups(
    rows: Mapping[str, Sequence[Row]],
    tokenizer: Any,
    *,
    rows_each: int,
    seed: int,
    max_length: int = EVALUATION_LENGTH,
) -> dict[str, list[Example]]:
    """Returns examples: ``rows_each`` of each domain, and as many that change domain.

    A domain whose rows are all too long is left out.
    """
    groups = {
        domain: encode_rows(group, tokenizer, max_length, limit=rows_each, seed=seed)
        for domain, group in rows.items()
    }
    if len(rows) > 1:
        groups[MIXED] = mixed_examples(rows, tokenizer, max_length, rows_each, seed=seed)
    return {name: group for name, group in groups.items() if group}


def evaluation_groups(
    data: Path, domains: Sequence[str], tokenizer: Any, *, rows: int, seed: int = 0
) -> dict[str, list[Example]]:
    """Returns held-out examples: ``rows`` of each domain, and ``rows`` that change domain.

    Raises:
        ConfigError: If there are no rows of a domain, or all are too long.
    """
    by_domain = {domain: read_domain(data, domain, "heldout") for domain in domains}
    groups = example_groups(by_domain, tokenizer, rows_each=rows, seed=seed)
    empty = [domain for domain in domains if domain not in groups]
    if empty:
        raise ConfigError(
            f"no held-out row of {', '.join(empty)} fits into {EVALUATION_LENGTH} tokens"
        )
    return groups


def run_evaluation(
    model: XLoraModel,
    tokenizer: Any,
    *,
    data: Path,
    out: Path | None = None,
    card: Path | None = None,
    rows: int = 16,
    merge: MergeFitSettings | None = MergeFitSettings(),  # noqa: B008 - frozen
    command: str = "",
    report: Report = silent,
) -> dict[str, Any]:
    """Evaluates a model; writes JSON, and the tables into a model card.

    Args:
        model: The model; in float32 for figures worth quoting.
        tokenizer: Its tokenizer.
        data: File of held-out rows, or folder as of ``read_domain``. The best merge is fitted on
            the training rows of a folder.
        out: JSON file of the record.
        card: Markdown file with marks between which the tables go.
        rows: Held-out rows of each domain.
        merge: How the best merge is fitted; None leaves it out.
        command: The command line, for the record.
        report: Gets a line now and then.

    Returns:
        The record: ``results`` by domain, and how they were made.

    Raises:
        ConfigError: If the card has no place for the tables, or there are no rows.
    """
    if card is not None:
        check_card(card)
    groups = evaluation_groups(data, model.adapter_names, tokenizer, rows=rows)
    fit, notes = None, []
    if merge is not None:
        fit, note = _fitted_merge(model, tokenizer, data, merge, report)
        notes += [note] if note else []
    results = evaluate(
        model,
        groups,
        pad_id(tokenizer),
        merge_weights=None if fit is None else list(fit.weights.values()),
        report=report,
    )
    record: dict[str, Any] = {
        "command": command,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "dtype": str(next(model.base_model.parameters()).dtype).removeprefix("torch."),
        "rows_per_domain": rows,
        "max_length": EVALUATION_LENGTH,
        "results": {name: asdict(result) for name, result in results.items()},
    }
    record["mean_losses"] = mean_losses(record["results"])
    if fit is not None and merge is not None:
        record["merge"] = asdict(fit) | {"settings": asdict(merge)}
    if notes:
        record["notes"] = notes
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if card is not None:
        write_into_card(card, tables(record))
    return record


def _fitted_merge(
    model: XLoraModel, tokenizer: Any, data: Path, settings: MergeFitSettings, report: Report
) -> tuple[MergeFit | None, str]:
    """Returns the best merge, or None and why there is none."""
    domains = model.adapter_names
    without = [domain for domain in domains if not has_split(data, domain, "train")]
    if without:
        return None, (
            "The best weighted merge is left out: it is fitted on training rows, and "
            f"{data.name} holds none of {', '.join(without)}."
        )
    groups = example_groups(
        {domain: read_domain(data, domain, "train") for domain in domains},
        tokenizer,
        rows_each=settings.rows_per_group,
        seed=0,
        max_length=settings.max_length,
    )
    too_long = [domain for domain in domains if domain not in groups]
    if too_long:
        return None, (
            "The best weighted merge is left out: no training row of "
            f"{', '.join(too_long)} fits into {settings.max_length} tokens."
        )
    return fit_merge(model, groups, pad_id(tokenizer), settings, report=report), ""
