"""Whatever is done to a checkpoint's files, the answer is an ``XLoraError`` or a fitting model."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.original_checkpoints import write_original_checkpoint
from tests.tiny_models import tiny_base, write_experts
from xlora_core.checkpoint import (
    NAMES_FILE,
    ORDERING_FILE,
    Layout,
    check_fits,
    read_checkpoint,
    write_original,
    write_peft,
)
from xlora_core.config import XLoraConfig
from xlora_core.errors import XLoraError
from xlora_core.model import XLoraModel

BASE = tiny_base()
WEIGHTS = "adapter_model.safetensors"
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, -1, 2**63, 10**400])
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.sampled_from(["", ".", "..", "/", "\x00", "0", "last", "XLORA", "a" * 5000]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module", params=[*Layout, "rescue", "gates"])
def layout_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint of each layout, with one expert and every optional file."""
    root = tmp_path_factory.mktemp("doctored")
    folder = root / "checkpoint"
    router = {"router": "per_layer"} if request.param == "gates" else {"xlora_depth": 2}
    model = XLoraModel.from_base(
        tiny_base(), XLoraConfig(adapters=write_experts(root / "experts", n_adapters=1), **router)
    )
    if request.param in (Layout.OURS, "gates"):
        model.save_pretrained(folder)
        return folder
    model.save_pretrained(root / "ours")
    write = write_original if request.param is Layout.ORIGINAL else write_peft
    write(folder, read_checkpoint(root / "ours"))
    if request.param == "rescue":
        break_as_peft_does(folder)
    return folder


def break_as_peft_does(folder: Path) -> None:
    """Makes it what PEFT >= 0.20 saves: layer 0 and the trained expert are in folder ``0``."""
    (folder / NAMES_FILE).unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    config["use_trainable_adapters"] = True
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shutil.copytree(folder / "experts" / "0", folder / "0")
    prefix = "base_model.internal_xlora_classifier."
    router = load_file(folder / WEIGHTS)
    strays = {
        f"{prefix}layers.{part}": router.pop(f"{prefix}layers.0.{part}")
        for part in ("weight", "bias")
    }
    save_file(router, folder / WEIGHTS)
    expert = {
        key.replace("base_model.model.", "base_model.lora_model.model."): tensor
        for key, tensor in load_file(folder / "0" / WEIGHTS).items()
    }
    save_file(strays | router | expert, folder / "0" / WEIGHTS)


def test_the_checkpoints_are_whole_to_begin_with(layout_folder: Path) -> None:
    assert check_fits(layout_folder, read_checkpoint(layout_folder), BASE).layer_names


def assert_refused_or_whole(folder: Path, doctor: Callable[[Path], object]) -> None:
    """Doctors a copy; anything else than an XLoraError is the test's failure."""
    with tempfile.TemporaryDirectory() as copy:
        target = Path(copy) / "checkpoint"
        shutil.copytree(folder, target)
        doctor(target)
        try:
            fitted = check_fits(target, read_checkpoint(target), BASE)
        except XLoraError:
            return
        assert len(fitted.layer_names or ()) == 14
        assert all(tensor.numel() for tensor in fitted.classifier.values())


def files_of(folder: Path, *suffixes: str) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.suffix in suffixes)


EXAMPLES = settings(
    max_examples=35, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@given(data=st.data())
@EXAMPLES
def test_truncated_files(layout_folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(files_of(layout_folder, ".json", ".safetensors")))
    keep = data.draw(st.integers(0, (layout_folder / name).stat().st_size - 1))

    def truncate(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:keep])

    assert_refused_or_whole(layout_folder, truncate)


@given(data=st.data())
@EXAMPLES
def test_changed_bytes(layout_folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(files_of(layout_folder, ".json", ".safetensors")))
    # The front of a safetensors file is its header, where a changed byte says the most.
    place = data.draw(st.integers(0, min(2000, (layout_folder / name).stat().st_size - 1)))
    byte = data.draw(st.integers(0, 255))

    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[place] = byte
        (folder / name).write_bytes(content)

    assert_refused_or_whole(layout_folder, change)


@given(data=st.data())
@settings(EXAMPLES, max_examples=80)
def test_other_values_in_json(layout_folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(files_of(layout_folder, ".json")))
    values = json.loads((layout_folder / name).read_text())
    where: Any = values
    for _ in range(data.draw(st.integers(0, 2))):
        inner = [
            v
            for v in (where.values() if isinstance(where, dict) else where)
            if v and isinstance(v, dict | list)
        ]
        if inner:
            where = data.draw(st.sampled_from(inner))
    if isinstance(where, dict):
        key: Any = data.draw(st.sampled_from(sorted(where)) | st.text(max_size=5))
    else:
        key = data.draw(st.integers(0, len(where) - 1))
    where[key] = data.draw(JSON)

    def rewrite(folder: Path) -> None:
        (folder / name).write_text(json.dumps(values), encoding="utf-8")

    assert_refused_or_whole(layout_folder, rewrite)


@given(content=JSON, data=st.data())
@EXAMPLES
def test_another_json_file_altogether(
    layout_folder: Path, content: Any, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(files_of(layout_folder, ".json")))
    assert_refused_or_whole(
        layout_folder, lambda folder: (folder / name).write_text(json.dumps(content))
    )


@given(data=st.data())
@EXAMPLES
def test_missing_files_and_files_that_are_folders(layout_folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(files_of(layout_folder, ".json", ".safetensors")))
    as_folder = data.draw(st.booleans())

    def remove(folder: Path) -> None:
        (folder / name).unlink()
        if as_folder:
            (folder / name).mkdir()

    assert_refused_or_whole(layout_folder, remove)


@given(content=JSON)
@EXAMPLES
def test_ordering_files_of_any_content(
    tmp_path_factory: pytest.TempPathFactory, content: Any
) -> None:
    folder = tmp_path_factory.getbasetemp() / "ordered"
    if not folder.exists():
        write_original_checkpoint(folder, n_adapters=1)

    def add(copy: Path) -> None:
        (copy / ORDERING_FILE).write_text(json.dumps({"layers": content, "order": content}))

    assert_refused_or_whole(folder, add)
