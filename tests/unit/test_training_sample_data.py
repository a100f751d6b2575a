"""What the project ships in sample_data/ is whole, small, licensed and consistent."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from xlora_core.training import recipes
from xlora_core.training.data import read_domain
from xlora_core.training.log import TrainingLog
from xlora_core.training.tables import tables

SAMPLE = Path(__file__).resolve().parents[2] / "sample_data"
DOMAINS = [settings.domain for settings in recipes.DEMO_EXPERTS]


def test_presets_are_complete_and_distinct() -> None:
    presets = json.loads((SAMPLE / "presets.json").read_text(encoding="utf-8"))
    assert len(presets) >= 8
    for key in ("id", "title", "prompt"):
        assert len({preset[key] for preset in presets}) == len(presets)
    assert all(preset["look_at"].strip() for preset in presets)
    assert {name for preset in presets for name in preset["experts"]} <= set(DOMAINS)


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize(("split", "count"), [("train", 32), ("heldout", 16)])
def test_sample_rows_are_there_and_may_be_shared(domain: str, split: str, count: int) -> None:
    rows = read_domain(SAMPLE / "rows", domain, split)
    assert len(rows) == count
    assert not any(re.search(r"melts at|boils at|log P", row.assistant) for row in rows)


def test_no_row_is_on_both_sides() -> None:
    for domain in DOMAINS:
        sides = [
            {r.id for r in read_domain(SAMPLE / "rows", domain, s)} for s in ("train", "heldout")
        ]
        assert not sides[0] & sides[1]


def test_the_card_shows_the_evaluation_as_it_was_measured() -> None:
    record = json.loads((SAMPLE / "evaluation.json").read_text(encoding="utf-8"))
    assert tables(record) in (SAMPLE / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_routing_beats_merging_on_every_shipped_figure() -> None:
    results = json.loads((SAMPLE / "evaluation.json").read_text())["results"]
    assert set(results) == {*DOMAINS, "mixed"}
    for result in results.values():
        assert result["losses"]["routed"] < result["losses"]["uniform"] < result["losses"]["base"]
        assert result["right_top"] > 0.5


def test_training_logs_are_read_and_go_down() -> None:
    for path in (SAMPLE / "training").glob("*.json"):
        log = TrainingLog(**json.loads(path.read_text(encoding="utf-8")))
        steps = [step for step, _ in log.train_loss]
        assert steps == list(range(1, log.settings["steps"] + 1))
        assert log.heldout_loss[-1][1] < log.heldout_loss[0][1]
        assert log.seconds > 0
        assert log.command


def test_sample_data_is_small_and_names_no_machine() -> None:
    files = [path for path in SAMPLE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40e6
    for path in files:
        if path.suffix == ".json":
            assert not re.search(r'"(/|~|[A-Z]:\\)', path.read_text(encoding="utf-8")), path
