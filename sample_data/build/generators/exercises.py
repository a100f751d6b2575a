"""Writes exercises of mathematics-dataset to stdout, as JSON lines. Runs where that is installed.

The package wants numpy and sympy of 2019, so it has an environment of its own, and this file
imports nothing of the project. Run it with PYTHONHASHSEED set: the order of sympy's terms, hence
the wording, follows the hashes of strings.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from absl import flags
from mathematics_dataset import generate
from mathematics_dataset.modules import modules
from mathematics_dataset.util import composition

_SEED = 11
_PER_MODULE = 400
_TOO_MANY_FAILURES = 10 * _PER_MODULE
# Does not work with the newest sympy that the others work with.
_BROKEN = {"polynomials__add"}


def exercises(per_module: int = _PER_MODULE) -> Iterator[dict[str, str]]:
    """Yields dictionaries with ``question`` and ``answer``, module by module.

    Every module is seeded by its name, so that one that draws more numbers changes no other.
    """
    flags.FLAGS([""], known_only=True)
    _number_entities()
    for name, module in sorted(_flat(modules.train(_any_difficulty))):
        if name in _BROKEN:
            continue
        seed = f"{_SEED}/{name}"
        random.seed(seed)
        np.random.seed(random.getrandbits(32))
        made = 0
        failed = 0
        while made < per_module:
            try:
                problem, _ = generate.sample_from_module(module)
            except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
                # Now and then a module draws numbers that it, or this sympy, cannot handle.
                failed += 1
                if failed > _TOO_MANY_FAILURES:
                    raise RuntimeError(f"{name} hardly ever works") from error
                continue
            yield {"question": str(problem.question), "answer": str(problem.answer)}
            made += 1


def _number_entities() -> None:
    """Makes sets of a question's parts keep one order.

    The package shuffles such a set, whose order follows the parts' hashes: addresses in memory,
    other ones in every run.
    """
    numbers = itertools.count()

    def number(entity: Any) -> int:
        if "number" not in vars(entity):
            entity.number = next(numbers)
        return int(entity.number)

    composition.Entity.__hash__ = number


def _any_difficulty(entropies: tuple[float, float]) -> tuple[float, float]:
    return entropies


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Callable[[], Any]]]:
    for name, branch in tree.items():
        if isinstance(branch, dict):
            yield from _flat(branch, prefix + name + "__")
        else:
            yield prefix + name, branch


if __name__ == "__main__":
    for exercise in exercises():
        sys.stdout.write(json.dumps(exercise) + "\n")
