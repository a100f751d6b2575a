"""The original package's checkpoints: every variant that is in the wild, and each refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.original_checkpoints import (
    CLASSIFIER,
    CONFIG,
    N_MODULES,
    OriginalClassifier,
    write_original_checkpoint,
)
from tests.tiny_models import HIDDEN_SIZE, tiny_base, tiny_prompt, tiny_xlora
from xlora_core.checkpoint import (
    NAMES_FILE,
    ORDERING_FILE,
    check_fits,
    read_checkpoint,
    read_original_config,
    write_original,
)
from xlora_core.errors import CheckpointError
from xlora_core.model import XLoraModel

FLOAT64 = {"atol": 1e-12, "rtol": 1e-12}


def load(folder: Path, **arguments: object) -> XLoraModel:
    return XLoraModel.from_pretrained(tiny_base(dtype=torch.float64), folder, **arguments).eval()


def logits(model: XLoraModel) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=tiny_prompt()).logits
    return result


def hidden() -> torch.Tensor:
    return torch.randn(2, 5, HIDDEN_SIZE, generator=torch.Generator().manual_seed(2)).double()


def assert_same_router(model: XLoraModel, original: OriginalClassifier) -> None:
    with torch.no_grad():
        ours, theirs = model.classifier(hidden()), original(hidden())
    torch.testing.assert_close(ours, theirs, **FLOAT64)


def refusal(folder: Path, **arguments: object) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load(folder, **arguments)
    return caught.value


def edit_config(folder: Path, edit: Callable[[dict], object]) -> None:
    values = json.loads((folder / CONFIG).read_text())
    edit(values)
    (folder / CONFIG).write_text(json.dumps(values))


# ---------------------------------------------------------------- classifiers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activations", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_every_kind_of_classifier(
    tmp_path: Path, depth: int, activations: bool, bias: bool
) -> None:
    original = write_original_checkpoint(
        tmp_path / "xlora", depth=depth, activations=activations, bias=bias
    )
    model = load(tmp_path / "xlora")
    assert_same_router(model, original)
    # Without ReLU the layers are one.
    assert model.config_xlora.xlora_depth == (depth if activations else 1)


def test_a_shared_classifier(tmp_path: Path) -> None:
    original = write_original_checkpoint(tmp_path / "xlora", depth=2, layerwise=False)
    assert_same_router(load(tmp_path / "xlora"), original)


def test_folding_is_exact_and_said(tmp_path: Path) -> None:
    original = write_original_checkpoint(tmp_path / "xlora", depth=3, activations=False)
    checkpoint = read_checkpoint(tmp_path / "xlora")
    assert checkpoint.notes == [
        "3 linear layers without ReLU between were folded into the one they equal"
    ]
    weight = original.last.weight @ original.inner[1].weight @ original.inner[0].weight
    assert checkpoint.classifier["layers.0.weight"].dtype == torch.float64
    torch.testing.assert_close(checkpoint.classifier["layers.0.weight"], weight, **FLOAT64)


def test_dropout_0_numbers_the_layers_as_ours(tmp_path: Path) -> None:
    """The original has a dropout module even then, ours and PEFT's have none."""
    original = write_original_checkpoint(tmp_path / "xlora", depth=3, config={"xlora_dropout_p": 0})
    assert "inner.3.weight" in load_file(tmp_path / "xlora" / CLASSIFIER)
    model = load(tmp_path / "xlora")
    assert list(model.classifier.state_dict())[::2] == [
        "layers.0.weight",
        "layers.2.weight",
        "layers.4.weight",
    ]
    assert_same_router(model, original)


def test_before_use_bias_the_file_tells(tmp_path: Path) -> None:
    original = write_original_checkpoint(
        tmp_path / "xlora", depth=2, bias=False, config={"use_bias": None}
    )
    assert_same_router(load(tmp_path / "xlora"), original)


# ---------------------------------------------------------------- configs in the wild


def test_old_keys_and_whole_numbers(tmp_path: Path) -> None:
    write_original_checkpoint(
        tmp_path / "xlora", config={"stop_token_id": 2, "device": "cuda:0", "top_k_lora": 2}
    )
    config = read_original_config(tmp_path / "xlora" / CONFIG).config
    assert (config.top_k_lora, config.softmax_temperature) == (2, 1)


@pytest.mark.parametrize(
    "adapters",
    [
        ["0", "1", "2"],
        {"0": "0", "1": "/gone/since", "2": ""},  # a folder of that name comes first
        None,
    ],
)
def test_adapters_as_list_or_paths_or_missing(tmp_path: Path, adapters: object) -> None:
    folder = tmp_path / "xlora"
    write_original_checkpoint(folder)
    expected = logits(load(folder))
    edit_config(folder, lambda c: c.update(adapters=adapters) if adapters else c.pop("adapters"))
    model = load(folder)
    assert model.adapter_names == ["0", "1", "2"]
    assert torch.equal(logits(model), expected)


def test_the_list_is_the_order(tmp_path: Path) -> None:
    folder = tmp_path / "xlora"
    write_original_checkpoint(folder)
    edit_config(folder, lambda c: c.update(adapters=["2", "0", "1"]))
    assert load(folder).adapter_names == ["2", "0", "1"]


def test_missing_adapters_are_the_folders_2_before_10(tmp_path: Path) -> None:
    folder = tmp_path / "xlora"
    write_original_checkpoint(folder, n_adapters=11, config={"adapters": None})
    assert load(folder).adapter_names == [str(index) for index in range(11)]


def test_missing_adapters_may_be_given_and_ordered(tmp_path: Path) -> None:
    folder = tmp_path / "xlora"
    write_original_checkpoint(folder, config={"adapters": None})
    given = {}
    for name in ("verse", "code", "math"):
        given[name] = (folder / str(len(given))).rename(tmp_path / name)
    assert "it names no adapters" in refusal(folder).message
    assert load(folder, adapters=given).adapter_names == ["verse", "code", "math"]


def test_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_original_checkpoint(tmp_path / "xlora")
    expected = logits(load(tmp_path / "xlora"))
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(load(Path("xlora"))), expected)


def test_experts_of_early_versions_lie_in_adapters(tmp_path: Path) -> None:
    folder = tmp_path / "xlora"
    write_original_checkpoint(folder)
    expected = logits(load(folder))
    (folder / "adapters").mkdir()
    for name in ("0", "1", "2"):
        (folder / name).rename(folder / "adapters" / name)
    assert torch.equal(logits(load(folder)), expected)
    edit_config(folder, lambda c: c.pop("adapters"))
    assert torch.equal(logits(load(folder)), expected)


def test_stray_classifier_tensors_in_adapters_are_dropped(tmp_path: Path) -> None:
    write_original_checkpoint(tmp_path / "xlora")
    stray = load_file(tmp_path / "xlora" / "0" / "adapter_model.safetensors")
    assert "base_model.internal_xlora_classifier.last.bias" in stray
    adapter = read_checkpoint(tmp_path / "xlora").adapters[0]
    assert len(adapter.modules) == N_MODULES


def test_softmax_over_top_k_is_per_token_and_the_difference_is_said(tmp_path: Path) -> None:
    write_original_checkpoint(
        tmp_path / "xlora",
        config={"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2},
    )
    (note,) = read_checkpoint(tmp_path / "xlora").notes
    assert note.startswith("the original package takes the softmax over top-k over all tokens")
    model = load(tmp_path / "xlora")
    model.enable_scalings_logging()
    logits(model)
    scalings = model.route(model.classifier(hidden()), model.default_knobs)
    torch.testing.assert_close(scalings.sum(-1), torch.ones(2, 5, N_MODULES).double())


# ---------------------------------------------------------------- the order of the modules


def ordering_of(names: list[str], adapters: list[str] | None = None) -> str:
    values: dict[str, object] = {"layers": {name: i for i, name in enumerate(names)}}
    if adapters is not None:
        values["order"] = adapters
    return json.dumps(values)


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_an_ordering_file_puts_the_rows_in_module_order(tmp_path: Path, prefix: str) -> None:
    folder = tmp_path / "xlora"
    write_original_checkpoint(folder, depth=2)
    names = load(folder).lora_layer_names
    expected = logits(load(folder))
    # The same classifier, trained with modules in another order.
    shuffled = [names[i] for i in torch.randperm(14, generator=torch.Generator().manual_seed(1))]
    tensors = load_file(folder / CLASSIFIER)
    for part in ("weight", "bias"):
        rows = tensors[f"last.{part}"].unflatten(0, (14, 3))
        site_rows = torch.stack([rows[names.index(name)] for name in shuffled])
        tensors[f"last.{part}"] = site_rows.flatten(0, 1).contiguous()
    save_file(tensors, folder / CLASSIFIER)
    assert not torch.allclose(logits(load(folder)), expected, atol=1e-3)
    ordering = tmp_path / "ordering.json"
    ordering.write_text(ordering_of([prefix + name for name in shuffled]))
    assert torch.equal(logits(load(folder, ordering=ordering)), expected)
    # In the folder, it is found by its name.
    shutil.copy(ordering, folder / ORDERING_FILE)
    assert torch.equal(logits(load(folder)), expected)


def test_an_ordering_file_may_order_the_adapters(tmp_path: Path) -> None:
    folder = tmp_path / "xlora"
    write_original_checkpoint(folder)
    names = load(folder).lora_layer_names
    ordering = tmp_path / "ordering.json"
    ordering.write_text(ordering_of(names, ["1", "2", "0"]))
    model = load(folder, ordering=ordering)
    assert model.adapter_names == ["1", "2", "0"]
    edit_config(folder, lambda c: c.update(adapters=["1", "2", "0"]))
    assert torch.equal(logits(load(folder)), logits(model))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object, found list"),
        ("{}", "it holds neither order nor layers"),
        ('{"layers": {"a": 0, "b": 2}}', "layers must number its modules 0, 1, 2, ..."),
        ('{"layers": {"a": 0, "b": 0}}', "layers must number its modules 0, 1, 2, ..."),
        ('{"layers": {"a": "0"}}', "layers must number its modules 0, 1, 2, ..."),
        ('{"order": ["a", "a"]}', "order must be a list of adapter names that differ"),
        ('{"order": [], "what": 1}', "unknown keys: 'what'"),
        ('{"order": ["0", "1", "3"]}', "its order names the adapters 0, 1, 3, the checkpoint has"),
        ('{"layers": {"model.x": 0}}', "its adapters fit 14 modules of this model, it was trained"),
    ],
)
def test_ordering_files_that_do_not_fit(tmp_path: Path, text: str, fault: str) -> None:
    write_original_checkpoint(tmp_path / "xlora")
    (tmp_path / "ordering.json").write_text(text)
    assert fault in refusal(tmp_path / "xlora", ordering=tmp_path / "ordering.json").message


def test_an_ordering_file_where_none_belongs(tmp_path: Path) -> None:
    tiny_xlora(tmp_path / "experts").save_pretrained(tmp_path / "ours")
    (tmp_path / "ordering.json").write_text('{"order": ["0", "1", "2"]}')
    with pytest.raises(CheckpointError, match="names its modules itself, the ordering file"):
        XLoraModel.from_pretrained(
            tiny_base(), tmp_path / "ours", ordering=tmp_path / "ordering.json"
        )
    assert f"there is no ordering file {tmp_path / 'no.json'}" in (
        refusal(tmp_path / "ours", ordering=tmp_path / "no.json").message
    )


# ---------------------------------------------------------------- refusals


def test_a_pickled_classifier_is_not_opened(tmp_path: Path) -> None:
    folder = tmp_path / "xlora"
    write_original_checkpoint(folder)
    (folder / CLASSIFIER).unlink()
    (folder / "xlora_classifier.pt").write_bytes(b"cos\nsystem\n(S'touch never'\ntR.")
    error = refusal(folder)
    assert error.message == (
        "checkpoint: xlora_classifier.pt is a pickle; pickles can run code and are never opened"
    )


def test_every_fault_of_a_config_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "xlora"
    write_original_checkpoint(
        folder,
        config={
            "hidden_size": None,
            "use_bias": "yes",
            "enable_relu_and_dropout": 1,
            "top_k_lora": 4,
            "use_mean_pool": True,
            "softmax_temperature": 0,
        },
    )
    error = refusal(folder)
    assert error.message == (
        f"{folder / CONFIG}: enable_relu_and_dropout must be true or false, got 1\n"
        "use_bias must be true or false, got 'yes'\n"
        "hidden_size is missing\n"
        "unknown X-LoRA config keys: 'use_mean_pool'\n"
        "softmax_temperature must be finite and > 0, got 0\n"
        "top_k_lora must be None or a whole number from 1 to 3 (the number of adapters), got 4"
    )
    assert error.hint.startswith("allowed keys: enable_softmax, ")


@pytest.mark.parametrize("adapters", [["0", "0"], ["0", 1], "0", {"0": 1}, 7])
def test_adapters_that_are_not_names(tmp_path: Path, adapters: object) -> None:
    write_original_checkpoint(tmp_path / "xlora", config={"adapters": adapters})
    assert refusal(tmp_path / "xlora").message == (
        f"{tmp_path / 'xlora' / CONFIG}: adapters must be a list of names, or map names to "
        f"folders, got {adapters!r}"
    )


def test_the_hand_edited_file_that_is_not_json(tmp_path: Path) -> None:
    write_original_checkpoint(tmp_path / "xlora")
    (tmp_path / "xlora" / CONFIG).write_text("adapters={")
    assert "xlora_config.json is not valid JSON" in refusal(tmp_path / "xlora").message


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (
            {"enable_relu_and_dropout": False},
            "it lacks inner.1.bias, inner.1.weight; it should not have inner.3.bias",
        ),
        ({"use_bias": False}, "it should not have inner.0.bias, inner.3.bias, last.bias"),
        ({"xlora_depth": 2}, "it should not have inner.3.bias, inner.3.weight"),
        ({"xlora_depth": 4}, "it lacks inner.6.bias, inner.6.weight"),
        ({"xlora_depth": 10**9}, "xlora_depth is 1000000000, the file holds fewer layers"),
        ({"xlora_size": 8}, "tensor inner.0.weight must be [8, 32], found [16, 32]"),
        ({"hidden_size": 64}, "tensor inner.0.weight must be [16, 64], found [16, 32]"),
        ({"adapters": ["0", "1"]}, "expected {"),
        ({"layerwise_scalings": False}, "tensor last.weight must be [3, 16], found [42, 16]"),
    ],
)
def test_a_classifier_of_another_config(
    tmp_path: Path, edit: dict[str, object], fault: str
) -> None:
    write_original_checkpoint(tmp_path / "xlora", depth=3, config=edit)
    (tmp_path / "xlora" / CONFIG).write_text(
        json.dumps(json.loads((tmp_path / "xlora" / CONFIG).read_text()) | edit)
    )
    assert fault in refusal(tmp_path / "xlora").message


def test_two_checkpoints_in_a_folder(tmp_path: Path) -> None:
    write_original_checkpoint(tmp_path / "xlora")
    (tmp_path / "xlora" / "adapter_config.json").write_text('{"peft_type": "XLORA"}')
    assert "holds two checkpoints" in refusal(tmp_path / "xlora").message


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("dropout", [0.2, 0.0])
def test_what_is_written_comes_back(tmp_path: Path, depth: int, dropout: float) -> None:
    model = tiny_xlora(
        tmp_path / "experts", dtype=torch.float64, xlora_depth=depth, xlora_dropout_p=dropout
    )
    model.save_pretrained(tmp_path / "ours")
    write_original(tmp_path / "xlora", read_checkpoint(tmp_path / "ours"))
    shutil.rmtree(tmp_path / "ours")
    shutil.rmtree(tmp_path / "experts")
    again = load(tmp_path / "xlora")
    assert torch.equal(logits(again), logits(model))
    # As the original package reads it: into its own classifier, all keys matching.
    original = OriginalClassifier(
        depth=depth, n_adapters=3, activations=True, bias=True, layerwise=True
    ).double()
    original.load_state_dict(load_file(tmp_path / "xlora" / CLASSIFIER))
    assert_same_router(model, original.eval())
    ordering = json.loads((tmp_path / "xlora" / ORDERING_FILE).read_text())
    assert ordering["order"] == ["0", "1", "2"]
    assert list(ordering["layers"]) == model.lora_layer_names
    assert list(ordering["layers"].values()) == list(range(14))
    # Without our own file, too.
    (tmp_path / "xlora" / NAMES_FILE).unlink()
    assert torch.equal(logits(load(tmp_path / "xlora")), logits(model))


def test_names_that_cannot_be_folders(tmp_path: Path) -> None:
    model = tiny_xlora(tmp_path / "experts", dtype=torch.float64)
    names = ["../up", "math", "MATH"]
    model.save_pretrained(tmp_path / "ours")
    checkpoint = read_checkpoint(tmp_path / "ours")
    adapters = [replace(a, name=n) for a, n in zip(checkpoint.adapters, names, strict=True)]
    write_original(tmp_path / "xlora", replace(checkpoint, adapters=adapters))
    stored = json.loads((tmp_path / "xlora" / CONFIG).read_text())["adapters"]
    assert stored == ["00-up", "math", "02-MATH"]
    again = load(tmp_path / "xlora")
    assert again.adapter_names == names
    assert torch.equal(logits(again), logits(model))


def test_an_order_that_is_not_yet_known_is_not_written(tmp_path: Path) -> None:
    folder = tmp_path / "xlora"
    write_original_checkpoint(folder)
    names = load(folder).lora_layer_names
    (tmp_path / "ordering.json").write_text(ordering_of(names[::-1]))
    checkpoint = read_checkpoint(folder, ordering=tmp_path / "ordering.json")
    with pytest.raises(CheckpointError) as caught:
        write_original(tmp_path / "again", checkpoint)
    assert "fit the checkpoint to its base model first" in caught.value.hint
    fitted = check_fits(folder, checkpoint, tiny_base())
    write_original(tmp_path / "again", fitted)
    expected = load(folder, ordering=tmp_path / "ordering.json")
    assert torch.equal(logits(load(tmp_path / "again")), logits(expected))
