"""Packed matrices: the same products, copies that are shared while they are in use."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.tiny_models import tiny_prompt, tiny_xlora
from tests.unit.test_rows_projection import expected, layers
from xlora_core.engine import free_memory
from xlora_core.engine.free_memory import has_room_for_copy
from xlora_core.rows import RowBatch, Segment, packed
from xlora_core.rows.llama import LlamaRows
from xlora_core.rows.opening import open_rows
from xlora_core.rows.packed import PackedMatrix, Product, packed_matrix, packs
from xlora_core.rows.projection import FusedProjection, RankWeights

# Of those that this CPU can pack.
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if packs(dtype)]
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
    torch.testing.assert_close(PackedMatrix(matrix)(x, bias), own, **near)
    for packed_too in (False, True):
        product = Product(matrix, bias, packed=packed_too)
        torch.testing.assert_close(product(x), own, **near)
        torch.testing.assert_close(product(x, 5), own[:, :5], **near)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_types_are_not_packed(dtype: torch.dtype) -> None:
    assert not packs(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_who_packs_the_same_shares_it_while_it_is_in_use(dtype: torch.dtype) -> None:
    part = torch.ones(4, 8, dtype=dtype)
    first = packed_matrix(part)
    assert packed_matrix(part) is first
    assert packed_matrix(part[:2]) is not first
    part.mul_(2)  # what was packed before is another matrix
    second = packed_matrix(part)
    assert second is not first
    assert float(second(torch.ones(1, 8, dtype=dtype))[0, 0]) == 16
    n_known = len(packed._known)
    del first, second
    gc.collect()
    assert len(packed._known) == n_known - 2


@pytest.mark.parametrize("n_adapted", [0, 1, 3])
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d == torch.float32])
def test_a_packed_projection_is_the_layers_side_by_side(dtype: torch.dtype, n_adapted: int) -> None:
    linears = layers(dtype)
    x = torch.randn(3, 24, dtype=dtype)
    scalings = torch.rand(n_adapted, 2, 4, dtype=dtype)
    with torch.no_grad():
        own = expected(linears, x, scalings)
        projection = FusedProjection(linears, packed=True)
        (weights,) = RankWeights([projection], dtype).of(scalings, 3)
        torch.testing.assert_close(projection(x, weights), own, atol=2e-5, rtol=0)
        base = torch.cat([layer(x) for layer in linears], dim=1)
        torch.testing.assert_close(projection(x, None), base, atol=2e-5, rtol=0)


def test_a_packed_model_reads_the_same(tmp_path: Path) -> None:
    """Also where nothing can be packed, and it is read as ever."""
    model = tiny_xlora(tmp_path)
    ids = tiny_prompt(1, 6)[0]
    scalings = torch.rand(6, len(model.lora_layer_names), 3)
    batch = RowBatch(token_ids=ids, segments=[Segment(row=0, start=0, n=6)], scalings=scalings)
    own = model.main_pass(scalings=scalings[None], input_ids=ids[None]).logits[0]
    for reader in (LlamaRows(model, packed=True), open_rows(model, packed=True)):
        assert isinstance(reader, LlamaRows)
        reader.cache.grow(1, 6)
        torch.testing.assert_close(reader.logits(reader.read(batch)), own, atol=1e-4, rtol=0)


def test_there_is_room_for_a_copy_of_what_fits_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(10, 10, bias=False)
    for free, has_room in ((800, True), (799, False)):
        monkeypatch.setattr(free_memory, "free_bytes", lambda _, free=free: free)
        assert has_room_for_copy(model) == has_room
