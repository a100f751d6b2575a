"""What the README and docs/ tell people to type works, and what they link to is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from xlora_core import Run
from xlora_core.cli import main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    """Returns the README's code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(start: str) -> list[str]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith(start)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    relative = [link for link in links if "://" not in link]
    assert [link for link in relative if not (page.parent / link).exists()] == []


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in commands("make "):
        target = shlex.split(line, comments=True)[1]
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), line


def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("python")
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    assert re.search(r"\(\d+, 210, \d+\)", capsys.readouterr().out)
    assert [track.arm.kind for track in Run.load(tmp_path / "run.safetensors").tracks] == [
        "routed",
        "merged",
        "expert",
    ]


def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for line in commands("xlora "):
        # Folders of the reader's own cannot be here; merge writes 540 MB and has its own tests.
        if "path/to" not in line and "merge" not in line:
            assert main(shlex.split(line)[1:]) == 0, line
    header = (tmp_path / "out.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header.startswith("run_id,arm,bucket_by,bucket,bucket_start,bucket_end,n_tokens,")
    assert (tmp_path / "by-segment.csv").is_file()
