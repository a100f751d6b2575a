"""Quantities, formulas and programs, read out of written answers.

A number counts only where the text says what it is: beside the quantity's name, in a unit that is
known, or bare right after "is", "=", ":" or "of". Hedges, bounds and comparisons are not read.
"""

from __future__ import annotations

import ast
import itertools
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Mapping

Formula = tuple[frozenset[tuple[str, int]], str]  # atoms of each kind, charge

# ---------------------------------------------------------------- numbers

_NUMBER = r"(?<![\w.,^*/-])([-+]?\d{1,40}(?:,\d{3})*(?:\.\d{1,60})?)(?!\w|[.,]\d|\s*[x×*·]\s*10\b)"
_CONNECTIVE = r"(?:\bis\b|\bwas\b|\bbe\b|\bof\b|\bequals\b|=|:)"
_ABOUT = r"(?:\s|~|≈|\b(?:approximately|about|around|roughly|pH)\b)*"
# A bare number is followed by the end of what is said, or by a word that is no unit.
_BARE_END = (
    r"(?=\s*(?:$|[;)\]!?]|,(?!\s*[-+]?\d)|\.(?:\s|$)|(?:and|which|while|where|at|for|with|as"
    r"|because|so|but)\b(?!\s+[-+]?\d)))"
)
_BOUNDED = r"\b(?:not|at least|at most|between|above|below|over|under|than)\s*$"
_RANGE_BEFORE = r"\d\s*(?:to|or|–|±|\+/-)\s*$"
_RANGE_AFTER = (
    r"\s*(?:(?:to|or|–|±|\+/-)\s*[-+]?\d|(?:larger|smaller|higher|lower|greater|more|less|above"
    r"|below)\b)"
)
# What another quantity is named by ends what is said of this one.
_NEXT_QUANTITY = (
    r"\b(?:HOMO|LUMO|gap|dipole|polari[sz]ab\w*|ZPVE|zero-point|heat capacity|GRAVY|instability"
    r"|aromaticity|isoelectric)\b"
)
_END_OF_CLAUSE = rf"\n|[.;!?](?:\s|$)|{_NEXT_QUANTITY}"
_LONGEST_CLAUSE = 300

_ENERGY = {r"eV\b|electron\s*-?\s*volts?\b": 1.0, r"(?:hartrees?|Ha|E_?h)\b": 27.211386245988}
_DIPOLE = {r"(?:D|debyes?)\b": 1.0}
_BETWEEN = r"(?:\s+(?:energy|difference))*(?:\s+between\s+(?:the\s+)?HOMO\s+and\s+(?:the\s+)?LUMO)?"
_PER_VOLUME = r"(?!\s*(?:/|per)\s*(?:cubic|(?:kg|[mcd]?[lm])(?![a-z])|milli|centi|deci|lit))"
_MOLAR_MASS = {
    rf"(?:g|grams?|amu|u|da|daltons?)\b{_PER_VOLUME}": 1.0,
    r"(?:kg|kilograms?)\s*(?:/|per)\s*mole?\b": 1000.0,
}
_PROTEIN_MASS = {
    r"(?:kda|kilo\s*-?\s*daltons?|kg\s*/\s*mol)\b": 1.0,
    r"(?:da|daltons?|g\s*/\s*mol|grams?\s+per\s+mole)\b": 1e-3,
}


def homo_lumo_gap(text: str) -> float | None:
    """Reads the gap that is stated; else the difference of the two orbital energies; eV."""
    between = r"HOMO\s*[-–/]\s*LUMO"
    gap = _quantity(text, rf"(?:{between}(?:\s+(?:energy\s+)?gap)?|\bgap\b){_BETWEEN}", _ENERGY)
    if gap is not None:
        return gap
    homo = _quantity(text, r"(?<![-–/])\bHOMO\b(?!\s*[-–/]\s*LUMO|\s+and)", _ENERGY)
    lumo = _quantity(text, r"(?<![-–/])\bLUMO\b", _ENERGY)
    return None if homo is None or lumo is None else lumo - homo


def dipole_moment(text: str) -> float | None:
    """Reads the dipole moment; debye."""
    return _quantity(text, r"\bdipole(?:\s+moment)?\b", _DIPOLE)


def isoelectric_point(text: str) -> float | None:
    """Reads the number that is said of "isoelectric point" or "pI"; pH units."""
    return _quantity(text, r"\bisoelectric point\b(?:\s*\(pI\))?|(?-i:\bpI\b)", {})


def molar_mass(text: str) -> float | None:
    """Reads the first mass in grams (a mole) or daltons; else what the mass is; g/mol."""
    return _mass(text, r"\b(?:molar|molecular) (?:mass|weight)\b", _MOLAR_MASS)


def protein_mass(text: str) -> float | None:
    """Reads the first mass in (kilo)daltons or g/mol; else what the mass is; kDa."""
    return _mass(text, r"\b(?:mass|weight)\b(?: in kDa)?", _PROTEIN_MASS)


def _mass(text: str, name: str, units: Mapping[str, float]) -> float | None:
    value = _first_in(_without_markup(text), units)
    return _quantity(text, name, {}) if value is None else value


def _quantity(text: str, name: str, units: Mapping[str, float]) -> float | None:
    """Reads the number that is said of a quantity.

    Args:
        text: The answer.
        name: Regular expression of what the quantity is called.
        units: Regular expression of a unit -> what it is in the quantity's own unit.
    """
    text = _without_markup(text)
    for start in re.finditer(name, text, flags=re.IGNORECASE):
        rest = text[start.end() : start.end() + _LONGEST_CLAUSE]
        clause = re.split(_END_OF_CLAUSE, rest, maxsplit=1, flags=re.IGNORECASE)[0]
        value = _first_in(clause, units)
        if value is None:
            value = _bare(clause)
        if value is not None:
            return value
    return None


def _first_in(text: str, units: Mapping[str, float]) -> float | None:
    """Reads the first number in one of the units; None if it is hedged, or a comparison."""
    if not units:
        return None
    found = re.search(rf"{_NUMBER}\s*(?:{'|'.join(units)})", text, flags=re.IGNORECASE)
    if found is None or _is_hedged(text[: found.start()], text[found.end() :]):
        return None
    unit = found[0].removeprefix(found[1]).strip()
    of_unit = (size for name, size in units.items() if re.match(name, unit, flags=re.IGNORECASE))
    return _as_float(found[1]) * next(of_unit)


def _bare(clause: str) -> float | None:
    """Reads a number without a unit at the beginning of a clause, or right after "is"."""
    bare = rf"{_ABOUT}{_NUMBER}{_BARE_END}"
    found = re.match(bare, clause, flags=re.IGNORECASE)
    found = found or re.search(rf"{_CONNECTIVE}{bare}", clause, flags=re.IGNORECASE)
    return None if found is None else _as_float(found[1])


def _is_hedged(before: str, after: str) -> bool:
    return bool(
        re.search(f"{_BOUNDED}|{_RANGE_BEFORE}", before, flags=re.IGNORECASE)
        or re.match(_RANGE_AFTER, after, flags=re.IGNORECASE)
    )


def _without_markup(text: str) -> str:
    """Takes away what hides a number from its unit: bold, code, LaTeX."""
    text = unicodedata.normalize("NFKC", text).replace("−", "-")
    text = re.sub(r"\\(?:text|mathrm)\{([^{}]*)\}", r"\1", text)
    return re.sub(r"\*\*|[$`~]|\\[,;()\[\]]", "", text)


def _as_float(number: str) -> float:
    return float(number.replace(",", ""))


# ---------------------------------------------------------------- formulas

_ELEMENT = (  # two letters before one
    "A[cglrstu]|B[aeir]|C[adelorsu]|Dy|E[ru]|F[er]|G[ade]|H[efgo]|I[nr]|Kr|L[aiu]|M[gno]|N[abdei]|"
    "Os|P[abdmort]|R[abehnu]|S[bceimnr]|T[abcehilm]|Xe|Yb|Z[nr]|[BCDFHIKNOPSTUVWY]"
)
_FORMULA = rf"((?:(?:{_ELEMENT})\d{{0,4}})+)((?:[+-]\d?)?)"


def molecular_formula(text: str) -> Formula | None:
    """Reads the molecular formula after the word "formula": atoms of each kind, and charge.

    It is the first that directly follows "is", "=", ":" or "formula"; else the first with a digit
    that is not what the formula is "of". The order of the elements does not matter. A single
    letter is none ("I" is a word), nor is a part of a SMILES string.
    """
    text = unicodedata.normalize("NFKC", text)  # subscript digits become plain ones
    text = re.sub(r"_\{?(\d+)\}?", r"\1", text)
    start = re.search(r"formula", text, flags=re.IGNORECASE)
    if start is None:
        return None
    tokens = ["formula", *re.split(r"\s+|(?<=[=:])", text[start.end() :])]
    named = []
    for before, token in itertools.pairwise(tokens):
        match = re.fullmatch(_FORMULA, token.strip(".,;()*$`"))
        formula = None if match is None else _counted(match)
        if formula is None:
            continue
        if re.fullmatch(r"is|formula|.*[=:]", before.strip("*"), flags=re.IGNORECASE):
            return formula
        if re.search(r"\d", token) and before.lower() != "of":
            named.append(formula)
    return named[0] if named else None


def _counted(formula: re.Match[str]) -> Formula | None:
    atoms: Counter[str] = Counter()
    for element, count in re.findall(rf"({_ELEMENT})(\d*)", formula[1]):
        atoms[element] += int(count or 1)
    if sum(atoms.values()) < 2:
        return None
    return frozenset(atoms.items()), formula[2].removesuffix("1")


def formula_text(formula: Formula) -> str:
    """Writes a formula: carbon, hydrogen, then the others by name."""
    atoms = dict(formula[0])
    first = [element for element in ("C", "H") if element in atoms]
    order = [*first, *sorted(set(atoms) - {"C", "H"})]
    written = (f"{element}{atoms[element] if atoms[element] != 1 else ''}" for element in order)
    return "".join(written) + formula[1]


# ---------------------------------------------------------------- programs


def python_code(text: str) -> str | None:
    """Reads the first fenced block, or a text that defines a function without a fence.

    A block that was never closed is cut off: there is no code to read.
    """
    fence = re.search(r"```[a-zA-Z0-9]*\n(.*?)(?:```|\Z)", text, flags=re.DOTALL)
    if fence is None:
        return text if re.search(r"^\s*(?:async )?def ", text, flags=re.MULTILINE) else None
    return fence[1] if fence[0].endswith("```") else None


def defines_a_function(code: str) -> bool:
    """Whether code parses as Python and defines at least one function."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as an escape that Python does not know
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in ast.walk(tree))
