"""Writes a corpus: rows, what they are made of, and the licences they stand under."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from sample_data.build.catalogue import DOMAINS, Domain
from sample_data.build.rows import Row
from sample_data.build.sources import PACKAGES

MANIFEST = "manifest.json"
_TABLE_HEAD = """\
# Licences of this corpus

Made by `python -m sample_data.build`. The licence texts are in `licenses/`. Whoever passes rows on
keeps the credit with them; rows of a licence that begins with `LicenseRef-` are for training only.

| domain | package | version | licence of the data | credit |
| --- | --- | --- | --- | --- |
"""


def write_split(path: Path, rows: Iterable[Row]) -> dict[str, int | str]:
    """Writes rows as gzipped JSON lines; the same rows always give the same bytes.

    Args:
        path: The file; it appears once it is whole.
        rows: In the order they are to stand in.

    Returns:
        What the manifest says of it: ``rows``, ``characters`` of prompts and answers, and
        ``sha256`` of the lines, which no version of zlib changes.
    """
    rows = list(rows)
    lines = "".join(row.line() for row in rows).encode()
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as zipped:
        zipped.write(lines)
    os.replace(partial, path)
    return {
        "rows": len(rows),
        "characters": sum(row.characters for row in rows),
        "sha256": hashlib.sha256(lines).hexdigest(),
    }


def write_domain(
    out: Path,
    domain: Domain,
    train: Iterable[Row],
    heldout: Iterable[Row],
    folders: Mapping[str, Path],
) -> dict[str, dict[str, int | str]]:
    """Writes both sides of a domain, and brings manifest and licences up to date.

    Args:
        out: The corpus's folder; domains that are there already stay.
        domain: The domain.
        train: Training rows.
        heldout: Held-out rows.
        folders: Its unpacked packages, for the licence texts.

    Returns:
        The domain's entry in the manifest: for ``"train"`` and ``"heldout"``, as
        :func:`write_split`.
    """
    (out / "licenses").mkdir(parents=True, exist_ok=True)
    entry = {
        split: write_split(out / f"{domain.name}.{split}.jsonl.gz", rows)
        for split, rows in (("train", train), ("heldout", heldout))
    }
    for name, folder in folders.items():
        text = folder / PACKAGES[name].licence_file
        shutil.copyfile(text, out / "licenses" / f"{name}.txt")
    manifest = {**_manifest(out), domain.name: entry}
    ordered = {name: manifest[name] for name in DOMAINS if name in manifest}
    (out / MANIFEST).write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    (out / "LICENSES.md").write_text(licence_table(ordered), encoding="utf-8")
    return entry


def licence_table(domains: Iterable[str]) -> str:
    """The page that says where each domain's rows come from and whom to credit."""
    lines = [
        f"| {name} | {package.name} | {package.version} | {package.licence} | {package.credit} |\n"
        for name in domains
        for package in (PACKAGES[key] for key in DOMAINS[name].packages)
    ]
    return _TABLE_HEAD + "".join(lines)


def _manifest(out: Path) -> dict[str, dict[str, dict[str, int | str]]]:
    path = out / MANIFEST
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: known[name] for name in known if name in DOMAINS}
