"""Compounds that no expert is taught: warfare agents and explosives, told by their structure.

A coarse filter of a list of compounds that is public anyway. It knows classes, not doses: it drops
some harmless relatives and keeps poisons that are everyday chemicals. Look at the rows before
passing them on.
"""

from __future__ import annotations

from sample_data.build.smiles import Atom, atoms

# Two nitro groups on carbon are a dye or a weed killer, three are mostly an explosive.
_NITRO_ON_CARBON = 3
_NITRO_ON_NITROGEN = 2
_PEROXIDE_BRIDGES = 2


def reason_to_leave_out(smiles: str) -> str:
    """Why a compound is left out, or nothing.

    >>> reason_to_leave_out("CC1=C(C=C(C=C1[N+](=O)[O-])[N+](=O)[O-])[N+](=O)[O-]")
    'polynitro compound'
    >>> reason_to_leave_out("CC(=O)OC1=CC=CC=C1C(=O)O")
    ''

    Args:
        smiles: The structure; one that cannot be read is left out as well.
    """
    try:
        molecule = atoms(smiles)
    except ValueError:
        return "structure that cannot be read"
    for reason, test in (
        ("arsenical", _is_arsenical),
        ("nerve agent or relative", _is_nerve_agent),
        ("mustard", _is_mustard),
        ("nitrate ester", _is_nitrate_ester),
        ("polynitro compound", _is_polynitro),
        ("peroxide explosive", _is_peroxide_explosive),
    ):
        if test(molecule):
            return reason
    return ""


def _beside(molecule: list[Atom], atom: Atom) -> list[Atom]:
    return [molecule[i] for i in atom.bonds]


def _is_arsenical(molecule: list[Atom]) -> bool:
    return any(atom.element == "As" for atom in molecule)


def _is_nerve_agent(molecule: list[Atom]) -> bool:
    """Phosphorus with fluorine or cyanide, or with sulphur that leads to an amine."""
    elements = {atom.element for atom in molecule}
    if {"P", "F"} <= elements:
        return True
    return any(
        _is_cyanide(molecule, other) or (other.element == "S" and _leads_to_amine(molecule, other))
        for atom in molecule
        if atom.element == "P"
        for other in _beside(molecule, atom)
    )


def _is_cyanide(molecule: list[Atom], atom: Atom) -> bool:
    triple = (molecule[i] for i, order in atom.bonds.items() if order == 3)
    return atom.element == "C" and any(other.element == "N" for other in triple)


def _leads_to_amine(molecule: list[Atom], sulphur: Atom) -> bool:
    """Whether S-C-C-N begins here, with a nitrogen that has saturated carbon alone around it."""
    return any(
        nitrogen.element == "N"
        and all(_is_saturated_carbon(other) for other in _beside(molecule, nitrogen))
        for first in _beside(molecule, sulphur)
        if _is_saturated_carbon(first)
        for second in _beside(molecule, first)
        if _is_saturated_carbon(second)
        for nitrogen in _beside(molecule, second)
    )


def _is_saturated_carbon(atom: Atom) -> bool:
    return atom.element == "C" and set(atom.bonds.values()) == {1}


def _is_mustard(molecule: list[Atom]) -> bool:
    """A 2-halogenoethyl on a sulphide, or two of them on an amine."""
    for atom in molecule:
        arms = sum(_is_halogenoethyl(molecule, other) for other in _beside(molecule, atom))
        sulphide = atom.element == "S" and list(atom.bonds.values()) == [1, 1]
        if (sulphide and arms >= 1) or (atom.element == "N" and arms >= 2):
            return True
    return False


def _is_halogenoethyl(molecule: list[Atom], atom: Atom) -> bool:
    return _is_saturated_carbon(atom) and any(
        _is_saturated_carbon(second)
        and any(end.element in ("Cl", "Br", "I") for end in _beside(molecule, second))
        for second in _beside(molecule, atom)
    )


def _nitro_groups(molecule: list[Atom]) -> list[Atom]:
    """The nitrogens with two oxygens that have nothing else on them."""
    return [
        atom
        for atom in molecule
        if atom.element == "N"
        and sum(o.element == "O" and len(o.bonds) == 1 for o in _beside(molecule, atom)) == 2
    ]


def _is_nitrate_ester(molecule: list[Atom]) -> bool:
    return any(
        oxygen.element == "O" and any(end.element == "C" for end in _beside(molecule, oxygen))
        for nitrogen in _nitro_groups(molecule)
        for oxygen in _beside(molecule, nitrogen)
    )


def _is_polynitro(molecule: list[Atom]) -> bool:
    holders = [{a.element for a in _beside(molecule, n)} for n in _nitro_groups(molecule)]
    on_carbon = sum("C" in elements for elements in holders)
    on_nitrogen = sum("N" in elements for elements in holders)
    return on_carbon >= _NITRO_ON_CARBON or on_nitrogen >= _NITRO_ON_NITROGEN


def _is_peroxide_explosive(molecule: list[Atom]) -> bool:
    """Two or more O-O bridges: acetone peroxide and its like."""
    halves = sum(
        other.element == "O" and len(other.bonds) == 2
        for atom in molecule
        if atom.element == "O" and len(atom.bonds) == 2
        for other in _beside(molecule, atom)
    )
    return halves >= 2 * _PEROXIDE_BRIDGES
