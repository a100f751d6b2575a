"""Reads a SMILES string as a graph of atoms, as far as telling neighbours apart needs it.

Source: Weininger, "SMILES, a chemical language and information system", 1988.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"\[(?P<bracket>[^\]]+)\]"
    r"|(?P<plain>Br|Cl|[BCNOPSFI]|[bcnops])"
    r"|(?P<bond>[-=#$:/\\~])"
    r"|(?P<ring>%\d\d|\d)"
    r"|(?P<branch>[()])"
    r"|(?P<dot>\.)"
)
_BRACKET = re.compile(r"\d*(?P<element>[A-Z][a-z]?|[a-z]{1,2}).*?(?P<charge>[+-]+\d*)?(?::\d+)?$")
_ORDERS = {"=": 2, "#": 3, "$": 4}
# In brackets a small first letter is an aromatic atom: [nH], [se], [as].
_AROMATIC = {"b", "c", "n", "o", "p", "s", "se", "as", "te", "si"}


@dataclass
class Atom:
    """An atom other than an implied hydrogen.

    Args:
        element: Its symbol, with a capital.
        charge: Its formal charge.
        bonds: Index of each neighbour -> order of the bond; 1 for an aromatic one.
    """

    element: str
    charge: int = 0
    bonds: dict[int, int] = field(default_factory=dict)


def atoms(smiles: str) -> list[Atom]:
    """The atoms of a molecule with their bonds.

    Raises:
        ValueError: If the string cannot be read.

    >>> [atom.element for atom in atoms("C[N+](=O)[O-]")]
    ['C', 'N', 'O', 'O']
    """
    found: list[Atom] = []
    branches: list[int | None] = []
    rings: dict[str, tuple[int, int]] = {}
    last: int | None = None
    order = 0  # 0: no bond was written
    place = 0
    while place < len(smiles):
        match = _TOKEN.match(smiles, place)
        if match is None:
            raise ValueError(f"{smiles!r}: cannot read {smiles[place:]!r}")
        place = match.end()
        kind, text = match.lastgroup, match[match.lastgroup or 0]
        if kind in ("bracket", "plain"):
            found.append(_atom(text) if kind == "bracket" else Atom(text.capitalize()))
            if last is not None:
                _bind(found, last, len(found) - 1, order)
            last, order = len(found) - 1, 0
        elif kind == "bond":
            order = _ORDERS.get(text, 1)
        elif kind == "ring" and last is not None:
            if text in rings:
                other, opened = rings.pop(text)
                _bind(found, other, last, order or opened)
            else:
                rings[text] = (last, order)
            order = 0
        elif text == "(":
            branches.append(last)
        elif text == ")" and branches:
            last = branches.pop()
        elif kind == "dot":
            last = None
        else:
            raise ValueError(f"{smiles!r}: {text!r} stands for nothing here")
    if rings or branches:
        raise ValueError(f"{smiles!r}: a ring or a branch is not closed")
    return found


def _bind(found: list[Atom], one: int, other: int, order: int) -> None:
    found[one].bonds[other] = found[other].bonds[one] = order or 1


def _atom(text: str) -> Atom:
    match = _BRACKET.match(text)
    if match is None:
        raise ValueError(f"[{text}] is not an atom")
    element = match["element"]
    if element[0].islower() and element not in _AROMATIC:
        element = element[0]
    signs = match["charge"] or ""
    digits = signs.lstrip("+-")
    amount = int(digits) if digits else len(signs)
    return Atom(element.capitalize(), -amount if signs.startswith("-") else amount)
