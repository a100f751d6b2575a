"""Checkpoints: what goes in comes out, and a save that fails loses nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.tiny_models import tiny_base, tiny_prompt, tiny_xlora, write_experts, write_lora
from xlora_core.adapters import WEIGHTS_FILE
from xlora_core.checkpoint import CLASSIFIER_FILE, HEADER_FILE, files, own_layout
from xlora_core.config import AdapterOverride, XLoraConfig
from xlora_core.errors import CheckpointError
from xlora_core.model import XLoraModel

# Order, not spelling, decides; nothing of a name may reach a path.
NAMES = (
    "11", "2", "1", "0", "10", "math/algebra", "..", "../../etc/passwd", "naïve ünïcode 数学",
    " spaces ", 'quote" and \\', "con",
)  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> XLoraModel:
    return tiny_xlora(tmp_path / "experts", dtype=torch.float64, xlora_depth=2)


@pytest.fixture
def saved(model: XLoraModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def load(folder: Path, **arguments: object) -> XLoraModel:
    base = tiny_base(dtype=torch.float64)
    return XLoraModel.from_pretrained(base, folder, **arguments).eval()


def logits(model: XLoraModel) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=tiny_prompt()).logits
    return result


def expert_folder(folder: Path, index: int = 0) -> Path:
    return sorted((folder / "adapters").iterdir())[index]


# ---------------------------------------------------------------- what goes in comes out


def test_round_trip(model: XLoraModel, saved: Path) -> None:
    again = load(saved)
    assert torch.equal(logits(again), logits(model))
    assert again.adapter_names == model.adapter_names
    assert again.lora_layer_names == model.lora_layer_names
    for name, tensor in model.classifier.state_dict().items():
        assert torch.equal(again.classifier.state_dict()[name], tensor)
    assert sorted(p.name for p in saved.iterdir()) == ["adapters", CLASSIFIER_FILE, HEADER_FILE]
    assert [p.name for p in sorted((saved / "adapters").iterdir())] == ["00-0", "01-1", "02-2"]


def test_every_field_and_setter_is_saved(tmp_path: Path) -> None:
    model = tiny_xlora(
        tmp_path / "experts",
        xlora_depth=3,
        xlora_size=8,
        xlora_dropout_p=0.0,
        enable_softmax=False,
        enable_softmax_topk=True,
        top_k_lora=1,
        use_trainable_adapters=True,
        adapter_overrides=[AdapterOverride.pin("1", 0.5, "*.q_proj"), AdapterOverride.mute("2")],
    )
    model.set_topk_lora(2)
    model.set_global_scaling_weight(0.75)
    model.set_softmax_temperature(3.0)
    model.set_scaling_pass_value(None)
    model.save_pretrained(tmp_path / "saved")
    again = XLoraModel.from_pretrained(tiny_base(), tmp_path / "saved").config_xlora
    assert again.to_dict() | {"adapters": {}} == {
        "hidden_size": 32,
        "adapters": {},
        "enable_softmax": False,
        "enable_softmax_topk": True,
        "layerwise_scalings": True,
        "xlora_depth": 3,
        "xlora_size": 8,
        "xlora_dropout_p": 0.0,
        "use_trainable_adapters": True,
        "softmax_temperature": 3.0,
        "top_k_lora": 2,
        "scaling_pass_value": 1 / 3,
        "global_scaling_weight": 0.75,
        "router": "classifier",
        "adapter_overrides": (
            {"adapter": "1", "kind": "pin", "value": 0.5, "modules": ("*.q_proj",)},
            {"adapter": "2", "kind": "mute", "value": None, "modules": None},
        ),
    }


def test_twelve_adapters_with_any_names_keep_their_order(tmp_path: Path) -> None:
    base = tiny_base(dtype=torch.float64)
    adapters = {
        name: str(write_lora(tmp_path / f"expert-{i}", base, ("q_proj",), rank=2, seed=i))
        for i, name in enumerate(NAMES)
    }
    model = XLoraModel.from_base(base, XLoraConfig(adapters=adapters)).eval()
    model.save_pretrained(tmp_path / "deep" / "saved")
    again = load(tmp_path / "deep" / "saved")
    assert tuple(again.adapter_names) == tuple(again.config_xlora.adapters) == NAMES
    assert torch.equal(logits(again), logits(model))
    folders = sorted(p.name for p in (tmp_path / "deep" / "saved" / "adapters").iterdir())
    assert [name[:3] for name in folders] == [f"{i:02d}-" for i in range(12)]
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for name in folders)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["saved"]


def test_it_is_self_contained_and_may_be_moved(saved: Path, tmp_path: Path) -> None:
    expected = logits(load(saved))
    for folder in (tmp_path / "experts").iterdir():
        for file in folder.iterdir():
            file.unlink()
    moved = saved.rename(tmp_path / "moved")
    assert torch.equal(logits(load(moved)), expected)
    assert str(tmp_path) not in (moved / HEADER_FILE).read_text()


def test_an_existing_checkpoint_is_replaced_as_a_whole(saved: Path, tmp_path: Path) -> None:
    (saved / "leftover.txt").write_text("of the old one")
    other = tiny_xlora(tmp_path / "two", dtype=torch.float64, n_adapters=2)
    other.save_pretrained(saved)
    assert torch.equal(logits(load(saved)), logits(other))
    assert not (saved / "leftover.txt").exists()
    assert len(list((saved / "adapters").iterdir())) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["experts", "saved", "two"]


def test_a_model_may_be_saved_over_the_folder_it_came_from(saved: Path) -> None:
    model = load(saved)
    expected = logits(model)
    model.save_pretrained(saved)
    assert torch.equal(logits(load(saved)), expected)


def test_trained_experts_are_saved_as_trained(tmp_path: Path) -> None:
    """PEFT writes them where it never reads them."""
    model = tiny_xlora(tmp_path / "experts", use_trainable_adapters=True)
    before = logits(model)
    ids = tiny_prompt()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    trained = logits(model)
    assert (trained - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "saved")
    again = XLoraModel.from_pretrained(tiny_base(), tmp_path / "saved").eval()
    assert torch.equal(logits(again), trained)
    assert again.lora_layers[0].lora_A.requires_grad


@pytest.mark.parametrize(
    ("of_file", "of_model"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)],
)
@pytest.mark.parametrize("learns_on", [True, False])
def test_trained_experts_keep_every_digit(
    tmp_path: Path, of_file: torch.dtype, of_model: torch.dtype, learns_on: bool
) -> None:
    """Training gives weights digits that the dtype of their file has no room for."""
    adapters = write_experts(tmp_path, dtype=of_file)
    config = XLoraConfig(adapters=adapters, use_trainable_adapters=True)
    model = XLoraModel.from_base(tiny_base(dtype=of_model), config)
    with torch.no_grad():
        for layer in model.lora_layers:
            layer.lora_B.mul_(1.2345678)
    model.set_use_trainable_adapters(learns_on)
    model.save_pretrained(tmp_path / "saved")
    again = XLoraModel.from_pretrained(tiny_base(dtype=of_model), tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))


def test_experts_beside_one_with_a_bias_get_none(tmp_path: Path) -> None:
    """Else theirs would learn, and have no place in an adapter without ``lora_bias``."""
    head = tiny_base().lm_head
    path = "model.layers.0.self_attn.q_proj"
    adapters = {
        "biased": write_lora(
            tmp_path / "biased",
            tiny_base(),
            ("q_proj", "lm_head"),
            config={"lora_bias": True},
            extra={f"{path}.lora_B.bias": torch.ones(32), "lm_head.lora_B.bias": torch.ones(97)},
        ),
        "plain": write_lora(tmp_path / "plain", tiny_base(), ("q_proj",), seed=1),
        "whole": write_lora(
            tmp_path / "whole",
            tiny_base(),
            ("q_proj",),
            seed=2,
            config={"modules_to_save": ["lm_head"]},
            extra={"lm_head.weight": head.weight.detach() + 0.1},
        ),
    }
    config = XLoraConfig(adapters=adapters, use_trainable_adapters=True)
    model = XLoraModel.from_base(tiny_base(), config).eval()
    model.save_pretrained(tmp_path / "referenced", bundle=False)  # nothing was trained yet
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=tiny_prompt(), labels=tiny_prompt()).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "saved")
    tensors = load_file(expert_folder(tmp_path / "saved", 1) / WEIGHTS_FILE)
    assert not any(key.endswith("bias") for key in tensors)
    again = XLoraModel.from_pretrained(tiny_base(), tmp_path / "saved").eval()
    torch.testing.assert_close(logits(again), logits(model))


def test_peft_reads_the_experts(saved: Path, model: XLoraModel) -> None:
    plain = PeftModel.from_pretrained(tiny_base(dtype=torch.float64), expert_folder(saved, 1))
    with torch.no_grad():
        theirs = plain.eval()(input_ids=tiny_prompt()).logits
        ours = model.main_pass(input_ids=tiny_prompt(), scalings=torch.eye(3)[1].double()).logits
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


def test_an_adapter_may_be_read_from_elsewhere(saved: Path, tmp_path: Path) -> None:
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    other = write_lora(tmp_path / "other", tiny_base(), targets, rank=6, seed=99)
    model = load(saved, adapters={"1": other})
    assert model.config_xlora.adapters["1"] == str(other)
    assert [layer.ranks for layer in model.lora_layers] == [[4, 6, 4]] * 14
    assert not torch.allclose(logits(model), logits(load(saved)), atol=1e-3)


# ---------------------------------------------------------------- writing that cannot be done


def test_a_foreign_folder_or_file_is_not_overwritten(model: XLoraModel, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    for target, what in (
        (mine, "is not an X-LoRA checkpoint folder"),
        (mine / "thesis.tex", "is a file"),
    ):
        with pytest.raises(CheckpointError) as caught:
            model.save_pretrained(target)
        assert caught.value.message == f"{target} exists and {what}"
        assert caught.value.hint == "choose a new or empty folder"
    assert (mine / "thesis.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    assert (tmp_path / "empty" / HEADER_FILE).is_file()


def test_a_path_through_a_file(model: XLoraModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written: "):
        model.save_pretrained(tmp_path / "file" / "below")


@pytest.mark.parametrize("fails_at", ["write", "first move", "second move"])
def test_a_failed_save_leaves_the_old_checkpoint(
    model: XLoraModel, saved: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    expected = logits(load(saved))
    moves = {"write": 0, "first move": 1, "second move": 2}[fails_at]
    calls = 0
    replace = os.replace

    def disk_full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def failing_replace(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == moves:
            disk_full()
        replace(source, target)

    if moves:
        monkeypatch.setattr(files.os, "replace", failing_replace)
    else:
        monkeypatch.setattr(own_layout, "save_file", disk_full)
    model.set_global_scaling_weight(9.0)
    with pytest.raises(CheckpointError, match="cannot be written: .*No space left on device"):
        model.save_pretrained(saved)
    monkeypatch.undo()
    assert torch.equal(logits(load(saved)), expected)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["experts", "saved"]


def test_a_name_with_a_dot_shares_nothing_with_its_neighbours(
    model: XLoraModel, tmp_path: Path
) -> None:
    """What is set aside while saving ``model.v1`` must not be called ``.model.old``."""
    mine = tmp_path / ".model.old"
    mine.mkdir()
    (mine / "keep.txt").write_text("mine")
    for _ in range(2):
        model.save_pretrained(tmp_path / "model.v1")
    assert (mine / "keep.txt").read_text() == "mine"
    load(tmp_path / "model.v1")


def test_a_link_keeps_pointing_to_the_newest(model: XLoraModel, saved: Path) -> None:
    link = saved.parent / "latest"
    link.symlink_to(saved, target_is_directory=True)
    model.set_global_scaling_weight(0.5)
    model.save_pretrained(link)
    assert link.is_symlink()
    assert load(saved).get_global_scaling_weight() == 0.5
