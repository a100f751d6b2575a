"""Quantum: computed properties of the small molecules of QM9 (B3LYP/6-31G(2df,p))."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sample_data.build.choice import pick
from sample_data.build.rows import Row

# CODATA 2018.
_ELECTRONVOLTS_PER_HARTREE = 27.211386245988
# A row carries the coordinates of all atoms, more than the csv module takes by default.
_LONGEST_FIELD = 10_000_000
# Kind of question -> its share, and its wordings.
_QUESTIONS = {
    "orbitals": (
        35,
        (
            "Predict the HOMO-LUMO gap of {}.",
            "What are the HOMO and LUMO energies of the molecule {}?",
            "Compute the frontier orbital energies of {} at the B3LYP level.",
        ),
    ),
    "field": (
        25,
        (
            "What is the dipole moment of {}?",
            "Estimate the dipole moment and polarizability of {}.",
        ),
    ),
    "heat": (
        20,
        (
            "What is the heat capacity of {} at 298 K?",
            "Give the zero-point energy and heat capacity of {}.",
        ),
    ),
    "all": (20, ("List the quantum-chemical properties of {}.", "QM9 properties for {}:")),
}


@dataclass(frozen=True)
class Molecule:
    """A molecule's computed properties, in the units of the answers.

    Args:
        smiles: The structure.
        homo: Energy of the highest occupied orbital, eV.
        lumo: Energy of the lowest unoccupied orbital, eV.
        gap: Between the two, eV.
        dipole: Dipole moment, debye.
        polarizability: Isotropic, cubic Bohr radii.
        zero_point: Zero-point vibrational energy, eV.
        energy: Internal energy at 0 K, hartree.
        heat_capacity: At constant volume and 298 K, cal/(mol K).
    """

    smiles: str
    homo: float
    lumo: float
    gap: float
    dipole: float
    polarizability: float
    zero_point: float
    energy: float
    heat_capacity: float

    def answer(self, kind: str) -> str:
        """The answer to a kind of question."""
        homo, lumo, gap = f"{self.homo:.2f} eV", f"{self.lumo:.2f} eV", f"{self.gap:.2f} eV"
        dipole, alpha = f"{self.dipole:.2f} D", f"{self.polarizability:.1f} a0^3"
        zero_point = f"{self.zero_point:.2f} eV"
        heat = f"{self.heat_capacity:.2f} cal/(mol K)"
        if kind == "orbitals":
            return f"HOMO = {homo}, LUMO = {lumo}, HOMO-LUMO gap = {gap}."
        if kind == "field":
            return f"Dipole moment μ = {dipole}, isotropic polarizability α = {alpha}."
        if kind == "heat":
            return f"Zero-point vibrational energy = {zero_point}, Cv(298 K) = {heat}."
        return (
            f"Dipole moment = {dipole}; polarizability = {alpha}; HOMO = {homo}; LUMO = {lumo}; "
            f"gap = {gap}; ZPVE = {zero_point}; U0 = {self.energy:.4f} Ha; Cv = {heat}."
        )

    def row(self) -> Row:
        """The molecule's one row."""
        kinds = list(_QUESTIONS)
        shares = [share for share, _ in _QUESTIONS.values()]
        kind = pick(kinds, "quantum", "kind", self.smiles, weights=shares)
        wording = pick(_QUESTIONS[kind][1], "quantum", "wording", self.smiles)
        return Row("quantum", self.smiles, wording.format(self.smiles), self.answer(kind))


def rows(folders: Mapping[str, Path]) -> Iterator[Row]:
    """A row for every molecule.

    Args:
        folders: ``qm9pack``: the unpacked package.
    """
    for part in (1, 2, 3):
        path = folders["qm9pack"] / "qm9pack" / "data" / f"qm9_part{part}.csv"
        for molecule in molecules(path):
            yield molecule.row()


def molecules(path: Path) -> Iterator[Molecule]:
    """The molecules of one of the package's tables, energies turned into eV."""
    csv.field_size_limit(_LONGEST_FIELD)
    with path.open(newline="", encoding="utf-8") as file:
        for record in csv.DictReader(file):
            yield Molecule(
                smiles=record["SMILES"],
                homo=float(record["HOMO_au"]) * _ELECTRONVOLTS_PER_HARTREE,
                lumo=float(record["LUMO_au"]) * _ELECTRONVOLTS_PER_HARTREE,
                gap=float(record["HOMO_LUMO_gap_au"]) * _ELECTRONVOLTS_PER_HARTREE,
                dipole=float(record["Dipole_debye"]),
                polarizability=float(record["Polarizability_bohr3"]),
                zero_point=float(record["ZPVE_au"]) * _ELECTRONVOLTS_PER_HARTREE,
                energy=float(record["InternalEnergy_0K_au"]),
                heat_capacity=float(record["Heatcapacity_Cv_cal_mol_K"]),
            )
