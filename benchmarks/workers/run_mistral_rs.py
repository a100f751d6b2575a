"""Runs mistral.rs; a script of its own, for an interpreter that has nothing else installed.

Reads JSON lines, first ``{"model", "adapters", "order", "dtype"}`` (without the adapters it runs
the plain base model), then ``{"prompt", "max_tokens"}``, and answers each with a line.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    """Loads the model, then answers until the input ends."""
    from importlib.metadata import version

    import mistralrs

    settings = json.loads(sys.stdin.readline())
    model = {
        "model_id": settings["model"],
        "arch": mistralrs.Architecture.Llama,
        "dtype": getattr(mistralrs.ModelDType, settings["dtype"]),
    }
    if "adapters" in settings:
        which = mistralrs.Which.XLora(
            xlora_model_id=settings["adapters"], order=settings["order"], **model
        )
    else:
        which = mistralrs.Which.Plain(**model)
    runner = mistralrs.Runner(which=which, max_seqs=1)
    _answer({"version": version("mistralrs"), "dtype": settings["dtype"]})
    for line in sys.stdin:
        question = json.loads(line)
        completion = runner.send_completion_request(
            mistralrs.CompletionRequest(model="", temperature=0.0, **question)
        )
        usage = completion.usage
        _answer(
            {
                "text": completion.choices[0].text,
                "n_prompt": usage.prompt_tokens,
                "n_tokens": usage.completion_tokens,
                # Without the first token, which the prompt brings.
                "seconds": usage.total_completion_time_sec,
            }
        )


def _answer(answer: dict[str, Any]) -> None:
    sys.stdout.write(f"\n@answer {json.dumps(answer)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
