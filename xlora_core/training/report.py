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
from xlora_core.training.answer_questions import AnswerSettings, checked_rows
from xlora_core.training.answer_results import check_answers
from xlora_core.training.answer_runs import write_answers
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
    with_mixed: bool = True,
) -> dict[str, list[Example]]:
    """Returns examples of at most ``EVALUATION_LENGTH`` tokens, ``rows_each`` of each domain.

    A domain whose rows are all too long is left out.

    Args:
        rows: Domain -> its rows.
        tokenizer: The base model's tokenizer.
        rows_each: Most examples of each domain.
        seed: Seed of the choice.
        with_mixed: And as many that change domain, as ``MIXED``.
    """
    groups = {
        domain: encode_rows(group, tokenizer, EVALUATION_LENGTH, limit=rows_each, seed=seed)
        for domain, group in rows.items()
    }
    if with_mixed and len(rows) > 1:
        groups[MIXED] = mixed_examples(rows, tokenizer, EVALUATION_LENGTH, rows_each, seed=seed)
    return {name: group for name, group in groups.items() if group}


def _evaluation_groups(
    heldout: Mapping[str, Sequence[Row]], tokenizer: Any, *, rows: int
) -> dict[str, list[Example]]:
    groups = example_groups(heldout, tokenizer, rows_each=rows, seed=0)
    empty = [domain for domain in heldout if domain not in groups]
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
    answers: AnswerSettings | None = AnswerSettings(),  # noqa: B008 - frozen
    answers_file: Path | None = None,
    routed_only: bool = False,
    command: str = "",
    report: Report = silent,
) -> dict[str, Any]:
    """Evaluates a model; writes JSON, and the tables into a model card.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        data: File of held-out rows, or folder as of ``read_domain``. The best merge is fitted on
            the training rows of a folder.
        out: JSON file of the record.
        card: Markdown file with marks between which the tables go.
        rows: Held-out rows of each domain.
        merge: How the best merge is fitted; None leaves it out.
        answers: Which answers are written and checked; None writes none.
        answers_file: JSON-lines file of the answers themselves.
        routed_only: Only the losses and the routing of the routed model, whatever ``merge`` and
            ``answers`` say: all else is the same under every router over the same experts.
        command: The command line, for the record.
        report: Gets a line now and then.

    Returns:
        The record: ``results`` by domain, and how they were made.

    Raises:
        ConfigError: If the card has no place for the tables, or there are no rows of a domain,
            or all are too long.
    """
    if card is not None:
        check_card(card)
    if routed_only:
        merge = answers = None
    domains = model.adapter_names
    heldout = {domain: read_domain(data, domain, "heldout") for domain in domains}
    training = {
        domain: read_domain(data, domain, "train")
        for domain in domains
        if has_split(data, domain, "train")
    }
    groups = _evaluation_groups(heldout, tokenizer, rows=rows)
    asked = checked_rows(heldout, tokenizer, answers, model.context_length) if answers else {}
    fit, notes = None, []
    if merge is not None:
        fit, note = _fitted_merge(model, tokenizer, training, merge, report)
        notes += [note] if note else []
    weights = None if fit is None else fit.weights
    results = evaluate(
        model,
        groups,
        pad_id(tokenizer),
        merge_weights=None if weights is None else list(weights.values()),
        routed_only=routed_only,
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
    if answers is not None:
        _write_json(out, record)  # a run that is cut off from here on has its losses
        written = write_answers(
            model, tokenizer, asked, answers, merge_weights=weights, report=report
        )
        checks = [asdict(result) for result in check_answers(written, training)]
        record["answers"] = {"settings": asdict(answers), "checks": checks}
        if answers_file is not None:
            lines = [json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in written]
            answers_file.write_text("".join(lines), encoding="utf-8")
    _write_json(out, record)
    if card is not None:
        write_into_card(card, tables(record))
    return record


def _write_json(path: Path | None, record: Mapping[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _fitted_merge(
    model: XLoraModel,
    tokenizer: Any,
    training: Mapping[str, Sequence[Row]],
    settings: MergeFitSettings,
    report: Report,
) -> tuple[MergeFit | None, str]:
    """Returns the best merge, or None and why there is none."""
    domains = model.adapter_names
    groups = example_groups(
        training, tokenizer, rows_each=settings.rows_per_domain, seed=0, with_mixed=False
    )
    missing = [domain for domain in domains if domain not in groups]
    if missing:
        return None, (
            "The best weighted merge is left out: it is fitted on training rows of at most "
            f"{EVALUATION_LENGTH} tokens in a folder, and there are none of {', '.join(missing)}."
        )
    return fit_merge(model, groups, pad_id(tokenizer), settings, report=report), ""
