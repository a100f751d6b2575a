"""The tables of an evaluation say what the record says."""

from __future__ import annotations

from typing import Any

import pytest

from xlora_core.training.answer_tables import answer_section
from xlora_core.training.tables import expert_table, merge_table, table, tables


def result(own: float | None, **losses: float) -> dict[str, Any]:
    return {
        "tokens": 10,
        "losses": {name.replace("_of_", ":"): loss for name, loss in losses.items()},
        "right_mass": own,
        "right_top": own,
        "entropy": 0.25,
    }


RESULTS = {
    "math": result(
        0.8,
        base=3.0,
        uniform=2.0,
        best_merge=1.9,
        expert_of_math=1.0,
        expert_of_law=2.5,
        right=1.0,
        routed=1.1,
    ),
    "law": result(
        0.6,
        base=3.0,
        uniform=2.0,
        best_merge=1.5,
        expert_of_math=1.9,
        expert_of_law=1.95,
        right=1.95,
        routed=1.6,
    ),
    "mixed": result(
        0.7,
        base=9.0,
        uniform=9.0,
        best_merge=9.0,
        expert_of_math=9.0,
        expert_of_law=9.0,
        right=9.0,
        routed=9.0,
    ),
}
CHECK = {
    "domain": "quantum",
    "check": "gap",
    "right_when": "the same",
    "unit": "",
    "rows": 4,
    "question": "Predict the gap.",
    "arms": {"routed": {"rows": 4, "read": 3, "right": 1, "distinct": 2, "median_error": None}},
    "cut": {"routed": 0},
    "common": {},
    "usual": None,
    "constant": None,
}
ANSWERS = {"settings": {"rows": 4, "max_new_tokens": 192}, "checks": [CHECK]}
RECORD = {
    "command": "xlora eval --data rows",
    "versions": {"torch": "2"},
    "dtype": "float32",
    "rows_per_domain": 4,
    "max_length": 288,
    "results": RESULTS,
    "merge": {"weights": {"math": 0.5, "law": -0.25}, "losses": [2.0], "rows": 9},
    "answers": ANSWERS,
    "notes": ["Something is missing."],
}


def cells(text: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]


def test_losses_and_routing() -> None:
    header, _, math, law, _, mean = cells(table(RESULTS))
    assert header[2:7] == ["base", "uniform merge", "best merge", "routed", "right expert"]
    assert math[:5] == ["math", "10", "3.000", "2.000", "1.900"]
    assert math[5:] == ["**1.100**", "1.000", "0.80", "80%", "0.25"]
    assert law[4:6] == ["**1.500**", "1.600"]
    # the rows that change domain are not in the mean
    assert mean[:7] == ["mean of domains", "-", "3.000", "2.000", "1.700", "**1.350**", "1.475"]
    assert mean[7:] == ["0.70", "70%", "0.25"]


def test_what_is_unknown_is_a_dash() -> None:
    losses = {"base": 1.0, "uniform": 1.0, "expert:math": 1.0, "routed": 1.0}
    row = {"tokens": 1, "losses": losses, "right_mass": None, "right_top": None, "entropy": 1.0}
    assert cells(table({"cooking": row}))[2][5:] == ["-", "-", "-", "1.00"]


def test_an_own_expert_is_bold_only_where_it_is_the_best() -> None:
    header, _, math, law, mixed, mean = cells(expert_table(RESULTS))
    assert header == ["domain", "math", "law"]
    assert math == ["math", "**1.00**", "2.50"]
    assert law == ["law", "1.90", "1.95"]
    assert mixed == ["mixed", "9.00", "9.00"]
    assert mean == ["mean of domains", "1.45", "2.23"]


def test_weights_and_their_sum() -> None:
    assert cells(merge_table({"math": 0.5, "law": -0.25}))[2] == ["weight", "0.50", "-0.25", "0.25"]


def test_all_tables_stand_together_with_what_made_them() -> None:
    text = tables(RECORD)
    for part in (
        table(RESULTS),
        expert_table(RESULTS),
        answer_section(ANSWERS, {"routed": "routed"}),
    ):
        assert f"\n\n{part}\n\n" in text
    assert "fitted on 9 training rows" in text
    assert "\n\nSomething is missing.\n\n" in text
    assert text.endswith("; 30 answer tokens; float32; torch 2.")
    assert "`xlora eval --data rows`" in text


@pytest.mark.parametrize("missing", ["merge", "answers", "notes"])
def test_what_was_not_measured_is_not_shown(missing: str) -> None:
    record = {key: value for key, value in RECORD.items() if key != missing}
    assert len(tables(record)) < len(tables(RECORD))
