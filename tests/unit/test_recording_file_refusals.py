"""Run files that are refused: what is wrong is said by file and field, with a hint."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save
from safetensors.torch import save as save_tensors

from tests.recorded_runs import ALL_ARMS, make_run
from xlora_core import Run
from xlora_core.errors import RunFileError
from xlora_core.recording import run_file

Tensors = dict[str, NDArray[Any]]


def contents(data: bytes) -> tuple[Tensors, dict[str, str], dict[str, Any]]:
    """Returns tensors, metadata and the parsed header of a run file's bytes."""
    n_header = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + n_header])["__metadata__"]
    return load(data), metadata, json.loads(metadata["header"])


def doctored(change: Callable[[Tensors, dict[str, Any]], object], *, signed: bool = True) -> bytes:
    """Returns a valid file whose tensors or header were changed, with the right checksum."""
    tensors, metadata, header = contents(make_run(arms=ALL_ARMS).to_bytes())
    tensors = {name: array.copy() for name, array in tensors.items()}
    change(tensors, header)
    metadata["header"] = json.dumps(header)
    if signed:
        metadata["sha256"] = run_file._digest(metadata["header"], tensors)
    return save(tensors, metadata=metadata)


def test_a_missing_file_is_said_so(tmp_path) -> None:
    with pytest.raises(RunFileError, match=r"cannot read .*nope: No such file") as caught:
        Run.load(tmp_path / "nope")
    assert caught.value.hint == "check the path of the run file"
    with pytest.raises(RunFileError, match="cannot read .*[Dd]irectory"):
        Run.load(tmp_path)


def test_an_absurdly_large_file_is_not_read(tmp_path) -> None:
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.truncate(run_file.MOST_BYTES + 1)
    with pytest.raises(RunFileError, match="4,294,967,297 bytes are more than a run file may have"):
        Run.load(path)


def test_an_absurdly_large_header_is_not_parsed(monkeypatch) -> None:
    data = make_run().to_bytes()
    monkeypatch.setattr(run_file, "MOST_HEADER_BYTES", 1000)
    with pytest.raises(RunFileError, match="a header has at most 1,000 bytes"):
        Run.from_bytes(data)


class Payload:
    """Would leave a mark if anything unpickled it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_pickle_is_refused_by_name_and_never_opened(tmp_path, kind) -> None:
    path, mark = tmp_path / "run.pt", tmp_path / "mark"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Payload(mark)))
    else:
        torch.save({"x": Payload(mark)}, path)
    with pytest.raises(RunFileError, match=r"run\.pt: this is a pickle or an archive") as caught:
        Run.load(path)
    assert "Run.save" in caught.value.hint
    assert not mark.exists()


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 3000, -1])
def test_a_truncated_file_is_refused(tmp_path, keep) -> None:
    path = tmp_path / "run.safetensors"
    path.write_bytes(make_run(arms=ALL_ARMS).to_bytes()[:keep])
    with pytest.raises(
        RunFileError, match=r"run\.safetensors: not a readable safetensors file, perhaps truncated"
    ) as caught:
        Run.load(path)
    assert "copy or download it again" in caught.value.hint


def test_bytes_after_the_end_are_refused() -> None:
    with pytest.raises(RunFileError, match="not a readable safetensors file"):
        Run.from_bytes(make_run().to_bytes() + b"\0")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_other_safetensors_files_are_refused(metadata) -> None:
    data = save({"weight": np.zeros(3)}, metadata=metadata)
    with pytest.raises(RunFileError, match="up.bin: not a run file: the metadata") as caught:
        Run.from_bytes(data, "up.bin")
    assert "Run.save" in caught.value.hint


def test_a_newer_version_is_refused_before_anything_else() -> None:
    # Nothing else is as it is today: other metadata, other fields, a type numpy does not have.
    header = {"format_version": 4, "shape_of_things": "to come"}
    data = save_tensors(
        {"new": torch.zeros(2, dtype=torch.bfloat16)},
        metadata={"format": "xlora-run", "header": json.dumps(header)},
    )
    with pytest.raises(
        RunFileError, match="the file has format version 4, this program reads up to 3"
    ) as caught:
        Run.from_bytes(data)
    assert caught.value.hint == "upgrade xlora-explorer to open it"


def test_tensors_of_another_type_are_refused() -> None:
    _, metadata, _ = contents(make_run().to_bytes())
    data = save_tensors({"prompt_text": torch.zeros(2, dtype=torch.bfloat16)}, metadata=metadata)
    with pytest.raises(RunFileError, match="up.bin: tensor type 'BF16' is not one of a run file"):
        Run.from_bytes(data, "up.bin")


def test_json_that_is_no_safetensors_header_is_refused() -> None:
    header = b'["__metadata__"]'
    with pytest.raises(RunFileError, match="not a run file"):
        Run.from_bytes(len(header).to_bytes(8, "little") + header)


def test_a_change_of_any_value_breaks_the_checksum() -> None:
    def change(tensors: Tensors, header: dict[str, Any]) -> None:
        tensors["tracks.0.seconds"][3] += 1

    assert Run.from_bytes(doctored(change)).tracks[0].seconds[3] == pytest.approx(1.3)
    with pytest.raises(RunFileError, match="checksum that 'sha256' says") as caught:
        Run.from_bytes(doctored(change, signed=False))
    assert "damaged, cut off or edited" in caught.value.hint


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"header": None}, "metadata: key 'header' is missing"),
        ({"sha256": None}, "metadata: key 'sha256' is missing"),
        ({"more": "x"}, "metadata: key 'more' is not known"),
        ({"header": "{"}, "header is not valid JSON"),
        ({"header": "[]"}, "header must be a JSON object, got list"),
        ({"header": "[" * 100_000}, "header is not valid JSON"),
        ({"header": '{"format_version": 1, "format_version": 1}'}, "'format_version' comes twice"),
        ({"header": '{"format_version": NaN}'}, "NaN is no number"),
        ({"header": '{"format_version": ' + "9" * 5000 + "}"}, "header is not valid JSON"),
        ({"header": '{"format_version": "1"}'}, "format_version must be a whole number >= 1"),
        ({"header": '{"format_version": 0}'}, "format_version must be a whole number >= 1, got 0"),
        ({"header": "{}"}, "format_version must be a whole number >= 1, got None"),
        ({"header": '{"format_version": 1}'}, "header: key 'run_id' is missing"),
        ({"header": " " * (32 * 2**20 + 1)}, "JSON text of at most 33,554,432 characters"),
    ],
)
def test_doctored_metadata_is_refused(metadata, message) -> None:
    tensors, valid, _ = contents(make_run().to_bytes())
    merged = {k: v for k, v in (valid | metadata).items() if v is not None}
    with pytest.raises(RunFileError, match=f"^up.bin: .*{message}") as caught:
        Run.from_bytes(save(tensors, metadata=merged), "up.bin")
    assert caught.value.hint


def _set(*path: str | int, to: Any) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, header: dict[str, Any]) -> None:
        value: Any = header
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("more", to=1), "header: key 'more' is not known"),
        (lambda t, h: h.pop("present"), "header: key 'present' is missing"),
        (_set("present", to=[[True] * 3]), r"present must have 2 rows \(modules\) of 3 values"),
        (_set("adapter_names", to=["a", "b"]), "present must have 2 rows .* of 2 values"),
        (_set("adapter_names", to=["a", "b", "b"]), "adapter_names must differ"),
        (_set("adapter_names", to=5), "adapter_names must be a list of texts"),
        (_set("run_id", to="a/b"), "run_id must be 1 to 64"),
        (_set("created", to="now"), "created must be an ISO 8601 time"),
        (_set("scaling_pass_value", to=10**400), "scaling_pass_value must be a finite number"),
        (
            _set("layerwise", to=False),
            r"router_logits: expected shape \[8, 1, 3\], got \[8, 2, 3\]",
        ),
        (_set("sampling", to=[]), "header: sampling must be a JSON object, got list"),
        (_set("sampling", "seed", to=-1), r"header: sampling: seed must be a whole number from 0"),
        (_set("sampling", "top_p", to=10**400), "header: sampling: "),
        (_set("sampling", "more", to=1), "header: sampling: key 'more' is not known"),
        (_set("tracks", to=[]), "tracks must be a list of 1 to 256 tracks"),
        (_set("tracks", to=[{}] * 257), "tracks must be a list of 1 to 256 tracks"),
        (_set("tracks", 0, to=None), r"tracks\[0\] must be a JSON object, got NoneType"),
        (_set("tracks", 1, "more", to=1), r"tracks\[1\]: key 'more' is not known"),
        (_set("tracks", 0, "n_prompt", to=9), "track 0: n_prompt: expected 0 to 8, got 9"),
        (_set("tracks", 0, "n_prompt", to=1.5), "n_prompt must be a whole number, got 1.5"),
        (_set("tracks", 0, "finish_reason", to="tired"), "finish_reason must be null or one of"),
        (_set("tracks", 0, "finish_reason", to=[]), "finish_reason must be null or one of"),
        (_set("tracks", 0, "arm", to={}), r"tracks\[0\].arm: key 'kind' is missing"),
        (
            _set("tracks", 0, "arm", "kind", to="best"),
            "kind must be routed, merged, base or expert",
        ),
        (_set("tracks", 0, "arm", "kind", to=[]), "kind must be routed, merged, base or expert"),
        (_set("tracks", 0, "arm", "knobs", "top_k", to=0), "arm.knobs: top_k must be None or"),
        (_set("tracks", 0, "arm", "knobs", to=3), "arm.knobs must be a JSON object, got int"),
        (_set("tracks", 3, "arm", "adapter", to="law"), "arm: the run has no adapter 'law'"),
        (_set("tracks", 3, "arm", "adapter", to=7), "adapter must be text or null, got 7"),
        (_set("tracks", 0, "arm", "knobs", "top_k", to=4), "arm: top_k must be .* from 1 to 3"),
    ],
)
def test_a_doctored_header_is_refused_by_field(change, message) -> None:
    with pytest.raises(RunFileError, match=f"^up.bin: .*{message}") as caught:
        Run.from_bytes(doctored(change), "up.bin")
    assert caught.value.hint


def _put(name: str, array: NDArray[Any]) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, header: dict[str, Any]) -> None:
        tensors[name] = array

    return change


def _value(name: str, value: float) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, header: dict[str, Any]) -> None:
        tensors[name].flat[1] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, h: t.pop("tracks.2.seconds"), "tensor 'tracks.2.seconds' is missing"),
        (lambda t, h: t.pop("tracks.0.router_logits"), "'tracks.0.router_logits' is missing"),
        (lambda t, h: t.pop("prompt_text"), "tensor 'prompt_text' is missing"),
        (_put("more", np.zeros(1)), "tensor 'more' is not known"),
        (_put("tracks.1.router_logits", np.zeros(1)), "'tracks.1.router_logits' is not known"),
        (_put("tracks.0.token_ids", np.zeros(7, np.int32)), r"logprob: expected shape \[7\]"),
        (_put("tracks.0.token_ids", np.zeros(8)), "token_ids: expected dtype int32, got float64"),
        (_put("tracks.0.token_ids", np.array(5, np.int32)), "token_ids: expected 1 dimensions"),
        (
            _put("tracks.0.router_logits", np.zeros((8, 2, 4), np.float16)),
            r"router_logits: expected shape \[8, 2, 3\], got \[8, 2, 4\]",
        ),
        (
            _put("tracks.0.router_logits", np.zeros((0, 10**9, 10**9), np.float16)),
            r"router_logits: expected shape \[0, 2, 3\]",
        ),
        (
            _put("tracks.0.router_logits", np.zeros((9, 2, 3), np.float16)),
            "router_logits: 9 rows are more than the 8 tokens",
        ),
        (_put("tracks.0.top_k", np.zeros(9, np.int16)), r"top_k: expected shape \[8\], got \[9\]"),
        (_value("tracks.0.router_logits", np.nan), "router_logits: values must be finite"),
        (_value("tracks.0.router_logits", -np.inf), "router_logits: values must be finite"),
        (_value("tracks.0.temperature", 0), "temperature: values must be finite and > 0"),
        (_value("tracks.0.temperature", np.nan), "temperature: values must be finite and > 0"),
        (_value("tracks.0.global_weight", np.inf), "global_weight: values must be finite"),
        (_value("tracks.0.top_k", 4), r"top_k: values must be from 0 \(all\) to 3"),
        (_value("tracks.0.top_k", -1), r"top_k: values must be from 0 \(all\) to 3"),
        (_value("tracks.0.token_ids", -1), "token_ids: ids must be >= 0"),
        (_value("tracks.0.alternative_ids", -2), "alternative_ids: ids must be >= -1"),
        (_value("tracks.0.seconds", -1), "seconds: values must be finite and >= 0"),
        (_value("tracks.0.base_logprob", 0.5), "base_logprob: values must be <= 0"),
        (_value("tracks.0.alternative_logprobs", np.inf), "alternative_logprobs: values must be"),
        (_put("tracks.0.piece_ends", np.zeros(8, np.int32)), "piece_ends: expected int64"),
        (_put("tracks.0.piece_ends", np.zeros((8, 1), np.int64)), "piece_ends: expected int64 of"),
        (_put("tracks.0.piece_bytes", np.zeros(8, np.int8)), "piece_bytes: expected uint8"),
        (_value("tracks.0.piece_ends", 10**6), "piece_ends: must rise to 24, the number of"),
        (_value("tracks.0.piece_ends", -(2**63)), "piece_ends: must rise to 24"),
        (
            _put("tracks.0.piece_ends", np.array([24] * 7, np.int64)),
            "pieces: expected 8 texts, got 7",
        ),
        (_value("tracks.0.piece_bytes", 0xFF), "piece_bytes: not UTF-8"),
        (_value("prompt_text", 0xFF), "prompt_text: not UTF-8"),
        (_put("prompt_text", np.zeros(2, np.int16)), "prompt_text: expected uint8"),
    ],
)
def test_doctored_tensors_are_refused_by_field(change, message) -> None:
    with pytest.raises(RunFileError, match=f"^up.bin: .*{message}") as caught:
        Run.from_bytes(doctored(change), "up.bin")
    assert caught.value.hint


def test_rows_missing_from_a_finished_arm_are_refused() -> None:
    def change(tensors: Tensors, header: dict[str, Any]) -> None:
        for name in ("router_logits", "top_k", "temperature", "global_weight"):
            tensors[f"tracks.0.{name}"] = tensors[f"tracks.0.{name}"][:7].copy()

    with pytest.raises(RunFileError, match="a finished arm needs 8 rows, got 7"):
        Run.from_bytes(doctored(change))
