"""Protein: names, properties and sequences of the proteins of two bacterial genera."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sample_data.build.choice import pick
from sample_data.build.errors import CorpusError
from sample_data.build.rows import Row

# The identifiers of the package's third genus, Escherichia, are EcoCyc's.
_GENERA = ("Enterococcus", "Staphylococcus")
_AMINO_ACIDS = frozenset("ACDEFGHIKLMNPQRSTVWY")
_SHORTEST = 30
# Residues of a sequence that a row shows; properties are those of the whole.
_SHOWN = 180
_NAME_IT = (
    "Protein sequence:\n{}\nWhat is this protein?",
    "What is the function of the protein {}?",
    "Annotate this amino acid sequence: {}",
)
_MEASURE_IT = (
    "Compute the biophysical properties of this protein:\n{}",
    "Isoelectric point and hydropathy of {}",
)


@dataclass(frozen=True)
class Protein:
    """A protein as the package describes it.

    Args:
        accession: Its RefSeq accession.
        enzyme: Its EC number; empty for none.
        gene: Its gene; empty if unknown.
        product: What it is.
        genus: The bacteria it is from.
        sequence: Its residues, in letters.
    """

    accession: str
    enzyme: str
    gene: str
    product: str
    genus: str
    sequence: str

    @property
    def name(self) -> str:
        """Product and gene."""
        return f"{self.product} (gene {self.gene})" if self.gene else self.product

    @property
    def shown(self) -> str:
        """The sequence, or the beginning of a long one."""
        return self.sequence[:_SHOWN] + "…" if len(self.sequence) > _SHOWN else self.sequence


def rows(folders: Mapping[str, Path]) -> Iterator[Row]:
    """A row for every protein whose function is known.

    Args:
        folders: ``prokka``: the unpacked package.

    Raises:
        CorpusError: If Biopython, which computes the properties, is not installed.
    """
    for genus in _GENERA:
        path = folders["prokka"] / "usr/share/prokka/db/genus" / genus
        for protein in proteins(path.read_text(encoding="utf-8"), genus):
            yield protein_row(protein)


def proteins(fasta: str, genus: str) -> Iterator[Protein]:
    """The proteins of a FASTA file with headers ``>ACCESSION EC~~~gene~~~product``.

    Left out are hypothetical proteins, fragments, and sequences with unknown residues.
    """
    for record in fasta.split(">")[1:]:
        header, _, lines = record.partition("\n")
        accession, _, description = header.partition(" ")
        enzyme, gene, product = description.split("~~~")
        sequence = "".join(lines.split())
        if (
            "hypothetical" not in product.lower()
            and len(sequence) >= _SHORTEST
            and _AMINO_ACIDS.issuperset(sequence)
        ):
            # An EC number with a dash names a class of enzymes, not this one.
            enzyme = "" if "-" in enzyme else enzyme
            yield Protein(accession, enzyme, gene, product, genus, sequence)


def protein_row(protein: Protein) -> Row:
    """The protein's one row: named in 40 of 100, measured in 25, written down in 35."""
    key = ("protein", protein.accession)
    kind = pick(("name", "measure", "write"), "kind", *key, weights=(40, 25, 35))
    if kind == "write":
        question = pick(
            (
                f"Give a FASTA record for {protein.product} from {protein.genus}.",
                f"Write the amino acid sequence of {protein.name}.",
            ),
            "wording",
            *key,
        )
        header = f">{protein.accession} {protein.product} [{protein.genus}]"
        return Row("protein", protein.sequence, question, f"{header}\n{protein.shown}")
    measured, structure = properties(protein.sequence)
    if kind == "measure":
        question = pick(_MEASURE_IT, "wording", *key).format(protein.shown)
        return Row("protein", protein.sequence, question, f"{measured} {structure}")
    question = pick(_NAME_IT, "wording", *key).format(protein.shown)
    enzyme = f", EC {protein.enzyme}" if protein.enzyme else ""
    answer = f"{protein.name}{enzyme}, from {protein.genus}. {measured}"
    return Row("protein", protein.sequence, question, answer)


def properties(sequence: str) -> tuple[str, str]:
    """A sequence's biophysical properties, in words: size and charge; secondary structure.

    Raises:
        CorpusError: If Biopython is not installed.
    """
    try:
        from Bio.SeqUtils.ProtParam import ProteinAnalysis
    except ImportError as error:
        raise CorpusError(
            "the properties of proteins are computed by Biopython, which is not installed",
            hint="pip install -c constraints.txt -e '.[corpus]'",
        ) from error
    protein = ProteinAnalysis(sequence)
    helix, turn, sheet = protein.secondary_structure_fraction()
    measured = (
        f"{len(sequence)} residues, {protein.molecular_weight() / 1000:.1f} kDa, "
        f"isoelectric point {protein.isoelectric_point():.2f}, GRAVY {protein.gravy():.2f}, "
        f"instability index {protein.instability_index():.1f}, "
        f"aromaticity {protein.aromaticity():.2f}."
    )
    structure = (
        f"Secondary structure propensity: helix {helix:.2f}, turn {turn:.2f}, sheet {sheet:.2f}."
    )
    return measured, structure
