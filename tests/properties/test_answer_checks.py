"""Whatever a model writes is read or not read; what the project itself writes is read back."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from xlora_core.training.answer_checks import (
    CHECKS,
    Check,
    final_answer,
    homo_lumo_gap,
    molecular_formula,
    same_result,
    score,
)

EXAMPLES = settings(max_examples=100, deadline=None, database=None)
ALL = [check for checks in CHECKS.values() for check in checks]
WORDS = st.sampled_from(
    ["The answer is", "####", "formula", "gap", "pI", "```python\n", "```", "def f():", "eV", "Da"]
)
TEXTS = st.lists(WORDS | st.text(max_size=12) | st.floats().map(str), max_size=8).map(" ".join)


@pytest.mark.parametrize("check", ALL, ids=lambda check: check.name)
@given(text=TEXTS)
@EXAMPLES
def test_any_text_can_be_scored(check: Check, text: str) -> None:
    value = check.read(text)
    result = score(check, [text], [value])
    assert result.read == (value is not None)
    assert result.right <= result.read
    if check.name != "Python that parses" and value is not None:
        assert result.right == 1  # a value agrees with itself
        assert result.mean_error in (None, 0)


@given(number=st.integers(-(10**9), 10**9), below=st.integers(1, 10**6))
@EXAMPLES
def test_numbers_are_the_same_however_they_are_written(number: int, below: int) -> None:
    for text in (f"{number}", f"So it is {number}.", f"The answer is {number}", f"####{number:,}"):
        read = final_answer(text)
        assert read is not None
        assert same_result(read, str(number))
        assert not same_result(read, str(number + 1))
    assert same_result(f"{number * 2}/{below * 2}", f"{number}/{below}")


@given(
    atoms=st.dictionaries(
        st.sampled_from(["C", "H", "N", "O", "Cl", "Na", "Si", "Pt"]),
        st.integers(2, 99),
        min_size=1,
    ),
    data=st.data(),
)
@EXAMPLES
def test_formulas_do_not_depend_on_the_order(atoms: dict[str, int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(sorted(atoms)))
    formula = "".join(f"{element}{atoms[element]}" for element in order)
    assert molecular_formula(f"Its formula is {formula}.") == (frozenset(atoms.items()), "")


@given(gap=st.floats(0, 30).map(lambda value: round(value, 2)))
@EXAMPLES
def test_gaps_are_read_back(gap: float) -> None:
    text = f"HOMO = -6.20 eV, LUMO = 0.42 eV, HOMO-LUMO gap = {gap:.2f} eV."
    assert homo_lumo_gap(text) == gap
