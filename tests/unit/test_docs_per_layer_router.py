"""What docs/per-layer-router.md says runs: its blocks and its "here" columns, top to bottom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_chat import tiny_chat_base, tiny_tokenizer
from tests.tiny_models import write_lora
from tests.unit.test_docs_interop import cells

PAGE = Path(__file__).resolve().parents[2] / "docs" / "per-layer-router.md"


def steps(text: str) -> list[tuple[int, str]]:
    """Returns (line number, code) of every python block and every table's second column."""
    found: list[tuple[int, str]] = []
    block: list[str] | None = None
    here = False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("```"):
            if block:
                found.append((number - len(block), "\n".join(block)))
            block = [] if block is None else None
        elif block is not None:
            block.append(line)
        elif not line.startswith("|"):
            here = False
        elif cells(line)[1] == "here":
            here = True
        elif here and "---" not in line:
            code = re.fullmatch(r"`([^`]+)`", cells(line)[1])
            assert code, line
            found.append((number, code[1]))
    return found


def test_every_line_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_chat_base()
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("math", "law")):
        write_lora(tmp_path / "loras" / name, base, ("q_proj", "v_proj"), seed=seed)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    ran = steps(PAGE.read_text(encoding="utf-8"))
    assert len(ran) > 30
    namespace: dict[str, Any] = {"__name__": "page"}
    for line, code in ran:
        # The line numbers of an error are those of the page.
        exec(compile("\n" * (line - 1) + code, str(PAGE), "exec"), namespace)
        if code == "gates = model.gates":
            assert all(gate.weight.abs().max() > 0 for gate in namespace["gates"])  # they learned
        if "model.route(router_logits)" in code:
            torch.testing.assert_close(namespace["output"].logits, namespace["gated"].output.logits)
    assert namespace["adapter"].ranks == [4, 4]
    torch._dynamo.reset()
