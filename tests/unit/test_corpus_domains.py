"""Each domain of the corpus, from a few lines in its package's own format."""

from __future__ import annotations

import csv
import gzip
import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from sample_data.build.catalogue import DOMAINS
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
from sample_data.build.domains.chemistry import Compound
from sample_data.build.sources import PACKAGES

ASPIRIN = Compound(
    cas="50-78-2",
    formula="C9H8O4",
    mass=180.15742,
    smiles="CC(=O)OC1=CC=CC=C1C(=O)O",
    inchi="C9H8O4/c1-6(10)13-8-5-3-2-4-7(8)9(11)12/h2-5H,1H3,(H,11,12)",
    iupac="2-acetyloxybenzoic acid",
    common="aspirin",
    synonyms=("50-78-2", "2-acetyloxybenzoic acid", "acetylsalicylic acid", "ecotrin", "acylpyrin"),
    melting="408.15",
    log_p="1.19",
)


def test_the_catalogue_is_consistent() -> None:
    assert list(DOMAINS) == [
        "math", "chemistry", "quantum", "protein", "biology", "python", "verse", "law",
    ]  # fmt: skip
    assert {name for domain in DOMAINS.values() for name in domain.packages} == set(PACKAGES)


@pytest.mark.parametrize(
    ("question", "answer", "asked", "answered"),
    [
        ("Solve -96*i = -75*i - 42 for i.", "2", "Solve -96*i = -75*i - 42 for i.", "2"),
        (
            "How many are left? Give the result as your final answer. Do not include units.",
            "There are 3*2 = 6 bricks.\n9 - 6 = 3 are left.\n#### 3",
            "How many are left?",
            "There are 3*2 = 6 bricks.\n9 - 6 = 3 are left.\nThe answer is 3",
        ),
        (
            "Evaluate the indefinite integral: ∫ 2*x dx\nUse ** instead of ^.",
            "x**2 + C",
            "Evaluate the indefinite integral: ∫ 2*x dx",
            "x**2 + C",
        ),
    ],
)
def test_mathematics_drops_the_advice_on_format(
    question: str, answer: str, asked: str, answered: str
) -> None:
    row = mathematics.exercise_row(question, answer)
    assert (row.domain, row.id, row.user, row.assistant) == ("math", asked, asked, answered)


FACTS = (
    "Its molecular formula is C9H8O4 and its molar mass is 180.16 g/mol. It melts at 135 °C. "
    "Its octanol-water partition coefficient log P is 1.19."
)


def test_chemistry_answers() -> None:
    def answer(kind: str) -> str:
        return ASPIRIN.answer(kind, "aspirin", with_inchi=True)

    smiles = "CC(=O)OC1=CC=CC=C1C(=O)O"
    assert answer("mass") == FACTS
    assert answer("name") == f"{smiles} is aspirin (IUPAC name {ASPIRIN.iupac}). {FACTS}"
    assert answer("structure") == f"SMILES: {smiles}\nInChI=1S/{ASPIRIN.inchi}\n{FACTS}"
    assert answer("description") == (
        f"Aspirin is a chemical compound with CAS number 50-78-2. {FACTS} "
        f"It is also known as acetylsalicylic acid or ecotrin. SMILES: {smiles}"
    )


@pytest.mark.parametrize(
    "code", ["nsc512600", "ctk1b0591", "42474-60-2", "ac1o5bod", "brn 0255815", "agn-pc-02k2bl"]
)
def test_a_registry_number_is_no_name(code: str) -> None:
    assert replace(ASPIRIN, common=code).name == "2-acetyloxybenzoic acid"
    assert not chemistry.is_fit(replace(ASPIRIN, common=code, iupac=""))


@pytest.mark.parametrize(
    "name", ["aspirin", "1,2-dichloroethane", "acid yellow 135", "vitamin b12"]
)
def test_a_name_with_numbers_stays(name: str) -> None:
    assert replace(ASPIRIN, common=name).name == name


def test_a_compound_without_systematic_name_has_no_empty_parenthesis() -> None:
    answer = replace(ASPIRIN, iupac="").answer("name", "aspirin", with_inchi=False)
    assert " is aspirin. Its molecular formula" in answer


def test_only_unmeasured_compounds_are_shareable() -> None:
    assert not ASPIRIN.row().shareable
    assert replace(ASPIRIN, melting="", log_p="").row().shareable


def test_chemistry_joins_its_tables(tmp_path: Path) -> None:
    tables = tmp_path / "chemicals"
    for folder in ("Identifiers", "Misc", "Environment"):
        (tables / folder).mkdir(parents=True)
    aspirin = (
        "2244\t50-78-2\tC9H8O4\t180.15742\tCC(=O)OC1=CC=CC=C1C(=O)O\tC9\tKEY\tiupac\taspirin\tasa"
    )
    explosive = "CC1=C(C=C(C=C1[N+](=O)[O-])[N+](=O)[O-])[N+](=O)[O-]"
    tnt = f"8376\t118-96-7\tC7H5N3O6\t227.1\t{explosive}\tC7\tKEY\tiupac\ttnt"
    small = tables / "Identifiers" / "chemical identifiers pubchem small.tsv"
    small.write_text(f"{aspirin}\n{tnt}\n", encoding="utf-8")
    # The second table repeats a compound of the first.
    large = tables / "Identifiers" / "chemical identifiers pubchem large.tsv"
    large.write_text(f"{aspirin}\n", encoding="utf-8")
    measured = tables / "Misc" / "common_chemistry_data.tsv"
    measured.write_text("CAS\tTm\tTb\tVms\tVml\n50782\t408.15\t413.15\t\t\n", encoding="utf-8")
    with gzip.open(tables / "Environment" / "Syrres logP data.csv.gz", "wt") as file:
        file.write("CAS\tChemical\tlogP\n50-78-2\tAspirin\t1.19\n")
    found = list(chemistry.compounds(tables))
    assert [compound.cas for compound in found] == ["50-78-2", "118-96-7"]
    assert "melts at 135 °C. It boils at 140 °C. Its octanol-water" in found[0].facts
    assert found[0].synonyms == ("asa",)
    assert [row.id for row in chemistry.rows({"chemicals": tmp_path})] == ["50-78-2"]


def test_quantum_turns_hartree_into_electronvolts(tmp_path: Path) -> None:
    record = {
        "SMILES": "O", "HOMO_au": "-0.2928", "LUMO_au": "0.0687", "HOMO_LUMO_gap_au": "0.3615",
        "Dipole_debye": "1.8511", "Polarizability_bohr3": "6.31", "ZPVE_au": "0.021375",
        "InternalEnergy_0K_au": "-76.404702", "Heatcapacity_Cv_cal_mol_K": "6.002",
        "XYZ_Ang": "[[0.0, 0.1]]" * 20_000,
    }  # fmt: skip
    path = tmp_path / "qm9_part1.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(record))
        writer.writeheader()
        writer.writerow(record)
    (water,) = quantum.molecules(path)
    assert water.answer("orbitals") == "HOMO = -7.97 eV, LUMO = 1.87 eV, HOMO-LUMO gap = 9.84 eV."
    assert water.answer("field") == (
        "Dipole moment μ = 1.85 D, isotropic polarizability α = 6.3 a0^3."
    )
    assert water.answer("heat") == (
        "Zero-point vibrational energy = 0.58 eV, Cv(298 K) = 6.00 cal/(mol K)."
    )
    assert water.answer("all") == (
        "Dipole moment = 1.85 D; polarizability = 6.3 a0^3; HOMO = -7.97 eV; LUMO = 1.87 eV; gap = "
        "9.84 eV; ZPVE = 0.58 eV; U0 = -76.4047 Ha; Cv = 6.00 cal/(mol K)."
    )
    row = water.row()
    assert row.id == "O"
    assert row.assistant in {water.answer(kind) for kind in ("orbitals", "field", "heat", "all")}


FASTA = """\
>YP_1.1 3.6.1.1~~~ppaX~~~pyrophosphatase PpaX
MSSKAELLNGMNPRQKEAVLHTDGPLLLMAG
AGSGKTRVL
>YP_2.1 3.6.1.-~~~~~~ATP-dependent DNA helicase
MSSKAELLNGMNPRQKEAVLHTDGPLLLMAGAGSGKTRVLTHRIAY
>YP_3.1 ~~~~~~conserved hypothetical protein
MSSKAELLNGMNPRQKEAVLHTDGPLLLMAGAGSGKTRVLTHRIAY
>YP_4.1 ~~~~~~fragment
MSSKAELLNG
>YP_5.1 ~~~~~~unsure of a residue
MSSKAELLNGMNPRQKEAVLHTDGPLLLMAGAGSGKTRVLTHRXAY
"""


def test_proteins_of_known_function_and_sequence_are_taken() -> None:
    first, second = protein.proteins(FASTA, "Enterococcus")
    assert (first.accession, first.enzyme, first.name) == (
        "YP_1.1", "3.6.1.1", "pyrophosphatase PpaX (gene ppaX)",
    )  # fmt: skip
    assert first.sequence == "MSSKAELLNGMNPRQKEAVLHTDGPLLLMAGAGSGKTRVL"
    assert (second.enzyme, second.name) == ("", "ATP-dependent DNA helicase")


def test_a_long_sequence_is_shown_in_part_and_measured_whole() -> None:
    whole = protein.Protein("YP_1.1", "", "", "protein", "Genus", "MKLV" * 50)
    assert whole.shown == "MKLV" * 45 + "…"
    for number in range(40):
        row = protein.protein_row(replace(whole, accession=f"YP_{number}"))
        assert row.id == whole.sequence
        assert whole.shown in row.user + row.assistant
        assert row.assistant.startswith(">") or "200 residues" in row.assistant


def test_protein_properties_are_biopythons() -> None:
    # Glycine alone: 57.05 Da a residue and water; GRAVY is its Kyte-Doolittle value.
    measured, structure = protein.properties("G" * 40)
    assert measured.startswith("40 residues, 2.3 kDa, isoelectric point ")
    assert "GRAVY -0.40" in measured
    assert measured.endswith("aromaticity 0.00.")
    assert structure == "Secondary structure propensity: helix 0.00, turn 1.00, sheet 0.00."


def test_gene_ontology_terms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "GO.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("create table go_term (_id, go_id, term, ontology, definition)")
        database.executemany(
            "insert into go_term values (?, ?, ?, ?, ?)",
            [
                (1, "GO:2", "cytosol", "CC", "The part of the cytoplasm without organelles."),
                (2, "GO:1", "growth", "BP", "The increase in size or mass."),
                (3, "GO:3", "all", "universal", "The root."),
                (4, "GO:4", "nameless", "MF", None),
            ],
        )
    database.close()
    monkeypatch.setattr(biology, "fraction", lambda *_: 0.0)
    growth, cytosol = biology.go_rows(path)
    assert (growth.id, growth.assistant) == ("GO:1", "The increase in size or mass.")
    assert cytosol.user in {
        "What is cytosol?",
        "In cell biology, what does cytosol mean?",
        'Define the cellular component "cytosol".',
    }
    # Beyond its share, nothing of a formulaic kind is left.
    monkeypatch.setattr(biology, "fraction", lambda *_: 0.5)
    assert list(biology.go_rows(path)) == []


OBO = r"""format-version: 1.2

[Term]
id: HP:0000003
name: Multicystic kidney dysplasia
def: "Multiple \"cysts\" of varying size." [https://orcid.org/0]
comment: Look twice.

[Term]
id: HP:0000004
name: Old
def: "No longer used." []
is_obsolete: true

[Term]
id: HP:0000001
name: All

[Typedef]
id: part_of
name: part of
"""


def test_clinical_findings_are_for_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(biology, "fraction", lambda *_: 0.0)
    (row,) = biology.hpo_rows(OBO)
    assert row.id == "HP:0000003"
    assert row.assistant == 'Multiple "cysts" of varying size. Look twice.'
    assert row.user in {
        'What does the clinical finding "Multicystic kidney dysplasia" mean?',
        "Define multicystic kidney dysplasia.",
        "A patient has multicystic kidney dysplasia. What is it?",
    }
    assert not row.shareable
    (without,) = biology.hpo_rows(OBO.replace("Look twice.", "x" * 500))
    assert without.assistant == 'Multiple "cysts" of varying size.'


def test_articles_on_biology_alone_are_taken() -> None:
    owl = {"title": "Owl", "extract": "Owls are birds.", "topic": "Biology and health sciences"}
    opera = {"title": "Opera", "extract": "Opera is art.", "topic": "Arts"}
    (row,) = biology.wiki_rows(json.dumps({"Owl": owl, "Opera": opera}))
    assert (row.id, row.assistant) == ("wiki:Owl", "Owls are birds.")
    assert row.user in {"What is Owl?", "Tell me about Owl.", "Explain Owl in a few sentences."}


def test_python_leaves_long_code_out(tmp_path: Path) -> None:
    path = tmp_path / "reasoning_gym" / "data" / "codeio.jsonl.gz"
    path.parent.mkdir(parents=True)
    tasks = [("Add.", "def f(): ..."), ("Too long.", "#" * 2601), ("At the edge.", "#" * 2600)]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for task, code in tasks:
            entry = {"task_description": task, "input_output_spec": "a, b", "code_sample": code}
            file.write(json.dumps(entry) + "\n")
    first, last = python_code.rows({"reasoning-gym": tmp_path})
    assert (first.id, first.assistant) == ("Add.", "```python\ndef f(): ...\n```")
    assert first.user.removesuffix("\n\na, b") in {
        "Add.",
        "Write a Python function. Add.",
        "Python: Add.",
    }
    assert last.id == "At the edge."


PLAY = """\
# The Tragedy

## ACT I

### SCENE I. A heath.

*Enter two Witches*

**First Witch**  \\
{first}

**Second Witch**
{second}

## ACT II

### SCENE I. A hall.

**MACBETH**
{third}
"""


def test_verse_is_cut_at_scenes_and_speeches() -> None:
    play = PLAY.format(first="a" * 1200, second="b" * 400, third="c" * 301)
    rows = list(verse.play_rows("the-tragedy", play))
    assert [row.assistant for row in rows] == [
        "_Enter two Witches_\n\nFirst Witch.\n" + "a" * 1200,
        "Second Witch.\n" + "b" * 400,
        "MACBETH.\n" + "c" * 301,
    ]
    assert {row.id for row in rows} == {"the-tragedy"}
    assert verse.title_of("the-tragedy", play) == "The Tragedy"
    prompts = {p.format("The Tragedy") for p in verse._PROMPTS}
    assert {row.user for row in rows} <= prompts


def test_whole_plays_are_held_out() -> None:
    assert verse.held_out("macbeth")
    assert not verse.held_out("hamlet")
    assert DOMAINS["verse"].held_out is verse.held_out


def test_law_keeps_the_wording_and_drops_the_marks() -> None:
    text = (
        "Copyright (c) <<var;name=copyright;original= <year> <owner>;match=.+>> All rights\t  "
        "reserved.\n \n<<beginOptional;name=x>>" + "Clause. " * 170 + "<<endOptional>>\n\nEnd."
    )
    (row,) = law.licence_rows("BSD-2-Clause", text)
    assert row.assistant.startswith("Copyright (c) <year> <owner> All rights reserved.\n\nClause.")
    assert "<<" not in row.assistant
    # The last passage is too short to stand alone.
    assert row.assistant.endswith("Clause.")
    assert row.user in {prompt.format("BSD-2-Clause") for prompt in law._PROMPTS}


def test_a_licence_in_an_older_encoding_is_read() -> None:
    assert law.decoded("Müller".encode()) == law.decoded("Müller".encode("cp1252")) == "Müller"
