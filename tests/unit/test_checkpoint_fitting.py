"""What a router must look like, and its outputs following the modules by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import tiny_base, tiny_prompt, tiny_xlora, write_lora
from xlora_core.checkpoint import (
    CLASSIFIER_FILE,
    HEADER_FILE,
    check_fits,
    read_checkpoint,
    router_shapes,
)
from xlora_core.classifier import XLoraClassifier
from xlora_core.config import XLoraConfig
from xlora_core.errors import CheckpointError
from xlora_core.model import XLoraModel


@pytest.mark.parametrize("layerwise", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_shapes_are_those_of_the_classifier(depth: int, dropout: float, layerwise: bool) -> None:
    config = XLoraConfig(
        hidden_size=32,
        xlora_depth=depth,
        xlora_size=16,
        xlora_dropout_p=dropout,
        layerwise_scalings=layerwise,
    )
    classifier = XLoraClassifier(config, n_lora_layers=7, n_adapters=3)
    assert router_shapes(config, n_lora_layers=7, n_adapters=3) == {
        name: list(tensor.shape) for name, tensor in classifier.state_dict().items()
    }


def test_outputs_follow_the_modules_by_name(tmp_path: Path) -> None:
    """A base model whose modules are registered in another order routes each as before."""
    model = tiny_xlora(tmp_path / "experts", xlora_depth=2)
    model.save_pretrained(tmp_path / "saved")
    header = json.loads((tmp_path / "saved" / HEADER_FILE).read_text())
    header["layer_names"].reverse()
    (tmp_path / "saved" / HEADER_FILE).write_text(json.dumps(header))
    path = tmp_path / "saved" / CLASSIFIER_FILE
    tensors = load_file(path)
    for name in ("layers.3.weight", "layers.3.bias"):
        tensors[name] = tensors[name].unflatten(0, (14, 3)).flip(0).flatten(0, 1).contiguous()
    save_file(tensors, path)
    again = XLoraModel.from_pretrained(tiny_base(), tmp_path / "saved").eval()
    assert again.lora_layer_names == model.lora_layer_names
    for name, tensor in model.classifier.state_dict().items():
        assert torch.equal(again.classifier.state_dict()[name], tensor), name
    with torch.no_grad():
        ids = tiny_prompt()
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_fitting_needs_no_weights_and_changes_nothing(tmp_path: Path) -> None:
    tiny_xlora(tmp_path / "experts").save_pretrained(tmp_path / "saved")
    checkpoint = read_checkpoint(tmp_path / "saved")
    skeleton = tiny_base().to("meta")
    fitted = check_fits(tmp_path / "saved", checkpoint, skeleton)
    assert fitted.layer_names == checkpoint.layer_names
    assert fitted.base == checkpoint.base
    assert {type(module).__name__ for module in skeleton.modules()} == {
        type(module).__name__ for module in tiny_base().modules()
    }


def test_no_hidden_size(tmp_path: Path) -> None:
    tiny_xlora(tmp_path / "experts").save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / HEADER_FILE
    header = json.loads(path.read_text())
    header["config"]["hidden_size"] = None
    path.write_text(json.dumps(header))
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "saved")
    assert caught.value.message == f"{path}: config.hidden_size is missing"


def test_adapters_that_are_not_numbers_are_not_renamed(tmp_path: Path) -> None:
    """``adapters=`` gives names only to adapters that have none."""
    base = tiny_base()
    folders = {n: str(write_lora(tmp_path / n, base, ("q_proj",))) for n in ("a", "b")}
    XLoraModel.from_base(base, XLoraConfig(adapters=folders)).save_pretrained(tmp_path / "saved")
    others = {"c": folders["a"], "d": folders["b"]}
    with pytest.raises(CheckpointError, match="no adapter named 'c', 'd' in this checkpoint"):
        read_checkpoint(tmp_path / "saved", others)
