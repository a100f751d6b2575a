"""What is asked of the arms, and how values are scored."""

from __future__ import annotations

import pytest

from tests.training_models import row
from xlora_core.training.answer_checks import CHECKS, Check, most_covered, outright, score

SEQUENCE = "MKV" * 12
ASKS_PROTEIN = "Compute the molecular mass in kDa and the isoelectric point of this protein:\n"
FORMULA = "Its molecular formula is C2H6O and its molar mass is 46.07 g/mol."
PROTEIN = "36 residues, 4.1 kDa, isoelectric point 9.45, GRAVY 0.60."
GAP = "HOMO = -7.00 eV, LUMO = 0.46 eV, HOMO-LUMO gap = 7.46 eV."


def check_of(domain: str, name: str) -> Check:
    return next(check for check in CHECKS[domain] if check.name == name)


def asked(domain: str, question: str, answer: str) -> dict[str, str]:
    """Returns what a row is checked for -> the reference."""
    put = outright(row(question, answer, domain), domain)
    values = {check: check.reference(put.user, put.assistant) for check in CHECKS[domain]}
    return {check.name: check.show(v) for check, v in values.items() if v is not None}


@pytest.mark.parametrize(
    ("domain", "question", "put"),
    [
        (
            "chemistry",
            "How heavy is one mole of ethanol?",
            "What is the molecular formula and molar mass of ethanol?",
        ),
        (
            "chemistry",
            "Name this molecule: C[N+](C)C",
            "What is the molecular formula and molar mass of C[N+](C)C?",
        ),
        (
            "chemistry",
            "SMILES: CCO\nWhat is the IUPAC name?",
            "What is the molecular formula and molar mass of CCO?",
        ),
        (
            "quantum",
            "Compute the frontier orbital energies of CCO at the B3LYP level.",
            "Predict the HOMO-LUMO gap of CCO.",
        ),
        ("quantum", "QM9 properties for CCO:", "Predict the HOMO-LUMO gap of CCO."),
        ("quantum", "What is the dipole moment of CCO?", "What is the dipole moment of CCO?"),
        (
            "protein",
            f"Protein sequence:\n{SEQUENCE}…\nWhat is this protein?",
            f"{ASKS_PROTEIN}{SEQUENCE}…",
        ),
        ("math", "2 + 2?", "2 + 2?"),
    ],
)
def test_questions_are_put_so_that_they_name_what_is_checked(
    domain: str, question: str, put: str
) -> None:
    assert outright(row(question, "", domain), domain).user == put
    assert outright(row(put, "", domain), domain).user == put


def test_only_what_a_question_names_is_checked() -> None:
    by_name = {"formula, from a name": "C2H6O", "molar mass, from a name": "46.07"}
    by_smiles = {"formula, from SMILES": "C2H6O", "molar mass, from SMILES": "46.07"}
    assert asked("chemistry", "How heavy is one mole of ethanol?", FORMULA) == by_name
    assert asked("chemistry", "Which compound has the SMILES string CCO?", FORMULA) == by_smiles
    aromatic = "Name this molecule: c1cc(Cl)ncc1[N+](=O)[O-]"
    assert asked("chemistry", aromatic, FORMULA) == by_smiles
    name = "How heavy is one mole of 1-(4-nitrophenyl)indeno[1,2-b]azirin-6-one?"
    assert asked("chemistry", name, FORMULA) == by_name
    # the answers give formulas, too, but nobody asks for one
    assert asked("chemistry", "Describe the compound ethanol.", FORMULA) == {}
    assert asked("chemistry", "Write the SMILES of ethanol.", FORMULA) == {}
    assert asked("quantum", "List the quantum-chemical properties of CCO.", GAP) == {
        "HOMO-LUMO gap": "7.46"
    }
    assert asked("quantum", "What is the heat capacity of CCO at 298 K?", GAP) == {}
    python = ("```python\ndef f(): ...\n```", "Python that parses")
    assert list(asked("python", "Write a Python function.", python[0])) == [python[1]]
    assert asked("python", "What is the drag of a whale?", python[0]) == {}


def test_the_mass_of_a_protein_is_asked_only_of_whole_sequences() -> None:
    point = {"isoelectric point": "9.45"}
    whole = {"mass, whole sequence": "4.1", **point}
    assert asked("protein", f"Annotate this amino acid sequence: {SEQUENCE}", PROTEIN) == whole
    assert asked("protein", f"Annotate this amino acid sequence: {SEQUENCE}…", PROTEIN) == point


def test_python_counts_if_it_parses_and_defines_a_function() -> None:
    check = check_of("python", "Python that parses")
    texts = ["def f():\n    return 1", "x = 1", "def f(:", "def f():\n" + "(" * 5000, "def f\0"]
    values = [check.read(f"```python\n{text}\n```") for text in texts]
    result = score(check, [*values, check.read("no code")], [""] * 6)
    assert (result.rows, result.read, result.right) == (6, 5, 1)
    assert result.mean_error is None


def test_an_unread_answer_is_wrong_and_has_no_error() -> None:
    check = check_of("quantum", "HOMO-LUMO gap")
    result = score(check, [7.4, 5.0, 9.0, None, 5.0], [7.0] * 5)
    assert (result.rows, result.read, result.right, result.distinct) == (5, 4, 1, 3)
    assert result.mean_error == pytest.approx((0.4 + 2 + 2 + 2) / 4)
    assert result.median_error == pytest.approx(2)


def test_relative_errors_are_in_percent() -> None:
    check = check_of("protein", "mass, whole sequence")
    result = score(check, [21.0, 22.0], [20.0, 20.0])
    assert (result.right, result.mean_error, check.unit) == (1, pytest.approx(7.5), "%")


def test_the_best_constant_is_right_for_the_most() -> None:
    gap = check_of("quantum", "HOMO-LUMO gap").constant
    assert gap is not None
    # the median, 7, would be right for one
    assert gap([5.0, 5.2, 5.4, 7.0, 9.0, 10.0, 11.0]) == pytest.approx(5.2)
    mass = check_of("protein", "mass, whole sequence").constant
    assert mass is not None
    assert mass([100.0, 104.0, 50.0]) == pytest.approx((0.95 * 104 + 1.05 * 100) / 2)
    exact = check_of("math", "final answer").constant
    assert exact is not None
    assert exact(["2", "true", "true", "5"]) == "true"
    assert check_of("python", "Python that parses").constant is None


def test_of_several_best_constants_it_is_the_one_in_the_midst() -> None:
    assert most_covered([(0, 1), (4, 5), (9, 10)]) == 4.5
    assert most_covered([(3, 3)]) == 3
