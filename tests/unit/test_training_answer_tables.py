"""The table of the checks says what the record says, and no more."""

from __future__ import annotations

from typing import Any

from xlora_core.training.answer_tables import answer_section, answer_table, question_list

COLUMNS = {"base": "base", "best_merge": "best merge", "routed": "routed"}


def score(rows: int, read: int, right: int, distinct: int, error: float | None) -> dict[str, Any]:
    return {
        "rows": rows,
        "read": read,
        "right": right,
        "distinct": distinct,
        "mean_error": error,
        "median_error": error,
    }


GAP = {
    "domain": "quantum",
    "check": "gap",
    "right_when": "within 0.5 eV",
    "unit": "eV",
    "rows": 4,
    "question": "Predict the gap of `C`.",
    "arms": {"base": score(4, 1, 0, 1, 1234.5), "routed": score(4, 3, 2, 2, 1.4567)},
    "cut": {"base": 3, "routed": 0},
    "common": {"base": score(1, 1, 0, 1, 1234.5), "routed": score(1, 1, 1, 1, 0.25)},
    "usual": {"value": "9.1", "score": score(4, 4, 1, 1, 2.0)},
    "constant": {"value": "6.5", "score": score(4, 4, 2, 1, 1.0)},
}
PARSES = {
    "domain": "python",
    "check": "code",
    "right_when": "parses",
    "unit": "",
    "rows": 4,
    "question": "Write.",
    "arms": {"base": score(4, 0, 0, 0, None), "routed": score(4, 4, 4, 4, None)},
    "cut": {"base": 0, "routed": 0},
    "common": {},
    "usual": None,
    "constant": None,
}


def cells(text: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]


def test_counts_constants_errors_and_what_was_cut() -> None:
    header, ruler, right, error, common, cut, parses = cells(answer_table([GAP, PARSES], COLUMNS))
    assert header == [
        "domain", "check", "rows", "usual value", "best constant", "base", "routed",
    ]  # fmt: skip
    assert ruler[:3] == ["---", "---", "--:"]
    assert right[:3] == ["quantum", "gap: within 0.5 eV; right / read / distinct", "4"]
    assert right[3:] == ["1 (9.1)", "2 (6.5)", "0 / 1 / 1", "2 / 3 / 2"]
    assert error[1:] == ["gap: median error, eV", "4", "2.00", "1.00", "1,234", "1.46"]
    assert common[1] == "gap: right of the 1 that all were read in; median error"
    assert common[3:] == ["-", "-", "0; 1,234", "1; 0.25"]
    assert cut[1:] == ["gap: cut", "4", "-", "-", "3", "0"]
    assert parses[1:] == [
        "code: parses; right / read / distinct", "4", "-", "-", "0 / 0 / 0", "4 / 4 / 4",
    ]  # fmt: skip


def test_rows_that_all_were_read_in_need_no_line_if_they_are_all() -> None:
    all_read = GAP | {"common": {"base": score(4, 4, 0, 1, 1.0), "routed": score(4, 4, 2, 2, 1.0)}}
    names = [line[1] for line in cells(answer_table([all_read], COLUMNS))[2:]]
    assert not any("all were read" in name for name in names)


def test_questions_are_shown_as_they_were_put() -> None:
    assert question_list([GAP]) == "- quantum, gap: `Predict the gap of 'C'.`"
    answers = {"settings": {"max_new_tokens": 192}, "checks": [GAP, PARSES]}
    text = answer_section(answers, COLUMNS)
    assert "at most 192 tokens" in text
    assert "For example:\n\n- quantum" in text
    assert text.endswith(question_list([GAP, PARSES]))


def test_an_older_record_has_dashes() -> None:
    older = {
        key: value
        for key, value in GAP.items()
        if key not in ("question", "cut", "common", "usual", "constant")
    }
    older["arms"] = {"routed": {k: v for k, v in score(4, 3, 2, 2, 1.0).items() if k != "distinct"}}
    answers = {"settings": {"max_new_tokens": 192}, "checks": [older]}
    assert "For example" not in answer_section(answers, COLUMNS)
    (right, error) = cells(answer_table([older], COLUMNS))[2:]
    assert right[3:] == ["-", "-", "2 / 3 / -"]
    assert error[3:] == ["-", "-", "1.00"]
