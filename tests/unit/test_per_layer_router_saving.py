"""What is kept of a model whose layers route themselves: its checkpoint, or a merged model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.gated_models import gated_xlora, randomise_gates
from tests.task_models import TASKS, peft_experts, task_base
from tests.tiny_models import tiny_base, tiny_prompt
from tests.unit.test_per_layer_router import NEAR, logits_of
from xlora_core.checkpoint import read_checkpoint, write_original, write_peft
from xlora_core.config import XLoraConfig
from xlora_core.errors import CheckpointError, ModelError
from xlora_core.freezing import approximation_loss, freeze_rows
from xlora_core.layers import XLoraLayer
from xlora_core.model import XLoraModel
from xlora_core.training.data import IGNORE, Example


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> XLoraModel:
    """For tests that change nothing of it but the log."""
    return gated_xlora(tmp_path_factory.mktemp("gated"), dtype=torch.float64)


# -------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", ["llama", "adapted embedding"])
def test_a_checkpoint_brings_it_back(tmp_path: Path, name: str) -> None:
    if name in TASKS:
        fresh: Callable[[], Any] = lambda: task_base(name)  # noqa: E731  # one of two
        config = XLoraConfig(adapters=peft_experts(tmp_path, name), router="per_layer")
        model = XLoraModel.from_base(fresh(), config).eval()
        randomise_gates(model)
    else:
        fresh = lambda: tiny_base(dtype=torch.float64)  # noqa: E731  # the other
        model = gated_xlora(tmp_path, dtype=torch.float64)
    model.set_topk_lora(2)
    model.save_pretrained(tmp_path / "checkpoint")
    loaded = XLoraModel.from_pretrained(fresh(), tmp_path / "checkpoint").eval()
    assert loaded.config_xlora.router == "per_layer"
    assert torch.equal(logits_of(loaded, tiny_prompt()), logits_of(model, tiny_prompt()))
    for name_, tensor in model.gates.state_dict().items():
        assert torch.equal(loaded.gates.state_dict()[name_], tensor)


def test_trained_experts_are_saved_beside_the_gates(tmp_path: Path) -> None:
    model = gated_xlora(tmp_path, use_trainable_adapters=True)
    with torch.no_grad():
        model.lora_layers[3].lora_B.mul_(1.7)
    model.save_pretrained(tmp_path / "checkpoint")
    loaded = XLoraModel.from_pretrained(tiny_base(), tmp_path / "checkpoint").eval()
    assert torch.equal(logits_of(loaded, tiny_prompt()), logits_of(model, tiny_prompt()))


def test_damaged_gates_are_refused(tmp_path: Path) -> None:
    model = gated_xlora(tmp_path)
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    path = folder / "classifier.safetensors"
    good = load_file(path)
    assert sorted(good) == sorted(f"gates.{i}.{p}" for i in range(14) for p in ("weight", "bias"))
    for change, message in (
        ({"gates.3.bias": None}, "gates.3.bias is missing"),
        ({"gates.14.bias": torch.zeros(3)}, "gates.14.bias is not known"),
        ({"gates.2.weight": torch.zeros(4, 32)}, r"gates.2.weight must be \[3, inputs\]"),
        ({"gates.2.bias": torch.zeros(3, 1)}, r"gates.2.bias must be \[3\], found \[3, 1\]"),
        (
            {"gates.6.weight": torch.zeros(3, 31)},
            "gate of module model.layers.0.mlp.down_proj reads 31 values, .* input has 48",
        ),
        ({"gates.0.bias": torch.full((3,), float("nan"))}, "NaN"),
    ):
        tensors = {k: v for k, v in (good | change).items() if v is not None}
        save_file(tensors, path, metadata={"format": "pt"})
        base = tiny_base()
        with pytest.raises(CheckpointError, match=message):
            XLoraModel.from_pretrained(base, folder)
        assert not any(isinstance(module, XLoraLayer) for module in base.modules())


def test_no_other_layout_can_hold_gates(tmp_path: Path) -> None:
    gated_xlora(tmp_path).save_pretrained(tmp_path / "checkpoint")
    checkpoint = read_checkpoint(tmp_path / "checkpoint")
    for write in (write_peft, write_original):
        with pytest.raises(CheckpointError, match="no router 'per_layer'"):
            write(tmp_path / "out", checkpoint)
        assert not (tmp_path / "out").exists()


def test_gates_follow_their_modules_by_name(tmp_path: Path) -> None:
    """A checkpoint whose header lists the modules in another order loads as the same model."""
    model = gated_xlora(tmp_path)
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0)).tolist()
    header = json.loads((folder / "xlora.json").read_text())
    header["layer_names"] = [header["layer_names"][i] for i in order]
    (folder / "xlora.json").write_text(json.dumps(header))
    path = folder / "classifier.safetensors"
    tensors = load_file(path)
    shuffled = {
        f"gates.{new}.{part}": tensors[f"gates.{old}.{part}"]
        for new, old in enumerate(order)
        for part in ("weight", "bias")
    }
    save_file(shuffled, path, metadata={"format": "pt"})
    loaded = XLoraModel.from_pretrained(tiny_base(), folder).eval()
    assert torch.equal(logits_of(loaded, tiny_prompt()), logits_of(model, tiny_prompt()))


# -------------------------------------------------------------------- merging


def test_merging_leaves_a_plain_model(tmp_path: Path) -> None:
    model = gated_xlora(tmp_path, dtype=torch.float64)
    ids = tiny_prompt()
    with torch.no_grad():
        wanted = model.main_pass(input_ids=ids, scalings=torch.tensor([0.2, 0.5, 0.3])).logits
        merged = model.merge_and_unload([0.2, 0.5, 0.3])
        torch.testing.assert_close(merged(input_ids=ids).logits, wanted, atol=1e-6, rtol=0)
    with pytest.raises(ModelError, match="was merged"):
        model(input_ids=ids)


@torch.no_grad()
def test_it_freezes_into_a_constant_mixture(model: XLoraModel) -> None:
    """Merging's own measures work on it: the mean over texts, and what it loses."""
    ids = tiny_prompt(batch=3)
    rows = [
        Example(input_ids=row, labels=[IGNORE, *row[1:]], domains=[""] * len(row))
        for row in ids.tolist()
    ]
    frozen = freeze_rows(model, rows, tokens="all", name="texts")
    scalings = model.route(model.read_router(input_ids=ids))
    torch.testing.assert_close(frozen.weights, scalings.mean(dim=(0, 1)), **NEAR)
    report = approximation_loss(model, frozen.weights, rows)
    logits = logits_of(model, ids)[:, :-1].flatten(0, 1)
    wanted = nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    assert report.arms["routed"].cross_entropy == pytest.approx(float(wanted), abs=1e-9)
    assert report.arms["routed"].kl == pytest.approx(0, abs=1e-9)
    assert report.arms["frozen"].kl > 1e-3
