"""The folder of the runs: what is there, and whether it belongs to this model and this list.

``index.json`` keeps, for every run, the fingerprint of the checkpoint that it was recorded from,
that of its settings, and the checksum of its file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from sample_data.record.errors import RecordingError
from sample_data.record.recordings import Recording
from xlora_core.recording import Run
from xlora_core.recording.atomic_file import atomic_file

INDEX = "index.json"
_ENTRY_KEYS = {"checkpoint", "settings", "sha256"}

Entry = dict[str, str]


def checkpoint_fingerprint(folder: Path) -> str:
    """Returns 16 hex digits over the weights and settings in a checkpoint folder.

    What else lies there, such as the log of the training, does not count.

    Raises:
        RecordingError: If there are none.
    """
    files = sorted(path for path in folder.rglob("*") if _is_part(path))
    if not files:
        raise RecordingError(f"{folder} holds no checkpoint")
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _is_part(path: Path) -> bool:
    return path.suffix == ".safetensors" or path.name in ("xlora.json", "adapter_config.json")


class Shelf:
    """The runs of a folder.

    Args:
        folder: Made when the first run is put there.
        checkpoint: Fingerprint of the checkpoint that runs are to be from.

    Raises:
        RecordingError: If the folder's index is malformed.
    """

    def __init__(self, folder: Path, checkpoint: str) -> None:
        self.folder = folder
        self.checkpoint = checkpoint
        self._entries = _read_index(folder / INDEX)

    def path(self, recording: Recording) -> Path:
        """Returns where a recording's run lies."""
        return self.folder / f"{recording.id}.safetensors"

    def fault(self, recording: Recording) -> str | None:
        """Returns why a recording's run must be made anew; None if it is there and current."""
        entry, path = self._entries.get(recording.id), self.path(recording)
        if entry is None or not path.is_file():
            return "not recorded"
        if entry["checkpoint"] != self.checkpoint:
            return "recorded from another model"
        if entry["settings"] != recording.settings:
            return "recorded with other settings"
        if entry["sha256"] != _sha256(path):
            return "the file is not the one that was recorded"
        return None

    def put(self, recording: Recording, run: Run) -> None:
        """Writes a run and notes what it belongs to."""
        self.folder.mkdir(parents=True, exist_ok=True)
        run.save(self.path(recording))
        self._entries[recording.id] = {
            "checkpoint": self.checkpoint,
            "settings": recording.settings,
            "sha256": _sha256(self.path(recording)),
        }
        self._write_index()

    def run(self, recording: Recording) -> Run:
        """Returns the run of a recording.

        Raises:
            RunFileError: If it cannot be read.
            RecordingError: If it is another recording's.
        """
        run = Run.load(self.path(recording))
        if run.header.run_id != recording.id:
            raise RecordingError(
                f"{self.path(recording)} holds the run {run.header.run_id!r}",
                hint="record it again with --force",
            )
        return run

    def strangers(self, recordings: Iterable[Recording]) -> list[str]:
        """Returns the names of run files that are no recording's, in order."""
        known = {self.path(recording).name for recording in recordings}
        found = {path.name for path in self.folder.glob("*.safetensors")}
        return sorted(found - known)

    def arrange(self, recordings: Sequence[Recording]) -> None:
        """Keeps the index in the order of the list, without runs that are no longer on it."""
        order = [recording.id for recording in recordings]
        self._entries = {name: self._entries[name] for name in order if name in self._entries}
        self._write_index()

    def _write_index(self) -> None:
        with atomic_file(self.folder / INDEX) as file:
            file.write((json.dumps(self._entries, indent=1) + "\n").encode())


def _read_index(path: Path) -> dict[str, Entry]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordingError(
            f"{path} is not JSON: {error}", hint="remove it: all runs are then recorded anew"
        ) from error
    entries = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(entry, dict) and set(entry) == _ENTRY_KEYS for entry in entries):
        raise RecordingError(
            f"{path}: expected {', '.join(sorted(_ENTRY_KEYS))} for every run",
            hint="remove it: all runs are then recorded anew",
        )
    return dict(found)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
