"""Checkpoints that PEFT 0.21.2 writes, read here; and checkpoints written here, read by PEFT."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel
from peft import XLoraConfig as PeftXLoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.tiny_models import (
    HIDDEN_SIZE,
    families,
    tiny_base,
    tiny_prompt,
    tiny_xlora,
    write_experts,
    write_lora,
)
from xlora_core.checkpoint import (
    check_fits,
    read_checkpoint,
    write_peft,
)
from xlora_core.config import XLoraConfig
from xlora_core.errors import CheckpointError
from xlora_core.model import XLoraModel

PREFIX = "base_model.internal_xlora_classifier."
WEIGHTS = "adapter_model.safetensors"
# Only the order of additions differs.
FLOAT64 = {"atol": 1e-10, "rtol": 0}


def uncached(base: PreTrainedModel) -> PreTrainedModel:
    base.config.use_cache = False
    return base


def live_peft(
    adapters: dict[str, str],
    *,
    base: PreTrainedModel | None = None,
    depth: int = 1,
    dropout: float = 0.2,
    layerwise: bool = True,
    adapter_name: str = "default",
    **config: object,
) -> PeftModel:
    """Returns PEFT's model, in float64, with a classifier that routes visibly."""
    settings = PeftXLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=HIDDEN_SIZE,
        adapters=dict(adapters),
        xlora_depth=depth,
        xlora_size=16,
        xlora_dropout_p=dropout,
        layerwise_scalings=layerwise,
        **config,
    )
    base = uncached(base or tiny_base(dtype=torch.float64))
    model = peft.get_peft_model(base, settings, adapter_name=adapter_name)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in classifier_of(model).parameters():
            parameter.normal_(0, 2 / parameter.shape[-1] ** 0.5)
    return model.eval()


def classifier_of(model: PeftModel) -> torch.nn.Module:
    return model.base_model.internal_xlora_classifier


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=tiny_prompt()).logits
    return result


def load(folder: Path, **arguments: object) -> XLoraModel:
    return XLoraModel.from_pretrained(tiny_base(dtype=torch.float64), folder, **arguments).eval()


def save(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def whole_save(model: PeftModel, folder: Path) -> Path:
    """Saves as PEFT <= 0.19 did, with every tensor of the classifier."""
    save(model, folder)
    tensors = {PREFIX + name: t.clone() for name, t in classifier_of(model).state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


# ---------------------------------------------------------------- PEFT -> here


@pytest.mark.parametrize("n_adapters", [3, 4])
@pytest.mark.parametrize("dropout", [0.2, 0.0])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_what_peft_loses_is_recovered_bit_for_bit(
    tmp_path: Path, depth: int, dropout: float, n_adapters: int
) -> None:
    adapters = write_experts(tmp_path, n_adapters=n_adapters)
    model = live_peft(adapters, depth=depth, dropout=dropout)
    folder = save(model, tmp_path / "saved")
    lost = set(classifier_of(model).state_dict()) - {
        key.removeprefix(PREFIX) for key in load_file(folder / WEIGHTS)
    }
    assert "layers.0.weight" in lost
    checkpoint = read_checkpoint(folder)
    assert list(checkpoint.classifier) == list(classifier_of(model).state_dict())
    for name, tensor in classifier_of(model).state_dict().items():
        assert torch.equal(checkpoint.classifier[name], tensor), name
    layers = ", ".join(sorted({name.rpartition(".")[0] for name in lost}))
    (note,) = checkpoint.notes
    assert note.startswith(f"recovered {layers} of the classifier from the experts' folders")


@pytest.mark.parametrize("layerwise", [True, False])
@pytest.mark.parametrize("write", [save, whole_save], ids=["0.21", "0.19"])
def test_the_model_is_the_one_peft_saved(tmp_path: Path, write: object, layerwise: bool) -> None:
    model = live_peft(write_experts(tmp_path), depth=3, layerwise=layerwise, top_k_lora=2)
    assert callable(write)
    ours = load(write(model, tmp_path / "saved"))
    torch.testing.assert_close(logits(ours), logits(model), **FLOAT64)
    assert ours.adapter_names == ["0", "1", "2"]
    assert ours.config_xlora.top_k_lora == 2


def test_a_rescue_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save(live_peft(write_experts(tmp_path)), tmp_path / "saved")
    load(folder)
    (record,) = [r for r in caplog.records if r.name == "xlora_core.model"]
    assert record.getMessage().startswith(f"{folder}: recovered layers.0 of the classifier")


def test_a_whole_save_needs_no_rescue_and_no_folders(tmp_path: Path) -> None:
    model = live_peft(write_experts(tmp_path), depth=2)
    folder = whole_save(model, tmp_path / "saved")
    for index in range(3):
        shutil.rmtree(folder / str(index))
    assert read_checkpoint(folder).notes == []
    torch.testing.assert_close(logits(load(folder)), logits(model), **FLOAT64)


@pytest.mark.parametrize(
    ("depth", "dropout", "lost"),
    [(1, 0.2, "layers.0.weight, layers.0.bias"), (3, 0.2, "layers.3.weight, layers.3.bias")],
)
def test_what_cannot_be_recovered_is_refused_by_name(
    tmp_path: Path, depth: int, dropout: float, lost: str
) -> None:
    """PEFT itself goes on with random weights, and says nothing."""
    adapters = write_experts(tmp_path, n_adapters=4)
    folder = save(live_peft(adapters, depth=depth, dropout=dropout), tmp_path / "saved")
    shutil.rmtree(folder / lost[len("layers.")])
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert caught.value.message == (
        f"PEFT >= 0.20 saved this incompletely: {lost} are neither in {folder / WEIGHTS} nor in "
        "the experts' folders beside it"
    )
    assert "copy the folders 0, 1, ..." in caught.value.hint


def test_a_model_of_another_name_has_its_experts_beside_it(tmp_path: Path) -> None:
    model = live_peft(write_experts(tmp_path), adapter_name="router")
    folder = save(model, tmp_path / "saved") / "router"
    assert sorted(path.name for path in folder.parent.iterdir())[:3] == ["0", "1", "2"]
    torch.testing.assert_close(logits(load(folder)), logits(model), **FLOAT64)
    # Those of another checkpoint around it are not its own.
    save(live_peft(write_experts(tmp_path)), tmp_path / "saved")
    with pytest.raises(CheckpointError, match="layers.0.weight, layers.0.bias are neither in"):
        load(folder)


def test_relative_paths_may_be_of_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PEFT takes them. In the checkpoint itself they come first."""
    monkeypatch.chdir(tmp_path)
    write_experts(tmp_path)
    model = live_peft({str(i): f"expert-{i}" for i in range(3)})
    folder = save(model, tmp_path / "saved")
    torch.testing.assert_close(logits(load(folder)), logits(model), **FLOAT64)
    monkeypatch.chdir(folder)
    with pytest.raises(CheckpointError, match="3 of its 3 experts are not where"):
        load(folder)


def test_folders_of_another_save_do_not_help(tmp_path: Path) -> None:
    adapters = write_experts(tmp_path, n_adapters=4)
    model = live_peft(adapters, depth=3)
    folder = save(model, tmp_path / "saved")
    with torch.no_grad():
        classifier_of(model).layers[6].bias.add_(1)
    other = save(model, tmp_path / "other")
    shutil.rmtree(folder / "0")
    shutil.copytree(other / "0", folder / "0")
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert caught.value.message == (
        f"{folder / '0' / WEIGHTS} belongs to another save than {folder / WEIGHTS}: their "
        "layers.6.bias differ"
    )


def test_twelve_adapters_keep_their_order(tmp_path: Path) -> None:
    """PEFT sorts them as "0", "1", "10", "11", "2", and loads them in that order."""
    model = live_peft(write_experts(tmp_path, n_adapters=12))
    folder = save(model, tmp_path / "saved")
    stored = json.loads((folder / "adapter_config.json").read_text())["adapters"]
    assert list(stored)[:4] == ["0", "1", "10", "11"]
    ours = load(folder)
    assert ours.adapter_names == [str(i) for i in range(12)]
    torch.testing.assert_close(logits(ours), logits(model), **FLOAT64)


def test_experts_may_lie_elsewhere_now_and_get_names(tmp_path: Path) -> None:
    """PEFT silently ignores ``adapters=`` and looks where they were while training."""
    adapters = write_experts(tmp_path)
    model = live_peft(adapters)
    folder = save(model, tmp_path / "saved")
    expected = logits(model)
    moved = {}
    for name, path in adapters.items():
        moved[name] = Path(path).rename(tmp_path / f"moved-{name}")
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert "3 of its 3 experts are not where its config says" in caught.value.message
    for name, path in adapters.items():
        assert f"\n  {name}: {path}" in caught.value.message
    assert caught.value.hint == (
        "say where they are: adapters={'0': 'path/to/lora', '1': 'path/to/lora', ...}"
    )
    torch.testing.assert_close(logits(load(folder, adapters=moved)), expected, **FLOAT64)
    named = load(folder, adapters=dict(zip(("math", "code", "verse"), moved.values(), strict=True)))
    assert named.adapter_names == ["math", "code", "verse"]
    torch.testing.assert_close(logits(named), expected, **FLOAT64)


# ---------------------------------------------------------------- experts trained with the router


def deep_base() -> PreTrainedModel:
    """Returns a base model of four blocks."""
    config = families()["llama"].config
    config.num_hidden_layers = 4
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(torch.float64).eval()


def train_experts(model: PeftModel) -> None:
    """Changes every LoRA weight, as training does."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def test_a_single_trained_expert_is_recovered(tmp_path: Path) -> None:
    """PEFT reads the expert as it was before."""
    model = live_peft(write_experts(tmp_path, n_adapters=1), use_trainable_adapters=True)
    before = logits(model)
    train_experts(model)
    folder = save(model, tmp_path / "saved")
    trained = load(folder)
    assert (logits(model) - before).abs().max() > 1e-3
    # PEFT keeps experts in float32.
    torch.testing.assert_close(logits(trained), logits(model), **FLOAT64)
    assert read_checkpoint(folder).notes[-1] == "expert '0' was recovered"
    shutil.rmtree(tmp_path / "expert-0")
    torch.testing.assert_close(logits(load(folder)), logits(model), **FLOAT64)


def late_experts(tmp_path: Path, blocks: Sequence[int]) -> dict[str, str]:
    """Writes two experts that adapt only some blocks."""
    adapters = {}
    for index in range(2):
        folder = write_lora(
            tmp_path / f"expert-{index}",
            deep_base(),
            ("q_proj", "down_proj"),
            seed=index,
            config={"layers_to_transform": list(blocks)},
        )
        tensors = load_file(folder / WEIGHTS)
        kept = {k: t for k, t in tensors.items() if any(f"layers.{b}." in k for b in blocks)}
        save_file(kept, folder / WEIGHTS)
        adapters[str(index)] = str(folder)
    return adapters


def test_trained_experts_in_blocks_that_no_adapter_is_named_after_are_recovered(
    tmp_path: Path,
) -> None:
    model = live_peft(late_experts(tmp_path, [2, 3]), base=deep_base(), use_trainable_adapters=True)
    train_experts(model)
    folder = save(model, tmp_path / "saved")
    ours = XLoraModel.from_pretrained(deep_base(), folder).eval()
    torch.testing.assert_close(logits(ours), logits(model), **FLOAT64)


def test_trained_experts_that_peft_saved_incompletely_are_refused_by_name(tmp_path: Path) -> None:
    adapters = late_experts(tmp_path, [0, 1, 2])
    model = live_peft(adapters, base=deep_base(), use_trainable_adapters=True)
    untrained = logits(model)
    train_experts(model)
    folder = save(model, tmp_path / "saved")
    with pytest.raises(CheckpointError) as caught:
        XLoraModel.from_pretrained(deep_base(), folder)
    message = caught.value.message
    assert "its experts were trained with the router (use_trainable_adapters)" in message
    for index, block in ((0, 1), (1, 0)):
        assert (
            f"adapter '{index}': {folder / str(index)} lacks 2 of its 6 modules, such as "
            f"model.layers.{block}."
        ) in message
    # Going on with the untrained ones is a choice; it takes saying so.
    assert "pass them: adapters={'0': " in caught.value.hint
    ours = XLoraModel.from_pretrained(deep_base(), folder, adapters=adapters).eval()
    torch.testing.assert_close(logits(ours), untrained, **FLOAT64)
    shutil.rmtree(adapters["1"])
    with pytest.raises(CheckpointError, match="cannot be shown to be whole, since the expert it"):
        XLoraModel.from_pretrained(deep_base(), folder)


# ---------------------------------------------------------------- here -> PEFT


def peft_load(folder: Path) -> PeftModel:
    with warnings.catch_warnings():
        # A key that PEFT does not know, or one that it misses, would only be a warning.
        warnings.filterwarnings("error", message=".*(missing|Unexpected|unexpected).*")
        base = uncached(tiny_base(dtype=torch.float64))
        return PeftModel.from_pretrained(base, folder).eval()


def as_checkpoint(model: XLoraModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "config",
    [
        {"xlora_depth": 1},
        {"xlora_depth": 3, "layerwise_scalings": False, "top_k_lora": 2},
        {
            "xlora_depth": 4,
            "xlora_dropout_p": 0.0,
            "enable_softmax": False,
            "enable_softmax_topk": True,
            "top_k_lora": 2,
            "global_scaling_weight": 0.5,
            "scaling_pass_value": 0.25,
        },
    ],
    ids=["depth 1", "depth 3, shared, top-k", "depth 4, softmax over top-k"],
)
def test_peft_loads_what_is_written_for_it(tmp_path: Path, config: dict[str, object]) -> None:
    model = tiny_xlora(tmp_path / "experts", dtype=torch.float64, **config)
    write_peft(tmp_path / "peft", read_checkpoint(as_checkpoint(model, tmp_path / "ours")))
    shutil.rmtree(tmp_path / "ours")
    shutil.rmtree(tmp_path / "experts")
    theirs = peft_load(tmp_path / "peft")
    torch.testing.assert_close(logits(theirs), logits(model), **FLOAT64)
    again = load(tmp_path / "peft")
    assert torch.equal(logits(again), logits(model))


def test_peft_loads_twelve_adapters_in_order(tmp_path: Path) -> None:
    names = [f"expert {chr(ord('z') - i)}" for i in range(12)]
    folders = write_experts(tmp_path / "experts", n_adapters=12).values()
    base = tiny_base(dtype=torch.float64)
    config = XLoraConfig(adapters=dict(zip(names, folders, strict=True)), layerwise_scalings=True)
    model = XLoraModel.from_base(base, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        model.classifier.layers[0].weight.normal_(0, 0.5)
    write_peft(tmp_path / "peft", read_checkpoint(as_checkpoint(model, tmp_path / "ours")))
    torch.testing.assert_close(logits(peft_load(tmp_path / "peft")), logits(model), **FLOAT64)
    assert load(tmp_path / "peft").adapter_names == names


def test_relative_paths_are_for_peft_in_that_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_xlora(tmp_path / "experts", dtype=torch.float64)
    checkpoint = read_checkpoint(as_checkpoint(model, tmp_path / "ours"))
    write_peft(tmp_path / "peft", checkpoint, relative_paths=True)
    shutil.rmtree(tmp_path / "ours")
    moved = (tmp_path / "peft").rename(tmp_path / "elsewhere")
    assert str(tmp_path) not in (moved / "adapter_config.json").read_text()
    assert torch.equal(logits(load(moved)), logits(model))
    monkeypatch.chdir(moved)
    torch.testing.assert_close(logits(peft_load(moved)), logits(model), **FLOAT64)


def test_a_broken_save_becomes_one_that_peft_loads(tmp_path: Path) -> None:
    model = live_peft(write_experts(tmp_path), depth=2)
    folder = save(model, tmp_path / "broken")
    write_peft(tmp_path / "whole", read_checkpoint(folder))
    assert not torch.allclose(logits(peft_load(folder)), logits(model), atol=1e-3)
    torch.testing.assert_close(logits(peft_load(tmp_path / "whole")), logits(model), **FLOAT64)


def test_peft_may_save_over_an_export(tmp_path: Path) -> None:
    """Its names belong to the classifier that was exported, not to the new one."""
    exported = tmp_path / "peft"
    model = tiny_xlora(tmp_path / "experts", dtype=torch.float64)
    write_peft(exported, read_checkpoint(as_checkpoint(model, tmp_path / "ours")))
    theirs = peft_load(exported)
    with torch.no_grad():
        classifier_of(theirs).layers[0].bias.add_(1)
    save(theirs, exported)
    checkpoint = read_checkpoint(exported)
    assert checkpoint.notes[0] == (
        "xlora_names.json belongs to another classifier and was not used"
    )
    fitted = check_fits(exported, checkpoint, tiny_base(dtype=torch.float64))
    assert fitted.layer_names == model.lora_layer_names
    torch.testing.assert_close(logits(load(exported)), logits(theirs), **FLOAT64)
