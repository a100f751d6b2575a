"""Writes exercises of reasoning-gym to stdout, as JSON lines. Runs where that is installed.

It imports nothing of the project. Run it with PYTHONHASHSEED set: the order of sympy's terms, hence
the wording, follows the hashes of strings.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping

import reasoning_gym

_SEED = 11
_SIZES = {
    "gsm_symbolic": 9000,
    "simple_integration": 1500,
    "simple_equations": 1500,
    "polynomial_multiplication": 1500,
}


def exercises(sizes: Mapping[str, int] = _SIZES) -> Iterator[dict[str, str]]:
    """Yields dictionaries with ``question`` and ``answer``; a word problem's is worked out."""
    for name, size in sizes.items():
        for exercise in reasoning_gym.create_dataset(name, size=size, seed=_SEED):
            worked = exercise["metadata"].get("answer_cot")
            yield {"question": exercise["question"], "answer": worked or exercise["answer"]}


if __name__ == "__main__":
    for exercise in exercises():
        sys.stdout.write(json.dumps(exercise) + "\n")
