"""What ``xlora eval`` does: reads held-out rows, measures, writes JSON and the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from xlora_core.errors import ConfigError
from xlora_core.model import XLoraModel
from xlora_core.training.data import (
    Example,
    Row,
    encode_rows,
    mixed_examples,
    pad_id,
    read_domain,
)
from xlora_core.training.evaluation import MIXED, evaluate, table
from xlora_core.training.progress import Report, silent

EVALUATION_LENGTH = 288  # longest example in tokens


def example_groups(
    rows: Mapping[str, Sequence[Row]], tokenizer: Any, *, rows_each: int, seed: int
) -> dict[str, list[Example]]:
    """Returns examples: ``rows_each`` of each domain, and as many that change domain."""
    groups = {
        domain: encode_rows(group, tokenizer, EVALUATION_LENGTH, limit=rows_each, seed=seed)
        for domain, group in rows.items()
    }
    if len(rows) > 1:
        groups[MIXED] = mixed_examples(rows, tokenizer, EVALUATION_LENGTH, rows_each, seed=seed)
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
    command: str = "",
    report: Report = silent,
) -> dict[str, Any]:
    """Evaluates a model; writes JSON, and the table into a model card.

    Args:
        model: The model; in float32 for figures worth quoting.
        tokenizer: Its tokenizer.
        data: File of held-out rows, or folder as of ``read_domain``.
        out: JSON file of the record.
        card: Markdown file with marks between which the table goes.
        rows: Rows of each domain.
        command: The command line, for the record.
        report: Gets a line per domain.

    Returns:
        The record: ``results`` by domain, and how they were made.

    Raises:
        ConfigError: If the card has no place for the table, or there are no rows.
    """
    if card is not None:
        _card_parts(card)
    groups = evaluation_groups(data, model.adapter_names, tokenizer, rows=rows)
    results = evaluate(model, groups, pad_id(tokenizer), report=report)
    record: dict[str, Any] = {
        "command": command,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "rows_per_domain": rows,
        "max_length": EVALUATION_LENGTH,
        "results": {name: asdict(result) for name, result in results.items()},
    }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if card is not None:
        write_into_card(card, table(record["results"]))
    return record


_CARD_MARKS = ("<!-- evaluation -->", "<!-- /evaluation -->")


def write_into_card(card: Path, text: str) -> None:
    """Replaces what stands between the card's evaluation marks.

    Raises:
        ConfigError: If the card has no such marks.
    """
    start, end = _CARD_MARKS
    head, tail = _card_parts(card)
    card.write_text(f"{head}{start}\n{text}\n{end}{tail}", encoding="utf-8")


def _card_parts(card: Path) -> tuple[str, str]:
    start, end = _CARD_MARKS
    old = card.read_text(encoding="utf-8") if card.is_file() else ""
    if start not in old or end not in old:
        raise ConfigError(f"{card} has no lines {start} and {end} for the table to stand between")
    head, _, rest = old.partition(start)
    return head, rest.partition(end)[2]
