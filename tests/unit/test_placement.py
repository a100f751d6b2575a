"""Where a model goes and in which type, on machines with and without GPUs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from xlora_core import placement
from xlora_core.errors import ConfigError
from xlora_core.placement import device_map, main_device, weights_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def folder_of(tmp_path: Path, **config: object) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def bfloat16_is_native(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)


@pytest.mark.parametrize("device", [None, "auto"])
@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_is_taken_where_there_is_one(device: str | None) -> None:
    assert main_device(device).type == "cuda"
    assert main_device("cuda:1") == torch.device("cuda:1")
    assert main_device("cpu") == CPU


@pytest.mark.parametrize("device", [None, "auto", "cpu", CPU])
@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_it_is_the_cpu(device: str | None) -> None:
    assert main_device(device) == CPU


@pytest.mark.parametrize(
    ("places", "main"),
    [
        ({"a": "cpu", "b": 1, "c": 0}, "cuda:1"),
        ({"a": "disk", "b": "cuda:0"}, "cuda:0"),
        ({"a": torch.device("cuda:1")}, "cuda:1"),
        ({"a": "cpu", "b": "disk"}, "cpu"),
    ],
)
@pytest.mark.usefixtures("two_gpus")
def test_a_spread_model_computes_on_its_first_gpu(places: dict[str, object], main: str) -> None:
    assert main_device(places) == torch.device(main)
    assert device_map(places) == places


@pytest.mark.usefixtures("two_gpus")
def test_a_spread_model_cannot_lie_on_a_gpu_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="cuda:2 does not exist: PyTorch sees 2 CUDA devices"):
        main_device({"": 2})


def test_only_auto_and_a_mapping_spread_a_model() -> None:
    assert device_map("auto") == "auto"
    assert [device_map(device) for device in (None, "cpu", "cuda:0", GPU)] == [None] * 4


def test_a_missing_accelerate_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="by accelerate, which is not installed") as caught:
        device_map("auto")
    assert caught.value.hint == "pip install accelerate, or give one device, such as cuda:0"
    assert device_map("cuda:0") is None


@pytest.mark.parametrize("dtype", [None, "auto"])
def test_a_cpu_computes_in_float32_whatever_the_files_are(
    tmp_path: Path, dtype: str | None
) -> None:
    assert weights_dtype(dtype, CPU, folder_of(tmp_path, dtype="bfloat16")) == torch.float32


@pytest.mark.parametrize(
    ("config", "native", "expected"),
    [
        ({"dtype": "float32"}, True, torch.bfloat16),
        ({"torch_dtype": "bfloat16"}, True, torch.bfloat16),
        ({}, True, torch.bfloat16),
        ({"dtype": "float16"}, True, torch.float16),
        ({"text_config": {"dtype": "float16"}}, True, torch.float16),
        ({"dtype": "bfloat16"}, False, torch.float32),
        ({"dtype": "float16"}, False, torch.float16),
    ],
)
def test_a_gpu_computes_in_sixteen_bits_where_it_can(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, object],
    native: bool,
    expected: torch.dtype,
) -> None:
    bfloat16_is_native(monkeypatch, native)
    assert weights_dtype(None, GPU, folder_of(tmp_path, **config)) == expected


@pytest.mark.parametrize("content", ["[]", "{", None])
def test_a_damaged_config_is_left_to_what_loads_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    bfloat16_is_native(monkeypatch, True)
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert weights_dtype(None, GPU, tmp_path) == torch.bfloat16


def test_a_given_type_is_taken(tmp_path: Path) -> None:
    assert weights_dtype("bfloat16", CPU, tmp_path) == torch.bfloat16
    assert weights_dtype(torch.float64, GPU, tmp_path) == torch.float64
    with pytest.raises(ConfigError, match="one of auto, float32, bfloat16, float16, got 'int4'"):
        weights_dtype("int4", CPU, tmp_path)
