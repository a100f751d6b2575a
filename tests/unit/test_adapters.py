"""Reading adapters: what a good folder holds, and what every bad one is told."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.tiny_models import tiny_base, write_lora
from xlora_core.adapters import CONFIG_FILE, WEIGHTS_FILE, adapter_tensors, read_adapter
from xlora_core.errors import AdapterError, XLoraError

Q0 = "model.layers.0.self_attn.q_proj"
KEY_A = f"base_model.model.{Q0}.lora_A.weight"
KEY_B = f"base_model.model.{Q0}.lora_B.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "lora", tiny_base(), ("q_proj", "v_proj"), rank=4, alpha=8)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def refusal(folder: Path) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        read_adapter("math", folder)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, XLoraError)
    assert "adapter 'math'" in caught.value.message
    return caught.value


# ---------------------------------------------------------------- a good folder


def test_what_a_folder_holds(folder: Path) -> None:
    edit_config(folder, lora_dropout=0.25)
    adapter = read_adapter("any name / at all", folder)
    on_disk = load_file(folder / WEIGHTS_FILE)
    assert adapter.name == "any name / at all"
    assert list(adapter.modules) == [
        f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"
    ]
    assert torch.equal(adapter.modules[Q0].lora_A, on_disk[KEY_A])
    assert torch.equal(adapter.modules[Q0].lora_B, on_disk[KEY_B])
    assert adapter.modules[Q0].rank == 4
    assert adapter.modules[Q0].lora_scaling == 2.0
    assert adapter.dtype == torch.float32
    assert adapter.dropout == 0.25


def test_rslora_divides_by_the_root_of_the_rank(folder: Path) -> None:
    edit_config(folder, use_rslora=True)
    assert read_adapter("math", folder).modules[Q0].lora_scaling == 8 / math.sqrt(4)


def test_rank_and_alpha_patterns_match_a_path_or_its_end(tmp_path: Path) -> None:
    folder = write_lora(
        tmp_path / "lora",
        tiny_base(),
        ("q_proj", "v_proj"),
        rank=4,
        alpha=8,
        config={
            "r": 2,
            "rank_pattern": {r"layers\.\d+.self_attn.q_proj": 4, "v_proj": 4},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 12, "_proj": 99, "q_proj": 20},
        },
    )
    modules = read_adapter("math", folder).modules
    assert modules[Q0].lora_scaling == 3.0
    # "_proj" is the end of the name only, not of the path at a dot, so it matches nothing.
    assert modules["model.layers.1.self_attn.q_proj"].lora_scaling == 5.0
    assert modules["model.layers.0.self_attn.v_proj"].lora_scaling == 2.0


def test_keys_with_an_adapter_name_in_them_are_read(folder: Path) -> None:
    tensors = {
        key.replace(".weight", ".default.weight"): tensor
        for key, tensor in load_file(folder / WEIGHTS_FILE).items()
    }
    save_file(tensors, folder / WEIGHTS_FILE)
    assert Q0 in read_adapter("math", folder).modules


# ---------------------------------------------------------------- folders and files


def test_missing_folder(tmp_path: Path) -> None:
    error = refusal(tmp_path / "nowhere")
    assert error.message == f"adapter 'math': folder {tmp_path / 'nowhere'} does not exist"
    assert error.hint == f"give the folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}"
    assert str(error) == f"{error.message}\nhint: {error.hint}"


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    assert "x.txt is a file, a folder was expected" in refusal(tmp_path / "x.txt").message


@pytest.mark.parametrize("name", ["adapter_model.bin", "weights.pt", "model.PTH", "a.ckpt"])
def test_a_pickle_is_refused_by_name_and_never_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch never'\ntR.")
    error = refusal(tmp_path / name)
    assert (
        error.message
        == f"adapter 'math': {name} is a pickle; pickles can run code and are never opened"
    )
    assert "safe_serialization=True" in error.hint


@pytest.mark.parametrize("name", ["adapter_model.bin", "weights.pt"])
def test_a_folder_with_a_pickle_instead_of_safetensors(folder: Path, name: str) -> None:
    (folder / WEIGHTS_FILE).rename(folder / name)
    assert f"{name} is a pickle" in refusal(folder).message


def test_no_config_is_not_a_lora(tmp_path: Path) -> None:
    error = refusal(tmp_path)
    assert (
        error.message
        == f"adapter 'math': {tmp_path} is not a LoRA adapter, it has no {CONFIG_FILE}"
    )
    assert error.hint == "PEFT's save_pretrained writes such a folder"


@pytest.mark.parametrize("peft_type", ["XLORA", "IA3", None, ["LORA"]])
def test_another_peft_method(folder: Path, peft_type: object) -> None:
    edit_config(folder, peft_type=peft_type)
    assert f"is not a LoRA, its peft_type is {peft_type!r}, expected 'LORA'" in str(refusal(folder))


@pytest.mark.parametrize("text", ["{", "", "\x00", "[" * 100_000, '{"r": ' + "9" * 5000 + "}"])
def test_a_config_that_is_not_json(folder: Path, text: str) -> None:
    (folder / CONFIG_FILE).write_text(text)
    assert f"{folder / CONFIG_FILE} is not valid JSON: " in refusal(folder).message


def test_a_config_that_is_not_an_object(folder: Path) -> None:
    (folder / CONFIG_FILE).write_text("[1, 2]")
    assert "its peft_type is 'list', expected 'LORA'" in refusal(folder).message


def test_no_weights(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    assert refusal(folder).message == f"adapter 'math': {folder} has no {WEIGHTS_FILE}"


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_safetensors(folder: Path, keep: int) -> None:
    whole = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(whole[:keep])
    error = refusal(folder)
    assert f"{folder / WEIGHTS_FILE} is not a readable safetensors file: " in error.message
    assert error.hint == "the file is truncated or damaged; copy or save it again"


@pytest.mark.parametrize(
    ("found", "planted"),
    [
        (b'"shape":[4,32]', b'"shape":[5,32]'),  # shape and bytes disagree
        (b'"dtype":"F32"', b'"dtype":"F64"'),
        (b'"data_offsets":[0,', b'"data_offsets":[9,'),
    ],
)
def test_doctored_safetensors(folder: Path, found: bytes, planted: bytes) -> None:
    path = folder / WEIGHTS_FILE
    whole = path.read_bytes()
    assert found in whole
    path.write_bytes(whole.replace(found, planted, 1))
    assert "is not a readable safetensors file" in refusal(folder).message


def test_no_tensors(folder: Path) -> None:
    edit_tensors(folder, dict.clear)
    assert "holds no tensors" in refusal(folder).message


# ---------------------------------------------------------------- tensors


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinite_weights(folder: Path, value: float) -> None:
    edit_tensors(folder, lambda t: t[KEY_B].view(-1)[7:8].fill_(value))
    error = refusal(folder)
    assert f"tensor {KEY_B} holds NaN or infinite values" in error.message
    assert "training diverged" in error.hint


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn])
def test_dtypes_no_expert_can_have(folder: Path, dtype: torch.dtype) -> None:
    edit_tensors(folder, lambda t: t.update({KEY_A: t[KEY_A].to(dtype)}))
    assert f"tensor {KEY_A} is {dtype}, expected one of torch.float32, " in refusal(folder).message


@pytest.mark.parametrize(("side", "key"), [("A", KEY_A), ("B", KEY_B)])
def test_one_half_of_a_pair_is_missing(folder: Path, side: str, key: str) -> None:
    edit_tensors(folder, lambda t: t.pop(key))
    assert (
        refusal(folder).message
        == f"adapter 'math', module {Q0}: lora_{side} is missing, the file is incomplete"
    )


def test_halves_of_different_ranks(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({KEY_B: t[KEY_B][:, :3].contiguous()}))
    assert (
        f"module {Q0}: lora_A must be [r, in] and lora_B [out, r], or [r, in, kh, kw] and "
        "[out, r, 1, 1] for a convolution, found [4, 32] and [32, 3]" in refusal(folder).message
    )


def test_tensors_that_are_no_matrices(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({KEY_A: t[KEY_A].flatten()}))
    assert "found [128] and [32, 4]" in refusal(folder).message


@pytest.mark.parametrize("rank", [8, "4", None, 4.5])
def test_the_config_says_another_rank(folder: Path, rank: object) -> None:
    edit_config(folder, r=rank)
    assert (
        f"module {Q0}: {CONFIG_FILE} says rank {rank!r}, the tensors have rank 4"
        in refusal(folder).message
    )


def test_rank_0(folder: Path) -> None:
    edit_config(folder, r=0)
    edit_tensors(
        folder,
        lambda t: t.update({KEY_A: torch.zeros(0, 32), KEY_B: torch.zeros(32, 0)}),
    )
    assert "says rank 0, the tensors have rank 0" in refusal(folder).message


def test_two_adapters_in_one_file(folder: Path) -> None:
    edit_tensors(
        folder, lambda t: t.update({KEY_A.replace(".weight", ".code.weight"): t[KEY_A] + 1})
    )
    error = refusal(folder)
    assert f"module {Q0} has two tensors lora_A, expected one" in error.message
    assert error.hint == "the file holds several adapters; save each of them alone"


# ---------------------------------------------------------------- what plain LoRA is not


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "trained biases (bias='all')"),
        ({"use_dora": True, "bias": "lora_only"}, "DoRA, trained biases (bias='lora_only')"),
        ({"trainable_token_indices": [1]}, "trained token embeddings"),
        ({"layer_replication": [[0, 2]]}, "replicated layers"),
    ],
)
def test_variants_are_refused_by_name(folder: Path, changes: dict[str, object], what: str) -> None:
    edit_config(folder, **changes)
    error = refusal(folder)
    assert f"{folder / CONFIG_FILE} uses {what}; only plain LoRA can be mixed" in error.message
    assert "merge that part into the base model first" in error.hint


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        (f"base_model.model.{Q0}.lora_magnitude_vector", "only plain LoRA adapters can be mixed"),
        (f"{Q0}.lora_A.weight", "only plain LoRA adapters can be mixed"),
        ("base_model.model.lm_head.weight", "adapters that train further parameters cannot be"),
        (f"base_model.model.{Q0}.bias", "adapters that train further parameters cannot be mixed"),
    ],
)
def test_tensors_of_something_else(folder: Path, key: str, hint: str) -> None:
    edit_tensors(folder, lambda t: t.update({key: torch.zeros(4, 32)}))
    error = refusal(folder)
    assert (
        f"tensor {key} is not part of plain LoRA; expected base_model.model.<module>.lora_A"
        in error.message
    )
    assert hint in error.hint


# ---------------------------------------------------------------- embeddings, biases, whole modules

EMBEDDING = "model.embed_tokens"
EMBEDDING_KEYS = {
    f"base_model.model.{EMBEDDING}.lora_embedding_A": torch.ones(4, 97),
    f"base_model.model.{EMBEDDING}.lora_embedding_B": torch.ones(32, 4),
}


@pytest.mark.parametrize("suffix", ["", ".default"])
def test_an_embedding_adapter(folder: Path, suffix: str) -> None:
    edit_tensors(folder, lambda t: t.update({k + suffix: v for k, v in EMBEDDING_KEYS.items()}))
    weights = read_adapter("a", folder).modules[EMBEDDING]
    assert weights.embedding
    assert (weights.lora_A.shape, weights.lora_B.shape) == ((4, 97), (32, 4))
    assert not read_adapter("a", folder).modules[Q0].embedding


def test_the_bias_of_the_expanding_half(folder: Path) -> None:
    bias = torch.arange(32.0)
    edit_tensors(folder, lambda t: t.update({f"base_model.model.{Q0}.lora_B.bias": bias}))
    edit_config(folder, lora_bias=True)
    modules = read_adapter("a", folder).modules
    assert torch.equal(modules[Q0].bias, bias)
    assert [path for path, weights in modules.items() if weights.bias is not None] == [Q0]


def test_a_bias_of_another_size(folder: Path) -> None:
    key = f"base_model.model.{Q0}.lora_B.bias"
    edit_tensors(folder, lambda t: t.update({key: torch.zeros(4, 32)}))
    assert "the bias of lora_B must be [32], found [4, 32]" in refusal(folder).message


def test_a_wholly_trained_module(folder: Path) -> None:
    head = torch.ones(97, 32)
    edit_tensors(folder, lambda t: t.update({"base_model.model.lm_head.weight": head}))
    edit_config(folder, modules_to_save=["classifier", "lm_head"])
    adapter = read_adapter("a", folder)
    assert list(adapter.saved_modules) == ["lm_head"]
    assert torch.equal(adapter.saved_modules["lm_head"].weight, head)
    assert adapter.saved_modules["lm_head"].bias is None
    assert adapter.paths == [*adapter.modules, "lm_head"]


def test_a_wholly_trained_module_without_its_weight(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"base_model.model.lm_head.bias": torch.ones(97)}))
    edit_config(folder, modules_to_save=["lm_head"])
    assert "module lm_head: the saved module has a bias but no weight" in refusal(folder).message


def test_modules_to_save_that_the_file_does_not_hold(folder: Path) -> None:
    edit_config(folder, modules_to_save=["score"])
    error = refusal(folder)
    assert "modules_to_save names score, but the file holds none of them" in error.message


@pytest.mark.parametrize("names", ["score", [1], {"a": 1}])
def test_modules_to_save_that_are_no_names(folder: Path, names: object) -> None:
    edit_config(folder, modules_to_save=names)
    assert "modules_to_save must be a list of module names, got " in refusal(folder).message


def test_what_is_read_is_written_under_the_same_keys(folder: Path) -> None:
    added = EMBEDDING_KEYS | {
        f"base_model.model.{Q0}.lora_B.bias": torch.arange(32.0),
        "base_model.model.lm_head.weight": torch.ones(97, 32),
    }
    edit_tensors(folder, lambda t: t.update(added))
    edit_config(folder, modules_to_save=["lm_head"])
    written = adapter_tensors(read_adapter("a", folder))
    on_disk = load_file(folder / WEIGHTS_FILE)
    assert written.keys() == on_disk.keys()
    assert all(torch.equal(written[key], on_disk[key]) for key in on_disk)


@pytest.mark.parametrize("alpha", ["8", None, True, math.inf, math.nan, 10**400])
def test_alpha_that_is_no_number(folder: Path, alpha: object) -> None:
    edit_config(folder, lora_alpha=alpha)
    assert f"module {Q0}: lora_alpha must be a finite number, got " in refusal(folder).message


@pytest.mark.parametrize("dropout", ["0.1", 1, -0.1, math.nan, [0.1]])
def test_dropout_that_is_no_probability(folder: Path, dropout: object) -> None:
    edit_config(folder, lora_dropout=dropout)
    assert f"lora_dropout must be in [0, 1), got {dropout!r}" in refusal(folder).message


def test_patterns_that_are_none(folder: Path) -> None:
    edit_config(folder, alpha_pattern={"q_pr[oj": 3})
    assert "alpha_pattern: 'q_pr[oj' is not a pattern: " in refusal(folder).message
    edit_config(folder, alpha_pattern=None, rank_pattern=["q_proj"])
    assert "rank_pattern must map patterns to numbers, got ['q_proj']" in refusal(folder).message


# ---------------------------------------------------------------- random damage


@settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**32 - 1))
def test_damage_raises_adapter_error_or_reads_fine(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever bytes are cut off or changed: no other error ever comes out."""
    rng = random.Random(seed)
    good = _good_files(tmp_path_factory)
    name = rng.choice((CONFIG_FILE, WEIGHTS_FILE))
    damaged = bytearray(good[name])
    # Half of the damage goes to the header, where the structure is.
    reach = len(damaged) if name == CONFIG_FILE or rng.random() < 0.5 else 500
    for _ in range(rng.choice((1, 1, 2, 8))):
        damaged[rng.randrange(reach)] = rng.choice(b'0123456789"[]{},:-.eFBUI\x00\xff\x7f (\\')
    if rng.random() < 0.3:
        del damaged[rng.randrange(len(damaged)) :]
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    for file, content in (good | {name: bytes(damaged)}).items():
        (folder / file).write_bytes(content)
    try:
        adapter = read_adapter("math", folder)
    except AdapterError:
        return
    assert 0 <= adapter.dropout < 1
    assert all(torch.isfinite(w.lora_A).all() for w in adapter.modules.values())


_files: dict[str, bytes] = {}


def _good_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    if not _files:
        folder = write_lora(
            tmp_path_factory.mktemp("good"),
            tiny_base(),
            ("q_proj",),
            rank=2,
            config={
                "lora_dropout": 0.1,
                "rank_pattern": {"q_proj": 2},
                "alpha_pattern": {r"layers\.[01].self_attn.(q|v)_proj": 3},
            },
        )
        _files.update({f: (folder / f).read_bytes() for f in (CONFIG_FILE, WEIGHTS_FILE)})
    return _files
