"""PEFT's layout: its config, and files that contradict it. PEFT itself: ``tests/parity``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import tiny_base, tiny_xlora
from xlora_core.checkpoint import (
    NAMES_FILE,
    Layout,
    layout_of,
    read_checkpoint,
    read_peft_config,
    write_peft,
)
from xlora_core.config import AdapterOverride, XLoraConfig
from xlora_core.errors import AdapterError, CheckpointError
from xlora_core.model import XLoraModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.internal_xlora_classifier."


@pytest.fixture
def model(tmp_path: Path) -> XLoraModel:
    return tiny_xlora(tmp_path / "experts", xlora_depth=3)


@pytest.fixture
def saved(model: XLoraModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "ours")
    write_peft(tmp_path / "peft", read_checkpoint(tmp_path / "ours"))
    return tmp_path / "peft"


def refusal(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        XLoraModel.from_pretrained(tiny_base(), folder)
    return caught.value


def edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / CONFIG).read_text()) | values
    (folder / CONFIG).write_text(json.dumps(config))


def edit_classifier(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


# ---------------------------------------------------------------- the config


def write_config(folder: Path, **values: object) -> Path:
    """Writes a config with the keys and defaults of PEFT 0.21.2."""
    config: dict[str, object] = {
        "adapters": {"0": "a", "1": "b", "2": "c"},
        "auto_mapping": None,
        "base_model_name_or_path": "some/base",
        "enable_softmax": True,
        "enable_softmax_topk": False,
        "global_scaling_weight": 1.0,
        "hidden_size": 32,
        "inference_mode": True,
        "layerwise_scalings": False,
        "peft_type": "XLORA",
        "peft_version": "0.21.2",
        "revision": None,
        "scaling_pass_value": 0.0,
        "softmax_temperature": 1.0,
        "task_type": "CAUSAL_LM",
        "top_k_lora": None,
        "use_trainable_adapters": False,
        "xlora_depth": 1,
        "xlora_dropout_p": 0.2,
        "xlora_size": 2048,
    }
    (folder / CONFIG).write_text(json.dumps(config | values))
    return folder / CONFIG


def test_a_config_of_peft(tmp_path: Path) -> None:
    config = read_peft_config(write_config(tmp_path, xlora_depth=4, top_k_lora=2))
    assert config == XLoraConfig(
        hidden_size=32, adapters={"0": "a", "1": "b", "2": "c"}, xlora_depth=4, top_k_lora=2
    )


def test_numbers_are_sorted_as_numbers_and_names_stay_as_they_are(tmp_path: Path) -> None:
    numbers = {str(i): f"expert-{i}" for i in (0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9)}
    config = read_peft_config(write_config(tmp_path, adapters=numbers))
    assert list(config.adapters) == [str(i) for i in range(12)]
    assert list(config.adapters.values()) == [f"expert-{i}" for i in range(12)]
    names = {"b": "x", "10": "y", "2": "z"}
    config = read_peft_config(write_config(tmp_path, adapters=names))
    assert list(config.adapters) == ["b", "10", "2"]


def test_softmax_over_top_k_without_top_k_is_over_all(tmp_path: Path) -> None:
    """PEFT takes the softmax of whatever top-k left, so of all, then."""
    config = read_peft_config(
        write_config(tmp_path, enable_softmax=False, enable_softmax_topk=True)
    )
    assert config.top_k_lora == 3


@pytest.mark.parametrize(
    ("values", "fault", "hint"),
    [
        (
            {"enable_softmax_topk": True, "top_k_lora": 2},
            "enable_softmax and enable_softmax_topk exclude each other",
            "PEFT takes a softmax of a softmax here, which is not supported",
        ),
        ({"top_k_lora": 0}, "from 1 to 3 (the number of adapters), got 0", "PEFT only warns"),
        ({"top_k_lora": 4}, "from 1 to 3 (the number of adapters), got 4", "PEFT only warns"),
        ({"softmax_temperature": 0}, "softmax_temperature must be finite and > 0", "correct"),
        ({"scaling_pass_value": None}, "scaling_pass_value must be a finite number", "correct"),
        ({"hidden_size": None}, "hidden_size is missing", "correct"),
        ({"use_dora": True}, "unknown X-LoRA config keys: 'use_dora'", "allowed keys: "),
        ({"router": "classifier"}, "unknown X-LoRA config keys: 'router'", "allowed keys: "),
        ({"adapters": {}}, "adapters must map names to folders, got {}", "correct"),
        ({"adapters": ["0"]}, "adapters must map names to folders, got ['0']", "correct"),
        ({"adapters": {"0": 7}}, "the folder of '0' must be a path, got 7", "correct"),
        ({"adapters": {" ": "a"}}, "a name must be a non-empty string", "correct"),
        ({"peft_type": "LORA"}, "peft_type must be 'XLORA', got 'LORA'", "correct"),
    ],
)
def test_what_peft_accepts_and_cannot_mean(
    tmp_path: Path, values: dict[str, object], fault: str, hint: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_peft_config(write_config(tmp_path, **values))
    assert caught.value.message.startswith(f"{tmp_path / CONFIG}: ")
    assert fault in caught.value.message
    assert caught.value.hint.startswith(hint)


def test_every_fault_at_once(tmp_path: Path) -> None:
    path = write_config(
        tmp_path, bogus=1, xlora_dropout_p=1.5, enable_softmax="yes", adapters={"": 1}
    )
    with pytest.raises(CheckpointError) as caught:
        read_peft_config(path)
    assert caught.value.message == (
        f"{path}: unknown X-LoRA config keys: 'bogus'\n"
        "adapters: a name must be a non-empty string, got ''\n"
        "enable_softmax must be true or false, got 'yes'\n"
        "xlora_dropout_p must be in [0, 1), got 1.5"
    )


def test_twelve_names_keep_their_order_through_json() -> None:
    names = ["zeta", "11", "2", "1", "0", "10", "math/algebra", "..", "数学", "a", "9", "_"]
    config = XLoraConfig(adapters={name: f"path/{name}" for name in names})
    again = XLoraConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert list(again.adapters) == names
    assert again == config


# ---------------------------------------------------------------- the folder


def test_layouts_are_told_apart(saved: Path, tmp_path: Path) -> None:
    assert layout_of(saved) is Layout.PEFT
    assert layout_of(tmp_path / "ours") is Layout.OURS
    with pytest.raises(CheckpointError) as caught:
        layout_of(tmp_path / "experts" / "expert-0")
    assert "the peft_type in its adapter_config.json is 'LORA'" in caught.value.message
    assert caught.value.hint == "a single LoRA is an expert: give it under adapters instead"


def test_a_pickled_classifier_is_not_opened(saved: Path) -> None:
    (saved / WEIGHTS).rename(saved / "adapter_model.bin")
    assert refusal(saved).message == (
        "checkpoint: adapter_model.bin is a pickle; pickles can run code and are never opened"
    )


def test_no_classifier_at_all(saved: Path) -> None:
    (saved / WEIGHTS).unlink()
    assert refusal(saved).message == f"{saved} has no {WEIGHTS}, the checkpoint is incomplete"


@pytest.mark.parametrize(
    ("dropout", "layers"),
    [(0.0, "classifier layers 0, 3, 6 do not fit xlora_dropout_p 0 in adapter_config.json")],
)
def test_the_numbers_of_the_layers_contradict_the_dropout(
    saved: Path, dropout: float, layers: str
) -> None:
    edit_config(saved, xlora_dropout_p=dropout)
    assert layers in refusal(saved).message


def test_layers_without_dropout_contradict_one(tmp_path: Path) -> None:
    model = tiny_xlora(tmp_path / "experts", xlora_depth=3, xlora_dropout_p=0.0)
    model.save_pretrained(tmp_path / "ours")
    write_peft(tmp_path / "peft", read_checkpoint(tmp_path / "ours"))
    XLoraModel.from_pretrained(tiny_base(), tmp_path / "peft")
    edit_config(tmp_path / "peft", xlora_dropout_p=0.2)
    assert "classifier layers 0, 2, 4 do not fit xlora_dropout_p 0.2" in (
        refusal(tmp_path / "peft").message
    )


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (
            lambda t: t.pop(PREFIX + "layers.6.bias"),
            "PEFT >= 0.20 saved this incompletely: layers.6.bias is neither in",
        ),
        (
            lambda t: t.update({PREFIX + "layers.9.bias": torch.zeros(2)}),
            "a classifier of depth 3 has no layers.9.bias",
        ),
        (lambda t: t.update({"what": torch.zeros(2)}), "tensor what is not part of an X-LoRA"),
        (
            lambda t: t.update({PREFIX + "layers.3.weight": torch.zeros(16, 8)}),
            "tensor layers.3.weight must be [16, 16], found [16, 8]",
        ),
        (
            lambda t: t.update({PREFIX + "layers.3.bias": torch.zeros(8)}),
            "tensor layers.3.bias must be [16], found [8]",
        ),
        (
            lambda t: t.update({PREFIX + "layers.6.weight": torch.zeros(41, 16)}),
            "tensor layers.6.weight must be [modules x 3, 16], found [41, 16]",
        ),
        (
            lambda t: t.update({PREFIX + "layers.6.weight": torch.zeros(())}),
            "tensor layers.6.weight must be [modules x 3, 16], found []",
        ),
        (
            lambda t: t[PREFIX + "layers.3.bias"].fill_(torch.nan),
            "layers.3.bias holds NaN, infinite or no floating-point values",
        ),
    ],
)
def test_a_classifier_that_contradicts_its_config(
    saved: Path, edit: Callable[[dict[str, torch.Tensor]], object], fault: str
) -> None:
    edit_classifier(saved, edit)
    assert fault in refusal(saved).message


def test_more_modules_than_the_experts_adapt(saved: Path) -> None:
    def add_a_module(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("weight", "bias"):
            key = f"{PREFIX}layers.6.{part}"
            tensors[key] = torch.cat([tensors[key], tensors[key][:3]])

    edit_classifier(saved, add_a_module)
    (saved / NAMES_FILE).unlink()
    message = refusal(saved).message
    assert "'layers.6.weight': [42, 16]" in message.partition("found")[0]
    assert "for 3 adapters in 14 modules" in message
    assert "'layers.6.weight': [45, 16]" in message.partition("found")[2]


@pytest.mark.parametrize("depth", [0, 2, 10**9, 10**30, -1])
def test_another_depth(saved: Path, depth: int) -> None:
    edit_config(saved, xlora_depth=depth)
    assert "depth" in refusal(saved).message


def test_without_the_file_of_names_it_is_a_checkpoint_of_peft(
    saved: Path, model: XLoraModel
) -> None:
    checkpoint = read_checkpoint(saved)
    assert checkpoint.layer_names == model.lora_layer_names
    (saved / NAMES_FILE).unlink()
    checkpoint = read_checkpoint(saved)
    assert (checkpoint.layer_names, checkpoint.base) == (None, None)
    assert XLoraModel.from_pretrained(tiny_base(), saved).lora_layer_names == (
        model.lora_layer_names
    )


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": "xlora-explorer-names"}'])
def test_a_damaged_file_of_names(saved: Path, text: str) -> None:
    (saved / NAMES_FILE).write_text(text)
    assert NAMES_FILE in refusal(saved).message


def test_names_for_another_number_of_adapters(saved: Path) -> None:
    names = json.loads((saved / NAMES_FILE).read_text())
    (saved / NAMES_FILE).write_text(json.dumps(names | {"adapters": ["a", "b"]}))
    assert "names 2 adapters, the config has 3" in refusal(saved).message


def test_another_base_model(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="belongs to another base model"):
        XLoraModel.from_pretrained(tiny_base("qwen2"), saved)
    (saved / NAMES_FILE).unlink()
    with pytest.raises(AdapterError, match="GPT2LMHeadModel has no such module"):
        XLoraModel.from_pretrained(tiny_base("gpt2"), saved)


# ---------------------------------------------------------------- writing


def test_what_peft_does_not_have_is_not_written(model: XLoraModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "plain")
    checkpoint = read_checkpoint(tmp_path / "plain")
    config = replace(checkpoint.config, adapter_overrides=[AdapterOverride.mute("1")])
    with pytest.raises(CheckpointError) as caught:
        write_peft(tmp_path / "peft", replace(checkpoint, config=config))
    assert caught.value.message.startswith("PEFT has no adapter_overrides ")
    assert not (tmp_path / "peft").exists()


def test_only_into_a_new_or_empty_folder(saved: Path, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(saved)
    before = sorted(path.name for path in saved.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        write_peft(saved, checkpoint)
    assert caught.value.message == f"{saved} exists and is not empty"
    assert sorted(path.name for path in saved.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    write_peft(tmp_path / "empty", checkpoint)
    assert layout_of(tmp_path / "empty") is Layout.PEFT
