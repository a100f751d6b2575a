"""The command line: records what is missing or out of date, writes the page, checks the leads."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sample_data.record import pages
from sample_data.record.errors import RecordingError
from sample_data.record.recordings import RECORDINGS, Recording, read_recordings
from sample_data.record.shelf import Shelf, checkpoint_fingerprint
from sample_data.record.spans import SpanLead, span_leads
from xlora_core import load_model
from xlora_core.demo import DEMO, DEMO_CHECKPOINT
from xlora_core.errors import XLoraError
from xlora_core.recording import Run

RUNS = RECORDINGS.parent / "runs"
README = "README.md"
_DESCRIPTION = """\
Records the sample runs from the demo model: one file for each entry of recordings.json, and a page
about them. A run that is there already, from the same model and with the same settings, is kept;
words such as titles and what to look at may be edited without recording anew.

Always on the CPU in float32, one run after the other, a few minutes in all. Interrupted, it goes
on where it was.
"""
_EPILOG = """\
examples:
  python -m sample_data.record
  python -m sample_data.record --only all-eight --force
  python -m sample_data.record --check

--check needs no model: it prints which adapter leads in which part of each run, and ends with
status 1 if a run is missing or out of date, or another adapter leads than the list expects.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: The arguments; None takes the process's.

    Returns:
        The exit status: 0; 1 if ``--check`` found something; 2 for anything the user can mend,
        told on stderr; 130 after Ctrl-C.
    """
    args = parser().parse_args(argv)
    try:
        recordings = read_recordings(args.list)
        shelf = Shelf(args.out, checkpoint_fingerprint(args.checkpoint))
        if args.check:
            strangers = shelf.strangers(recordings)
            return check(shelf, chosen(recordings, args.only), strangers)
        failed = record(
            shelf, chosen(recordings, args.only), force=args.force, checkpoint=args.checkpoint
        )
        write_page(shelf, recordings)
        if failed:
            raise RecordingError(f"not recorded: {', '.join(failed)}", hint="see above")
    except XLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was recorded is kept", file=sys.stderr)
        return 130
    return 0


def chosen(recordings: Sequence[Recording], ids: Sequence[str] | None) -> list[Recording]:
    """Returns the recordings of these ids, in the order of the list; None takes all.

    Raises:
        RecordingError: If there is no such recording.
    """
    known = [recording.id for recording in recordings]
    for name in ids or ():
        if name not in known:
            raise RecordingError(
                f"there is no recording {name!r}", hint=f"there are {', '.join(known)}"
            )
    return [recording for recording in recordings if ids is None or recording.id in ids]


def record(
    shelf: Shelf, recordings: Sequence[Recording], *, force: bool, checkpoint: Path
) -> list[str]:
    """Records what is missing or out of date; the model is loaded only if something is.

    Args:
        shelf: Where to.
        recordings: What.
        force: Also what is there and current.
        checkpoint: The checkpoint's folder.

    Returns:
        The ids of those that failed; why is told on stderr, and the others go on.
    """
    due = [recording for recording in recordings if force or shelf.fault(recording)]
    for recording in recordings:
        if recording not in due:
            print(f"{recording.id}: kept", flush=True)
    if not due:
        return []
    from sample_data.record.stage import Stage

    model, tokenizer = load_model(DEMO, checkpoint=checkpoint, device="cpu", dtype="float32")
    stage = Stage(model, tokenizer, model_id=DEMO)
    failed = []
    for recording in due:
        try:
            run = stage.record(recording)
        except XLoraError as error:
            print(f"{recording.id}: {error}", file=sys.stderr, flush=True)
            failed.append(recording.id)
        else:
            shelf.put(recording, run)
            print(_said(recording, run, shelf.path(recording)), flush=True)
    return failed


def write_page(shelf: Shelf, recordings: Sequence[Recording]) -> None:
    """Brings index and page up to date with the list; runs that are not current are left out."""
    current = [recording for recording in recordings if shelf.fault(recording) is None]
    if not current:
        return
    found = [(recording, shelf.run(recording)) for recording in current]
    page = pages.readme([(r, run, span_leads(run, r)) for r, run in found])
    shelf.arrange(recordings)
    (shelf.folder / README).write_text(page, encoding="utf-8")


def check(shelf: Shelf, recordings: Sequence[Recording], strangers: Sequence[str] = ()) -> int:
    """Prints who leads where and what is wrong; returns 1 if anything is.

    Args:
        shelf: The runs.
        recordings: Which of them.
        strangers: Files beside them that are no recording's.
    """
    leads: list[tuple[Recording, Sequence[SpanLead]]] = []
    faults = {recording.id: shelf.fault(recording) for recording in recordings}
    wrong = [f"{name}: {fault}" for name, fault in faults.items() if fault]
    wrong += [f"{name}: no recording has this name" for name in strangers]
    for recording in recordings:
        if faults[recording.id] is None:
            found = span_leads(shelf.run(recording), recording)
            leads.append((recording, found))
            wrong += pages.misses(recording, found)
    print(pages.check_table(leads))
    print("\n".join(["", *wrong]) if wrong else "\nall runs are current, all leads as expected")
    return 1 if wrong else 0


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    arguments = argparse.ArgumentParser(
        prog="python -m sample_data.record",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument(
        "--out", type=Path, default=RUNS, metavar="DIR", help="default: sample_data/runs"
    )
    arguments.add_argument("--only", nargs="+", metavar="ID", help="these runs alone")
    arguments.add_argument(
        "--force", action="store_true", help="record anew what is there and current"
    )
    arguments.add_argument(
        "--check", action="store_true", help="record nothing, say who leads where"
    )
    arguments.add_argument(
        "--list", type=Path, default=RECORDINGS, metavar="FILE", help="another recordings.json"
    )
    arguments.add_argument(
        "--checkpoint",
        type=Path,
        default=DEMO_CHECKPOINT,
        metavar="DIR",
        help="another X-LoRA checkpoint of the demo's base model",
    )
    return arguments


def _said(recording: Recording, run: Run, path: Path) -> str:
    n_tokens = max(track.n_tokens for track in run.tracks)
    seconds = max(float(track.seconds[-1]) for track in run.tracks)
    reasons = ", ".join(
        f"{label} {track.finish_reason}"
        for label, track in zip(run.arm_labels, run.tracks, strict=True)
    )
    size = path.stat().st_size / 1e6
    return f"{recording.id}: {n_tokens} tokens in {seconds:.0f} s ({reasons}), {size:.2f} MB"
