"""Python: task descriptions, each solved by one documented function."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from sample_data.build.choice import pick
from sample_data.build.rows import Row

# Characters of code; what is longer would be cut in training, mid-function.
_LONGEST = 2600
_PROMPTS = (
    "{task}",
    "Write a Python function. {task}",
    "Python: {task}",
    "{task}\n\n{signature}",
    "Write a Python function. {task}\n\n{signature}",
    "Python: {task}\n\n{signature}",
)


def rows(folders: Mapping[str, Path]) -> Iterator[Row]:
    """A row for every task whose solution is short enough.

    Args:
        folders: ``reasoning-gym``: the unpacked package.
    """
    path = folders["reasoning-gym"] / "reasoning_gym" / "data" / "codeio.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            task = json.loads(line)
            if len(task["code_sample"]) <= _LONGEST:
                yield task_row(
                    task["task_description"], task["input_output_spec"], task["code_sample"]
                )


def task_row(task: str, signature: str, code: str) -> Row:
    """A task's row.

    Args:
        task: What to write; also the group.
        signature: Arguments and results, which half of the prompts mention.
        code: The solution.
    """
    # Some tasks are solved more than once; each solution may be asked for in its own way.
    prompt = pick(_PROMPTS, "python", task, code)
    return Row(
        "python", task, prompt.format(task=task, signature=signature), f"```python\n{code}\n```"
    )
