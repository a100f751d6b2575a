"""Memory: what a process holds with the model loaded and one run finished.

Each case runs in a process of its own: the engine alone, and the app's pages over it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.options import new_parser, show
from xlora_core.bench import Report

PROMPT = "Why is the sky blue? Explain it to a child."
METHOD = (
    "Resident memory (MiB) of a process, case by case: the engine alone, and the app's pages over "
    "it without the web server."
)
_ROOT = Path(__file__).resolve().parents[1]
_LIMIT_GB = 2.5
_MEBIBYTE = 2**20


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    parser = new_parser("memory", __doc__ or "")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--case", choices=("engine", "app"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.case:
        print(json.dumps(_engine_case(args) if args.case == "engine" else _app_case(args)))
        return
    rows = [{"case": case} | _in_own_process(case, argv) for case in ("engine", "app")]
    facts = {
        "limit (GB)": _LIMIT_GB,
        "dtype": args.dtype or "default",
        "tokens": args.max_new_tokens,
    }
    show(Report(name="memory", method=METHOD, rows=rows, facts=facts), args, argv)


def _in_own_process(case: str, argv: Sequence[str]) -> dict[str, Any]:
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks", "memory", *argv, "--case", case],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(finished.stdout.strip().splitlines()[-1])
    return result


def _resident() -> float:
    gc.collect()
    return float(psutil.Process().memory_info().rss) / _MEBIBYTE


def _peak() -> float | None:
    """Returns the largest resident size so far in MiB, where the system keeps it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def _engine_case(args: argparse.Namespace) -> dict[str, Any]:
    from xlora_core import Arm, Engine, SamplingParams
    from xlora_core.cli.options import load

    imported = _resident()
    model, tokenizer = load(args)
    loaded = _resident()
    with Engine(model, tokenizer) as engine:
        run = engine.run(
            [{"role": "user", "content": PROMPT}],
            [Arm.routed(), Arm.merged()],
            SamplingParams(max_new_tokens=args.max_new_tokens),
        )
        finished = _resident()
    return _row(imported, loaded, finished, run.tracks[0].n_tokens)


def _app_case(args: argparse.Namespace) -> dict[str, Any]:
    """The pages in Streamlit's own test runner: all of the app but its web server."""
    from streamlit.testing.v1 import AppTest

    from app import engine_client, session

    _pass_model_options(args)
    imported = _resident()
    engine_client.shared_client()
    loaded = _resident()
    page = AppTest.from_file(str(_ROOT / "app" / "main.py"), default_timeout=600).run()
    page.text_area(key=session.PROMPT).set_value(PROMPT)
    page.number_input(key=session.MAX_NEW_TOKENS).set_value(args.max_new_tokens)
    next(button for button in page.button if button.label == "Generate").click().run()
    handle = page.session_state["show"].handle
    while not page.exception and page.session_state["show"].live:
        page.run()  # as the page's own polling
    if page.exception:
        raise SystemExit(f"the app failed: {page.exception[0].message}")
    return _row(imported, loaded, _resident(), handle.wait().tracks[0].n_tokens)


def _pass_model_options(args: argparse.Namespace) -> None:
    options = {"MODEL": args.model, "CHECKPOINT": args.checkpoint, "DEVICE": args.device}
    options |= {"DTYPE": args.dtype, "ADAPTERS": ",".join(args.adapter)}
    for name, value in options.items():
        if value:
            os.environ[f"XLORA_APP_{name}"] = value


def _row(imported: float, loaded: float, finished: float, n_tokens: int) -> dict[str, Any]:
    peak = _peak()
    return {
        "imports_mib": round(imported),
        "model_loaded_mib": round(loaded),
        "run_finished_mib": round(finished),
        "peak_mib": None if peak is None else round(peak),
        "tokens": n_tokens,
        "under_2.5_gb": "yes" if finished * _MEBIBYTE < _LIMIT_GB * 1e9 else "no",
    }
