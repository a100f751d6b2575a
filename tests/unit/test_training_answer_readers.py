"""Quantities, formulas and programs are read where a text states them, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from xlora_core.training.answer_readers import (
    dipole_moment,
    formula_text,
    homo_lumo_gap,
    isoelectric_point,
    molar_mass,
    molecular_formula,
    protein_mass,
    python_code,
)

PROPERTIES = "306 residues, 34.4 kDa, isoelectric point 9.45, GRAVY 0.60, aromaticity 0.14."
MOLECULE = "Dipole moment μ = 2.71 D, isotropic polarizability α = 76.2 a0^3."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HOMO = -7.00 eV, LUMO = 0.46 eV, HOMO-LUMO gap = 7.46 eV.", 7.46),
        ("HOMO = -6.28 eV; LUMO = 0.25 eV; gap = 6.53 eV; ZPVE = 4.05 eV", 6.53),
        ("The HOMO-LUMO gap of C1C2N1 is 5.2 eV.", 5.2),
        ("The HOMO–LUMO gap is about **5.2 eV**.", 5.2),
        ("The HOMO-LUMO gap is 5.2 electronvolts.", 5.2),
        ("The HOMO-LUMO gap is 5.2 electron volts.", 5.2),
        ("The gap is 1 electron-volt", 1.0),
        ("The gap is 0.25 hartree.", 0.25 * 27.211386245988),
        ("The gap is 0.25 Eh.", 0.25 * 27.211386245988),
        ("HOMO-LUMO gap: 5.2", 5.2),
        ("The HOMO-LUMO gap of C1CC1 is 5.2.", 5.2),
        ("It has a HOMO-LUMO gap of 5.2, which is large.", 5.2),
        ("The gap between the HOMO and the LUMO is 5.2.", 5.2),
        ("HOMO-LUMO = 2.00 eV.", 2.0),
        ("HOMO: -6.25 eV\nLUMO: 0.75 eV", 7.0),
        ("HOMO-LUMO gap: 1.0000000000000001.", 1.0),
    ],
)
def test_gaps(text: str, expected: float) -> None:
    assert homo_lumo_gap(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text",
    [
        "The gap is 3 nm wide; HOMO = -6 nm.",
        "The gap is wide; HOMO = -6.3 eV.",
        "The gap is 500 kJ/mol.",
        "The gap is 5 to 6 eV.",
        "The gap is 5 eV or 6 eV.",
        "The gap is 5 ± 1 eV.",
        "The gap is less than 5 eV.",
        "The gap is not 5 eV.",
        "The gap is 0.5 eV larger than that of C, 6 eV.",
        "The gap is 5 x 10^-3 eV.",
        "The gap is 10^-3 eV.",
        "The gap of 5 molecules",
        "HOMO-LUMO gap: 1.000.000.000000.",
        "HOMO = -6.3 eV",
        "The gap is 5, 6 and 7.",
    ],
)
def test_what_does_not_state_a_gap_is_not_read(text: str) -> None:
    assert homo_lumo_gap(text) is None


@pytest.mark.parametrize(
    ("read", "text", "expected"),
    [
        (dipole_moment, MOLECULE, 2.71),
        (dipole_moment, "The dipole moment of CCO is 1.7 debye.", 1.7),
        (dipole_moment, "Polarizability = 76.2; dipole moment: 0", 0.0),
        (dipole_moment, "The dipole moment is 5 C m.", None),
        (dipole_moment, "Its dipole moment and polarizability are 5 D and 7.", None),
        (molar_mass, "its molar mass is 167.21 g/mol.", 167.21),
        (molar_mass, "One mole of C12H9N weighs about 1,167 grams.", 1167.0),
        (molar_mass, "Its density is 1.2 g/mL, its weight 44 u", 44.0),
        (molar_mass, "0.167 kg/mol", 167.0),
        (molar_mass, "It is 1.11 grams per cubic milliliter.", None),
        (molar_mass, "about 1.2 x 10^3 g", None),
        (molar_mass, "The molar mass is 144.01.", 144.01),
        (molar_mass, "The molar mass is 144 to 150.", None),
        (protein_mass, "Molecular mass: 34.4\nIsoelectric point: 9.45", 34.4),
        (molar_mass, "It is heavy.", None),
        (protein_mass, PROPERTIES, 34.4),
        (protein_mass, "It weighs 34,400 Da.", 34.4),
        (protein_mass, "34,400 g/mol", 34.4),
        (protein_mass, "It has 306 residues.", None),
        (isoelectric_point, PROPERTIES, 9.45),
        (isoelectric_point, "The pI of MKV is about 5.2.", 5.2),
        (isoelectric_point, "The isoelectric point (pI) of it is pH 5.2", 5.2),
        (isoelectric_point, "The isoelectric point of 164 residues is 5.2.", 5.2),
        (isoelectric_point, "The isoelectric point is unknown.\n5 is a number.", None),
        (isoelectric_point, "pi = 3.14", None),
    ],
)
def test_numbers_are_read_with_their_units(
    read: Callable[[str], float | None], text: str, expected: float | None
) -> None:
    assert read(text) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Its molecular formula is C12H9N and its molar mass is 167.21 g/mol.", "C12H9N"),
        ("The molecular formula of In-doped salt is H9NC12.", "C12H9N"),
        ("The chemical formula: C₁₂H₉N", "C12H9N"),
        ("The molecular formula is **C_{12}H_9N**.", "C12H9N"),
        ("The molecular formula of CCCCC(C)CC is C8H18.", "C8H18"),
        ("The molecular formula of CCO is C2H6O.", "C2H6O"),
        ("a compound with molecular formula C10H12. Its molar mass", "C10H12"),
        ("Its molecular formula is C18H38P2Pt+2 and", "C18H38P2Pt+2"),
        ("Its molecular formula is H4N+.", "H4N+"),
    ],
)
def test_formulas_are_read_in_any_order(text: str, expected: str) -> None:
    formula = molecular_formula(text)
    assert formula is not None
    assert formula_text(formula) == expected


@pytest.mark.parametrize(
    "text",
    [
        "CCO is ethanol.",
        "I do not know the formula. I am sorry.",
        "formula: unknown",
        "The molecular formula of C1CCC(C)CC1 is 100.144 grams per mole.",
        "The formula of C2H6O",
    ],
)
def test_no_formula_is_read_where_none_is_given(text: str) -> None:
    assert molecular_formula(text) is None


def test_charges_and_counts_matter() -> None:
    texts = ("formula C2H6O", "formula C2H6O2", "formula C2H6O+", "formula C2H6O-1")
    assert len({molecular_formula(text) for text in texts}) == 4


def test_python_is_read_from_closed_blocks() -> None:
    code = "def f(x):\n    return x\n"
    assert python_code(f"Here:\n```python\n{code}```\nDone.") == code
    assert python_code(f"```\n{code}```") == code
    assert python_code(code) == code
    assert python_code(f"```python\n{code}") is None  # cut off
    assert python_code("Sort the list first.") is None
