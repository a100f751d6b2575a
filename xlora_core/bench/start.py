"""From the start of a process to the first token, in processes of their own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from xlora_core.bench.report import Cell, Report
from xlora_core.errors import EngineError, XLoraError
from xlora_core.startup import without_collector

METHOD = (
    "Seconds since a fresh process was started, until: the package and what it needs are imported, "
    "the model is loaded, the engine stands, the first token of a short prompt is there. loading: "
    "from the imports to the engine. Files are in the system's cache from an earlier start, "
    "which is not counted."
)
_STAGES = ("imported", "model loaded", "engine ready", "first token")
_PROMPT = "Why is the sky blue?"


def measure(model_options: Sequence[str], *, rounds: int = 3) -> Report:
    """Times starts of a process that loads a model and writes one token.

    Args:
        model_options: What ``xlora`` commands take to name a model, such as
            ``["--model", "demo"]``.
        rounds: How many starts after the first.

    Raises:
        EngineError: If such a process fails.
    """
    _start(model_options)  # fills the caches
    starts = [_start(model_options) for _ in range(rounds)]
    rows: list[dict[str, Cell]] = [_row(f"start {i}", start) for i, start in enumerate(starts, 1)]
    best = min(starts, key=lambda start: start[_STAGES[-1]])
    rows.append(_row("quietest", best))
    return Report(name="start", method=METHOD, rows=rows, facts={"rounds": rounds})


def _row(name: str, start: dict[str, float]) -> dict[str, Cell]:
    row: dict[str, Cell] = {"start": name}
    row |= {f"{stage} (s)": start[stage] for stage in _STAGES}
    return row | {"loading (s)": start["engine ready"] - start["imported"]}


def _start(model_options: Sequence[str]) -> dict[str, float]:
    # The wall clock is one that both processes share.
    command = [sys.executable, "-m", __name__, "--started", str(time.time()), *model_options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # this very program
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EngineError(
            f"a process that loads the model ended with status {done.returncode}: {last}",
            hint="check the model options with: xlora inspect",
        )
    stages: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return stages


def _main(argv: Sequence[str]) -> dict[str, float]:
    """Loads a model, writes one token, and returns stage -> seconds since ``--started``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--started", type=float)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--checkpoint")
    parser.add_argument("--adapter", action="append", default=[])
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args(argv)
    stages: dict[str, float] = {}

    def reached(stage: str) -> None:
        stages[stage] = time.time() - args.started

    with without_collector():  # as the command line and the app do
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

        from xlora_core import Engine, SamplingParams
        from xlora_core.bench.texts import prompt_of
        from xlora_core.demo import load_model
        from xlora_core.threads import set_threads

        set_threads(args.threads)
        reached("imported")
        adapters: dict[str, Any] = dict(pair.split("=", 1) for pair in args.adapter)
        model, tokenizer = load_model(
            args.model,
            checkpoint=args.checkpoint,
            adapters=adapters or None,
            device=args.device,
            dtype=args.dtype,
        )
        reached("model loaded")
    with Engine(model, tokenizer) as engine:
        reached("engine ready")
        engine.run(prompt_of(tokenizer, _PROMPT), sampling=SamplingParams(max_new_tokens=1))
        reached("first token")
    return stages


if __name__ == "__main__":
    try:
        sys.stdout.write(json.dumps(_main(sys.argv[1:])) + "\n")
    except XLoraError as error:
        sys.exit(error.message)
