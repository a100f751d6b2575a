"""Checkpoints that are damaged, foreign, newer or of another model: refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import tiny_base, tiny_xlora, write_lora
from xlora_core.checkpoint import CLASSIFIER_FILE, HEADER_FILE
from xlora_core.errors import AdapterError, CheckpointError, XLoraError
from xlora_core.layers import XLoraLinear
from xlora_core.model import XLoraModel


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = tiny_xlora(tmp_path / "experts", xlora_depth=2)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def refusal(folder: Path, **arguments: object) -> CheckpointError:
    """Returns the error of loading; the base model must be as good as before."""
    base = tiny_base()
    with pytest.raises(CheckpointError) as caught:
        XLoraModel.from_pretrained(base, folder, **arguments)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, XLoraError)
    assert not any(isinstance(module, XLoraLinear) for module in base.modules())
    return caught.value


def edit_header(folder: Path, edit: Callable[[dict], object]) -> None:
    header = json.loads((folder / HEADER_FILE).read_text())
    edit(header)
    (folder / HEADER_FILE).write_text(json.dumps(header))


def expert_folder(folder: Path, index: int = 0) -> Path:
    return sorted((folder / "adapters").iterdir())[index]


def test_a_missing_folder(tmp_path: Path) -> None:
    error = refusal(tmp_path / "nowhere")
    assert error.message == f"checkpoint folder {tmp_path / 'nowhere'} does not exist"
    assert error.hint == (
        "give a folder that XLoraModel.save_pretrained wrote (it holds xlora.json), or one of "
        "PEFT's or the original xlora package's X-LoRA checkpoints"
    )


def test_a_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert refusal(tmp_path).message == (
        f"{tmp_path} is not an X-LoRA checkpoint: it has no xlora.json (ours), no "
        "adapter_config.json (PEFT's) and no xlora_config.json (the original xlora package's)"
    )


@pytest.mark.parametrize("name", ["xlora_classifier.pt", "adapter_model.bin"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch never'\ntR.")
    for given in (tmp_path, tmp_path / name):
        error = refusal(given)
        assert error.message == (
            f"checkpoint: {name} is a pickle; pickles can run code and are never opened"
        )
        assert "safetensors" in error.hint


def test_a_newer_version(saved: Path) -> None:
    edit_header(saved, lambda h: h.update(version=4))
    error = refusal(saved)
    assert error.message == (
        f"{saved / HEADER_FILE} has format version 4, this program reads up to 3"
    )
    assert error.hint == "update xlora-explorer"


@pytest.mark.parametrize("text", ["", "{", "\x00\xff", "[" * 100_000, "9" * 5000])
def test_a_header_that_is_not_json(saved: Path, text: str) -> None:
    (saved / HEADER_FILE).write_text(text, encoding="latin-1")
    assert f"{saved / HEADER_FILE} is not valid JSON: " in refusal(saved).message


@pytest.mark.parametrize("header", [[], {}, {"format": "other"}])
def test_a_header_of_something_else(saved: Path, header: object) -> None:
    (saved / HEADER_FILE).write_text(json.dumps(header))
    assert refusal(saved).message == (
        f"{saved / HEADER_FILE} is not an X-LoRA checkpoint header (format 'xlora-explorer')"
    )


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda h: h.pop("adapters"), "'adapters'"),
        (lambda h: h.pop("config"), "'config'"),
        (lambda h: h.update(layer_names=3), "not iterable"),
        (lambda h: h["adapters"][0].pop("sha256"), "'sha256'"),
        (lambda h: h["adapters"][0].update(path=7), "unsupported operand"),
        (lambda h: h.update(adapters={"a": "b"}), "indices must be integers"),
    ],
)
def test_header_fields_missing_or_of_the_wrong_kind(
    saved: Path, edit: Callable[[dict], object], what: str
) -> None:
    edit_header(saved, edit)
    error = refusal(saved)
    assert f"{saved / HEADER_FILE}: field missing or of the wrong kind: " in error.message
    assert what in error.message


@pytest.mark.parametrize("path", ["../x", "adapters/../../experts/expert-0", "/etc"])
def test_a_path_that_leads_out_of_the_folder(saved: Path, path: str) -> None:
    edit_header(saved, lambda h: h["adapters"][0].update(path=path))
    assert f"adapter path {path!r} leads out of the checkpoint folder" in refusal(saved).message


def test_a_link_that_leads_out_of_the_folder(saved: Path, tmp_path: Path) -> None:
    expert = expert_folder(saved)
    expert.rename(tmp_path / "moved")
    expert.symlink_to(tmp_path / "moved", target_is_directory=True)
    assert "leads out of the checkpoint folder" in refusal(saved).message


def test_a_config_with_faults(saved: Path) -> None:
    edit_header(saved, lambda h: h["config"].update(top_k_lora=4, softmax_temperature=0, bogus=1))
    assert refusal(saved).message == (
        f"{saved / HEADER_FILE}: unknown X-LoRA config keys: 'bogus'\n"
        "softmax_temperature must be finite and > 0, got 0\n"
        "top_k_lora must be None or a whole number from 1 to 3 (the number of adapters), got 4"
    )


def test_no_classifier(saved: Path) -> None:
    (saved / CLASSIFIER_FILE).unlink()
    assert refusal(saved).message == (
        f"{saved} has no {CLASSIFIER_FILE}, the checkpoint is incomplete"
    )


@pytest.mark.parametrize("keep", [0, 20, -1])
def test_a_truncated_classifier(saved: Path, keep: int) -> None:
    path = saved / CLASSIFIER_FILE
    path.write_bytes(path.read_bytes()[:keep])
    error = refusal(saved)
    assert f"classifier: {path} is not a readable safetensors file: " in error.message
    assert error.hint == "the file is truncated or damaged; copy or save it again"


def edit_classifier(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / CLASSIFIER_FILE)
    edit(tensors)
    save_file(tensors, folder / CLASSIFIER_FILE)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_the_classifier(saved: Path, value: float) -> None:
    edit_classifier(saved, lambda t: t["layers.3.bias"][5:6].fill_(value))
    error = refusal(saved)
    assert "tensor layers.3.bias holds NaN, infinite or no floating-point values" in error.message
    assert error.hint == "the router's training diverged; take an earlier checkpoint"


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t.pop("layers.0.weight"),  # as PEFT >= 0.20 loses it
        lambda t: t.update({"layers.3.bias": t["layers.3.bias"][:-1].clone()}),
        lambda t: t.update({"layers.9.bias": torch.zeros(2)}),
    ],
)
def test_a_classifier_that_does_not_fit_its_config(
    saved: Path, edit: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    edit_classifier(saved, edit)
    error = refusal(saved)
    assert f"{saved}: the classifier does not fit its config, expected " in error.message
    assert "'layers.0.weight': [16, 32]" in error.message.split("found")[0]


def test_another_base_model(saved: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        XLoraModel.from_pretrained(tiny_base("qwen2"), saved)
    assert caught.value.message.startswith(
        f"{saved} belongs to another base model: it was trained on {{'model_type': 'llama'"
    )
    assert "this one is {'model_type': 'qwen2'" in caught.value.message
    assert caught.value.hint == "load the base model the checkpoint was trained on"


def test_modules_that_the_experts_do_not_adapt(saved: Path) -> None:
    edit_header(saved, lambda h: h["layer_names"].__setitem__(0, "model.layers.7.mlp"))
    error = refusal(saved)
    assert error.message == (
        f"{saved}: its adapters fit 14 modules of this model, it was trained with 14: no expert "
        "adapts model.layers.7.mlp; it does not know model.layers.0.self_attn.q_proj"
    )
    assert error.hint == "use the experts it was trained with"


def test_a_module_named_twice(saved: Path) -> None:
    edit_header(saved, lambda h: h["layer_names"].append(h["layer_names"][0]))
    edit_classifier(
        saved, lambda t: t.update({k: torch.cat([t[k], t[k][:3]]) for k in t if "3" in k})
    )
    assert refusal(saved).message == (
        f"{saved}: its adapters fit 14 modules of this model, it was trained with 15: "
        "it names a module twice"
    )


def test_another_adapter_with_other_targets_does_not_fit_the_classifier(
    saved: Path, tmp_path: Path
) -> None:
    other = write_lora(tmp_path / "other", tiny_base(), ("lm_head",))
    error = refusal(saved, adapters={"1": other})
    assert "fit 15 modules of this model, it was trained with 14: it does not know lm_head" in (
        error.message
    )


def exchange_weights(expert: Path) -> None:
    tensors = load_file(expert / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, expert / "adapter_model.safetensors")


def exchange_alpha(expert: Path) -> None:
    path = expert / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 80'))


@pytest.mark.parametrize("exchange", [exchange_weights, exchange_alpha])
def test_an_exchanged_expert(saved: Path, exchange: Callable[[Path], None]) -> None:
    folder = expert_folder(saved, 2)
    exchange(folder)
    error = refusal(saved)
    assert error.message == (
        f"{saved}: adapter '2' is not the one this classifier was trained with "
        f"(adapter_model.safetensors or adapter_config.json has another sha256 than "
        f"{HEADER_FILE} says)"
    )
    assert "adapters={name: folder}" in error.hint
    # On purpose it may be used.
    XLoraModel.from_pretrained(tiny_base(), saved, adapters={"2": folder})


def test_other_line_ends_in_a_config_are_no_other_expert(saved: Path) -> None:
    path = expert_folder(saved) / "adapter_config.json"
    before = XLoraModel.from_pretrained(tiny_base(), saved)
    changed = path.read_bytes().replace(b"\n", b"\r\n")
    assert changed != path.read_bytes()
    path.write_bytes(changed)
    after = XLoraModel.from_pretrained(tiny_base(), saved)
    for old, new in zip(before.lora_layers, after.lora_layers, strict=True):
        assert torch.equal(old.lora_A, new.lora_A)
        assert torch.equal(old.lora_scaling, new.lora_scaling)


def test_a_missing_expert(saved: Path) -> None:
    (expert_folder(saved) / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="adapter '0': .* has no adapter_model.safetensors"):
        XLoraModel.from_pretrained(tiny_base(), saved)


def test_unknown_names_in_adapters(saved: Path, tmp_path: Path) -> None:
    error = refusal(saved, adapters={"math": tmp_path, "0": tmp_path})
    assert error.message == f"{saved}: no adapter named 'math' in this checkpoint"
    assert error.hint == "its adapters are 0, 1, 2"
