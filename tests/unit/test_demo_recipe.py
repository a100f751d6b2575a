"""The recipe of the demo model, with two tiny experts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny_models import tiny_prompt
from tests.training_models import EXPERT, ROUTER, row, tiny_base_folder, write_rows
from xlora_core.checkpoint import read_checkpoint
from xlora_core.demo import load_base
from xlora_core.model import XLoraModel
from xlora_core.training import recipes
from xlora_core.training.__main__ import main

NAMES = ("math", "verse")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny base and rows, and a recipe that is as small."""
    tiny_base_folder(tmp_path / "base")
    for domain, letters in zip(NAMES, ("abc", "xyz"), strict=True):
        for split in ("train", "heldout"):
            rows = [vars(row(f"{letters}{i}?", letters * (1 + i % 3), domain)) for i in range(16)]
            write_rows(tmp_path / "rows" / f"{domain}.{split}.jsonl", rows)
    out = tmp_path / "out"
    out.mkdir()
    (out / "MODEL_CARD.md").write_text("<!-- evaluation -->\n<!-- /evaluation -->\n")
    small = replace(EXPERT, steps=2, eval_every=1)
    monkeypatch.setattr(recipes, "DEMO_EXPERTS", [replace(small, domain=name) for name in NAMES])
    router = replace(ROUTER, steps=2, eval_every=1)
    monkeypatch.setattr(recipes, "DEMO_ROUTER", replace(router, label_start_rows=8))
    monkeypatch.setattr(recipes, "DEMO_GATES", replace(router, router="per_layer"))
    return tmp_path


def train(place: Path) -> int:
    places = {"base": "base", "data": "rows", "rows": "rows", "out": "out", "work": "work"}
    return main(["demo", *(f"--{name}={place / folder}" for name, folder in places.items())])


def test_it_trains_both_routers_over_the_same_experts(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(place) == 0
    out = place / "out"
    table = capsys.readouterr().out.strip()
    assert table in (out / "MODEL_CARD.md").read_text()
    record = json.loads((out / "evaluation.json").read_text())
    assert set(record["results"]) == {*NAMES, "mixed"}
    assert {path.name for path in (out / "training").iterdir()} == {
        "math.json", "verse.json", "router.json", "router-per-layer.json"
    }  # fmt: skip
    for path in (out / "training").iterdir():
        assert json.loads(path.read_text())["command"] == "python -m xlora_core.training demo"

    first, second = (read_checkpoint(out / name) for name in ("demo", "demo-per-layer"))
    assert [a.name for a in first.adapters] == [a.name for a in second.adapters] == list(NAMES)
    assert not (out / "demo-per-layer" / "adapters").exists()
    moved = out.rename(place / "moved")  # the second one sees the first one's experts
    base, _ = load_base(str(place / "base"), "float32")
    model = XLoraModel.from_pretrained(base, moved / "demo-per-layer").eval()
    assert model.is_routed_per_layer
    with torch.no_grad():
        assert model(input_ids=tiny_prompt()).logits.shape[-1] == base.config.vocab_size


def test_a_second_call_trains_nothing_anew(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(place) == 0
    first = capsys.readouterr().out
    for name in ("train_expert", "fit_router"):
        monkeypatch.setattr(recipes, name, lambda *_, **__: pytest.fail("trained anew"))
    assert train(place) == 0
    again = capsys.readouterr()
    assert again.out == first
    assert again.err.count("is trained already") == 4


def test_the_settings_of_the_demo_are_in_range() -> None:
    names = [settings.domain for settings in recipes.DEMO_EXPERTS]
    assert len(set(names)) == len(names) == 8
    assert recipes.DEMO_GATES.router == "per_layer"
