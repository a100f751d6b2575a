"""Steps over fixed addresses, as a CUDA graph replays them, on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.row_texts import RowText, assert_as_alone, random_text, read_on
from tests.tiny_models import tiny_xlora
from xlora_core.model import XLoraModel
from xlora_core.rows.graphs import RecordedSteps
from xlora_core.rows.llama import LlamaRows


class Recorder:
    """Runs a step again where a graph would replay it; counts what was recorded."""

    def __init__(self) -> None:
        self.n_recorded = self.n_replayed = 0

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.n_recorded += 1
        run()  # a recorder runs the step more than once
        result = run()

        def replay() -> Tensor:
            self.n_replayed += 1
            # Into the same memory, as a graph does.
            result.copy_(run())
            return result

        return replay


@pytest.fixture
def model(tmp_path: Path) -> XLoraModel:
    return tiny_xlora(tmp_path, dtype=torch.float64)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def reader(model: XLoraModel, recorder: Recorder) -> LlamaRows:
    reader = LlamaRows(model)
    reader._recorded = RecordedSteps(reader._run, reader.cache, recorder)
    return reader


def texts_of(model: XLoraModel) -> list[RowText]:
    """Texts in rows 0, 2, 3 and 5 of 6; two with adapters, all of other lengths."""
    lengths = {5: 30, 2: 12, 0: 40, 3: 21}
    return [random_text(model, row, n, adapted=row > 2, seed=row) for row, n in lengths.items()]


def test_replayed_steps_are_each_text_alone(
    model: XLoraModel, reader: LlamaRows, recorder: Recorder
) -> None:
    reader.cache.grow(6, 64)
    texts = texts_of(model)
    read_on(reader, [(text, text.n_left - 10) for text in texts])
    assert recorder.n_recorded == 0
    for _ in range(10):
        read_on(reader, [(text, 1) for text in texts])
    assert (recorder.n_recorded, recorder.n_replayed) == (1, 10)
    for text in texts:
        assert_as_alone(model, reader, text, 1e-10)


def test_rows_that_change_places_share_a_step(
    model: XLoraModel, reader: LlamaRows, recorder: Recorder
) -> None:
    """What a recorded step reads is said anew at each call."""
    reader.cache.grow(6, 64)
    texts = texts_of(model)
    for turn in range(8):
        with_adapters, plain = texts[0], texts[2 + turn % 2]
        read_on(reader, [(with_adapters, 1), (plain, 1)])
        read_on(reader, [(texts[1 + turn % 3], 1)])
    # One and two rows, of which the last has adapters or not.
    assert recorder.n_recorded == 4
    for text in texts:
        assert_as_alone(model, reader, text, 1e-10)


def test_a_grown_cache_is_recorded_anew(
    model: XLoraModel, reader: LlamaRows, recorder: Recorder
) -> None:
    reader.cache.grow(1, 4)
    text = random_text(model, 0, 12, adapted=True)
    for _ in range(12):
        read_on(reader, [(text, 1)])
    # read_on makes room token by token from the fifth on.
    assert recorder.n_recorded == 9
    assert_as_alone(model, reader, text, 1e-10)


def test_new_rows_are_recorded_anew(
    model: XLoraModel, reader: LlamaRows, recorder: Recorder
) -> None:
    """The tensors that the recording wrote to are gone."""
    reader.cache.grow(1, 16)
    text = random_text(model, 0, 9, adapted=True)
    for n_rows in (1, 1, 2, 2, 3):
        reader.cache.grow(n_rows, 16)
        read_on(reader, [(text, 1)])
    assert recorder.n_recorded == 3
    assert_as_alone(model, reader, text, 1e-10)


def test_long_texts_are_looked_at_in_powers_of_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: XLoraModel, recorder: Recorder
) -> None:
    monkeypatch.setattr("xlora_core.rows.graphs._FEWEST_PLACES", 8)
    reader = LlamaRows(model)
    reader._recorded = RecordedSteps(reader._run, reader.cache, recorder)
    reader.cache.grow(2, 40)
    text = random_text(model, 1, 36, adapted=False)
    for _ in range(36):
        read_on(reader, [(text, 1)])
    assert recorder.n_recorded == 4  # 8, 16, 32, 40
    assert_as_alone(model, reader, text, 1e-10)


def test_few_steps_are_kept(
    monkeypatch: pytest.MonkeyPatch, model: XLoraModel, reader: LlamaRows, recorder: Recorder
) -> None:
    monkeypatch.setattr("xlora_core.rows.graphs._MAX_STEPS", 2)
    reader.cache.grow(6, 64)
    texts = texts_of(model)
    for n in (1, 2, 3, 1):
        read_on(reader, [(text, 1) for text in texts[:n]])
    assert recorder.n_recorded == 4
    for text in texts[:3]:
        assert_as_alone(model, reader, text, 1e-10)


def test_siblings_and_chunks_take_the_plain_way(
    model: XLoraModel, reader: LlamaRows, recorder: Recorder
) -> None:
    text = random_text(model, 0, 6, adapted=True)
    read_on(reader, [(text, 4)])
    read_on(reader, [(text, 1)], n_wrong=2)
    assert recorder.n_recorded == 0
    read_on(reader, [(text, 1)])
    assert recorder.n_recorded == 1
    assert_as_alone(model, reader, text, 1e-10)


def test_compiled_steps_are_each_text_alone(
    model: XLoraModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler's tracing alone, which needs no C++ compiler and changes no rounding."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    reader = LlamaRows(model, compiled=True)
    reader.cache.grow(6, 64)
    texts = texts_of(model)
    read_on(reader, [(text, text.n_left - 4) for text in texts])
    for _ in range(4):
        read_on(reader, [(text, 1) for text in texts])
    for text in texts:
        assert_as_alone(model, reader, text, 1e-10)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
