"""Who forbids editing a model at the moment."""

from __future__ import annotations

import threading
from typing import Any

from xlora_core.errors import ModelError


class EditGuard:
    """Counts those who run a model and rely on its adapters staying as they are.

    A copy or a pickle of a model starts with nobody: who runs the original does not run it.
    """

    def __init__(self) -> None:
        self._n_holders = 0
        self._lock = threading.Lock()

    def hold(self) -> None:
        """Forbids editing until as many calls of ``release`` as there were of this."""
        with self._lock:
            self._n_holders += 1

    def release(self) -> None:
        """Takes one ``hold`` back."""
        with self._lock:
            self._n_holders -= 1

    def check(self) -> None:
        """Raises if somebody forbids editing.

        Raises:
            ModelError: If an engine runs the model.
        """
        if self._n_holders:
            raise ModelError(
                "an Engine runs this model, its adapters cannot be changed meanwhile: requests in "
                "the queue were checked against them, and runs name them",
                hint="close the engine (engine.close()), change them, and make a new Engine",
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> EditGuard:
        copy: EditGuard = memo.setdefault(id(self), EditGuard())
        return copy

    def __reduce__(self) -> tuple[type[EditGuard], tuple[()]]:
        return EditGuard, ()
