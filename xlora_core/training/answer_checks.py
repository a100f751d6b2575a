"""What answers are checked for, how questions ask for it, and how values are scored.

A check covers only questions that ask for its quantity in so many words, so that an arm that was
never trained on the rows knows what is wanted. Where a domain's rows give a quantity that their
questions do not name, its questions are put anew (``REWORDINGS``). The reference is always the
row's own answer, read the same way.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_changes
from typing import Any

from xlora_core.training.answer_readers import (
    defines_a_function,
    dipole_moment,
    formula_text,
    homo_lumo_gap,
    isoelectric_point,
    molar_mass,
    molecular_formula,
    protein_mass,
    python_code,
)
from xlora_core.training.data import Row
from xlora_core.training.final_answers import final_answer, same_result


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that answers of a domain are checked for.

    Attributes:
        name: What is checked, such as ``"HOMO-LUMO gap"``.
        right_when: When an answer counts as right, such as ``"within 0.5 eV"``.
        asks: Regular expression of the questions that ask for it.
        read: Text of an answer -> its value; None if there is none in it.
        agrees: Value and reference -> whether the value is right.
        error: Value and reference -> how far off; None for values that are right or wrong only.
        unit: Of the error.
        show: Value -> its text; two values are the same if their texts are.
        constant: References -> the value that is right for most of them; None where a constant
            means nothing.
        at_the_end: Whether the value is what an answer ends in, so that one that was cut has none.
    """

    name: str
    right_when: str
    asks: str
    read: Callable[[str], Any]
    agrees: Callable[[Any, Any], bool]
    error: Callable[[float, float], float] | None = None
    unit: str = ""
    show: Callable[[Any], str] = str
    constant: Callable[[Sequence[Any]], Any] | None = None
    at_the_end: bool = False

    def reference(self, question: str, answer: str) -> Any:
        """Returns the value of a row's own answer; None where its question does not ask for it."""
        if not re.search(self.asks, question, flags=re.IGNORECASE):
            return None
        return self.read(answer)


@dataclass(frozen=True, kw_only=True)
class Score:
    """How answers did in a check.

    Attributes:
        rows: Number of answers.
        read: In how many a value could be read.
        right: Number of right ones; one that cannot be read is wrong.
        distinct: Number of different values.
        mean_error: Mean error of those that could be read; None without any, or without an error.
        median_error: Their median error.
    """

    rows: int
    read: int
    right: int
    distinct: int
    mean_error: float | None
    median_error: float | None


def score(check: Check, values: Sequence[Any], references: Sequence[Any]) -> Score:
    """Scores values against the references of the same rows; None could not be read."""
    pairs = [(v, r) for v, r in zip(values, references, strict=True) if v is not None]
    errors = [check.error(*pair) for pair in pairs] if check.error else []
    return Score(
        rows=len(values),
        read=len(pairs),
        right=sum(check.agrees(*pair) for pair in pairs),
        distinct=len({check.show(value) for value, _ in pairs}),
        mean_error=statistics.fmean(errors) if errors else None,
        median_error=statistics.median(errors) if errors else None,
    )


def outright(row: Row, domain: str) -> Row:
    """Returns a row whose question names what is checked, as far as ``REWORDINGS`` has it."""
    for pattern, question in REWORDINGS.get(domain, ()):
        found = re.search(pattern, row.user)
        if found:
            return with_changes(row, user=question.format(found[1]))
    return row


# ---------------------------------------------------------------- comparing


def _absolute(value: float, reference: float) -> float:
    return abs(value - reference)


def _percent(value: float, reference: float) -> float:
    return 100 * abs(value - reference) / max(abs(reference), 1e-9)


def most_covered(ranges: Sequence[tuple[float, float]]) -> float:
    """Returns the middle of what lies in the most ranges; of several such, the one in the midst.

    Args:
        ranges: Lowest and highest value that each reference accepts; not empty.

    Examples:
        >>> most_covered([(0, 2), (1, 3), (5, 7)])
        1.5
    """
    ends = sorted([(low, -1) for low, _ in ranges] + [(high, 1) for _, high in ranges])
    depth, best = 0, 0
    middles: list[float] = []
    for (value, kind), (after, _) in zip(ends, [*ends[1:], ends[-1]], strict=True):
        depth -= kind
        if depth > best:
            best, middles = depth, []
        if depth == best and kind < 0:
            middles.append((value + after) / 2)
    midst = statistics.median(low + high for low, high in ranges) / 2
    return min(middles, key=lambda middle: abs(middle - midst))


def _number_check(
    name: str,
    asks: str,
    read: Callable[[str], float | None],
    *,
    within: float,
    unit: str,
) -> Check:
    error = _percent if unit == "%" else _absolute

    def accepted(reference: float) -> tuple[float, float]:
        width = within * abs(reference) / 100 if unit == "%" else within
        return reference - width, reference + width

    return Check(
        name=name,
        right_when=f"within {within:g} {unit}",
        asks=asks,
        read=read,
        agrees=lambda value, reference: error(value, reference) <= within + 1e-9,
        error=error,
        unit=unit,
        show="{:.4g}".format,
        constant=lambda references: most_covered([accepted(value) for value in references]),
    )


def _exact_check(
    name: str,
    asks: str,
    read: Callable[[str], Any],
    *,
    agrees: Callable[[Any, Any], bool],
    show: Callable[[Any], str] = str,
    at_the_end: bool = False,
) -> Check:
    return Check(
        name=name,
        right_when="the same",
        asks=asks,
        read=read,
        agrees=agrees,
        show=show,
        constant=lambda references: Counter(references).most_common(1)[0][0],
        at_the_end=at_the_end,
    )


def _formula_check(name: str, asks: str) -> Check:
    return _exact_check(
        name,
        asks,
        molecular_formula,
        agrees=lambda value, reference: bool(value == reference),
        show=formula_text,
    )


# ---------------------------------------------------------------- what is asked

_FORMULA_AND_MASS = "What is the molecular formula and molar mass of "
# Elements that need no brackets, atoms in brackets, bonds, branches and rings.
_SMILES = r"(?-i:(?:\[[^\]\s]+\]|Cl|Br|[BCNOPSFIbcnops]|[-=#$/\\()%.:+@\d])+)"
_GIVES_SMILES = r"(?:Name this molecule: |Which compound has the SMILES string |SMILES: )"
_GAP = "Predict the HOMO-LUMO gap of "
_GIVES_ORBITALS = (
    "(?:What are the HOMO and LUMO energies of the molecule |Compute the frontier orbital energies "
    "of |List the quantum-chemical properties of |QM9 properties for )"
)
_OF_PROTEIN = "Compute the molecular mass in kDa and the isoelectric point of this protein:\n"

# Domain -> question that leaves out what is checked, what it is about in brackets -> question
# that names it.
REWORDINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "chemistry": (
        (r"^How heavy is one mole of (.+)\?$", _FORMULA_AND_MASS + "{}?"),
        (
            rf"^{_GIVES_SMILES}(\S+?)\??(?:\s*\nWhat is the IUPAC name\?)?$",
            _FORMULA_AND_MASS + "{}?",
        ),
    ),
    "quantum": ((rf"^{_GIVES_ORBITALS}(\S+?)(?: at the B3LYP level)?[.?:]$", _GAP + "{}."),),
    "protein": ((r"(?<![A-Z])([A-Z]{30,}…?)(?![A-Z…])", _OF_PROTEIN + "{}"),),
}

_BY_NAME = rf"^{_FORMULA_AND_MASS}(?!{_SMILES}\?$)"
_BY_SMILES = rf"^{_FORMULA_AND_MASS}{_SMILES}\?$"

# Domain -> what its answers are checked for. A domain without checks is not here.
CHECKS: dict[str, tuple[Check, ...]] = {
    "math": (_exact_check("final answer", "", final_answer, agrees=same_result, at_the_end=True),),
    "chemistry": (
        _formula_check("formula, from a name", _BY_NAME),
        _number_check("molar mass, from a name", _BY_NAME, molar_mass, within=1, unit="%"),
        _formula_check("formula, from SMILES", _BY_SMILES),
        _number_check("molar mass, from SMILES", _BY_SMILES, molar_mass, within=1, unit="%"),
    ),
    "quantum": (
        _number_check("HOMO-LUMO gap", "HOMO-LUMO gap", homo_lumo_gap, within=0.5, unit="eV"),
        _number_check("dipole moment", r"dipole moment", dipole_moment, within=0.5, unit="D"),
    ),
    "protein": (
        # The mass of a protein cannot be told from the beginning of its sequence.
        _number_check(
            "mass, whole sequence", rf"^{_OF_PROTEIN}[A-Z]+$", protein_mass, within=5, unit="%"
        ),
        _number_check(
            "isoelectric point", r"isoelectric point", isoelectric_point, within=0.5, unit="pH"
        ),
    ),
    "python": (
        Check(
            name="Python that parses",
            right_when="parses, defines a function",
            asks=r"\bpython\b",
            read=python_code,
            agrees=lambda code, _: defines_a_function(code),
        ),
    ),
}
