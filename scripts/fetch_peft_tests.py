"""Fetches PEFT's own X-LoRA test module: ``fetch_peft_tests.py FILE``.

The wheel of PEFT has no tests, its source distribution has. ``tests/parity`` runs them against
this project. The version is the one that constraints.txt pins, and pip is asked for it, so mirrors
and proxies of the user's pip apply.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

MEMBER = "tests/test_xlora.py"
CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"


def pinned_version(constraints: str) -> str:
    """Returns the version of PEFT that a constraints file pins."""
    pins = re.findall(r"^peft==(\S+)", constraints, flags=re.MULTILINE)
    if len(pins) != 1:
        sys.exit(f"{CONSTRAINTS} must pin peft once, found {len(pins)} pins")
    return str(pins[0])


def download(version: str, folder: Path) -> Path:
    """Returns the source distribution, downloaded into a folder by this Python's pip."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-qq"]
    # What pip asks a source distribution needs setuptools only, which PyTorch has brought.
    options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(folder)]
    command = [*pip, *options, f"peft=={version}"]
    done = subprocess.run(command, check=False)  # noqa: S603  # pip, asked for a pinned version
    found = list(folder.glob("peft-*.tar.gz"))
    if done.returncode or len(found) != 1:
        sys.exit(
            f"pip could not download the source distribution of peft=={version}\n"
            "hint: the package index must offer it, not only the wheel"
        )
    return found[0]


def main() -> None:
    """Downloads, unpacks one file, and puts it in place whole."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    target = Path(sys.argv[1])
    version = pinned_version(CONSTRAINTS.read_text(encoding="utf-8"))
    with (
        tempfile.TemporaryDirectory() as folder,
        tarfile.open(download(version, Path(folder))) as archive,
    ):
        members = [member for member in archive if member.name == f"peft-{version}/{MEMBER}"]
        file = archive.extractfile(members[0]) if members else None
        if file is None:
            sys.exit(f"peft {version} has no {MEMBER} in its source distribution")
        text = file.read()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_bytes(text)
    os.replace(partial, target)


if __name__ == "__main__":
    main()
