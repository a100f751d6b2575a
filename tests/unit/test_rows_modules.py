"""Rows through a model's modules: cache, calls, head."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from tests.decoders import decoder_xlora, decoders, longrope_decoder
from tests.row_texts import assert_as_alone, random_text, read_on
from xlora_core.errors import ModelError
from xlora_core.model import XLoraModel
from xlora_core.rows import BlockShape, RowBatch, RowCache, Segment
from xlora_core.rows.hf_cache import RowCacheView
from xlora_core.rows.layout import Grid, side_by_side
from xlora_core.rows.masks import ExplicitMasks
from xlora_core.rows.modules import ModuleRows, cached_shapes


def batch_of(*segments: Segment, scalings: Tensor | None = None) -> RowBatch:
    n_tokens = sum(segment.n for segment in segments)
    return RowBatch(token_ids=torch.arange(n_tokens), segments=segments, scalings=scalings)


# ---------------------------------------------------------------- cache


def cache_view() -> tuple[RowCache, RowCacheView]:
    rows = RowCache([BlockShape(n_heads=2, key_size=3, value_size=3)], dtype=torch.float32)
    rows.grow(4, 8)
    for tensor in (*rows.keys, *rows.values):
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))
    return rows, RowCacheView(rows)


def update(view: RowCacheView, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    new = torch.randn(len(grid.lines), 2, grid.width, 3)
    with view.reading(grid, 0):
        keys, values = view.update(new, -new, 0)
    return new, keys, values


def test_keys_of_consecutive_rows_are_not_copied() -> None:
    rows, view = cache_view()
    (grid,) = side_by_side(batch_of(Segment(row=2, start=5), Segment(row=1, start=3)))
    new, keys, values = update(view, grid)
    assert keys.shape == (2, 2, 6, 3)
    assert keys.untyped_storage().data_ptr() == rows.keys[0].untyped_storage().data_ptr()
    assert torch.equal(keys[0, :, 3], new[0, :, 0])
    assert torch.equal(values[1, :, 5], -new[1, :, 0])


def test_keys_of_other_rows_are_gathered() -> None:
    rows, view = cache_view()
    (grid,) = side_by_side(batch_of(Segment(row=3, start=5), Segment(row=1, start=3)))
    new, keys, _ = update(view, grid)
    assert torch.equal(keys, rows.keys[0][[1, 3], :, :6])
    assert torch.equal(rows.keys[0][3, :, 5], new[1, :, 0])


def test_padding_is_not_stored() -> None:
    rows, view = cache_view()
    before = rows.keys[0].clone()
    (grid,) = side_by_side(batch_of(Segment(row=0, start=0, n=3), Segment(row=1, start=5)))
    new, _, _ = update(view, grid)
    assert torch.equal(rows.keys[0][0, :, :3], new[0])
    assert torch.equal(rows.keys[0][1, :, 5], new[1, :, 0])
    before[0, :, :3], before[1, :, 5] = new[0], new[1, :, 0]
    assert torch.equal(rows.keys[0], before)


@pytest.mark.parametrize("rows", [(0, 1), (0, 2)])
def test_a_block_on_another_device_keeps_its_keys_there(rows: tuple[int, ...]) -> None:
    """As of a model that is spread over several; ``meta`` is a device without data."""
    meta = torch.device("meta")
    blocks = [BlockShape(n_heads=2, key_size=3, value_size=3, device=d) for d in (None, meta)]
    cache = RowCache(blocks, dtype=torch.float32)
    cache.grow(3, 8)
    view = RowCacheView(cache)
    assert [t.device.type for t in (*cache.keys, *cache.values)] == ["cpu", "meta"] * 2
    (grid,) = side_by_side(batch_of(*(Segment(row=row, start=2) for row in rows)))
    with view.reading(grid, 0):
        new = torch.zeros(2, 2, 1, 3, device=meta)
        keys, values = view.update(new, new, 1)
    assert (keys.device, values.device) == (meta, meta)
    assert keys.shape == (2, 2, 3, 3)


def test_a_view_outside_of_a_read_is_refused() -> None:
    _, view = cache_view()
    with pytest.raises(ModelError, match=r"through RowReader\.read"):
        view.update(torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 3), 0)


# ---------------------------------------------------------------- reading


@pytest.fixture
def model(tmp_path: Path) -> XLoraModel:
    return decoder_xlora(tmp_path, decoders()["gemma2"])


def module_rows(model: XLoraModel) -> ModuleRows:
    return ModuleRows(model, cached_shapes(model), ExplicitMasks(model.base_model.base_model))


@pytest.fixture
def calls(model: XLoraModel) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the tokens that the first block read, call by call."""
    shapes: list[tuple[int, ...]] = []
    block = model.base_model.model.layers[0]
    hook = block.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape[:2]))
    yield shapes
    hook.remove()


def test_a_decode_step_of_all_rows_is_one_call(
    model: XLoraModel, calls: list[tuple[int, ...]]
) -> None:
    reader = module_rows(model)
    texts = [random_text(model, row, 5, adapted=row < 2, seed=row) for row in range(4)]
    read_on(reader, [(text, 3 + i % 2) for i, text in enumerate(texts)])
    calls.clear()
    read_on(reader, [(text, 1) for text in texts])
    assert calls == [(4, 1)]


def test_the_cache_has_the_shapes_of_the_blocks(model: XLoraModel) -> None:
    empty = cached_shapes(model)
    assert (empty.n_rows, empty.n_tokens) == (0, 0)
    empty.grow(3, 7)
    assert [tuple(t.shape) for t in empty.keys] == [(3, 2, 7, 8)] * 2
    assert empty.keys[0].dtype == torch.float64


def test_a_segment_without_room_is_refused(model: XLoraModel) -> None:
    reader = module_rows(model)
    reader.cache.grow(1, 4)
    with pytest.raises(ModelError, match="outside of the cache of 1 rows with 4 positions"):
        reader.read(RowBatch(token_ids=torch.tensor([5]), segments=[Segment(row=0, start=4)]))


def test_a_read_that_fails_leaves_the_model_as_it_was(
    model: XLoraModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what was read before: the same tokens are read again at the same places."""
    reader = module_rows(model)
    text = random_text(model, 0, 6, adapted=True)
    read_on(reader, [(text, 3)])
    last = model.base_model.model.layers[-1]

    def fails(*args: object, **kwargs: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(last, "forward", fails)
        with pytest.raises(MemoryError):
            read_on(reader, [(text, 2)])
    assert model.active_scalings.value is None
    read_on(reader, [(text, 2)])
    assert_as_alone(model, reader, text, 1e-6)


def test_reading_needs_no_gradient(model: XLoraModel) -> None:
    reader = module_rows(model)
    reader.cache.grow(1, 1)
    hidden = reader.read(RowBatch(token_ids=torch.tensor([5]), segments=[Segment(row=0, start=0)]))
    assert not hidden.requires_grad
    assert not reader.logits(hidden).requires_grad


def test_one_set_of_scalings_serves_all_modules(model: XLoraModel) -> None:
    """``[M, 1, K]``, of a router that is not layerwise or of an arm with constant scalings."""
    reader = module_rows(model)
    text = random_text(model, 0, 5, adapted=True)
    assert text.scalings is not None
    text.scalings = text.scalings[:, :1]
    read_on(reader, [(text, 4)])
    read_on(reader, [(text, 1)])
    assert_as_alone(model, reader, text, 1e-6)


def test_texts_beyond_a_rotary_boundary_keep_their_own_frequencies(tmp_path: Path) -> None:
    """Read in rows as read step by step with a cache of its own: that is what there is to equal.

    One uncached call would take the long frequencies for the first tokens, too.
    """
    model = decoder_xlora(tmp_path, longrope_decoder())
    reader = module_rows(model)
    long = random_text(model, 0, 20, adapted=False, seed=1)
    short = random_text(model, 1, 9, adapted=False, seed=2)
    read_on(reader, [(long, 14), (short, 3)])
    for _ in range(6):
        read_on(reader, [(long, 1), (short, 1)])
    assert_as_alone(model, reader, short, 1e-9)
    cache = DynamicCache(config=model.base_model.config)
    with torch.no_grad():
        steps = [long.token_ids[:14], *long.token_ids[14:].split(1)]
        expected = [
            model.main_pass(scalings=None, input_ids=ids[None], past_key_values=cache).logits[0]
            for ids in steps
        ]
        found = reader.logits(torch.cat(long.hidden))
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite", "opt", "gpt2", "mixtral"])
def test_logits_are_the_models_own(tmp_path: Path, name: str) -> None:
    """Caps, scales and projections around a head are the architecture's."""
    model = decoder_xlora(tmp_path, decoders()[name])
    ids = torch.tensor([[5, 9, 4]])
    with torch.no_grad():
        hidden = model.base_model.base_model(input_ids=ids).last_hidden_state[0]
        expected = model.base_model(input_ids=ids).logits[0]
        plain = hidden @ model.base_model.get_output_embeddings().weight.T
    assert torch.equal(module_rows(model).logits(hidden), expected)
    assert torch.equal(plain, expected) == (name in ("opt", "gpt2", "mixtral"))
