"""Checkpoints that point to their experts instead of holding copies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.tiny_models import tiny_base, tiny_prompt, tiny_xlora, write_lora
from xlora_core.checkpoint import HEADER_FILE, read_checkpoint, write_checkpoint
from xlora_core.config import XLoraConfig
from xlora_core.errors import AdapterError, CheckpointError
from xlora_core.model import XLoraModel


@pytest.fixture
def model(tmp_path: Path) -> XLoraModel:
    return tiny_xlora(tmp_path / "experts")


@pytest.fixture
def saved(model: XLoraModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "saved", bundle=False)
    return tmp_path / "saved"


def load(folder: Path) -> XLoraModel:
    return XLoraModel.from_pretrained(tiny_base(), folder).eval()


def logits(model: XLoraModel) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=tiny_prompt()).logits
    return result


def header(folder: Path) -> dict:
    return json.loads((folder / HEADER_FILE).read_text())


def edit_header(folder: Path, edit: Callable[[dict], object]) -> None:
    values = header(folder)
    edit(values)
    (folder / HEADER_FILE).write_text(json.dumps(values))


def test_experts_stay_where_they_are(saved: Path, model: XLoraModel, tmp_path: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["classifier.safetensors", HEADER_FILE]
    again = load(saved)
    assert torch.equal(logits(again), logits(model))
    assert again.config_xlora.adapters["1"] == str(tmp_path / "experts" / "expert-1")
    moved = saved.rename(tmp_path / "moved")  # the paths are absolute
    assert torch.equal(logits(load(moved)), logits(model))


def test_a_relative_path_is_stored_as_an_absolute_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base()
    write_lora(tmp_path / "here" / "math", base, ("q_proj",))
    monkeypatch.chdir(tmp_path / "here")
    model = XLoraModel.from_base(base, XLoraConfig(adapters={"math": "math"})).eval()
    model.save_pretrained("saved", bundle=False)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(load(tmp_path / "here" / "saved")), logits(model))


def test_only_references_need_the_newer_version(saved: Path, model: XLoraModel) -> None:
    assert header(saved)["version"] == 2
    model.save_pretrained(saved)
    assert header(saved)["version"] == 1
    assert (saved / "adapters").is_dir()


def test_an_expert_that_changed_is_refused(saved: Path, tmp_path: Path) -> None:
    config = tmp_path / "experts" / "expert-2" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 80'))
    with pytest.raises(CheckpointError) as caught:
        load(saved)
    assert caught.value.message.startswith(
        f"{saved}: adapter '2' is not the one this classifier was trained with"
    )


def test_an_expert_that_is_gone_is_named(saved: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "experts" / "expert-1")
    with pytest.raises(AdapterError) as caught:
        load(saved)
    assert caught.value.message == (
        f"adapter '1': folder {tmp_path / 'experts' / 'expert-1'} does not exist"
    )


def test_it_can_be_bundled_later(saved: Path, model: XLoraModel, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "bundled", read_checkpoint(saved))
    shutil.rmtree(tmp_path / "experts")
    assert torch.equal(logits(load(tmp_path / "bundled")), logits(model))


def test_trained_experts_cannot_be_referenced(tmp_path: Path) -> None:
    model = tiny_xlora(tmp_path / "experts", use_trainable_adapters=True)
    model.save_pretrained(tmp_path / "untrained", bundle=False)
    with torch.no_grad():
        model.lora_layers[0].lora_A.add_(0.1)
    with pytest.raises(CheckpointError) as caught:
        model.save_pretrained(tmp_path / "trained", bundle=False)
    assert caught.value.message == (
        f"adapter '0' is not the one in {tmp_path / 'experts' / 'expert-0'} any more: it was "
        "trained since, or the file was changed"
    )
    assert "bundle=True" in caught.value.hint
    assert not (tmp_path / "trained").exists()


def test_a_model_in_half_precision_still_has_the_experts_of_its_files(tmp_path: Path) -> None:
    model = tiny_xlora(tmp_path / "experts", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved", bundle=False)
    assert torch.equal(logits(load(tmp_path / "saved")), logits(tiny_again(tmp_path)))


def tiny_again(tmp_path: Path) -> XLoraModel:
    """Returns the float32 model of the same experts and the same classifier."""
    return tiny_xlora(tmp_path / "experts")


def test_a_bundle_cannot_be_replaced_by_references_to_itself(
    model: XLoraModel, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    with pytest.raises(CheckpointError) as caught:
        again.save_pretrained(tmp_path / "saved", bundle=False)
    assert "which is replaced by this save" in caught.value.message
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_version_1_never_leads_out_and_version_2_is_absolute(saved: Path) -> None:
    edit_header(saved, lambda h: h.update(version=1))
    with pytest.raises(CheckpointError, match="leads out of the checkpoint folder"):
        load(saved)
    edit_header(saved, lambda h: h.update(version=2))
    edit_header(saved, lambda h: h["adapters"][0].update(path="experts/expert-0"))
    with pytest.raises(CheckpointError, match="'experts/expert-0' must be absolute in version 2"):
        load(saved)


def test_experts_can_be_seen_from_the_checkpoint(model: XLoraModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "both" / "saved", bundle=False, relative=True)
    values = header(tmp_path / "both" / "saved")
    assert values["version"] == 3
    assert [entry["path"] for entry in values["adapters"]] == [
        f"../../experts/expert-{i}" for i in range(3)
    ]
    assert torch.equal(logits(load(tmp_path / "both" / "saved")), logits(model))


def test_a_checkpoint_moves_with_the_experts_it_sees(model: XLoraModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved", bundle=False, relative=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("saved", "experts"):
        (tmp_path / name).rename(elsewhere / name)
    again = load(elsewhere / "saved")
    assert torch.equal(logits(again), logits(model))
    assert again.config_xlora.adapters["1"] == str(elsewhere / "experts" / "expert-1")
    (elsewhere / "saved").rename(tmp_path / "saved")
    with pytest.raises(AdapterError, match="adapter '0': folder .* does not exist"):
        load(tmp_path / "saved")


def test_version_3_is_relative(saved: Path) -> None:
    edit_header(saved, lambda h: h.update(version=3))
    with pytest.raises(CheckpointError, match="must be relative in version 3"):
        load(saved)


def test_an_expert_on_another_drive_is_told(
    model: XLoraModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two_drives(*_: object) -> str:
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr("os.path.relpath", two_drives)
    with pytest.raises(CheckpointError, match="adapter '0' in .* cannot be seen from") as caught:
        model.save_pretrained(tmp_path / "saved", bundle=False, relative=True)
    assert "bundle=True" in caught.value.hint
    assert not (tmp_path / "saved").exists()
