"""The loss of a constant mixture against the routed model, checked the long way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.gated_models import gated_xlora
from tests.seq2seq_models import seq2seq_xlora
from tests.task_models import peft_experts, task_base
from tests.tiny_models import tiny_base, tiny_prompt, tiny_xlora, write_lora
from xlora_core import RoutingKnobs, XLoraConfig, XLoraModel
from xlora_core.errors import ConfigError, ModelError
from xlora_core.freezing import (
    ApproximationReport,
    ArmLoss,
    approximation_loss,
    freeze_rows,
    lora_of_mixture,
)
from xlora_core.layers import XLoraLayer
from xlora_core.training.data import IGNORE, Example

NEAR = 1e-10


@pytest.fixture
def model(tmp_path: Path) -> XLoraModel:
    return tiny_xlora(tmp_path, dtype=torch.float64)


def examples(*lengths: int, n_prompt: int = 3) -> list[Example]:
    """Random rows, the first tokens of each without a label."""
    ids = tiny_prompt(len(lengths), max(lengths)).tolist()
    return [
        Example(
            input_ids=row[:n],
            labels=[IGNORE] * n_prompt + row[n_prompt:n],
            domains=[""] * n,
        )
        for row, n in zip(ids, lengths, strict=True)
    ]


@torch.no_grad()
def long_way(
    model: XLoraModel, rows: list[Example], scalings: Tensor | None, knobs: RoutingKnobs | None
) -> ArmLoss:
    """One row at a time without padding, one token at a time."""
    losses, divergences, agreements = [], [], []
    for example in rows:
        ids = torch.tensor([example.input_ids])
        routed = model(input_ids=ids, knobs=knobs, use_cache=False).logits[0]
        other = model.main_pass(input_ids=ids, scalings=scalings, use_cache=False).logits[0]
        for t in range(1, len(example)):
            if example.labels[t] == IGNORE:
                continue
            p, q = routed[t - 1].softmax(-1), other[t - 1].softmax(-1)
            losses.append(float(F.cross_entropy(other[t - 1], ids[0, t])))
            divergences.append(sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True)))
            agreements.append(int(p.argmax()) == int(q.argmax()))
    return ArmLoss(
        cross_entropy=sum(losses) / len(losses),
        kl=sum(divergences) / len(divergences),
        agreement=sum(agreements) / len(agreements),
    )


def assert_near(found: ArmLoss, expected: ArmLoss) -> None:
    assert found.cross_entropy == pytest.approx(expected.cross_entropy, abs=NEAR)
    assert found.kl == pytest.approx(expected.kl, abs=NEAR)
    assert found.agreement == pytest.approx(expected.agreement, abs=NEAR)


@pytest.mark.parametrize("knobs", [None, RoutingKnobs(top_k=1, temperature=0.5)])
def test_every_arm_is_what_the_long_way_finds(
    model: XLoraModel, knobs: RoutingKnobs | None
) -> None:
    rows = examples(9, 5, 12, 7)
    weights = freeze_rows(model, rows, knobs=knobs)
    report = approximation_loss(model, weights, rows, knobs=knobs)
    assert report.n_rows == 4
    assert report.n_tokens == 9 + 5 + 12 + 7 - 4 * 3
    assert list(report.arms) == ["routed", "frozen", "uniform", "base"]
    assert_near(report.arms["frozen"], long_way(model, rows, weights.weights, knobs))
    assert_near(report.arms["uniform"], long_way(model, rows, torch.ones(3).double() / 3, knobs))
    assert_near(report.arms["base"], long_way(model, rows, None, knobs))
    assert report.arms["routed"].kl == 0
    assert report.arms["routed"].agreement == 1
    assert 0.01 < report.arms["frozen"].kl < report.arms["base"].kl
    assert 0 < report.arms["base"].agreement < 1


def test_a_model_that_routes_per_layer(tmp_path: Path) -> None:
    model = gated_xlora(tmp_path, dtype=torch.float64)
    rows = examples(9, 5, 12)
    report = approximation_loss(model, [0.5, 0.25, 0.25], rows)
    weights = torch.tensor([0.5, 0.25, 0.25]).double()
    assert_near(report.arms["frozen"], long_way(model, rows, weights, None))
    assert report.arms["frozen"].kl > 0.01


@pytest.mark.parametrize("tokens_per_batch", [1, 20, 10_000])
def test_batches_and_padding_change_nothing(model: XLoraModel, tokens_per_batch: int) -> None:
    rows = examples(9, 4, 12, 7, 120)
    report = approximation_loss(model, [1.0, 0, 0], rows, tokens_per_batch=tokens_per_batch)
    expected = long_way(model, rows, torch.tensor([1.0, 0, 0]).double(), None)
    assert_near(report.arms["frozen"], expected)


def test_a_mixture_that_is_the_routed_one_loses_nothing(tmp_path: Path) -> None:
    """A router that gives every token the same scalings is a constant mixture."""
    model = tiny_xlora(tmp_path, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in model.classifier.named_parameters():
            if name.endswith("weight"):
                parameter.zero_()
    rows = examples(9, 5)
    report = approximation_loss(model, freeze_rows(model, rows), rows)
    assert abs(report.arms["frozen"].kl) < 1e-12
    assert report.arms["frozen"].agreement == 1
    assert report.arms["frozen"].cross_entropy == pytest.approx(
        report.arms["routed"].cross_entropy, abs=1e-12
    )
    assert report.arms["uniform"].kl > 0.01


def test_a_first_token_that_is_labelled_is_not_predicted(model: XLoraModel) -> None:
    report = approximation_loss(model, None, examples(6, 5, n_prompt=0))
    assert report.n_tokens == 9


def test_a_bf16_model_is_compared_in_float32(tmp_path: Path) -> None:
    model = tiny_xlora(tmp_path, dtype=torch.bfloat16)
    rows = examples(9, 5)
    report = approximation_loss(model, None, rows)
    with torch.no_grad():
        logits = [
            model.main_pass(
                input_ids=torch.tensor([row.input_ids]), scalings=None, use_cache=False
            ).logits[0, 2:-1]
            for row in rows
        ]
    targets = torch.tensor([token for row in rows for token in row.labels[3:]])
    expected = F.cross_entropy(torch.cat(logits).float(), targets)
    # bfloat16 logits differ a little with the batch; a bfloat16 softmax would be off by far more
    assert report.arms["base"].cross_entropy == pytest.approx(float(expected), abs=0.02)
    assert report.arms["routed"].kl == 0


def test_the_model_is_left_as_it_was(model: XLoraModel) -> None:
    modules = dict(model.base_model.named_modules())
    model.train()
    model.enable_scalings_logging()
    lora = lora_of_mixture(model, None, rank=1)
    approximation_loss(model, None, examples(6, 5), lora=lora)
    assert model.training
    assert dict(model.base_model.named_modules()) == modules
    assert model.get_scalings_log() == []
    model.eval()
    approximation_loss(model, None, examples(6, 5))
    assert not model.training


# ---------------------------------------------------------------- one LoRA


def test_an_exact_lora_loses_what_the_mixture_loses(model: XLoraModel) -> None:
    rows = examples(9, 5)
    weights = freeze_rows(model, rows)
    report = approximation_loss(model, weights, rows, lora=lora_of_mixture(model, weights))
    assert list(report.arms) == ["routed", "frozen", "lora", "uniform", "base"]
    assert_near(report.arms["lora"], report.arms["frozen"])


def test_a_truncated_lora_is_measured_as_it_is(tmp_path: Path) -> None:
    """Against the same weights baked into the plain layers; a cut module, a dropped one, a head."""
    model = _model_with_head(tmp_path)
    rows = examples(9, 5)
    weights = torch.rand(len(model.lora_layers), 2, generator=torch.Generator().manual_seed(0))
    weights[1] = 0
    lora = lora_of_mixture(model, weights, rank=1)
    assert len(lora.modules) == len(model.lora_layers) - 1
    found = approximation_loss(model, weights, rows, lora=lora).arms
    plain = _model_with_head(tmp_path).base_model
    with torch.no_grad():
        for path, part in lora.modules.items():
            layer = plain.get_submodule(path)
            assert isinstance(layer, XLoraLayer)
            layer.base_layer.weight.add_(part.lora_B @ part.lora_A)
        logits = [plain(torch.tensor([row.input_ids])).logits[0, 2:-1] for row in rows]
    targets = torch.tensor([token for row in rows for token in row.labels[3:]])
    expected = float(F.cross_entropy(torch.cat(logits), targets))
    assert found["lora"].cross_entropy == pytest.approx(expected, abs=NEAR)
    assert abs(found["lora"].cross_entropy - found["frozen"].cross_entropy) > 0.01


def _model_with_head(folder: Path) -> XLoraModel:
    base = tiny_base(dtype=torch.float64)
    targets = ("q_proj", "down_proj", "lm_head")
    adapters = {
        name: str(write_lora(folder / name, base, targets, rank=rank, seed=rank))
        for name, rank in (("a", 2), ("b", 3))
    }
    return XLoraModel.from_base(base, XLoraConfig(adapters=adapters))


# ---------------------------------------------------------------- refusals and the report


def test_what_cannot_be_compared_is_refused(model: XLoraModel) -> None:
    with pytest.raises(ConfigError, match="the texts have no token to predict"):
        approximation_loss(model, None, examples(3, 3))
    with pytest.raises(ConfigError, match="must have shape"):
        approximation_loss(model, [1.0], examples(5))
    with pytest.raises(ConfigError, match="top_k"):
        approximation_loss(model, None, examples(5), knobs=RoutingKnobs(top_k=4))


def test_a_model_that_predicts_no_next_token_is_refused(tmp_path: Path) -> None:
    name = "masked language model"
    config = XLoraConfig(adapters=peft_experts(tmp_path, name, 1))
    encoder = XLoraModel.from_base(task_base(name), config)
    for model in (encoder, seq2seq_xlora(tmp_path / "t5", "t5")):
        with pytest.raises(ModelError, match="so there is no loss to compare"):
            approximation_loss(model, None, examples(5))


def test_the_report_reads_well() -> None:
    report = ApproximationReport(
        n_rows=2,
        n_tokens=31,
        arms={
            "routed": ArmLoss(cross_entropy=1.25, kl=0.0, agreement=1.0),
            "frozen": ArmLoss(cross_entropy=1.5, kl=0.0625, agreement=0.9),
        },
    )
    assert report.table().splitlines() == [
        "2 rows, 31 tokens  cross-entropy  KL(routed||it)  same top token",
        "routed                    1.2500          0.0000          100.0%",
        "frozen                    1.5000          0.0625           90.0%",
    ]
    assert report.to_dict()["arms"]["frozen"] == {
        "cross_entropy": 1.5,
        "kl": 0.0625,
        "agreement": 0.9,
    }
