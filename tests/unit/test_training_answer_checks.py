"""What is read out of written answers, and how it is compared."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from xlora_core.training.answer_checks import (
    CHECKS,
    Check,
    final_answer,
    homo_lumo_gap,
    isoelectric_point,
    molar_mass,
    molecular_formula,
    protein_mass,
    python_code,
    same_result,
    score,
)

PROPERTIES = "306 residues, 34.4 kDa, isoelectric point 9.45, GRAVY 0.60, aromaticity 0.14."


def check_of(domain: str, name: str) -> Check:
    return next(check for check in CHECKS[domain] if check.name == name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("43", "43"),
        (" -8211*y**4 + 2475*y**2 ", "-8211*y**4+2475*y**2"),
        ("X**9/6 - 3*X**6/2 + C", "x**9/6-3*x**6/2+c"),
        ("12*sqrt(2) + 17", "12*sqrt(2)+17"),
        ("11:08 PM", "11:08pm"),
        ("2, 6379, 166909", "2,6379,166909"),
        ("(b)", "b"),
        ("True", "true"),
        ("Yes, 10206 is a multiple of 7.", "true"),
        ("They have 28 - 12 = 16.\nThe answer is 28", "28"),
        ("First 16.\n#### 1,323", "1,323"),
        ("The answer is $25.", "25"),
        ("The final answer is 35/3876.", "35/3876"),
        ("The answer is 28 stickers.", "28"),
        ("The answer is 2 + 3 = 5.", "5"),
        ("The answer is 2*x + 1.", "2*x+1"),
        ("The answer is 3.5 - x", "3.5-x"),
        ("To solve it, subtract 95.\nSo e = 43.", "43"),
        ("The probability is 1/21, I think.", "1/21"),
        ("It falls by −7", "-7"),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_final_answers(text: str, expected: str | None) -> None:
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    ("value", "reference", "same"),
    [
        ("0.5", "1/2", True),
        ("16.0", "16", True),
        ("1,323", "1323", True),
        ("25%", "25", True),
        ("-4/3", "4/3", False),
        ("1/0", "1", False),
        ("b", "b", True),
        ("2*x", "x*2", False),
    ],
)
def test_results_are_compared_as_numbers_or_as_text(value: str, reference: str, same: bool) -> None:
    assert same_result(value, reference) is same


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Its molecular formula is C12H9N and its molar mass is 167.21 g/mol.", "C12H9N"),
        ("The molecular formula of In-doped salt is H9NC12.", "C12H9N"),
        ("The chemical formula: C₁₂H₉N", "C12H9N"),
        ("Its molecular formula is C18H38P2Pt+2 and", "C18H38P2Pt+2"),
        ("Its molecular formula is H4N+.", "H4N+1"),
    ],
)
def test_formulas_are_read_in_any_order(text: str, expected: str) -> None:
    formula = molecular_formula(text)
    assert formula is not None
    assert formula == molecular_formula(f"formula {expected}")
    assert sum(count for _, count in formula[0]) > 1


@pytest.mark.parametrize(
    "text", ["CCO is ethanol.", "I do not know the formula. I am sorry.", "formula: unknown"]
)
def test_no_formula_is_read_where_none_is_given(text: str) -> None:
    assert molecular_formula(text) is None


def test_charges_and_counts_matter() -> None:
    texts = ("formula C2H6O", "formula C2H6O2", "formula C2H6O+", "formula C2H6O-1")
    assert len({molecular_formula(text) for text in texts}) == 4


@pytest.mark.parametrize(
    ("read", "text", "expected"),
    [
        (molar_mass, "its molar mass is 167.21 g/mol.", 167.21),
        (molar_mass, "One mole of C12H9N weighs about 1,167 grams.", 1167.0),
        (molar_mass, "Its density is 1.2 g/mL, its weight 44 u", 44.0),
        (molar_mass, "It is heavy.", None),
        (protein_mass, PROPERTIES, 34.4),
        (protein_mass, "It weighs 34,400 Da.", 34.4),
        (protein_mass, "It has 306 residues.", None),
        (isoelectric_point, PROPERTIES, 9.45),
        (isoelectric_point, "The pI of MKV is about 5.2.", 5.2),
        (isoelectric_point, "The isoelectric point is unknown.\n5 is a number.", None),
        (homo_lumo_gap, "HOMO = -7.00 eV, LUMO = 0.46 eV, HOMO-LUMO gap = 7.46 eV.", 7.46),
        (homo_lumo_gap, "HOMO = -6.28 eV; LUMO = 0.25 eV; gap = 6.53 eV; ZPVE = 4.05 eV", 6.53),
        (homo_lumo_gap, "The HOMO-LUMO gap of C1C2N1 is 5.2 eV.", 5.2),
        (homo_lumo_gap, "The gap is 3 nm wide; HOMO = -6 nm.", None),
    ],
)
def test_numbers_are_read_with_their_units(
    read: Callable[[str], float | None], text: str, expected: float | None
) -> None:
    assert read(text) == expected


def test_python_is_read_from_closed_blocks() -> None:
    code = "def f(x):\n    return x\n"
    assert python_code(f"Here:\n```python\n{code}```\nDone.") == code
    assert python_code(f"```\n{code}```") == code
    assert python_code(code) == code
    assert python_code(f"```python\n{code}") is None  # cut off
    assert python_code("Sort the list first.") is None


def test_python_counts_if_it_parses_and_defines_a_function() -> None:
    check = check_of("python", "Python that parses")
    texts = ["def f():\n    return 1", "x = 1", "def f(:", "def f():\n" + "(" * 5000, "def f\0"]
    answers = [f"```python\n{text}\n```" for text in texts]
    result = score(check, [*answers, "no code"], [""] * 6)
    assert (result.rows, result.read, result.right) == (6, 5, 1)
    assert result.mean_error is None


def test_only_rows_that_ask_are_checked() -> None:
    answer = "Its molecular formula is C2H6O and its molar mass is 46.07 g/mol."
    asked, smiles = check_of("chemistry", "formula, asked by name"), "Name this molecule: CCO"
    by_smiles = check_of("chemistry", "formula, from SMILES")
    assert asked.reference("How heavy is one mole of ethanol?", answer) is not None
    assert asked.reference(smiles, answer) is None
    assert by_smiles.reference(smiles, answer) == molecular_formula(answer)
    assert by_smiles.reference("How heavy is one mole of ethanol?", answer) is None


def test_an_unread_answer_is_wrong_and_has_no_error() -> None:
    check = check_of("quantum", "HOMO-LUMO gap")
    answers = ["gap = 7.4 eV", "gap = 5.0 eV", "gap = 9.0 eV", "?"]
    result = score(check, answers, [7.0] * 4)
    assert (result.rows, result.read, result.right) == (4, 3, 1)
    assert result.mean_error == pytest.approx((0.4 + 2 + 2) / 3)
    assert result.median_error == pytest.approx(2)


def test_relative_errors_are_in_percent() -> None:
    check = check_of("protein", "protein mass")
    result = score(check, ["21 kDa", "22 kDa"], [20.0, 20.0])
    assert (result.right, result.mean_error, check.unit) == (1, pytest.approx(7.5), "%")
