"""A run: what is known of one generation, and everything that can be asked of it afterwards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from xlora_core.config import RoutingKnobs
from xlora_core.errors import ConfigError, RecordError
from xlora_core.recording import buckets, export, long_table, run_file
from xlora_core.recording.buckets import BucketBy
from xlora_core.recording.export import ExportBy
from xlora_core.recording.header import RunHeader
from xlora_core.recording.reroute import track_scalings
from xlora_core.recording.track import Track, shape_faults

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Run:
    """The record of one generation, one track per arm. Needs no model.

    Attributes:
        header: What the run is a run of.
        tracks: One per arm.

    Raises:
        RecordError: If a track's arrays do not fit each other or the header.
    """

    header: RunHeader
    tracks: Sequence[Track]

    def __post_init__(self) -> None:
        if not self.tracks:
            raise RecordError("a run needs at least one track")
        for index, track in enumerate(self.tracks):
            faults = shape_faults(track, self.header)
            if faults:
                raise RecordError(f"track {index} ({track.arm.label}): " + "; ".join(faults))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Run:
        """Returns the run of a file.

        Raises:
            RunFileError: If the file is missing, truncated, doctored, or of a newer version.
        """
        return cls(*run_file.read(Path(path)))

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "the run file") -> Run:
        """Returns the run of a file's bytes, such as an upload's.

        Args:
            data: The bytes.
            name: What errors call the file.

        Raises:
            RunFileError: If they are truncated, doctored, or of a newer version.
        """
        return cls(*run_file.decode(data, name))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the run file; a file of that name is replaced at once or not at all.

        Raises:
            RunFileError: If it cannot be written, or the run holds values that it may not.
        """
        run_file.write(self.header, self.tracks, Path(path))

    def to_bytes(self) -> bytes:
        """Returns the run file's bytes, such as for a download.

        Raises:
            RunFileError: If the run holds values that a run file may not.
        """
        return run_file.encode(self.header, self.tracks)

    @property
    def arm_labels(self) -> list[str]:
        """One name per arm, all different: ``"routed"``, ``"routed#2"``, ``"expert:math"``."""
        labels: list[str] = []
        for track in self.tracks:
            label, n = track.arm.label, 1
            while label in labels:
                n += 1
                label = f"{track.arm.label}#{n}"
            labels.append(label)
        return labels

    def track(self, arm: int) -> Track:
        """Returns the track of an arm.

        Raises:
            ConfigError: If there is no such arm.
        """
        if not 0 <= arm < len(self.tracks):
            raise ConfigError(
                f"the run has {len(self.tracks)} arms, numbered from 0; there is no arm {arm}"
            )
        return self.tracks[arm]

    def text(self, arm: int = 0, *, stop_token: bool = True) -> str:
        """Returns the response as the arm wrote it, special tokens included.

        Args:
            arm: Index of the arm.
            stop_token: Keep the text of the token with which the model ended its answer.
        """
        track = self.track(arm)
        stopped = track.finish_reason == "stop" and not stop_token
        return "".join(track.pieces[track.n_prompt : track.n_tokens - stopped])

    def scalings(
        self, arm: int = 0, knobs: RoutingKnobs | None = None, effective: bool = False
    ) -> NDArray[np.float32]:
        """Returns an arm's scalings, recomputed from its router logits without the model.

        Other ``knobs`` than those of the run are exact for the classifier, which never sees the
        main pass. A per-layer router's gates do: under other knobs the mixture below a gate, and
        so its input, would have been another one. What comes back for such a run
        (``header.router``) is exact for its first module and approximate beyond.

        Args:
            arm: Index of the arm.
            knobs: For all tokens, instead of those in force at each token. Without effect on an
                arm that is not routed: merged is 1/K, base 0, an expert 1 for itself.
            effective: What the modules multiplied by: after top-k and global weight, and 0 where
                a module has no weights of the adapter. Otherwise what PEFT logs.

        Returns:
            ``[R, L, K]`` float32, one row per token whose routing is known.

        Raises:
            ConfigError: If there is no such arm, or top-k is larger than K.
        """
        track = self.track(arm)
        values = track_scalings(self.header, track, knobs, effective=effective)
        header = self.header
        if effective:
            return values * np.array(header.present, dtype=np.float32)
        shape = (len(values), header.n_lora_layers, header.n_adapters)
        return values if values.shape == shape else np.broadcast_to(values, shape).copy()

    def bucketed(
        self,
        by: BucketBy = "position",
        width: int = 16,
        knobs: RoutingKnobs | None = None,
        *,
        arm: int | None = None,
    ) -> pd.DataFrame:
        """Returns one row per arm, bucket of tokens, module and adapter.

        See ``buckets.bucketed_tables`` for the columns.

        Args:
            by: ``"position"`` (``width`` tokens each), ``"segment"`` (prompt, response) or
                ``"seq_len"`` (as PEFT's log: all tokens of each forward call).
            width: Tokens per bucket by position, >= 1.
            knobs: As in ``scalings``.
            arm: Only this arm; None takes all.

        Raises:
            ConfigError: If an argument is out of range.
        """
        import pandas as pd

        tables = buckets.bucketed_tables(self, by, width=width, knobs=knobs, arm=arm)
        return pd.concat(list(tables), ignore_index=True)

    def long_table(
        self, knobs: RoutingKnobs | None = None, *, arm: int | None = None
    ) -> pd.DataFrame:
        """Returns one row per arm, token, module and adapter.

        See ``long_table.long_tables`` for the columns. Large: a routed answer of 500 tokens over
        210 modules and 8 adapters has 840,000 rows.

        Args:
            knobs: As in ``scalings``.
            arm: Only this arm; None takes all.

        Raises:
            ConfigError: If an argument is out of range.
        """
        import pandas as pd

        return pd.concat(list(long_table.long_tables(self, knobs, arm=arm)), ignore_index=True)

    def to_csv(
        self,
        path: str | os.PathLike[str],
        by: ExportBy = "position",
        width: int = 16,
        knobs: RoutingKnobs | None = None,
        *,
        arm: int | None = None,
    ) -> None:
        """Writes a table as CSV (UTF-8, LF, texts in quotes); text cells are defused.

        Args:
            path: The file; replaced at once or not at all.
            by: As in ``bucketed``, or ``"token"`` for the long table.
            width: As in ``bucketed``.
            knobs: As in ``scalings``.
            arm: Only this arm; None takes all.

        Raises:
            ConfigError: If an argument is out of range.
            RecordError: If the file cannot be written.
        """
        export.write_csv(self, Path(path), by, width=width, knobs=knobs, arm=arm)

    def to_csv_text(
        self,
        by: ExportBy = "position",
        width: int = 16,
        knobs: RoutingKnobs | None = None,
        *,
        arm: int | None = None,
    ) -> str:
        """Returns what ``to_csv`` writes, such as for a download."""
        return export.csv_text(self, by, width=width, knobs=knobs, arm=arm)

    def to_parquet(
        self,
        path: str | os.PathLike[str],
        by: ExportBy = "position",
        width: int = 16,
        knobs: RoutingKnobs | None = None,
        *,
        arm: int | None = None,
    ) -> None:
        """Writes the table that ``to_csv`` writes as Parquet, with the same arguments."""
        export.write_parquet(self, Path(path), by, width=width, knobs=knobs, arm=arm)
