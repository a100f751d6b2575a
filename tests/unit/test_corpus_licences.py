"""Every file of sample_data has a source and a licence, and its sample rows are what they say."""

from __future__ import annotations

import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

from sample_data.build.catalogue import DOMAINS, Domain
from sample_data.build.safety import reason_to_leave_out
from sample_data.build.sources import PACKAGES
from sample_data.build.writing import licence_table
from xlora_core.training.data import Row, read_domain

SAMPLE = Path(__file__).resolve().parents[2] / "sample_data"
PAGE = (SAMPLE / "LICENSES.md").read_text(encoding="utf-8")
# The cells of every line of a table: files, source, licence, credit.
ENTRIES = [
    [cell.strip() for cell in line.strip("|\n").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| `")
]


def shipped() -> list[str]:
    """The files that git would ship, relative to sample_data."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "."],
        cwd=SAMPLE,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        return sorted(name for name in listed.stdout.split("\n") if (SAMPLE / name).is_file())
    return sorted(
        path.relative_to(SAMPLE).as_posix()
        for path in SAMPLE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    )


def test_every_entry_has_a_source_a_licence_and_a_credit() -> None:
    assert len(ENTRIES) > 10
    for entry in ENTRIES:
        assert len(entry) == 4
        assert all(entry), entry


def test_every_file_is_in_the_table() -> None:
    patterns = [pattern for files, *_ in ENTRIES for pattern in re.findall(r"`([^`]+)`", files)]
    names = shipped()
    assert "rows/law.train.jsonl.gz" in names
    assert "build/command.py" in names
    assert [name for name in names if not any(fnmatch(name, p) for p in patterns)] == []


def test_licence_texts_named_are_there_and_the_other_way_round() -> None:
    named = set(re.findall(r"`licenses/([\w.-]+)`", PAGE))
    there = {path.name for path in (SAMPLE / "licenses").iterdir()}
    assert named == there
    for name in there:
        assert len((SAMPLE / "licenses" / name).read_text(encoding="utf-8")) > 500


def test_versions_are_those_the_builder_takes() -> None:
    for package in PACKAGES.values():
        assert f"`{package.name}` {package.version}" in PAGE
    readme = (SAMPLE / "build" / "README.md").read_text(encoding="utf-8")
    for package in PACKAGES.values():
        assert f"`{package.name}` {re.split(r'[+-]', package.version)[0]}" in readme


def test_the_page_beside_a_corpus_names_every_source() -> None:
    page = licence_table(DOMAINS)
    for domain in DOMAINS.values():
        for name in domain.packages:
            package = PACKAGES[name]
            line = f"| {domain.name} | {name} | {package.version} | {package.licence} |"
            assert page.count(line) == 1


@pytest.mark.parametrize("domain", DOMAINS.values(), ids=list(DOMAINS))
def test_sample_rows_are_valid_and_split(domain: Domain) -> None:
    train, heldout = (
        read_domain(SAMPLE / "rows", domain.name, side) for side in ("train", "heldout")
    )
    assert (len(train), len(heldout)) == (64, 32)
    assert all(domain.held_out(row.id) for row in heldout)
    assert not any(domain.held_out(row.id) for row in train)
    for row in train + heldout:
        assert row.domain == domain.name
        assert row.assistant.strip()


def sample(domain: str) -> list[Row]:
    return [
        row for side in ("train", "heldout") for row in read_domain(SAMPLE / "rows", domain, side)
    ]


def test_no_clinical_finding_is_shipped() -> None:
    assert {row.id.split(":")[0] for row in sample("biology")} == {"GO", "wiki"}


def test_no_dangerous_compound_is_shipped() -> None:
    structure = re.compile(r"(?:SMILES: |Name this molecule: |has the SMILES string )([^\s?]+)")
    found = [
        smiles
        for row in sample("chemistry")
        for smiles in structure.findall(f"{row.user}\n{row.assistant}")
    ]
    assert len(found) >= 30
    assert [smiles for smiles in found if reason_to_leave_out(smiles)] == []
