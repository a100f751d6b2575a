"""Packed matrices: the same products, by copies that live as long as an engine."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.tiny_chat import tiny_chat_xlora, tiny_tokenizer
from tests.tiny_models import tiny_prompt, tiny_xlora
from tests.unit.test_rows_projection import expected, layers
from xlora_core.engine import Engine, free_memory
from xlora_core.engine.free_memory import has_room_for_copy
from xlora_core.model import XLoraModel
from xlora_core.rows import RowBatch, RowReader, Segment, packed
from xlora_core.rows.llama import LlamaRows
from xlora_core.rows.opening import open_rows
from xlora_core.rows.packed import PackedMatrix, Product, packs
from xlora_core.rows.projection import FusedProjection, RankWeights

DTYPES = [torch.float32, torch.bfloat16]
NEAR = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("n_rows", [1, 2, 3, 4, 9, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_linear_layer(dtype: torch.dtype, n_rows: int, with_bias: bool) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(9, 24, dtype=dtype)
    bias = torch.randn(9, dtype=dtype) if with_bias else None
    x = torch.randn(24, n_rows, dtype=dtype).t()  # not row by row in memory
    own = nn.functional.linear(x, matrix, bias)
    near = {"atol": NEAR[dtype] * float(own.abs().max()), "rtol": 0}
    if packs(dtype):
        torch.testing.assert_close(PackedMatrix(matrix)(x, bias), own, **near)
    for packed_too in (False, packs(dtype)):
        product = Product(matrix, bias, packed=packed_too)
        torch.testing.assert_close(product(x), own, **near)
        torch.testing.assert_close(product(x, 5), own[:, :5], **near)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_types_are_not_packed(dtype: torch.dtype) -> None:
    assert not packs(dtype)


@pytest.mark.parametrize("n_adapted", [0, 1, 3])
def test_a_packed_projection_is_the_layers_side_by_side(n_adapted: int) -> None:
    dtype = torch.float32
    linears = layers(dtype)
    x = torch.randn(3, 24, dtype=dtype)
    scalings = torch.rand(n_adapted, 2, 4, dtype=dtype)
    with torch.no_grad():
        own = expected(linears, x, scalings)
        projection = FusedProjection(linears, packed=packs(dtype))
        (weights,) = RankWeights([projection], dtype).of(scalings, 3)
        torch.testing.assert_close(projection(x, weights), own, atol=2e-5, rtol=0)
        base = torch.cat([layer(x) for layer in linears], dim=1)
        torch.testing.assert_close(projection(x, None), base, atol=2e-5, rtol=0)


class Packings:
    """Counts the packed matrices that were made, and those that are left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._made: list[weakref.ref[PackedMatrix]] = []

        def pack(matrix: torch.Tensor) -> PackedMatrix:
            made = PackedMatrix(matrix)
            self._made.append(weakref.ref(made))
            return made

        monkeypatch.setattr(packed, "PackedMatrix", pack)

    @property
    def n_made(self) -> int:
        return len(self._made)

    @property
    def n_left(self) -> int:
        return sum(made() is not None for made in self._made)


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> Packings:
    packs(torch.float32)  # tried before it is counted
    return Packings(monkeypatch)


def n_matrices(model: XLoraModel) -> int:
    """Returns how many matrices are packed of a model: four a block, and the head."""
    return 4 * model.config.num_hidden_layers + 1 if packs(torch.float32) else 0


def own_logits(model: XLoraModel) -> tuple[RowBatch, torch.Tensor]:
    """Returns a batch of six tokens, and their logits by the model's own pass."""
    ids = tiny_prompt(1, 6)[0]
    scalings = torch.rand(6, len(model.lora_layer_names), 3)
    batch = RowBatch(token_ids=ids, segments=[Segment(row=0, start=0, n=6)], scalings=scalings)
    with torch.no_grad():
        return batch, model.main_pass(scalings=scalings[None], input_ids=ids[None]).logits[0]


def assert_reads(reader: RowReader | None, batch: RowBatch, expected: torch.Tensor) -> None:
    assert isinstance(reader, LlamaRows)
    reader.cache.grow(1, 6)
    torch.testing.assert_close(reader.logits(reader.read(batch)), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("opens", [LlamaRows, open_rows])
def test_a_packed_model_reads_the_same(
    tmp_path: Path, packings: Packings, opens: Callable[..., RowReader | None]
) -> None:
    """Also where nothing can be packed, and it is read as ever."""
    model = tiny_xlora(tmp_path)
    batch, own = own_logits(model)
    reader = opens(model, packed=True)
    assert packings.n_left == n_matrices(model)
    assert_reads(reader, batch, own)


def test_weights_that_changed_are_packed_anew(tmp_path: Path, packings: Packings) -> None:
    """Training writes to ``lora_A`` in place; by so little that no probe of a reader minds."""
    model = tiny_xlora(tmp_path)
    readers = []  # all in use
    for _ in range(3):
        readers.append(open_rows(model, packed=True))
        batch, own = own_logits(model)
        assert_reads(readers[-1], batch, own)
        with torch.no_grad():
            for layer in model.lora_layers:
                layer.lora_A.mul_(1.001)
    assert packings.n_left == 3 * n_matrices(model)


def test_a_closed_engine_leaves_nothing_packed(tmp_path: Path, packings: Packings) -> None:
    model = tiny_chat_xlora(tmp_path)
    engines = [Engine(model, tiny_tokenizer()) for _ in range(2)]
    n = n_matrices(model)
    for n_open in (2, 1, 0):
        assert packings.n_left == n_open * n
        if n_open:
            engines[n_open - 1].close()
    assert packings.n_made == 2 * n


def test_there_is_room_for_a_copy_of_what_fits_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(10, 10, bias=False)
    for free, has_room in ((800, True), (799, False)):
        monkeypatch.setattr(free_memory, "free_bytes", lambda _, free=free: free)
        assert has_room_for_copy(model) == has_room
