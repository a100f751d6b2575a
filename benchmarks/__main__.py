"""Runs the benchmark named on the command line, or all and the table of targets."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import guessing, llama_cpp, memory, mistral_rs, peft_xlora, recording, targets
from benchmarks.four_experts import save_with_four_experts
from xlora_core.cli import main as xlora
from xlora_core.errors import XLoraError

_OWN = {
    "peft_xlora": peft_xlora.main,
    "mistral_rs": mistral_rs.main,
    "llama_cpp": llama_cpp.main,
    "recording": recording.main,
    "guessing": guessing.main,
    "memory": memory.main,
}
# Each in a process of its own, in this order, with these options.
_ALL: tuple[tuple[str, ...], ...] = (
    ("decode", "--contexts", "100", "512", "1024", "2000"),
    ("arms",),
    ("requests",),
    ("adapters", "--counts", "2", "16"),
    ("recording",),
    ("guessing",),
    ("reroute",),
    ("start",),
    ("memory",),
    ("bandwidth",),
    ("peft_xlora",),
    ("mistral_rs",),
    ("mistral_rs", "--dtype", "float16"),  # in which mistral.rs is fastest on a CPU
    ("llama_cpp",),
)
# What runs over four of the demo's experts; all else over the demo as it is, or random experts.
_WITH_FOUR_EXPERTS = {
    *("decode", "arms", "requests", "recording", "guessing", "peft_xlora", "mistral_rs"),
}
# Fewer texts and rounds, for a first impression.
_QUICK = {
    "arms": ("--texts", "2", "--rounds", "2"),
    "requests": ("--counts", "1", "8"),
    "adapters": ("--texts", "1", "--rounds", "2"),
    "recording": ("--tokens", "32", "--texts", "1"),
    "start": ("--rounds", "1"),
    "peft_xlora": ("--texts", "1"),
    "mistral_rs": ("--rounds", "1"),
    "llama_cpp": ("--texts", "1", "--rounds", "2"),
}


def main(argv: Sequence[str]) -> int:
    """Runs ``[NAME] [OPTIONS]``; all benchmarks without a name, shorter ones for ``--quick``."""
    if not argv or list(argv) == ["--quick"]:
        return _run_all(quick=bool(argv))
    name, *rest = argv
    if name in _OWN:
        _OWN[name](rest)
        return 0
    if name in {line[0] for line in _ALL}:
        return xlora(["bench", name, *rest])
    names = "|".join(dict.fromkeys(line[0] for line in _ALL))
    print(f"usage: python -m benchmarks [--quick] [{names}] [--help]", file=sys.stderr)
    return 0 if name in ("-h", "--help") else 2


def _run_all(*, quick: bool) -> int:
    documents: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        try:
            four = ("--checkpoint", str(save_with_four_experts(Path(folder) / "four")))
        except XLoraError as error:  # the others do not need the demo
            print(f"{error}", file=sys.stderr)
            four = ()
        for n, (name, *given) in enumerate(_ALL):
            label = " ".join([name, *given])
            shorter = _QUICK.get(name, ()) if quick else ()
            model = four if name in _WITH_FOUR_EXPERTS else ()
            print(f"\n## {label}\n", flush=True)
            output = Path(folder) / f"{n}.json"
            subprocess.run(
                [
                    *(sys.executable, "-m", "benchmarks"),
                    *(name, *given, *shorter, *model, "--output", str(output)),
                ],
                check=False,  # a benchmark that cannot run says why; the others go on
            )
            if output.exists():
                key = label if name in documents else name
                documents[key] = json.loads(output.read_text(encoding="utf-8"))
    print(f"\n## targets\n\n{targets.target_report(documents).table()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
