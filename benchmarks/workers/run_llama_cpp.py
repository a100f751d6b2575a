"""Runs llama.cpp; a script of its own, for an interpreter that has nothing else installed.

Reads JSON lines, first ``{"model", "n_threads"}``, then ``{"token_ids", "n_tokens"}``, and answers
each with a line.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main() -> None:
    """Loads the model, then answers until the input ends."""
    import llama_cpp

    settings = json.loads(sys.stdin.readline())
    llama = llama_cpp.Llama(
        settings["model"],
        n_ctx=settings["n_context"],
        n_threads=settings["n_threads"],
        n_threads_batch=settings["n_threads"],
        logits_all=False,
        verbose=False,
    )
    _answer({"version": llama_cpp.__version__})
    for line in sys.stdin:
        question = json.loads(line)
        _answer(_decode(llama, question["token_ids"], question["n_tokens"]))


def _decode(llama: Any, token_ids: list[int], n_tokens: int) -> dict[str, Any]:
    llama.reset()
    llama.eval(token_ids)
    written = [llama.sample(temp=0.0, repeat_penalty=1.0)]
    start = time.perf_counter()
    while len(written) < n_tokens:
        llama.eval([written[-1]])
        written.append(llama.sample(temp=0.0, repeat_penalty=1.0))
    return {"token_ids": written, "seconds": time.perf_counter() - start}


def _answer(answer: dict[str, Any]) -> None:
    sys.stdout.write(f"\n@answer {json.dumps(answer)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
