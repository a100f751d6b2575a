"""The cache of rows: room, writing, copies, siblings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xlora_core.errors import ModelError
from xlora_core.rows import BlockShape, RowBatch, RowCache, Segment

BLOCKS = [
    BlockShape(n_heads=2, key_size=3, value_size=3),
    BlockShape(n_heads=1, key_size=4, value_size=2),
]


def cache(n_rows: int = 3, n_tokens: int = 8) -> RowCache:
    rows = RowCache(BLOCKS, dtype=torch.float32)
    rows.grow(n_rows, n_tokens)
    return rows


def written(rows: RowCache, segment: Segment, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Writes random keys and values of a segment to all blocks and returns them."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for block, shape in enumerate(BLOCKS):
        keys = torch.randn(shape.n_heads, segment.n, shape.key_size, generator=generator)
        values = torch.randn(shape.n_heads, segment.n, shape.value_size, generator=generator)
        rows.write(block, segment, keys, values)
        pairs.append((keys, values))
    return pairs


def test_a_new_cache_has_no_rows_and_takes_no_memory() -> None:
    rows = RowCache(BLOCKS, dtype=torch.float32)
    assert (rows.n_rows, rows.n_tokens) == (0, 0)
    assert [tensor.numel() for tensor in (*rows.keys, *rows.values)] == [0, 0, 0, 0]


def test_tensors_have_the_shape_of_their_block() -> None:
    rows = RowCache(BLOCKS, dtype=torch.bfloat16)
    rows.grow(3, 8)
    assert [tuple(t.shape) for t in rows.keys] == [(3, 2, 8, 3), (3, 1, 8, 4)]
    assert [tuple(t.shape) for t in rows.values] == [(3, 2, 8, 3), (3, 1, 8, 2)]
    assert {t.dtype for t in (*rows.keys, *rows.values)} == {torch.bfloat16}


def test_bytes_per_token_are_those_that_one_more_position_of_a_row_takes() -> None:
    def n_bytes(rows: RowCache) -> int:
        return sum(t.numel() * t.itemsize for t in (*rows.keys, *rows.values))

    assert n_bytes(cache(2, 9)) - n_bytes(cache(2, 8)) == 2 * cache().bytes_per_token
    half = RowCache(BLOCKS, dtype=torch.bfloat16)
    assert half.bytes_per_token == cache().bytes_per_token / 2


def test_growing_keeps_what_is_there() -> None:
    rows = cache(2, 4)
    pairs = written(rows, Segment(row=1, start=1, n=3))
    rows.grow(4, 6)
    assert (rows.n_rows, rows.n_tokens) == (4, 6)
    for block, (keys, values) in enumerate(pairs):
        assert torch.equal(rows.keys[block][1, :, 1:4], keys)
        assert torch.equal(rows.values[block][1, :, 1:4], values)
        # What is new is zero: a masked place times 0 must not be NaN.
        assert not rows.keys[block][2:].any()
        assert not rows.values[block][:, :, 4:].any()


def test_growing_to_less_changes_nothing() -> None:
    rows = cache(3, 8)
    tensors = [*rows.keys, *rows.values]
    rows.grow(2, 5)
    assert (rows.n_rows, rows.n_tokens) == (3, 8)
    assert all(a is b for a, b in zip(tensors, [*rows.keys, *rows.values], strict=True))


def test_growing_in_one_direction_keeps_the_other() -> None:
    rows = cache(3, 4)
    rows.grow(1, 9)
    assert (rows.n_rows, rows.n_tokens) == (3, 9)
    rows.grow(5, 0)
    assert (rows.n_rows, rows.n_tokens) == (5, 9)


def test_writing_touches_no_other_place() -> None:
    rows = cache()
    before = written(rows, Segment(row=0, start=0, n=8), seed=1)
    segment = Segment(row=2, start=3, n=2)
    pairs = written(rows, segment, seed=2)
    for block, (keys, values) in enumerate(pairs):
        assert torch.equal(rows.keys[block][2, :, 3:5], keys)
        assert torch.equal(rows.values[block][2, :, 3:5], values)
        assert torch.equal(rows.keys[block][0], before[block][0])
        assert not rows.values[block][1].any()
        assert not rows.keys[block][2, :, 5:].any()


def test_writing_again_overwrites() -> None:
    rows = cache()
    segment = Segment(row=1, start=2)
    written(rows, segment, seed=1)
    (keys, _), _ = written(rows, segment, seed=2)
    assert torch.equal(rows.keys[0][1, :, 2:3], keys)


def test_a_copied_row_has_the_first_positions_and_nothing_more() -> None:
    rows = cache()
    pairs = written(rows, Segment(row=0, start=0, n=8))
    rows.copy_row(0, [1, 2], 5)
    for block, (keys, values) in enumerate(pairs):
        for row in (1, 2):
            assert torch.equal(rows.keys[block][row, :, :5], keys[:, :5])
            assert torch.equal(rows.values[block][row, :, :5], values[:, :5])
            assert not rows.keys[block][row, :, 5:].any()


def test_an_erased_row_leaves_nothing_and_the_others_stay() -> None:
    rows = cache()
    kept = written(rows, Segment(row=1, start=0, n=8))
    for row in (0, 2):
        for tensor in (*rows.keys, *rows.values):
            tensor[row, :, :6] = torch.nan
    rows.erase([0, 2], 6)
    for block, (keys, values) in enumerate(kept):
        assert torch.equal(rows.keys[block][1], keys)
        assert torch.equal(rows.values[block][1], values)
        for row in (0, 2):
            assert torch.equal(rows.keys[block][row], torch.zeros_like(keys))
            assert torch.equal(rows.values[block][row], torch.zeros_like(values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_room_is_zeros_of_the_dtype_asked_for(dtype: torch.dtype) -> None:
    rows = RowCache(BLOCKS, dtype=dtype)
    rows.grow(3, 5)
    for block, keys, values in zip(BLOCKS, rows.keys, rows.values, strict=True):
        assert keys.dtype == values.dtype == dtype
        assert keys.shape == (3, block.n_heads, 5, block.key_size)
        assert values.shape == (3, block.n_heads, 5, block.value_size)
        assert not keys.any()
        assert not values.any()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_kept_sibling_lies_where_the_text_goes_on(which: int) -> None:
    rows = cache()
    past = written(rows, Segment(row=1, start=0, n=4), seed=1)
    siblings = Segment(row=1, start=4, n=3, siblings=True)
    pairs = written(rows, siblings, seed=2)
    rows.keep(siblings, which)
    for block, (keys, values) in enumerate(pairs):
        assert torch.equal(rows.keys[block][1, :, 4], keys[:, which])
        assert torch.equal(rows.values[block][1, :, 4], values[:, which])
        assert torch.equal(rows.keys[block][1, :, :4], past[block][0])
        assert not rows.keys[block][0].any()


def test_a_cleared_cache_gives_its_memory_back_and_grows_again_empty() -> None:
    rows = cache()
    written(rows, Segment(row=0, start=0, n=8))
    rows.clear()
    assert (rows.n_rows, rows.n_tokens) == (0, 0)
    assert sum(t.numel() for t in (*rows.keys, *rows.values)) == 0
    rows.grow(1, 8)
    assert not any(t.any() for t in (*rows.keys, *rows.values))


@pytest.mark.parametrize(
    "segment",
    [
        Segment(row=3, start=0),
        Segment(row=-1, start=0),
        Segment(row=0, start=-1),
        Segment(row=0, start=8),
        Segment(row=0, start=6, n=3),
        Segment(row=0, start=0, n=0),
    ],
)
def test_a_segment_outside_of_the_cache_is_refused(segment: Segment) -> None:
    rows = cache()
    rows.check_room([Segment(row=2, start=5, n=3)])
    with pytest.raises(ModelError, match=r"outside of the cache of 3 rows with 8 positions") as e:
        rows.check_room([Segment(row=0, start=0), segment])
    assert "grow" in e.value.hint


def test_a_segment_stops_behind_its_last_token() -> None:
    assert Segment(row=0, start=4, n=3).stop == 7
    assert Segment(row=0, start=4).stop == 5


def test_a_batch_counts_its_tokens() -> None:
    segments = [Segment(row=0, start=0, n=2), Segment(row=1, start=5)]
    plain = RowBatch(token_ids=torch.tensor([5, 6, 7]), segments=segments)
    assert (plain.n_tokens, plain.n_adapted) == (3, 0)
    mixed = RowBatch(
        token_ids=torch.tensor([5, 6, 7]), segments=segments, scalings=torch.ones(2, 1, 4)
    )
    assert (mixed.n_tokens, mixed.n_adapted) == (3, 2)
