"""Another engine in a process of its own, under an interpreter that has it installed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

_WORKERS = Path(__file__).resolve().parent / "workers"
# Lines that begin so are answers; the engines write their logs to the same place.
ANSWER = "@answer "


class OtherProgram:
    """Runs a worker script and asks it, one JSON line at a time.

    Between two questions it is stopped, where the system can do that: mistral.rs keeps a core busy
    while it waits, and would slow down whoever has the next turn. On Linux it ends when the thread
    does that made it, however that ends.

    Args:
        script: A file of ``workers/``.
        settings: What it is given at the start.
        python: The interpreter to run it; None is this one.

    Raises:
        OtherProgramError: If it ends before it is ready.
    """

    def __init__(self, script: str, settings: dict[str, Any], *, python: str | None = None) -> None:
        self._process = subprocess.Popen(
            [python or sys.executable, str(_WORKERS / "launch.py"), str(_WORKERS / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.facts = self.ask(settings)

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Returns the answer to a question.

        Raises:
            OtherProgramError: If the process has ended, with the last line that it wrote.
        """
        process = self._process
        _signal(process, "SIGCONT")
        assert process.stdin is not None
        assert process.stdout is not None
        log: list[str] = []
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: what it wrote before says why
        for line in process.stdout:
            if line.startswith(ANSWER):
                _signal(process, "SIGSTOP")
                answer: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
                return answer
            log.append(line)
        assert process.stderr is not None
        log += process.stderr.readlines()
        last = next((line.strip() for line in reversed(log) if line.strip()), "no message")
        raise OtherProgramError(f"the process ended with status {process.wait()}: {last}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()


def _signal(process: subprocess.Popen[str], name: str) -> None:
    """Sends a signal, if the system has it."""
    number = getattr(signal, name, None)
    if number is not None:
        process.send_signal(number)


class OtherProgramError(Exception):
    """The other program failed."""
