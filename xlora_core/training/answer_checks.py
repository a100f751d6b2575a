"""What can be checked of a written answer: values are read out of texts and compared.

Pure text and arithmetic. The reference is always a row's own answer, read the same way. Reading
is lenient about wording. A value that a question does not ask for in so many words is checked, too,
where rows give it: a model that was never shown such rows leaves it out.
"""

from __future__ import annotations

import ast
import re
import statistics
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

_NUMBER = r"-?\d{1,15}(?:,\d{3})*(?:\.\d{1,15})?"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that answers of a domain are checked for.

    Attributes:
        name: What is checked, such as ``"HOMO-LUMO gap"``.
        right_when: When an answer counts as right, such as ``"within 0.5 eV"``.
        asks: Regular expression of the questions that are checked.
        read: Text of an answer -> its value; None if there is none in it.
        agrees: Value and reference -> whether the value is right.
        error: Value and reference -> how far off; None for values that are right or wrong only.
        unit: Of the error.
    """

    name: str
    right_when: str
    asks: str
    read: Callable[[str], Any]
    agrees: Callable[[Any, Any], bool]
    error: Callable[[float, float], float] | None = None
    unit: str = ""

    def reference(self, question: str, answer: str) -> Any:
        """Returns the value of a row's own answer; None where the row is not checked."""
        if not re.search(self.asks, question, re.IGNORECASE):
            return None
        return self.read(answer)


@dataclass(frozen=True, kw_only=True)
class Score:
    """How answers did in a check.

    Attributes:
        rows: Number of answers.
        read: In how many a value could be read.
        right: Number of right ones; one that cannot be read is wrong.
        mean_error: Mean error of those that could be read; None without any, or without an error.
        median_error: Their median error.
    """

    rows: int
    read: int
    right: int
    mean_error: float | None
    median_error: float | None


def score(check: Check, answers: Sequence[str], references: Sequence[Any]) -> Score:
    """Scores answers against the references of the same rows."""
    return score_values(check, [check.read(answer) for answer in answers], references)


def score_values(check: Check, values: Sequence[Any], references: Sequence[Any]) -> Score:
    """Scores values; None is an answer that could not be read."""
    pairs = [(v, r) for v, r in zip(values, references, strict=True) if v is not None]
    errors = [check.error(*pair) for pair in pairs] if check.error else []
    return Score(
        rows=len(values),
        read=len(pairs),
        right=sum(check.agrees(*pair) for pair in pairs),
        mean_error=statistics.fmean(errors) if errors else None,
        median_error=statistics.median(errors) if errors else None,
    )


# ---------------------------------------------------------------- reading


def final_answer(text: str) -> str | None:
    """Reads the result of a calculation, without spaces and in lower case.

    It is what follows the last "the answer is" or "####"; else the text itself if it is a single
    expression; else the last number in it.
    """
    text = unicodedata.normalize("NFKC", text).replace("−", "-").strip()
    told = re.findall(r"(?:answer is|####)[:\s]*([^\n]+)", text, flags=re.IGNORECASE)
    if told:
        value = told[-1].rpartition("=")[2].strip()
        # "28 stickers" is a number, "2 - x" is not
        number = re.match(rf"[$*\s]*({_NUMBER}(?:/\d{{1,15}})?)(?!\s*[-+*/^(]|\w|[.,]\d)", value)
        return _plain(number[1] if number else value) or None
    if "\n" not in text and not _is_prose(text):
        return _plain(text) or None
    word = re.match(r"(true|false|yes|no)\b", text, flags=re.IGNORECASE)
    if word:
        return _plain(word[1])
    numbers = re.findall(rf"(?<![\w.]){_NUMBER}(?:/\d{{1,15}})?", text)
    return _plain(numbers[-1]) if numbers else None


def _is_prose(text: str) -> bool:
    words = [w.lower() for w in re.findall(r"[A-Za-z]{2,}", text)]
    return any(word not in ("sqrt", "log", "true", "false", "am", "pm") for word in words)


def _plain(text: str) -> str:
    text = re.sub(r"[\s$]|\\[()\[\]]", "", text).rstrip(".").lower()
    if re.fullmatch(r"\([a-z]\)", text):
        text = text[1]
    return {"yes": "true", "no": "false"}.get(text, text)


def same_result(value: str, reference: str) -> bool:
    """Whether two results of ``final_answer`` are the same text, or the same number."""
    if value == reference:
        return True
    numbers = [_rational(text) for text in (value, reference)]
    return None not in numbers and numbers[0] == numbers[1]


def _rational(text: str) -> Fraction | None:
    match = re.fullmatch(rf"({_NUMBER})(?:/(\d{{1,15}}))?%?", text)
    if match is None or (match[2] is not None and not int(match[2])):
        return None
    return Fraction(match[1].replace(",", "")) / int(match[2] or 1)


_ELEMENT = (  # two letters before one
    "A[cglrstu]|B[aeir]|C[adelorsu]|Dy|E[ru]|F[er]|G[ade]|H[efgo]|I[nr]|Kr|L[aiu]|M[gno]|N[abdei]|"
    "Os|P[abdmort]|R[abehnu]|S[bceimnr]|T[abcehilm]|Xe|Yb|Z[nr]|[BCDFHIKNOPSTUVWY]"
)
_FORMULA = rf"(?<![A-Za-z0-9])((?:(?:{_ELEMENT})\d{{0,4}})+)((?:[+-]\d?)?)(?![A-Za-z0-9])"


def molecular_formula(text: str) -> tuple[frozenset[tuple[str, int]], str] | None:
    """Reads the first molecular formula after the word "formula": atoms of each kind, and charge.

    The order of the elements does not matter. A single letter is none: "I" is a word.
    """
    text = unicodedata.normalize("NFKC", text)  # subscript digits become plain ones
    start = re.search(r"formula", text, flags=re.IGNORECASE)
    if start is None:
        return None
    for match in re.finditer(_FORMULA, text[start.end() :]):
        atoms: Counter[str] = Counter()
        for element, count in re.findall(rf"({_ELEMENT})(\d*)", match[1]):
            atoms[element] += int(count or 1)
        if sum(atoms.values()) > 1:
            return frozenset(atoms.items()), match[2].removesuffix("1")
    return None


def molar_mass(text: str) -> float | None:
    """Reads the first mass in grams (a mole), or in daltons; g/mol."""
    return _number_before(text, r"(?:g|grams?|amu|u|da|daltons?)\b(?!/(?:m?l|cm))")


def protein_mass(text: str) -> float | None:
    """Reads the first mass in (kilo)daltons; kDa."""
    kilo = _number_before(text, r"(?:kda|kilodaltons?)\b")
    if kilo is not None:
        return kilo
    dalton = _number_before(text, r"(?:da|daltons?)\b")
    return None if dalton is None else dalton / 1000


def isoelectric_point(text: str) -> float | None:
    """Reads the number that follows "isoelectric point" or "pI"; pH units."""
    return _number_after(text, r"isoelectric point|\bpI\b", "")


def homo_lumo_gap(text: str) -> float | None:
    """Reads the number of electronvolts that follows "gap"; eV."""
    return _number_after(text, r"\bgap\b", r"\s*(?:eV|electron ?-?volts?)")


def _number_before(text: str, unit: str) -> float | None:
    match = re.search(rf"(?<![\w.])({_NUMBER})\s*{unit}", text, flags=re.IGNORECASE)
    return None if match is None else _as_float(match[1])


def _number_after(text: str, word: str, unit: str) -> float | None:
    for start in re.finditer(word, text, flags=re.IGNORECASE):
        line = text[start.end() : start.end() + 200].partition("\n")[0]
        match = re.search(rf"(?<![\w.])({_NUMBER})(?!\w){unit}", line, flags=re.IGNORECASE)
        if match:
            return _as_float(match[1])
    return None


def _as_float(number: str) -> float:
    return float(number.replace(",", ""))


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


# ---------------------------------------------------------------- comparing


def _absolute(value: float, reference: float) -> float:
    return abs(value - reference)


def _percent(value: float, reference: float) -> float:
    return 100 * abs(value - reference) / max(abs(reference), 1e-9)


def _number_check(
    name: str,
    asks: str,
    read: Callable[[str], float | None],
    *,
    within: float,
    unit: str,
) -> Check:
    error = _percent if unit == "%" else _absolute
    return Check(
        name=name,
        right_when=f"within {within:g} {unit}",
        asks=asks,
        read=read,
        agrees=lambda value, reference: error(value, reference) <= within + 1e-9,
        error=error,
        unit=unit,
    )


_ASKS_FORMULA = r"molecular formula|molar mass|how heavy"
_GIVES_SMILES = r"^(?:which compound has the smiles|name this molecule:|smiles:)"
_ASKS_PROPERTIES = r"biophysical properties|isoelectric point"

# Domain -> what its answers are checked for. A domain without checks is not here.
CHECKS: dict[str, tuple[Check, ...]] = {
    "math": (
        Check(
            name="final answer",
            right_when="the same",
            asks="",
            read=final_answer,
            agrees=same_result,
        ),
    ),
    "chemistry": (
        Check(
            name="formula, asked by name",
            right_when="the same",
            asks=_ASKS_FORMULA,
            read=molecular_formula,
            agrees=lambda value, reference: bool(value == reference),
        ),
        _number_check("molar mass, asked by name", _ASKS_FORMULA, molar_mass, within=1, unit="%"),
        Check(
            name="formula, from SMILES",
            right_when="the same",
            asks=_GIVES_SMILES,
            read=molecular_formula,
            agrees=lambda value, reference: bool(value == reference),
        ),
        _number_check("molar mass, from SMILES", _GIVES_SMILES, molar_mass, within=1, unit="%"),
    ),
    "quantum": (
        _number_check(
            "HOMO-LUMO gap",
            r"gap|homo|frontier|quantum-chemical properties|qm9 properties",
            homo_lumo_gap,
            within=0.5,
            unit="eV",
        ),
    ),
    "protein": (
        _number_check("protein mass", _ASKS_PROPERTIES, protein_mass, within=5, unit="%"),
        _number_check(
            "isoelectric point", _ASKS_PROPERTIES, isoelectric_point, within=0.5, unit="pH"
        ),
    ),
    "python": (
        Check(
            name="Python that parses",
            right_when="parses, defines a function",
            asks="",
            read=python_code,
            agrees=lambda code, _: defines_a_function(code),
        ),
    ),
}
