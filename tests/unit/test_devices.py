"""Models over several devices: scalings follow each module's device, experts their base layer's.

Two GPUs are stood in for by PyTorch's fake tensors, which have a device but no data and refuse
to mix devices just as real ones do. Offloading to disk is real, and so is a model that
``load_model`` spreads over memory and disk.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from tests.tiny_chat import tiny_chat_base, tiny_tokenizer, write_chat_experts
from tests.tiny_models import tiny_base, tiny_prompt, tiny_xlora, write_experts
from xlora_core import Engine, SamplingParams, load_model
from xlora_core.adapters import LoraAdapter, read_adapter
from xlora_core.layers import ActiveScalings, XLoraLayer
from xlora_core.model import XLoraModel
from xlora_core.replacing import replace_adapted_modules

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


def place(module: nn.Module, device: torch.device) -> None:
    """Puts a module on a device; its inputs are moved there, as ``device_map`` does it."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            moved = torch.empty_like(parameter, device=device)
            setattr(owner, name, nn.Parameter(moved, requires_grad=False))
        for name, buffer in owner.named_buffers(recurse=False):
            owner.register_buffer(name, torch.empty_like(buffer, device=device), persistent=False)


def spread(base: PreTrainedModel) -> PreTrainedModel:
    """Block 0 and the head on the first device, block 1 on the second."""
    place(base, FIRST)
    place(base.model.layers[1], SECOND)
    hook = AlignDevicesHook(execution_device=SECOND, io_same_device=True)
    add_hook_to_module(base.model.layers[1], hook)
    return base


def read_experts(folder: Path) -> list[LoraAdapter]:
    return [read_adapter(name, path) for name, path in write_experts(folder).items()]


def test_experts_live_with_their_base_layer(tmp_path: Path) -> None:
    adapters, base = read_experts(tmp_path), tiny_base()
    with FakeTensorMode(allow_non_fake_inputs=True):
        layers = replace_adapted_modules(spread(base), adapters, ActiveScalings())
        devices = {
            path: {layer.lora_A.device, layer.lora_B.device, layer.lora_scaling.device}
            for path, layer in layers.items()
        }
    assert {p for p, d in devices.items() if d == {FIRST}} == {p for p in layers if ".0." in p}
    assert {p for p, d in devices.items() if d == {SECOND}} == {p for p in layers if ".1." in p}


def test_scalings_follow_the_module(tmp_path: Path) -> None:
    """The classifier is on the first device; a module on the second computes there."""
    adapters, base = read_experts(tmp_path), tiny_base()
    active = ActiveScalings()
    with FakeTensorMode(allow_non_fake_inputs=True):
        layers = replace_adapted_modules(spread(base), adapters, active)
        scalings = torch.empty(2, 5, len(layers), len(adapters), device=FIRST)
        for path, layer in layers.items():
            here = SECOND if ".1." in path else FIRST
            x = torch.empty(2, 5, layer.lora_A.shape[1], device=here)
            with active.hold(scalings):
                assert layer(x).device == here


def test_an_input_that_only_the_base_layer_moves(tmp_path: Path) -> None:
    """With a hook on the layer itself, as for a head on a device of its own."""
    adapters, base = read_experts(tmp_path), tiny_base()
    active, path = ActiveScalings(), "model.layers.1.mlp.down_proj"
    with FakeTensorMode(allow_non_fake_inputs=True):
        place(base, FIRST)
        place(base.get_submodule(path), SECOND)
        hook = AlignDevicesHook(execution_device=SECOND, io_same_device=True)
        add_hook_to_module(base.get_submodule(path), hook)
        layer = replace_adapted_modules(base, adapters, active)[path]
        assert layer.lora_A.device == SECOND
        with active.hold(torch.empty(2, 5, 1, len(adapters), device=FIRST)):
            assert layer(torch.empty(2, 5, 48, device=FIRST)).device == FIRST


def test_the_stand_in_refuses_to_mix_devices() -> None:
    """Else the tests above would show nothing."""
    layer = nn.Linear(4, 4)
    with FakeTensorMode(allow_non_fake_inputs=True):
        place(layer, SECOND)
        with pytest.raises(RuntimeError, match="device"):
            layer(torch.ones(2, 4, device=FIRST))


def test_weights_that_rest_on_disk(tmp_path: Path) -> None:
    """Offloaded weights are on ``meta`` but for the moment they compute."""
    whole, ids = tiny_xlora(tmp_path), tiny_prompt()
    base = tiny_base()
    disk_offload(base, str(tmp_path / "offload"), execution_device=torch.device("cpu"))
    assert base.get_submodule("model.layers.0.self_attn.q_proj").weight.device.type == "meta"
    model = XLoraModel.from_base(base, whole.config_xlora).eval()
    model.classifier.load_state_dict(whole.classifier.state_dict())
    assert all(
        layer.lora_A.device.type == "cpu"
        for layer in model.base_model.modules()
        if isinstance(layer, XLoraLayer)
    )
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, whole(input_ids=ids).logits)


# --- models that load_model spreads -------------------------------------------------------


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_chat_base().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One router for all, since a fresh one is random."""
    folder = tmp_path_factory.mktemp("xlora")
    model, _ = load_model(base_folder, adapters=write_chat_experts(folder), device="cpu")
    model.save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"


ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


@pytest.mark.parametrize("device", ["auto", ON_DISK], ids=["auto", "disk"])
def test_a_spread_model_answers_as_a_whole_one(
    base_folder: Path, checkpoint: Path, device: str | dict[str, str]
) -> None:
    whole, _ = load_model(base_folder, checkpoint=checkpoint, device="cpu")
    model, tokenizer = load_model(base_folder, checkpoint=checkpoint, device=device)
    rests = model.base_model.get_submodule("model.layers.1.mlp.down_proj").weight.device.type
    assert rests == ("cpu" if device == "auto" else "meta")
    inputs = tokenizer("the sum of two numbers", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, whole(**inputs).logits)


def test_the_engine_serves_a_model_that_rests_on_disk(base_folder: Path, checkpoint: Path) -> None:
    sampling = SamplingParams(max_new_tokens=6)
    ids, hashes = [], set()
    for device in ("cpu", ON_DISK):
        model, tokenizer = load_model(base_folder, checkpoint=checkpoint, device=device)
        with Engine(model, tokenizer) as engine:
            run = engine.run("the sum of two numbers", sampling=sampling)
        ids.append(run.tracks[0].token_ids.tolist())
        hashes.add(run.header.base_hash)
    assert ids[0] == ids[1]
    assert len(hashes) == 1
