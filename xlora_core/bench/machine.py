"""The machine and the software that a timing depends on."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

_PACKAGE = "xlora-explorer"
# They decide whether idle threads spin, and how many there are.
_THREAD_VARIABLES = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def machine() -> dict[str, Any]:
    """Returns what a timing depends on beside the model, as plain JSON types.

    ``load_average`` is that of the last minute: well above the number of cores that the benchmark
    itself keeps busy, something else ran, too.
    """
    has_load = hasattr(os, "getloadavg")  # not on Windows
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch_threads": torch.get_num_threads(),
        "thread_settings": {k: os.environ[k] for k in _THREAD_VARIABLES if k in os.environ},
        "load_average": round(os.getloadavg()[0], 2) if has_load else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        _PACKAGE: _version(),
    }


def machine_words(facts: dict[str, Any]) -> str:
    """Returns the same in one line, for people."""
    settings = ", ".join(f"{k}={v}" for k, v in facts["thread_settings"].items())
    words = [
        *([facts["gpu"]] if facts["gpu"] else []),
        f"{facts['cpu']}, {facts['cores']} cores",
        f"{facts['torch_threads']} threads" + (f" ({settings})" if settings else ""),
        f"load {facts['load_average']}",
        f"torch {facts['torch']}",
        f"transformers {facts['transformers']}",
    ]
    return ", ".join(words)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version() -> str | None:
    try:
        return metadata.version(_PACKAGE)
    except metadata.PackageNotFoundError:
        return None
