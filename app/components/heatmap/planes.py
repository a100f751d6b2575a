"""The planes of a run: what the heatmap draws of every (token, module, adapter), as small arrays.

A row that a live run has recorded never changes, so ``Planes`` computes each row once however
often the page asks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from app import frames

if TYPE_CHECKING:
    from xlora_core import RoutingKnobs, Run

Range = tuple[float, float]


def quantize(values: NDArray[np.float32], low: float, high: float) -> NDArray[np.uint8]:
    """Returns ``values`` as codes 0..255 over ``[low, high]``."""
    codes = np.rint((values - low) * (255.0 / (high - low)))
    return np.asarray(np.clip(codes, 0, 255), dtype=np.uint8)


class Planes:
    """The planes of one arm, growing with it.

    Attributes:
        n_rows: Tokens R that the planes hold.
        range: Colour range of the scalings.
        effective_range: Colour range of the effective scalings.
        derived: The browser computes the effective scalings from the others (half the bytes);
            otherwise, as with overrides, they are a plane of their own.
        per_module: There is a row per module; otherwise all modules have the same.
    """

    def __init__(self) -> None:
        self._run_id = ""
        self.range: Range = (0.0, 1.0)
        self.effective_range: Range = (0.0, 1.0)
        self.derived = True
        self.per_module = False
        self._forget_rows()

    def _forget_rows(self) -> None:
        self._rows: dict[str, NDArray[Any]] = {}
        self._present: NDArray[np.uint8] | None = None
        self._any_cut = False
        self.n_rows = 0

    def read(self, run: Run, arm: int, knobs: RoutingKnobs | None = None) -> None:
        """Takes what the arm has recorded since the last time.

        Args:
            run: The run, or a snapshot of it.
            arm: Index of the routed arm.
            knobs: Route the recorded logits with these; always the same for one ``Planes``.
        """
        n_routed = run.tracks[arm].n_routed
        derived = not (run.header.enable_softmax_topk or frames.overrides(run, arm, knobs))
        per_module = frames.differs_by_module(run, arm, knobs)
        if run.header.run_id != self._run_id or n_routed < self.n_rows:
            self._run_id = run.header.run_id
            self.range = self.effective_range = (0.0, 1.0)
            self._forget_rows()
        if (derived, per_module) != (self.derived, self.per_module):
            # The run's first override: its effective scalings need a plane, its modules rows.
            self.derived, self.per_module = derived, per_module
            self._forget_rows()
        if n_routed == self.n_rows and self._rows:
            return
        drawn = self._new_rows(run, arm, knobs)
        if not self._widen(drawn, run.header.enable_softmax) and self.n_rows:
            # Codes of the old range mean other values now.
            self._forget_rows()
            drawn = self._new_rows(run, arm, knobs)
        self._append(drawn)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Returns the planes by name; those that say nothing are left out."""
        arrays = dict(self._rows)
        if not self._any_cut:
            arrays.pop("kept", None)
        if self._present is not None:
            arrays["present"] = self._present
        return arrays

    def _new_rows(self, run: Run, arm: int, knobs: RoutingKnobs | None) -> frames.Routing:
        return frames.routing(frames.tail(run, arm, self.n_rows), 0, knobs)

    def _widen(self, drawn: frames.Routing, bounded: bool) -> bool:
        """Makes the ranges hold the new rows; returns whether they stayed as they were."""
        before = self.range, self.effective_range
        self.range = frames.value_range(drawn.scalings, bounded=bounded, within=self.range)
        self.effective_range = frames.value_range(
            drawn.effective, bounded=bounded, within=self.effective_range
        )
        return before == (self.range, self.effective_range)

    def _append(self, drawn: frames.Routing) -> None:
        rows: dict[str, NDArray[Any]] = {
            "scalings": quantize(drawn.scalings, *self.range),
            "kept": np.packbits(~drawn.cut & drawn.present, axis=2, bitorder="little"),
            "weight": drawn.global_weight,
            "share": frames.mass_shares(drawn.scalings),
            "share_effective": frames.mass_shares(drawn.effective),
            "number": frames.effective_number(drawn.scalings),
            "number_effective": frames.effective_number(drawn.effective),
        }
        if not self.derived:
            rows["effective"] = quantize(drawn.effective, *self.effective_range)
        self._rows = {
            name: np.concatenate([self._rows[name], new]) if name in self._rows else new
            for name, new in rows.items()
        }
        self._present = drawn.present.astype(np.uint8)
        self._any_cut |= bool(drawn.cut.any())
        self.n_rows = len(rows["weight"]) + self.n_rows
