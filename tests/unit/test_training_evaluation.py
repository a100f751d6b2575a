"""The evaluation of every arm, and its table."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tests.tiny_models import tiny_base, tiny_xlora, write_experts
from tests.training_models import PAD, letter_tokenizer, row, write_rows
from xlora_core.config import XLoraConfig
from xlora_core.errors import ConfigError
from xlora_core.model import XLoraModel
from xlora_core.training import report
from xlora_core.training.card import write_into_card
from xlora_core.training.data import encode, encode_rows, mixed_examples
from xlora_core.training.evaluation import evaluate
from xlora_core.training.merge_fit import MergeFitSettings
from xlora_core.training.tables import table, tables


@pytest.fixture
def model(tmp_path: Path) -> XLoraModel:
    """Gives adapter "1" 4/5 of every module, whatever the text."""
    model = tiny_xlora(tmp_path, n_adapters=2, classifier_scale=0.0)
    with torch.no_grad():
        last = cast("Any", model.classifier.layers[-1])
        last.bias.view(-1, 2).copy_(torch.tensor([0.0, 3.0]).log1p())
    return model


def test_it_knows_the_right_expert(model: XLoraModel) -> None:
    tokenizer = letter_tokenizer()
    rows = {d: [row(f"{i}", "abc", d) for i in range(4)] for d in ("0", "1")}
    groups = {d: encode_rows(rows[d], tokenizer, 60) for d in rows}
    groups["mixed"] = mixed_examples(rows, tokenizer, 60, 4)
    lines: list[str] = []
    results = evaluate(model, groups, PAD, report=lines.append)
    assert lines[1].startswith(f"1: {results['1'].tokens} tokens, base ")
    assert lines[1].endswith("; right expert leads 100%")
    assert results["0"].right_mass == pytest.approx(0.2, abs=1e-4)
    assert results["1"].right_mass == pytest.approx(0.8, abs=1e-4)
    assert results["0"].mass == {"0": pytest.approx(0.2), "1": pytest.approx(0.8)}
    assert (results["0"].right_top, results["1"].right_top) == (0.0, 1.0)
    for domain in rows:
        losses = results[domain].losses
        assert losses["right"] == losses[f"expert:{domain}"]
        assert len({losses[arm] for arm in ("base", "uniform", "routed")}) == 3
    assert 0 < (results["mixed"].right_top or 0) < 1


def test_the_losses_are_those_of_the_model_itself(model: XLoraModel) -> None:
    example = encode([row("a", "bcd", "0")], letter_tokenizer(), 60)
    assert example is not None
    losses = evaluate(model, {"0": [example]}, PAD)["0"].losses
    ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
    routed = model(input_ids=ids, labels=labels).loss.item()
    merged = model.merge_and_unload()(input_ids=ids, labels=labels).loss.item()
    assert losses["routed"] == pytest.approx(routed, abs=1e-4)
    assert losses["uniform"] == pytest.approx(merged, abs=1e-4)


def test_an_unknown_domain_has_no_right_expert(model: XLoraModel) -> None:
    example = encode([row("a", "b", "cooking")], letter_tokenizer(), 60)
    assert example is not None
    result = evaluate(model, {"cooking": [example]}, PAD)["cooking"]
    assert result.right_mass is None
    assert "right" not in result.losses
    assert "| - |" in table({"cooking": vars(result)})


def test_the_table_goes_into_the_card(tmp_path: Path) -> None:
    card = tmp_path / "CARD.md"
    card.write_text("# a\n<!-- evaluation -->\nold\n<!-- /evaluation -->\nend\n")
    write_into_card(card, "| new |")
    write_into_card(card, "| newer |")
    assert card.read_text() == ("# a\n<!-- evaluation -->\n| newer |\n<!-- /evaluation -->\nend\n")
    card.write_text("nothing")
    with pytest.raises(ConfigError, match="has no lines <!-- evaluation -->"):
        write_into_card(card, "x")


def test_a_card_without_a_place_is_refused_before_the_work(
    model: XLoraModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "evaluate", pytest.fail)
    with pytest.raises(ConfigError, match="has no lines"):
        report.run_evaluation(
            model, letter_tokenizer(), data=tmp_path, card=tmp_path / "missing.md"
        )


def test_rows_that_are_all_too_long_are_an_error(model: XLoraModel, tmp_path: Path) -> None:
    rows = [{"domain": "0", "user": "a", "assistant": "b"}]
    rows += [{"domain": "1", "user": "a" * 400, "assistant": "b"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ConfigError, match="no held-out row of 1 fits into 288 tokens"):
        report.run_evaluation(model, letter_tokenizer(), data=path)


def test_without_training_rows_there_is_no_best_merge(model: XLoraModel, tmp_path: Path) -> None:
    rows = [vars(row(f"{i}", "abc", domain)) for i in range(2) for domain in ("0", "1")]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    record = report.run_evaluation(model, letter_tokenizer(), data=path)
    assert "merge" not in record
    assert "best_merge" not in record["results"]["0"]["losses"]
    assert record["answers"]["checks"] == []  # nothing is known of these domains
    (note,) = record["notes"]
    assert note.endswith("and there are none of 0, 1.")
    assert note in tables(record)


def test_a_run_that_is_cut_off_while_it_answers_keeps_its_losses(
    model: XLoraModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "write_answers", interrupted)
    rows = [vars(row(f"{i}", "abc", domain)) for i in range(2) for domain in ("0", "1")]
    path, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "figures.json"
    with pytest.raises(KeyboardInterrupt):
        report.run_evaluation(model, letter_tokenizer(), data=path, out=out)
    record = json.loads(out.read_text())
    assert set(record["results"]) == {"0", "1", "mixed"}
    assert "answers" not in record


@pytest.fixture(params=["classifier", "per_layer"])
def routed_model(request: pytest.FixtureRequest, tmp_path: Path) -> XLoraModel:
    """A model of either router that prefers some experts."""
    if request.param == "classifier":
        return tiny_xlora(tmp_path / "experts", n_adapters=2)
    return gated(tmp_path / "experts")


def gated(folder: Path) -> XLoraModel:
    config = XLoraConfig(adapters=write_experts(folder, n_adapters=2), router="per_layer")
    model = XLoraModel.from_base(tiny_base(), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.gates.parameters():
            parameter.normal_(0, 0.3)
    return model.eval()


def whole_folder(folder: Path) -> Path:
    """Training and held-out rows of two domains."""
    for split in ("train", "heldout"):
        rows = [vars(row(f"{i}", "abc" * (1 + i % 3), domain)) for i in range(9) for domain in "01"]
        write_rows(folder / f"{split}.jsonl", rows)
    return folder


def test_the_routed_model_alone_has_the_same_figures(
    routed_model: XLoraModel, tmp_path: Path
) -> None:
    data = whole_folder(tmp_path / "rows")
    record, alone = (
        report.run_evaluation(routed_model, letter_tokenizer(), data=data, routed_only=only)
        for only in (False, True)
    )
    assert "best_merge" in record["results"]["0"]["losses"]
    assert set(alone) == set(record) - {"merge", "answers"}
    for name, result in alone["results"].items():
        losses = record["results"][name].pop("losses")
        assert result.pop("losses") == {"routed": pytest.approx(losses["routed"], abs=1e-4)}
        assert result == record["results"][name]
        assert losses["routed"] not in (losses["uniform"], losses["base"])
        result["losses"] = {"routed": losses["routed"]}
    text = tables(alone)
    assert "| domain | answer tokens | routed | mass on right |" in text
    assert "best merge" not in text
    assert "Every expert alone" not in text
    assert "**" not in text


def test_gates_are_measured_as_the_model_itself_runs(tmp_path: Path) -> None:
    model = gated(tmp_path)
    example = encode([row("a", "bcd", "0")], letter_tokenizer(), 60)
    assert example is not None
    losses = evaluate(model, {"0": [example]}, PAD)["0"].losses
    ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
    assert losses["routed"] == pytest.approx(
        model(input_ids=ids, labels=labels).loss.item(), abs=1e-4
    )
    base = tiny_base()(input_ids=ids, labels=labels).loss.item()
    assert losses["base"] == pytest.approx(base, abs=1e-4)


def test_the_best_merge_is_of_the_domains_alone_and_the_record_says_how(
    model: XLoraModel, tmp_path: Path
) -> None:
    data = whole_folder(tmp_path / "rows")
    settings = MergeFitSettings(rows_per_domain=5)
    record = report.run_evaluation(
        model, letter_tokenizer(), data=data, merge=settings, answers=None
    )
    merge = record["merge"]
    assert merge["rows"] == 10
    assert merge["settings"] == asdict(settings)
    assert merge["loss"] <= merge["loss_at_half"] <= merge["uniform_loss"]
    assert (
        f"{merge['loss_at_half']:.3f} after half of the {merge['steps']} steps over all of them, "
        f"{merge['loss']:.3f} at the end."
    ) in tables(record)
    cut = record | {"merge": merge | {"converged": False}}
    assert "at the end, with no step left." in tables(cut)
