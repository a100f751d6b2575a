"""Questions are chosen that are checked, for every check as many."""

from __future__ import annotations

from collections import Counter

from tests.tiny_chat import tiny_tokenizer
from tests.training_models import row
from xlora_core.training.answer_questions import AnswerSettings, checked_rows

SETTINGS = AnswerSettings(rows=3, max_new_tokens=6)
SUMS = [row(f"{i} + {i}?", str(2 * i)) for i in range(3)]


def test_rows_are_chosen_that_are_checked_and_fit() -> None:
    tokenizer = tiny_tokenizer()
    rows = {
        "math": [*SUMS, row("long?", "123456789" * 3), row("", "plain text")],
        "quantum": [row("Predict the HOMO-LUMO gap of C.", "no gap", "quantum")],
        "verse": [row("Sing.", "la la", "verse")],
    }
    chosen = checked_rows(rows, tokenizer, SETTINGS, 128)
    assert list(chosen) == ["math"]
    assert sorted(r.id for r in chosen["math"]) == ["0 + 0?", "1 + 1?", "2 + 2?"]
    assert chosen == checked_rows(rows, tokenizer, SETTINGS, 128)
    one = AnswerSettings(rows=1, max_new_tokens=6)
    assert checked_rows(rows, tokenizer, one, 128)["math"] == chosen["math"][:1]
    assert checked_rows(rows, tokenizer, SETTINGS, 20) == {}  # no room for the prompt


def test_a_frequent_question_leaves_room_for_a_rare_one() -> None:
    gaps = [row(f"QM9 properties for {'C' * n}:", "gap = 7 eV", "quantum") for n in range(1, 9)]
    dipoles = [row("What is the dipole moment of CO?", "dipole = 1 D", "quantum")]
    settings = AnswerSettings(rows=2, max_new_tokens=64)
    (chosen,) = checked_rows(
        {"quantum": [*gaps, *dipoles]}, tiny_tokenizer(), settings, 512
    ).values()
    kinds = Counter(put.user.partition(" of ")[0] for put in chosen)
    assert kinds == {"Predict the HOMO-LUMO gap": 2, "What is the dipole moment": 1}
