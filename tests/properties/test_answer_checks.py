"""Whatever a model writes is read or not read, and no other number than the stated one is read."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given, settings

from xlora_core.training.answer_checks import CHECKS, Check, most_covered, score
from xlora_core.training.answer_readers import (
    dipole_moment,
    homo_lumo_gap,
    isoelectric_point,
    molar_mass,
    molecular_formula,
    protein_mass,
)
from xlora_core.training.final_answers import final_answer, same_result

EXAMPLES = settings(max_examples=100, deadline=None, database=None)
ALL = [check for checks in CHECKS.values() for check in checks]
WORDS = st.sampled_from(
    [
        "The answer is", "####", r"\boxed{", "}", "**", "formula", "gap", "HOMO", "LUMO", "pI",
        "is", "=", "mass", "```python\n", "```", "def f():", "eV", "hartree", "Da", "g/mol", "D",
    ]
)  # fmt: skip
TEXTS = st.lists(WORDS | st.text(max_size=12) | st.floats().map(str), max_size=8).map(" ".join)
INTEGERS = st.integers(-(10**9), 10**9)
QUANTITIES = st.decimals(0, 999, places=2, allow_nan=False).map(float)
# A result is stated in any of these forms, beside another number.
STATED = st.sampled_from(
    [
        "{n}", "x = {n}", "${n}$", "$x={n}$", "**{n}**", r"\boxed{{{n}}}", "The answer is {n}.",
        "The answer is **{n}**.", "After {m} steps the answer is {n} apples.", "#### {n}",
        "{m} + 1 = {n}", "{m} = {n}", "So, {m} + 2 = {m} = {n}.", "It takes {m} days.\nSo x = {n}.",
        "The answer is {n}. Indeed {m} = {m}.", "The answer is x = {n}, because y = {m}.",
    ]
)  # fmt: skip
# These commit themselves to nothing.
UNCOMMITTED = st.sampled_from(
    [
        "The answer is {n} or {m}.", "The answer is not {n}.", "The answer is between {n} and {m}.",
        "The answer is more than {n}.", "The answer is {n} times {m}.", "x = {n}, y = {m}",
        "The answer is {n} million.", "It may be {n} or {m}.", "We now add {n} + {m}",
    ]
)  # fmt: skip


@pytest.mark.parametrize("check", ALL, ids=lambda check: check.name)
@given(text=TEXTS)
@EXAMPLES
def test_any_text_can_be_scored(check: Check, text: str) -> None:
    value = check.read(text)
    result = score(check, [value], [value])
    assert result.read == result.distinct == (value is not None)
    assert result.right <= result.read
    if check.name != "Python that parses" and value is not None:
        assert result.right == 1  # a value agrees with itself
        assert result.mean_error in (None, 0)


@given(form=STATED, n=INTEGERS, m=INTEGERS)
@EXAMPLES
def test_the_stated_result_is_read_and_no_other_number(form: str, n: int, m: int) -> None:
    assume(n != m)
    read = final_answer(form.format(n=n, m=m))
    assert read is not None
    assert same_result(read, str(n))
    assert not same_result(read, str(m))


@given(form=UNCOMMITTED, n=INTEGERS, m=INTEGERS)
@EXAMPLES
def test_a_result_that_is_not_stated_is_not_read(form: str, n: int, m: int) -> None:
    assert final_answer(form.format(n=n, m=m)) is None


@given(number=INTEGERS, below=st.integers(1, 10**6))
@EXAMPLES
def test_numbers_are_the_same_however_they_are_written(number: int, below: int) -> None:
    read = final_answer(f"#### {number:,}")
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
    for text in ("Its formula is {}.", "The formula of CC(C)CO is **{}**.", "formula: {}"):
        assert molecular_formula(text.format(formula)) == (frozenset(atoms.items()), "")


READERS: list[tuple[Callable[[str], float | None], str, str]] = [
    (homo_lumo_gap, "HOMO-LUMO gap", "eV"),
    (dipole_moment, "dipole moment", "D"),
    (isoelectric_point, "isoelectric point", ""),
    (molar_mass, "molar mass", "g/mol"),
    (protein_mass, "molecular mass", "kDa"),
]


@pytest.mark.parametrize(("read", "name", "unit"), READERS)
@given(value=QUANTITIES, other=QUANTITIES)
@EXAMPLES
def test_a_stated_quantity_is_read_back(
    read: Callable[[str], float | None], name: str, unit: str, value: float, other: float
) -> None:
    for form in (
        "{name} = {n} {unit}.",
        "The {name} is {n} {unit}.",
        "The {name} of C1CC{m}1 is about **{n} {unit}**, and that is all.",
        "At {m} K, the {name}: {n} {unit}",
        "The {name} is {n}.",
    ):
        text = form.format(name=name, unit=unit, n=f"{value:.2f}", m=f"{other:.0f}")
        assert read(text) == pytest.approx(value), text


@pytest.mark.parametrize(("read", "name", "unit"), READERS)
@given(value=QUANTITIES, other=QUANTITIES)
@EXAMPLES
def test_a_number_of_something_else_is_not_read(
    read: Callable[[str], float | None], name: str, unit: str, value: float, other: float
) -> None:
    for form in (
        "The {name} is {n} furlongs.",
        "The {name} is between {n} and {m} furlongs.",
        "The {name} is {n} to {m} {unit}.",
        "The {name} is {n} x 10^{m}",
        "The {name} is large.\n{n} molecules were seen.",
        "The {name} is not known; {n} others are.",
    ):
        text = form.format(name=name, unit=unit, n=f"{value:.2f}", m=f"{other:.2f}")
        assert read(text) is None, text


@given(gap=st.floats(0, 1).map(lambda value: round(value, 4)))
@EXAMPLES
def test_hartrees_are_converted(gap: float) -> None:
    for unit in ("hartree", "Hartrees", "Ha", "Eh"):
        read = homo_lumo_gap(f"The HOMO-LUMO gap is {gap:.4f} {unit}.")
        assert read == pytest.approx(gap * 27.211386245988)


@given(references=st.lists(st.floats(1, 100), min_size=1, max_size=20), other=st.floats(0, 110))
@EXAMPLES
def test_no_constant_is_right_more_often_than_the_best(
    references: list[float], other: float
) -> None:
    def right(constant: float) -> int:
        return sum(abs(constant - reference) <= 0.5 + 1e-9 for reference in references)

    best = right(most_covered([(value - 0.5, value + 0.5) for value in references]))
    assert all(right(constant) <= best for constant in (other, *references))
