"""Triton's kernel of the mixture, in Triton's interpreter.

Triton is not among the test requirements: it is 0.3 GB to download and 1 GB installed. This runs
wherever it is there, as with PyTorch's CUDA builds, or after ``pip install triton``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_kernel_adds_what_plain_products_add() -> None:
    pytest.importorskip("triton", reason="triton is not installed: pip install triton (0.3 GB)")
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
