"""Triton's kernel of the mixture, in Triton's interpreter.

There are builds of Triton for Linux on x86-64 and ARM; there it is among the test requirements.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_kernel_adds_what_plain_products_add() -> None:
    if sys.platform == "linux":
        assert importlib.util.find_spec("triton"), "install the test requirements"
    pytest.importorskip("triton", reason="there is no Triton for this system")
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/interpreted_triton.py",
        ],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
