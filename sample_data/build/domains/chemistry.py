"""Chemistry: names, structures, formulas and masses of compounds, less the dangerous ones."""

from __future__ import annotations

import csv
import gzip
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sample_data.build.choice import fraction, pick
from sample_data.build.rows import Row
from sample_data.build.safety import reason_to_leave_out

# Characters; beyond these a structure or a name is no longer something to learn from.
_LONGEST_SMILES, _LONGEST_IUPAC, _LONGEST_SYNONYM = 90, 110, 50
_KELVIN = 273.15
# Catalogue and registry numbers, which the tables give where a compound has no common name.
_CODE = re.compile(
    r"[a-z][a-z./\-]{0,9}[ _]?\d{3}.*"
    r"|(?:ac1|ctk\d|agn-pc-|ag-[a-z]-|einecs|unii-|ai\d-).*"
    r"|.*\d-\d\d-\d|f\d{4}-\d{4}|.*_\w*\d{3}.*"
)
# Kind of question -> its share, and its wordings.
_QUESTIONS = {
    "name": (
        30,
        (
            "Name this molecule: {smiles}",
            "Which compound has the SMILES string {smiles}?",
            "SMILES: {smiles}\nWhat is the IUPAC name?",
        ),
    ),
    "structure": (
        30,
        (
            "Write the SMILES of {name}.",
            "What is the structure of {name}?",
            "Give the SMILES string for {name}.",
        ),
    ),
    "mass": (
        20,
        (
            "What is the molecular formula and molar mass of {name}?",
            "How heavy is one mole of {name}?",
        ),
    ),
    "description": (
        20,
        (
            "Tell me about the chemical {name} (CAS {cas}).",
            "What are the properties of {name}?",
            "Describe the compound {name}.",
        ),
    ),
}
# How often a structure is asked for by systematic name, and given with its InChI.
_SYSTEMATIC_SHARE, _INCHI_SHARE = 1 / 3, 1 / 4


@dataclass(frozen=True)
class Compound:
    """A compound as the tables have it; empty where they say nothing.

    Args:
        cas: CAS number, which is also the group.
        formula: Molecular formula.
        mass: Molar mass, g/mol.
        smiles: Structure.
        inchi: Structure, without ``InChI=1S/``.
        iupac: Systematic name.
        common: Common name, or a catalogue number.
        synonyms: Other names.
        melting: Melting point, kelvin.
        boiling: Boiling point, kelvin.
        log_p: Octanol-water partition coefficient, log10.
    """

    cas: str
    formula: str
    mass: float
    smiles: str
    inchi: str
    iupac: str
    common: str
    synonyms: tuple[str, ...] = field(default=())
    melting: str = ""
    boiling: str = ""
    log_p: str = ""

    @property
    def name(self) -> str:
        """The common name, or the systematic one where the common one is a mere number."""
        return self.iupac if _CODE.fullmatch(self.common) else self.common

    @property
    def facts(self) -> str:
        """Formula, mass and, where known, melting point, boiling point and log P."""
        said = [
            f"Its molecular formula is {self.formula} and its molar mass is {self.mass:.2f} g/mol."
        ]
        if self.melting:
            said.append(f"It melts at {_celsius(self.melting)} °C.")
        if self.boiling:
            said.append(f"It boils at {_celsius(self.boiling)} °C.")
        if self.log_p:
            said.append(f"Its octanol-water partition coefficient log P is {self.log_p}.")
        return " ".join(said)

    @property
    def is_shareable(self) -> bool:
        """Whether no measured value is among the facts: their tables' licence is not known."""
        return not (self.melting or self.boiling or self.log_p)

    def row(self) -> Row:
        """The compound's one row."""
        shares = [share for share, _ in _QUESTIONS.values()]
        kind = pick(list(_QUESTIONS), "chemistry", "kind", self.cas, weights=shares)
        wording = pick(_QUESTIONS[kind][1], "chemistry", "wording", self.cas)
        systematic = fraction("chemistry", "systematic", self.cas) < _SYSTEMATIC_SHARE
        inchi = fraction("chemistry", "inchi", self.cas) < _INCHI_SHARE
        name = self.iupac if kind == "structure" and systematic and self.iupac else self.name
        question = wording.format(smiles=self.smiles, name=name, cas=self.cas)
        answer = self.answer(kind, name, with_inchi=inchi)
        return Row("chemistry", self.cas, question, answer, self.is_shareable)

    def answer(self, kind: str, name: str, *, with_inchi: bool) -> str:
        """The answer to a kind of question that used ``name``."""
        if kind == "mass":
            return self.facts
        if kind == "structure":
            inchi = f"InChI=1S/{self.inchi}\n" if with_inchi else ""
            return f"SMILES: {self.smiles}\n{inchi}{self.facts}"
        if kind == "name":
            known_as = f"{name} (IUPAC name {self.iupac})" if self.iupac not in ("", name) else name
            return f"{self.smiles} is {known_as}. {self.facts}"
        others = [
            synonym
            for synonym in self.synonyms
            if synonym not in (name, self.iupac, self.cas) and len(synonym) < _LONGEST_SYNONYM
        ]
        also = f" It is also known as {' or '.join(others[:2])}." if others else ""
        return (
            f"{name[0].upper()}{name[1:]} is a chemical compound with CAS number {self.cas}. "
            f"{self.facts}{also} SMILES: {self.smiles}"
        )


def rows(folders: Mapping[str, Path]) -> Iterator[Row]:
    """A row for every compound that has a name, is not too long, and passes the safety filter.

    Args:
        folders: ``chemicals``: the unpacked package.
    """
    for compound in compounds(folders["chemicals"] / "chemicals"):
        if is_fit(compound):
            yield compound.row()


def is_fit(compound: Compound) -> bool:
    """Whether a compound is named, short enough and harmless enough to be taught."""
    return bool(
        compound.name
        and len(compound.smiles) <= _LONGEST_SMILES
        and len(compound.iupac) <= _LONGEST_IUPAC
        and not reason_to_leave_out(compound.smiles)
    )


def compounds(tables: Path) -> Iterator[Compound]:
    """All compounds of the package's identifier tables, with what other tables measured.

    Args:
        tables: The package's folder of data.
    """
    measured = _melting_and_boiling(tables / "Misc" / "common_chemistry_data.tsv")
    log_p = _log_p(tables / "Environment" / "Syrres logP data.csv.gz")
    seen = set()
    for size in ("small", "large"):
        path = tables / "Identifiers" / f"chemical identifiers pubchem {size}.tsv"
        with path.open(encoding="utf-8", newline="\n") as lines:
            for line in lines:
                _, cas, formula, mass, smiles, inchi, _, iupac, *names = line.rstrip("\n").split(
                    "\t"
                )
                if cas in seen:
                    continue
                seen.add(cas)
                common, *synonyms = names or [""]
                melting, boiling = measured.get(cas, ("", ""))
                yield Compound(
                    cas,
                    formula,
                    float(mass),
                    smiles,
                    inchi,
                    iupac,
                    common,
                    tuple(synonyms),
                    melting,
                    boiling,
                    log_p.get(cas, ""),
                )


def _melting_and_boiling(path: Path) -> dict[str, tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return {
            # The table writes 50-00-0 as 50000.
            f"{row['CAS'][:-3]}-{row['CAS'][-3:-1]}-{row['CAS'][-1]}": (row["Tm"], row["Tb"])
            for row in csv.DictReader(file, delimiter="\t")
        }


def _log_p(path: Path) -> dict[str, str]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return {row["CAS"]: row["logP"] for row in csv.DictReader(file, delimiter="\t")}


def _celsius(kelvin: str) -> int:
    return round(float(kelvin) - _KELVIN)
