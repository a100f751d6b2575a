"""Showing how a training run gets on: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm  # type: ignore[import-untyped]  # it ships no types
from transformers import TrainerCallback

Report = Callable[[str], None]  # gets a line


def silent(line: str) -> None:
    """Reports nothing."""


class Progress(TrainerCallback):
    """Says nothing; its children show something."""

    def note(self, line: str) -> None:
        """Shows a line."""

    # Any: transformers passes its callbacks whatever a version of it has.
    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Shows the losses of a step, or of the held-out rows."""
        logs: dict[str, float] = kwargs["logs"]
        if "heldout_loss" in logs:
            routing = {k.removeprefix("routing:"): v for k, v in logs.items() if "routing:" in k}
            figures = [f"held-out {logs['heldout_loss']:.3f}"]
            if "entropy" in routing:
                figures.append(f"router entropy {routing['entropy']:.2f}")
            if "right_top" in routing:
                figures.append(f"right expert leads {routing['right_top']:.0%}")
            self.note(f"step {state.global_step}/{state.max_steps}  {'  '.join(figures)}")
        elif "lm_loss" in logs:
            self.step(state.global_step, state.max_steps, logs)

    def step(self, step: int, steps: int, logs: dict[str, float]) -> None:
        """Shows a finished step."""


class LineProgress(Progress):
    """A line for every step and every evaluation.

    Args:
        report: Gets the lines.
        name: What is trained; stands before each line.
    """

    def __init__(self, report: Report, name: str = "") -> None:
        self.report = report
        self.prefix = f"{name}  " if name else ""

    def note(self, line: str) -> None:
        """Reports a line."""
        self.report(f"{self.prefix}{line}")

    def step(self, step: int, steps: int, logs: dict[str, float]) -> None:
        """Reports a finished step."""
        self.note(f"step {step}/{steps}  loss {logs['lm_loss']:.3f}  {logs['seconds']:.1f} s")


class BarProgress(Progress):
    """A progress bar, and a line above it for every evaluation.

    Args:
        stream: A terminal.
        name: What is trained; stands before the bar.
    """

    def __init__(self, stream: TextIO, name: str = "") -> None:
        self.stream = stream
        self.name = name
        self.bar: Any = None

    def note(self, line: str) -> None:
        """Writes a line above the bar."""
        tqdm.write(f"{self.name}  {line}", file=self.stream)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draws the bar; a resumed run's starts where it was."""
        self.bar = tqdm(
            desc=self.name,
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            file=self.stream,
            dynamic_ncols=True,
        )

    def step(self, step: int, steps: int, logs: dict[str, float]) -> None:
        """Moves the bar."""
        self.bar.set_postfix_str(f"loss {logs['lm_loss']:.3f}", refresh=False)
        self.bar.update(step - self.bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leaves the finished bar on the screen."""
        self.bar.close()


def progress_on(stream: TextIO, name: str = "") -> Progress:
    """Returns a bar for a terminal, and lines for a file or a pipe."""
    if stream.isatty():
        return BarProgress(stream, name)
    return LineProgress(lambda line: print(line, file=stream, flush=True), name)
