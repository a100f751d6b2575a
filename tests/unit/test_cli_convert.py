"""``xlora convert`` and ``xlora inspect FOLDER``, called in-process on checkpoints on disk."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.commands import refused
from tests.original_checkpoints import write_original_checkpoint
from tests.tiny_models import tiny_base, tiny_prompt, tiny_xlora, write_experts, write_lora
from xlora_core.checkpoint import NAMES_FILE, Layout, layout_of, read_checkpoint
from xlora_core.cli import main
from xlora_core.config import AdapterOverride, XLoraConfig
from xlora_core.model import XLoraModel

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model's config, a checkpoint of ours, and its experts."""
    root = tmp_path_factory.mktemp("places")
    tiny_base().config.save_pretrained(root / "base")
    values = json.loads((root / "base" / "config.json").read_text())
    values["architectures"] = ["LlamaForCausalLM"]
    (root / "base" / "config.json").write_text(json.dumps(values))
    tiny_xlora(root / "experts", xlora_depth=2).save_pretrained(root / "ours")
    write_original_checkpoint(root / "original", depth=3, activations=False)
    return root


def convert(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


def logits(folder: Path, **arguments: object) -> torch.Tensor:
    model = XLoraModel.from_pretrained(tiny_base(), folder, **arguments).eval()
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=tiny_prompt()).logits
    return result


def without_names(folder: Path) -> Path:
    (folder / NAMES_FILE).unlink()
    return folder


def test_around_all_layouts_and_back(places: Path, tmp_path: Path, capsys: Capture) -> None:
    steps = [places / "ours", tmp_path / "peft", tmp_path / "original", tmp_path / "ours"]
    for source, target in itertools.pairwise(steps):
        assert convert(source, target, "--to", target.name) == 0
    err = capsys.readouterr().err
    assert f"wrote {tmp_path / 'peft'} in PEFT's layout: 0, 1, 2\n" in err
    assert [str(layout_of(folder)) for folder in steps] == ["ours", "peft", "original", "ours"]
    first, last = read_checkpoint(steps[0]), read_checkpoint(steps[-1])
    assert first.layer_names == last.layer_names
    assert first.base == last.base
    assert (steps[0] / "classifier.safetensors").read_bytes() == (
        steps[-1] / "classifier.safetensors"
    ).read_bytes()
    assert torch.equal(logits(steps[-1]), logits(steps[0]))


def test_the_base_model_is_asked_for_where_its_names_are_needed(
    places: Path, tmp_path: Path, capsys: Capture
) -> None:
    convert(places / "ours", tmp_path / "peft", "--to", "peft")
    folder = without_names(tmp_path / "peft")
    error = refused(capsys, "convert", folder, tmp_path / "back", "--to", "ours")
    assert f"{folder} does not say which modules its router's outputs belong to" in error
    assert "hint: name the base model: --base path/to/base" in error
    # Between the two foreign layouts the order is the base model's own, whatever its names.
    assert convert(folder, tmp_path / "original", "--to", "original") == 0
    assert torch.equal(logits(tmp_path / "original"), logits(places / "ours"))
    # Only the base model's config is there, no weights.
    assert convert(folder, tmp_path / "back", "--to", "ours", "--base", places / "base") == 0
    assert read_checkpoint(tmp_path / "back").base == read_checkpoint(places / "ours").base
    assert torch.equal(logits(tmp_path / "back"), logits(places / "ours"))


def test_it_reports_as_json(places: Path, tmp_path: Path, capsys: Capture) -> None:
    source, target = places / "original", tmp_path / "peft"
    assert convert(source, target, "--to", "peft", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "source": str(source),
        "from": "original",
        "target": str(target),
        "to": "peft",
        "adapters": ["0", "1", "2"],
        "n_modules": 14,
        "notes": ["3 linear layers without ReLU between were folded into the one they equal"],
    }
    assert convert(source, tmp_path / "again", "--to", "peft") == 0
    assert "note: 3 linear layers without ReLU" in capsys.readouterr().err


def test_it_says_which_experts_peft_takes_otherwise(tmp_path: Path, capsys: Capture) -> None:
    bias = {"model.layers.0.self_attn.q_proj.lora_B.bias": torch.ones(32)}
    adapters = {
        "biased": write_lora(tmp_path / "a", tiny_base(), ("q_proj",), extra=bias),
        "whole": write_lora(
            tmp_path / "b",
            tiny_base(),
            ("q_proj",),
            config={"modules_to_save": ["lm_head"]},
            extra={"lm_head.weight": torch.ones(97, 32)},
        ),
        "plain": write_lora(tmp_path / "c", tiny_base(), ("q_proj",)),
    }
    model = XLoraModel.from_base(tiny_base(), XLoraConfig(adapters=adapters))
    model.save_pretrained(tmp_path / "ours")
    assert convert(tmp_path / "ours", tmp_path / "peft", "--to", "peft", "--json") == 0
    of_bias, of_whole = json.loads(capsys.readouterr().out)["notes"]
    assert of_bias.startswith("PEFT adds the bias on lora_B of 'biased' to every token, here it is")
    assert of_whole == "PEFT's X-LoRA does not load experts with modules_to_save ('whole')"


def break_as_peft_does(folder: Path) -> None:
    """Makes a PEFT folder what PEFT >= 0.20 saves: layer 0 is in the folder of expert 0."""
    prefix = "base_model.internal_xlora_classifier."
    path = folder / "adapter_model.safetensors"
    router = load_file(path)
    strays = {
        f"{prefix}layers.{part}": router.pop(f"{prefix}layers.0.{part}")
        for part in ("weight", "bias")
    }
    save_file(router, path)
    (folder / "0").mkdir()
    save_file(strays, folder / "0" / "adapter_model.safetensors")


def test_peft_to_peft_mends_what_peft_broke(places: Path, tmp_path: Path, capsys: Capture) -> None:
    convert(places / "ours", tmp_path / "broken", "--to", "peft")
    break_as_peft_does(tmp_path / "broken")
    capsys.readouterr()
    assert convert(tmp_path / "broken", tmp_path / "whole", "--to", "peft") == 0
    assert "note: recovered layers.0 of the classifier" in capsys.readouterr().err
    prefix = "base_model.internal_xlora_classifier."
    whole = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    for name, tensor in read_checkpoint(places / "ours").classifier.items():
        assert torch.equal(whole[prefix + name], tensor)
    shutil.rmtree(tmp_path / "broken" / "0")
    error = refused(capsys, "convert", tmp_path / "broken", tmp_path / "never", "--to", "peft")
    assert "PEFT >= 0.20 saved this incompletely: layers.0.weight, layers.0.bias are" in error
    assert not (tmp_path / "never").exists()


def test_numbered_experts_get_names_and_new_places(places: Path, tmp_path: Path) -> None:
    convert(places / "ours", tmp_path / "peft", "--to", "peft")
    folder = without_names(tmp_path / "peft")
    (folder / "experts").rename(tmp_path / "moved")
    arguments = ["--base", places / "base", "--adapters"]
    named = [f"{name}={tmp_path / 'moved' / str(i)}" for i, name in enumerate(("x", "y", "a"))]
    assert convert(folder, tmp_path / "ours", "--to", "ours", *arguments, *named) == 0
    assert [a.name for a in read_checkpoint(tmp_path / "ours").adapters] == ["x", "y", "a"]
    assert torch.equal(logits(tmp_path / "ours"), logits(places / "ours"))


def test_an_ordering_file(places: Path, tmp_path: Path, capsys: Capture) -> None:
    names = read_checkpoint(places / "ours").layer_names or ()
    ordering = tmp_path / "ordering.json"
    ordering.write_text(json.dumps({"layers": {n: i for i, n in enumerate(reversed(names))}}))
    given = [places / "original", tmp_path / "out", "--to", "peft", "--ordering", ordering]
    assert "--base" in refused(capsys, "convert", *given)
    assert convert(*given, "--base", places / "base") == 0
    expected = logits(places / "original", ordering=ordering)
    torch.testing.assert_close(logits(tmp_path / "out"), expected)
    assert not torch.allclose(expected, logits(places / "original"), atol=1e-3)


@pytest.mark.parametrize(
    "targets",
    [
        # PEFT saves the embedding's own weight beside the adapter's.
        {"target_modules": ["embed_tokens", "q_proj"]},
        # The difference from the base's head cannot be taken where there are only its shapes.
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["embedding", "whole head"],
)
def test_experts_with_more_than_linear_layers(
    targets: dict[str, list[str]], places: Path, tmp_path: Path
) -> None:
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, **targets)
    torch.manual_seed(0)
    trained = get_peft_model(tiny_base(), settings)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    trained.save_pretrained(tmp_path / "expert")
    config = XLoraConfig(adapters={"a": str(tmp_path / "expert")}, layerwise_scalings=True)
    model = XLoraModel.from_base(tiny_base(), config).eval()
    model.save_pretrained(tmp_path / "ours")
    for layout in ("peft", "original"):
        assert convert(tmp_path / "ours", tmp_path / layout, "--to", layout) == 0
        folder = without_names(tmp_path / layout)
        name = "0" if layout == "peft" else "a"
        back = [folder, tmp_path / f"from-{layout}", "--to", "ours", "--base", places / "base"]
        assert convert(*back, "--adapters", f"{name}={tmp_path / 'expert'}") == 0
        with torch.no_grad():
            expected = model(input_ids=tiny_prompt()).logits
        assert torch.equal(logits(tmp_path / f"from-{layout}"), expected)


def test_references_and_relative_paths(places: Path, tmp_path: Path, capsys: Capture) -> None:
    # The experts of a bundle are referenced where the bundle has them.
    assert convert(places / "ours", tmp_path / "light", "--to", "ours", "--reference") == 0
    assert not (tmp_path / "light" / "adapters").exists()
    assert torch.equal(logits(tmp_path / "light"), logits(places / "ours"))
    arguments = [places / "ours", tmp_path / "peft", "--to", "peft", "--relative-paths"]
    assert convert(*arguments) == 0
    stored = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert stored["adapters"] == {"0": "experts/0", "1": "experts/1", "2": "experts/2"}
    wrong = refused(
        capsys, "convert", *arguments[:2], "--to", "original", "--relative-paths", "--reference"
    )
    assert "--reference goes with --to ours, not with --to original" in wrong
    assert "--relative-paths goes with --to peft, not with --to original" in wrong


def test_refusals(places: Path, tmp_path: Path, capsys: Capture) -> None:
    ours = places / "ours"
    assert "checkpoint folder nowhere does not exist" in (
        refused(capsys, "convert", "nowhere", tmp_path / "a", "--to", "peft")
    )
    assert f"{places / 'original'} exists and is not empty" in (
        refused(capsys, "convert", ours, places / "original", "--to", "peft")
    )
    assert "there is no base model folder" in (
        refused(
            capsys, "convert", ours, tmp_path / "a", "--to", "ours", "--base", tmp_path / "none"
        )
    )
    assert "cannot be read as a base model" in (
        refused(capsys, "convert", ours, tmp_path / "a", "--to", "ours", "--base", tmp_path)
    )
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["NoSuchModel"]}'
    )
    assert "cannot be read as a base model" in (
        refused(capsys, "convert", ours, tmp_path / "a", "--to", "ours", "--base", tmp_path / "odd")
    )
    tiny_base("qwen2").config.save_pretrained(tmp_path / "qwen2")
    assert "belongs to another base model" in (
        refused(
            capsys, "convert", ours, tmp_path / "a", "--to", "ours", "--base", tmp_path / "qwen2"
        )
    )
    assert "--adapters must be of the form NAME=VALUE" in (
        refused(capsys, "convert", ours, tmp_path / "a", "--to", "ours", "--adapters", "x")
    )
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"adapter_overrides": [AdapterOverride.mute("1")]}, "adapter_overrides"),
        ({"router": "per_layer"}, "router 'per_layer'"),
    ],
)
def test_what_another_layout_cannot_say(
    tmp_path: Path, capsys: Capture, config: dict[str, object], what: str
) -> None:
    adapters = write_experts(tmp_path / "experts")
    model = XLoraModel.from_base(tiny_base(), XLoraConfig(adapters=adapters, **config))
    model.save_pretrained(tmp_path / "ours")
    assert main(["inspect", str(tmp_path / "ours")]) == 0
    capsys.readouterr()
    for layout, package in (("peft", "PEFT"), ("original", "the original xlora package")):
        error = refused(capsys, "convert", tmp_path / "ours", tmp_path / layout, "--to", layout)
        assert f"{package} has no {what}" in error
        assert not (tmp_path / layout).exists()


def test_help_teaches_with_examples(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["convert", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "\nexamples:\n  xlora convert" in out
    assert all(f"\n  {layout}" in out for layout in Layout)


# ---------------------------------------------------------------- inspect


def test_inspect_shows_a_folder_of_any_layout(
    places: Path, tmp_path: Path, capsys: Capture
) -> None:
    convert(places / "ours", tmp_path / "peft", "--to", "peft")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "peft"), "--modules"]) == 0
    out = capsys.readouterr().out
    assert f"checkpoint  {tmp_path / 'peft'} (PEFT's layout)\n" in out
    assert "base        model_type llama, hidden_size 32, num_hidden_layers 2" in out
    assert "modules     14\n" in out
    assert "  0  rank 4, 14 modules, " in out
    assert "modules in the router's order:\n  model.layers.0.self_attn.q_proj\n" in out
    without_names(tmp_path / "peft")
    assert main(["inspect", str(tmp_path / "peft"), "--modules"]) == 0
    out = capsys.readouterr().out
    assert "base        not stored" in out
    assert "modules     14 (names not stored: the base model's order)" in out
    assert main(["inspect", str(places / "original")]) == 0
    out = capsys.readouterr().out
    assert "(the original xlora package's layout)" in out
    assert "note: 3 linear layers without ReLU" in out


def test_inspect_reports_a_folder_as_json(places: Path, capsys: Capture) -> None:
    assert main(["inspect", str(places / "ours"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    checkpoint = read_checkpoint(places / "ours")
    assert report["layout"] == "ours"
    assert report["modules"] == checkpoint.layer_names
    assert report["n_router_parameters"] == sum(t.numel() for t in checkpoint.classifier.values())
    assert [adapter["name"] for adapter in report["adapters"]] == ["0", "1", "2"]
    assert report["adapters"][0]["n_parameters"] == sum(
        w.lora_A.numel() + w.lora_B.numel() for w in checkpoint.adapters[0].modules.values()
    )


def test_inspect_a_shared_router_and_moved_experts(tmp_path: Path, capsys: Capture) -> None:
    tiny_xlora(tmp_path / "experts", layerwise_scalings=False).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "peft", "--to", "peft")
    without_names(tmp_path / "peft")
    (tmp_path / "peft" / "experts" / "1").rename(tmp_path / "moved")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "peft")]) == 2
    assert "1 of its 3 experts are not where its config says" in capsys.readouterr().err
    options = ["--adapter", f"1={tmp_path / 'moved'}"]
    assert main(["inspect", str(tmp_path / "peft"), *options]) == 0
    out = capsys.readouterr().out
    assert "modules     not known without the base model (names not stored" in out
    assert f"parameters, {tmp_path / 'moved'}\n" in out
