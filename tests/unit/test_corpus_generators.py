"""The two scripts that generate exercises, run on stand-ins for the packages they import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sample_data.build import environments
from sample_data.build.domains import mathematics

# One module orders objects by their hashes, one fails every other time, one always.
MATHEMATICS = {
    "absl/__init__.py": "",
    "absl/flags.py": "def FLAGS(argv, known_only): pass\n",
    "mathematics_dataset/__init__.py": "",
    "mathematics_dataset/generate.py": "def sample_from_module(module): return module(), 0\n",
    "mathematics_dataset/util/__init__.py": "",
    "mathematics_dataset/util/composition.py": "class Entity:\n    pass\n",
    "mathematics_dataset/modules/__init__.py": "",
    "mathematics_dataset/modules/modules.py": """
import os
import random
from collections import namedtuple
import numpy as np
from mathematics_dataset.util.composition import Entity

Problem = namedtuple("Problem", "question answer")

def add():
    return Problem(f"add {random.random()} {np.random.random()}", 1)

def order():
    parts, between = {}, []
    for number in range(9):
        parts[Entity()] = number
        # Other addresses in every run.
        between += [Entity() for _ in range(os.urandom(1)[0])]
    return Problem(f"order {[parts[part] for part in set(parts)]} {random.random()}", 3)

def fickle():
    if random.random() < 0.5:
        raise AttributeError("numpy.int64")
    return Problem(f"fickle {random.random()}", 2)

def broken():
    raise TypeError("broken")

def train(entropy):
    assert entropy((0, 10)) == (0, 10)
    return {
        "b": {"fickle": fickle},
        "a": {"add": add},
        "c": {"order": order},
        "polynomials": {"add": broken},
    }
""",
}
REASONING = """
def create_dataset(name, size, seed):
    for number in range(seed, seed + size):
        metadata = {"answer_cot": f"So.\\n#### {number}"} if name == "gsm_symbolic" else {}
        question = f"{name} {number}? Give the result."
        yield {"question": question, "answer": str(number), "metadata": metadata}
"""


def run(script: str, stubs: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, environments._SCRIPTS / script],
        env={**os.environ, "PYTHONPATH": str(stubs), "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    for name, text in {**MATHEMATICS, "reasoning_gym.py": REASONING}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_every_module_gives_as_many_and_two_runs_the_same(stubs: Path) -> None:
    once, again = run("exercises.py", stubs), run("exercises.py", stubs)
    assert once.returncode == 0, once.stderr
    assert once.stdout == again.stdout
    exercises = [json.loads(line) for line in once.stdout.splitlines()]
    kinds = [exercise["question"].split()[0] for exercise in exercises]
    assert kinds == ["add"] * 400 + ["fickle"] * 400 + ["order"] * 400
    assert {exercise["answer"] for exercise in exercises} == {"1", "2", "3"}
    assert len({exercise["question"] for exercise in exercises}) == 1200


def test_a_module_that_never_works_is_no_endless_loop(stubs: Path) -> None:
    modules = stubs / "mathematics_dataset" / "modules" / "modules.py"
    modules.write_text(modules.read_text().replace('"polynomials"', '"polynomial"'))
    done = run("exercises.py", stubs)
    assert done.returncode == 1
    assert "polynomial__add hardly ever works" in done.stderr


def test_word_problems_come_worked_out(stubs: Path) -> None:
    done = run("word_problems.py", stubs)
    assert done.returncode == 0, done.stderr
    exercises = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(exercises) == 9000 + 3 * 1500
    row = mathematics.exercise_row(**exercises[0])
    assert (row.user, row.assistant) == ("gsm_symbolic 11?", "So.\nThe answer is 11")
    assert exercises[-1]["answer"] == "1510"
