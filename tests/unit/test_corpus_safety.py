"""What the experts are not taught: read structures, recognised classes, harmless relatives."""

from __future__ import annotations

import doctest

import pytest

from sample_data.build import rows, safety, smiles
from sample_data.build.domains import law, verse
from sample_data.build.safety import reason_to_leave_out
from sample_data.build.smiles import atoms


@pytest.mark.parametrize("module", [law, rows, safety, smiles, verse], ids=lambda m: m.__name__)
def test_the_examples_in_docstrings(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted
    assert not result.failed


def test_a_ring_with_branches_and_charges() -> None:
    nitrobenzene = atoms("c1ccc(cc1)[N+](=O)[O-]")
    assert [atom.element for atom in nitrobenzene] == ["C"] * 6 + ["N", "O", "O"]
    assert nitrobenzene[3].bonds == {2: 1, 4: 1, 6: 1}
    assert nitrobenzene[5].bonds == {4: 1, 0: 1}
    assert nitrobenzene[6].bonds == {3: 1, 7: 2, 8: 1}
    assert (nitrobenzene[6].charge, nitrobenzene[8].charge) == (1, -1)


@pytest.mark.parametrize(
    ("text", "elements"),
    [
        ("[13CH4]", ["C"]),
        ("[C@@H](F)(Cl)Br", ["C", "F", "Cl", "Br"]),
        ("[nH]1cccc1", ["N", "C", "C", "C", "C"]),
        ("[Na+].[Cl-]", ["Na", "Cl"]),
        ("C/C=C\\C", ["C"] * 4),
        ("C%10CC%10", ["C"] * 3),
        ("[se]1cccc1", ["Se", "C", "C", "C", "C"]),
        ("[Fe+3]", ["Fe"]),
    ],
)
def test_notations(text: str, elements: list[str]) -> None:
    assert [atom.element for atom in atoms(text)] == elements


def test_a_dot_parts_and_a_ring_number_is_used_again() -> None:
    salt = atoms("[Na+].[Cl-]")
    assert [atom.bonds for atom in salt] == [{}, {}]
    assert [atom.charge for atom in salt] == [1, -1]
    twice = atoms("C1CC1C1CC1")
    assert twice[5].bonds == {4: 1, 3: 1}


@pytest.mark.parametrize("text", ["C1CC", "C(C", "C)C", "Qx", "[]", "1CC"])
def test_what_is_no_structure_is_refused_and_left_out(text: str) -> None:
    with pytest.raises(ValueError, match="."):
        atoms(text)
    assert reason_to_leave_out(text) == "structure that cannot be read"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("CC(C)OP(=O)(C)F", "nerve agent or relative"),
        ("CCOP(=O)(C#N)N(C)C", "nerve agent or relative"),
        ("CCOP(=O)(C)SCCN(C(C)C)C(C)C", "nerve agent or relative"),
        ("C(CCl)SCCCl", "mustard"),
        ("CN(CCCl)CCCl", "mustard"),
        ("CN(CCBr)CCBr", "mustard"),
        ("C(=C[As](Cl)Cl)Cl", "arsenical"),
        ("C(C(CO[N+](=O)[O-])O[N+](=O)[O-])O[N+](=O)[O-]", "nitrate ester"),
        ("CC1=C(C=C(C=C1N(=O)=O)N(=O)=O)N(=O)=O", "polynitro compound"),
        ("C1N(CN(CN1[N+](=O)[O-])[N+](=O)[O-])[N+](=O)[O-]", "polynitro compound"),
        ("CC1(OOC(OOC(OO1)(C)C)(C)C)C", "peroxide explosive"),
    ],
)
def test_agents_and_explosives_are_left_out(text: str, reason: str) -> None:
    assert reason_to_leave_out(text) == reason


@pytest.mark.parametrize(
    "text",
    [
        "O",
        "C(=O)(C(F)(F)F)O",
        "OP(=O)(O)O",
        "CCOP(=S)(OCC)OC1=NC(=C(C=C1Cl)Cl)Cl",  # a phosphorothioate pesticide
        "COP(=S)(OC)SCC(=O)NC",  # S-C-C(=O)-N, an amide
        "C1=CC(=C(C=C1[N+](=O)[O-])O)[N+](=O)[O-]",  # two nitro groups
        "[N+](=O)([O-])[O-].[Ag+]",  # a nitrate, no ester
        "ClCCCl",
        "C(CCl)S(=O)(=O)CCCl",  # a sulphone
        "CC(C)(C)OOC(C)(C)C",  # one peroxide bridge
        "CN1C=NC2=C1C(=O)N(C(=O)N2C)C",
    ],
)
def test_relatives_stay(text: str) -> None:
    assert reason_to_leave_out(text) == ""
