"""The code of docs/encoder-decoder.md runs on a tiny T5."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.seq2seq_models import tiny_seq2seq, tokens, write_seq2seq_experts
from tests.tiny_models import VOCAB_SIZE

PAGE = Path(__file__).resolve().parents[2] / "docs" / "encoder-decoder.md"


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_seq2seq("t5", dtype=torch.float32).save_pretrained("t5-base-folder")
    experts = write_seq2seq_experts(tmp_path / "loras", "t5", 2)
    for name, folder in zip(("sum", "translate"), experts.values(), strict=True):
        Path(folder).rename(tmp_path / "loras" / name)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    source = tokens(2, 6)
    names = {"source": source, "mask": torch.ones_like(source), "target": tokens(2, 4, seed=1)}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert len(blocks) == 1
    n_modules = len(names["model"].lora_layer_names)
    assert names["loss"].ndim == 0
    assert names["of_target"].shape == (2, 4, n_modules, 2)
    assert names["of_source"].shape == (2, 6, n_modules, 2)
    assert names["written"].shape == (2, 9)
    assert names["logits"].shape == (2, 4, VOCAB_SIZE)
