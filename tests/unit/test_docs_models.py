"""The code of docs/models.md runs on tiny models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.task_models import N_LABELS, TASKS, peft_experts, task_base

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = "decoder with a classification head"
    monkeypatch.chdir(tmp_path)
    task_base(task).save_pretrained("classifier-base")
    experts = peft_experts(tmp_path / "loras", task, 2)
    for name, folder in zip(("mail", "chat"), experts.values(), strict=True):
        Path(folder).rename(tmp_path / "loras" / name)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names = {"inputs": TASKS[task].inputs()}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert len(blocks) == 1
    assert names["logits"].shape == (3, N_LABELS)
    assert names["scalings"].shape == (3, 7, 5, 2)  # q and v of two blocks, and the head
