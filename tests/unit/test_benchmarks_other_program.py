"""Other software in a process of its own: asked line by line, stopped in between, never left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.other_program import OtherProgram

_ECHO = """
import json, sys
print('a line of its log')
for line in sys.stdin:
    print('@answer ' + json.dumps({'got': json.loads(line)}), flush=True)
"""


def _state(pid: int) -> str:
    """Returns what a process does: "T" for stopped, "Z" or nothing where it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return ""


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


def test_another_program_is_asked_line_by_line_and_stopped_in_between(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(_ECHO)
    with OtherProgram(str(script), {"model": "m"}) as other:
        assert other.facts == {"got": {"model": "m"}}
        for n in range(2):
            _wait_until(lambda: _state(other._process.pid) == "T")
            assert other.ask({"n": n}) == {"got": {"n": n}}


def test_another_program_ends_with_the_benchmark_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(_ECHO)
    benchmark = f"""
import os, signal
from benchmarks.other_program import OtherProgram
other = OtherProgram({str(script)!r}, {{}})
print(other._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).resolve().parents[2]
    killed = subprocess.run(
        [sys.executable, "-c", benchmark], cwd=root, capture_output=True, text=True, check=False
    )
    _wait_until(lambda: _state(int(killed.stdout)) in ("", "Z"))
