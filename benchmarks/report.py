"""What every benchmark prints: a table for people, and JSON that says where it came from."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from xlora_core.cli.options import add_model_options

Row = Mapping[str, float | int | str | None]


def new_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Returns a benchmark's parser, with the model options and ``--output``."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=description)
    parser.add_argument("--output", metavar="FILE", help="also write the JSON there")
    add_model_options(parser)
    return parser


def publish(name: str, rows: Sequence[Row], args: argparse.Namespace, **facts: Any) -> None:
    """Prints the rows as a table and everything as one JSON line.

    Args:
        name: The benchmark.
        rows: The results; all have the same keys.
        args: The benchmark's arguments.
        facts: More that belongs to the results, such as the dtype.
    """
    print(f"\n{name}")
    columns = list(rows[0])
    cells = [columns, *([_cell(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    document = {
        "benchmark": name,
        "command": f"python -m benchmarks {name} {' '.join(sys.argv[2:])}".strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        **facts,
        "rows": list(rows),
    }
    print(json.dumps(document))
    if args.output:
        Path(args.output).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """Returns what the results depend on beside the code."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        # A busy machine: read the results with care.
        "load_average": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cell(value: float | int | str | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
