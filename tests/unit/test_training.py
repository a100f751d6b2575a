"""Training experts and routers on a tiny model, and the evaluation."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.tiny_models import tiny_base, tiny_xlora, write_experts
from tests.unit.test_training_data import letter_tokenizer, row
from xlora_core.errors import CheckpointError, ConfigError
from xlora_core.model import XLoraModel
from xlora_core.training import recipes
from xlora_core.training.__main__ import main, public_command
from xlora_core.training.data import Example, collate, encode, encode_rows, mixed_examples
from xlora_core.training.evaluation import evaluate, table
from xlora_core.training.experts import ExpertSettings, train_expert
from xlora_core.training.loop import LoopSettings, learning_rate_at
from xlora_core.training.losses import (
    answer_columns,
    backbone_losses,
    balanced_mean,
    column_losses,
)
from xlora_core.training.router import (
    RouterSettings,
    answer_losses,
    fresh_model,
    router_examples,
    train_router,
)

PAD = 0
ROUTER = RouterSettings(
    steps=6, rows=4, max_length=60, warmup_steps=1, dtype="float32", eval_every=3
)
EXPERT = ExpertSettings(
    domain="0",
    steps=6,
    rows=4,
    max_length=60,
    warmup_steps=1,
    rank=4,
    dtype="float32",
    eval_every=3,
)


def examples(n: int = 16, domain: str = "0") -> list[Example]:
    rows = [row(f"{i}?", "abc" * (1 + i % 3), domain) for i in range(n)]
    return encode_rows(rows, letter_tokenizer(), 60)


def test_answer_losses_equal_the_models_own_loss(tmp_path: Path) -> None:
    model = tiny_xlora(tmp_path)
    batch = collate(examples(3), PAD)
    losses, domains = answer_losses(model, batch)
    expected = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
    ).loss
    torch.testing.assert_close(losses.mean(), expected, rtol=1e-5, atol=1e-5)
    assert set(domains) == {"0"}
    assert len(domains) == len(losses) == int((batch.labels[:, 1:] != -100).sum())


def test_backbone_and_column_losses_agree() -> None:
    base = tiny_base()
    batch = collate(examples(3), PAD)
    columns = answer_columns(batch)
    logits = base(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    losses, where = column_losses(logits[:, columns], batch, columns)
    torch.testing.assert_close(losses, backbone_losses(base, batch), rtol=1e-5, atol=1e-5)
    by_hand = [
        F.cross_entropy(logits[b, t], batch.labels[b, t + 1]).item() for b, t in where.tolist()
    ]
    torch.testing.assert_close(losses, torch.tensor(by_hand), rtol=1e-5, atol=1e-5)


def test_balanced_mean_weighs_domains_not_tokens() -> None:
    losses = torch.tensor([1.0, 3.0, 3.0, 3.0])
    assert balanced_mean(losses, ["a", "b", "b", "b"]).item() == pytest.approx(2.0)


def test_learning_rate_warms_up_and_decays() -> None:
    settings = LoopSettings(steps=10, warmup_steps=2, learning_rate=1.0)
    rates = [learning_rate_at(step, settings) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0.05 < rates[-1] < 0.12


def test_a_fresh_model_is_the_uniform_merge(tmp_path: Path) -> None:
    model = fresh_model(tiny_base(), write_experts(tmp_path), ROUTER)
    logits = model.scaling_pass(input_ids=torch.tensor([[5, 6, 7]])).router_logits
    torch.testing.assert_close(model.route(logits), torch.full_like(logits, 1 / 3))


def test_router_training_lowers_the_loss_and_changes_the_classifier_only(tmp_path: Path) -> None:
    model = fresh_model(tiny_base(), write_experts(tmp_path / "experts"), ROUTER)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    log = train_router(model, PAD, examples(), examples(4), tmp_path / "out", ROUTER)
    assert log.heldout_loss[-1][1] < log.heldout_loss[0][1] - 0.01
    assert [point[0] for point in log.heldout_loss] == [0, 3, 6]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"classifier.layers.0.weight", "classifier.layers.0.bias"}
    assert not model.training
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["training.json"]


def test_a_cut_off_run_goes_on_where_it_was(tmp_path: Path) -> None:
    adapters = write_experts(tmp_path / "experts")

    def train(out: Path, stop_at: str | None) -> XLoraModel:
        def report(line: str) -> None:
            if stop_at and line.startswith(stop_at):
                raise KeyboardInterrupt

        model = fresh_model(tiny_base(), adapters, ROUTER)
        train_router(model, PAD, examples(), examples(4), out, ROUTER, report=report)
        return model

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", "step 5/6")
    assert (tmp_path / "cut" / "checkpoint.safetensors").is_file()
    resumed, whole = train(tmp_path / "cut", None), train(tmp_path / "whole", None)
    logs = [json.loads((tmp_path / n / "training.json").read_text()) for n in ("cut", "whole")]
    assert logs[0]["train_loss"] == logs[1]["train_loss"]
    for a, b in zip(resumed.classifier.parameters(), whole.classifier.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_damaged_training_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(b"not a checkpoint")
    model = fresh_model(tiny_base(), write_experts(tmp_path / "experts"), ROUTER)
    with pytest.raises(CheckpointError, match="is not a readable training checkpoint") as caught:
        train_router(model, PAD, examples(), examples(4), tmp_path, ROUTER)
    assert str(path) in caught.value.message
    assert caught.value.hint == "delete it to train from the start"


def test_expert_training_lowers_the_loss_and_writes_a_readable_adapter(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the extra 'train' is not installed")
    log = train_expert(
        tiny_base(), PAD, examples(), examples(4), tmp_path / "0", EXPERT, base_name="tiny"
    )
    assert log.heldout_loss[-1][1] < log.heldout_loss[0][1] - 0.01
    config = json.loads((tmp_path / "0" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert str(tmp_path) not in json.dumps(config)
    # Read back, alone and at full weight, it is the model whose loss was logged
    model = fresh_model(tiny_base(), {"0": str(tmp_path / "0")}, ROUTER)
    batch = collate(sorted(examples(4), key=len), PAD)
    losses, _ = answer_losses(model, batch)
    assert float(losses.detach().mean()) == pytest.approx(log.heldout_loss[-1][1], abs=2e-3)


def test_missing_peft_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError) as caught:
        train_expert(
            tiny_base(), PAD, examples(), examples(4), tmp_path / "0", EXPERT, base_name="tiny"
        )
    assert caught.value.message == (
        "training LoRA experts needs the package peft, which is not installed"
    )
    assert caught.value.hint == "pip install 'xlora-explorer[train]'"


def test_the_mixture_has_as_many_rows_of_each_domain() -> None:
    rows = {
        "a": [row(f"{i}", "x", "a") for i in range(40)],
        "b": [row(f"{i}", "y", "b") for i in range(40)],
    }
    settings = replace(ROUTER, steps=10, mixed_share=0.25)
    kinds = [
        frozenset(e.domains) - {""} for e in router_examples(rows, letter_tokenizer(), settings)
    ]
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    assert counts == {frozenset("a"): 15, frozenset("b"): 15, frozenset("ab"): 10}


def test_evaluation_knows_the_right_expert(tmp_path: Path) -> None:
    model = tiny_xlora(tmp_path, n_adapters=2, classifier_scale=0.0)
    last: Any = model.classifier.layers[-1]
    with torch.no_grad():  # adapter "1" gets 3/4 of every module
        last.bias.view(-1, 2).copy_(torch.tensor([0.0, 3.0]).log1p())
    tokenizer = letter_tokenizer()
    rows = {d: [row(f"{i}", "abc", d) for i in range(4)] for d in ("0", "1")}
    groups = {d: encode_rows(rows[d], tokenizer, 60) for d in rows}
    groups["mixed"] = mixed_examples(rows, tokenizer, 60, 4)
    results = evaluate(model, groups, PAD)
    assert results["0"].right_mass == pytest.approx(0.2, abs=1e-4)
    assert results["1"].right_mass == pytest.approx(0.8, abs=1e-4)
    assert (results["0"].right_top, results["1"].right_top) == (0.0, 1.0)
    for domain in rows:
        losses = results[domain].losses
        assert losses["right"] == losses[f"expert:{domain}"]
        assert len({losses[arm] for arm in ("base", "uniform", "routed")}) == 3
    assert 0 < (results["mixed"].right_top or 0) < 1
    lines = table({n: vars(r) for n, r in results.items()}).splitlines()
    assert lines[0].startswith(
        "| domain | tokens | base | uniform | expert:0 | expert:1 | routed |"
    )
    assert len({line.count("|") for line in lines}) == 1


def test_an_unknown_domain_has_no_right_expert(tmp_path: Path) -> None:
    example = encode([row("a", "b", "cooking")], letter_tokenizer(), 60)
    assert example is not None
    result = evaluate(tiny_xlora(tmp_path), {"cooking": [example]}, PAD)["cooking"]
    assert result.right_mass is None
    assert "right" not in result.losses
    assert "| - |" in table({"cooking": vars(result)})


def test_the_table_goes_into_the_card(tmp_path: Path) -> None:
    card = tmp_path / "CARD.md"
    card.write_text("# a\n<!-- evaluation -->\nold\n<!-- /evaluation -->\nend\n")
    recipes.write_into_card(card, "| new |")
    recipes.write_into_card(card, "| newer |")
    assert card.read_text() == ("# a\n<!-- evaluation -->\n| newer |\n<!-- /evaluation -->\nend\n")
    card.write_text("nothing")
    with pytest.raises(ConfigError, match="has no lines <!-- evaluation -->"):
        recipes.write_into_card(card, "x")


def test_the_sample_leaves_out_what_has_no_licence(tmp_path: Path) -> None:
    lines = [
        {"domain": "chemistry", "id": str(i), "user": "u", "assistant": text}
        for i, text in enumerate(["It melts at 3 K.", "Its formula is H2O.", "z" * 2000])
    ]
    for split in ("train", "heldout"):
        text = "\n".join(json.dumps(line) for line in lines)
        (tmp_path / f"chemistry.{split}.jsonl").write_text(text)
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        recipes.write_sample(tmp_path, ["chemistry"], out, train=2, heldout=2)
    assert [r.id for r in recipes.read_domain(outs[0], "chemistry", "train")] == ["1"]
    name = "chemistry.train.jsonl.gz"
    assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()


def test_the_recorded_command_has_no_folders_of_this_machine() -> None:
    command = public_command(["router", "--adapters", "math=/data/x/math", "--data", "../rows"])
    assert command == "python -m xlora_core.training router --adapters math=math --data rows"


def test_commands_report_errors_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["sample", "--data", str(tmp_path), "--out", str(tmp_path / "o")])
    assert status == 2
    assert capsys.readouterr().err.startswith("error: no math.train.jsonl.gz or math.train.jsonl")
    router = ["router", "--adapters", "math", "--data", "x", "--out", str(tmp_path / "o")]
    assert main(router) == 2
    assert "--adapters takes NAME=FOLDER" in capsys.readouterr().err


def test_the_commands_train_and_evaluate_a_whole_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft", reason="the extra 'train' is not installed")
    base, data = str(tmp_path / "base"), tmp_path / "rows"
    tiny_base().save_pretrained(base)
    letter_tokenizer().save_pretrained(base)
    data.mkdir()
    for domain, answer in (("sums", "123"), ("songs", "lala")):
        for split in ("train", "heldout"):
            rows = [vars(row(f"{i}?", answer * (1 + i % 2), domain)) for i in range(20)]
            text = "\n".join(json.dumps(values) for values in rows)
            (data / f"{domain}.{split}.jsonl").write_text(text)
    common = ["--data", str(data), "--base", base, "--steps", "3", "--rows", "4"]
    common += ["--warmup-steps", "1", "--dtype", "float32"]
    for domain in ("sums", "songs"):
        out = str(tmp_path / domain)
        assert main(["expert", "--domain", domain, "--out", out, "--rank", "2", *common]) == 0
    assert (
        main(
            ["expert", "--domain", "sums", "--out", str(tmp_path / "sums"), "--rank", "2", *common]
        )
        == 0
    )
    assert "sums is trained already" in capsys.readouterr().out
    adapters = [f"{domain}={tmp_path / domain}" for domain in ("sums", "songs")]
    out = str(tmp_path / "xlora")
    assert main(["router", "--out", out, "--adapters", *adapters, *common]) == 0
    figures = tmp_path / "figures.json"
    evaluation = ["evaluate", "--model", out, "--base", base, "--data", str(data), "--rows", "4"]
    assert main([*evaluation, "--out", str(figures)]) == 0
    record = json.loads(figures.read_text())
    assert set(record["results"]) == {"sums", "songs", "mixed"}
    assert record["command"].startswith("python -m xlora_core.training evaluate --model xlora")
    assert table(record["results"]) in capsys.readouterr().out
    for file in tmp_path.rglob("*.json"):
        assert str(tmp_path) not in file.read_text(), file
