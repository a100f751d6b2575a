"""How rows are laid out for a forward call, and which places their tokens see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Llama4TextConfig, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_masks_for_generate

from xlora_core.errors import ModelError
from xlora_core.rows import RowBatch, Segment
from xlora_core.rows.layout import PADDING_WORTH_A_CALL, like_with_like, side_by_side
from xlora_core.rows.masks import ExplicitMasks, PaddingMasks, rules

# ---------------------------------------------------------------- layout


def batch_of(*segments: Segment, scalings: Tensor | None = None) -> RowBatch:
    n_tokens = sum(segment.n for segment in segments)
    return RowBatch(token_ids=torch.arange(n_tokens), segments=segments, scalings=scalings)


def test_single_tokens_share_a_call() -> None:
    (grid,) = side_by_side(batch_of(*(Segment(row=row, start=row + 3) for row in range(5))))
    assert (len(grid.lines), grid.width, grid.n_places) == (5, 1, 8)
    assert grid.positions.flatten().tolist() == [3, 4, 5, 6, 7]


def test_lines_are_in_the_order_of_their_rows() -> None:
    """Only then their keys are read without a copy; the batch's order is another one."""
    segments = [Segment(row=row, start=9) for row in (4, 2, 3)]
    (grid,) = side_by_side(batch_of(*segments))
    assert grid.rows.tolist() == [2, 3, 4]
    assert grid.tokens.flatten().tolist() == [1, 2, 0]
    assert grid.row_range == slice(2, 5)


def test_rows_with_a_gap_are_no_range() -> None:
    (grid,) = side_by_side(batch_of(Segment(row=0, start=1), Segment(row=2, start=1)))
    assert grid.row_range is None


def test_short_lines_are_padded_by_their_own_first_token() -> None:
    (grid,) = side_by_side(batch_of(Segment(row=0, start=4, n=3), Segment(row=1, start=9)))
    assert grid.tokens.tolist() == [[0, 1, 2], [3, 3, 3]]
    assert grid.positions.tolist() == [[4, 5, 6], [9, 9, 9]]
    assert grid.places.tolist() == [[4, 5, 6], [9, 9, 9]]
    hidden = torch.arange(6.0).reshape(2, 3, 1)
    collected = torch.full((4, 1), torch.nan)
    grid.collect(hidden, into=collected)
    assert collected.flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("lengths", "calls"),
    [
        ((1, 1 + PADDING_WORTH_A_CALL), 1),
        ((1, 2 + PADDING_WORTH_A_CALL), 2),
        ((1, 1, 1, 200), 2),
        ((200, 190, 180), 1),
        ((200, 190, 150), 2),
        ((7,), 1),
    ],
)
def test_segments_share_a_call_unless_padding_costs_more(
    lengths: tuple[int, ...], calls: int
) -> None:
    segments = [Segment(row=row, start=0, n=n) for row, n in enumerate(lengths)]
    grids = side_by_side(batch_of(*segments))
    assert len(grids) == calls
    assert sum(len(grid.lines) for grid in grids) == len(lengths)


def test_lengths_on_both_sides_of_a_boundary_run_apart() -> None:
    segments = [Segment(row=0, start=14, n=2), Segment(row=1, start=15, n=2)]
    below, above = side_by_side(batch_of(*segments), [16])
    assert (below.rows.tolist(), above.rows.tolist()) == ([0], [1])
    siblings = Segment(row=1, start=15, n=2, siblings=True)
    (together,) = side_by_side(batch_of(segments[0], siblings), [16])
    assert together.rows.tolist() == [0, 1]


def test_siblings_stand_at_one_position() -> None:
    (grid,) = side_by_side(
        batch_of(Segment(row=1, start=5), Segment(row=0, start=7, n=3, siblings=True))
    )
    assert grid.positions.tolist() == [[7, 7, 7], [5, 5, 5]]
    assert grid.places.tolist() == [[7, 8, 9], [5, 5, 5]]


def test_chunks_share_a_call_with_their_like_and_siblings_are_lines() -> None:
    singles, like, other = like_with_like(
        batch_of(
            Segment(row=2, start=3, n=4),
            Segment(row=0, start=7, n=2, siblings=True),
            Segment(row=1, start=5),
            Segment(row=3, start=4, n=4),
            Segment(row=4, start=3, n=4),
        )
    )
    assert (like.rows.tolist(), like.positions.tolist()) == ([2, 4], [[3, 4, 5, 6]] * 2)
    assert other.rows.tolist() == [3]
    assert [grid.is_ordinary for grid in (singles, like, other)] == [False, True, True]
    assert singles.rows.tolist() == [0, 0, 1]
    assert singles.tokens.flatten().tolist() == [4, 5, 6]
    assert singles.positions.flatten().tolist() == [7, 7, 5]
    assert singles.places.flatten().tolist() == [7, 8, 5]


@pytest.mark.parametrize(
    ("segments", "ordinary"),
    [
        ([Segment(row=0, start=3, n=2)], True),
        ([Segment(row=0, start=3, n=2), Segment(row=4, start=3, n=2)], True),
        ([Segment(row=0, start=3, n=2), Segment(row=1, start=3)], False),
        ([Segment(row=0, start=3), Segment(row=1, start=4)], False),
        ([Segment(row=0, start=3, siblings=True)], False),
    ],
)
def test_texts_as_long_as_each_other_are_an_ordinary_batch(
    segments: list[Segment], ordinary: bool
) -> None:
    (grid,) = side_by_side(batch_of(*segments))
    assert grid.is_ordinary is ordinary
    mask = ExplicitMasks(Backbone(CONFIGS["full"], "sdpa")).of(grid)
    assert (mask is None) is ordinary


def test_scalings_are_zero_for_padding_and_for_tokens_without_adapters() -> None:
    scalings = torch.arange(1.0, 9.0).reshape(4, 1, 2)
    batch = batch_of(
        Segment(row=1, start=0, n=3),
        Segment(row=2, start=0),
        Segment(row=0, start=4),
        scalings=scalings,
    )
    (grid,) = side_by_side(batch)
    held = grid.scalings(batch)
    assert held is not None
    (laid_out,) = held.tensors()
    assert laid_out[0].tolist() == [[[0, 0]]] * 3
    assert torch.equal(laid_out[1], scalings[:3])
    assert torch.equal(laid_out[2, 0], scalings[3])
    assert not laid_out[2, 1:].any()


def test_a_grid_without_adapters_runs_the_base_layers_alone() -> None:
    plain = batch_of(Segment(row=0, start=4))
    assert side_by_side(plain)[0].scalings(plain) is None
    chunk, token = Segment(row=0, start=0, n=100), Segment(row=1, start=3)
    mixed = batch_of(chunk, token, scalings=torch.ones(100, 1, 2))
    assert [grid.scalings(mixed) is None for grid in side_by_side(mixed)] == [False, True]


# ---------------------------------------------------------------- masks


class Length(DynamicCache):
    """Says that it holds so many tokens, of a text that is so long."""

    def __init__(self, n_seen: int, n_places: int) -> None:
        super().__init__()
        self._n_seen, self._n_places = n_seen, n_places

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._n_seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._n_places, 0


class Backbone:
    """As much of a model as masks look at."""

    dtype = torch.float32

    def __init__(self, config: Any, attention: str) -> None:
        self.config = config
        config._attn_implementation = attention  # as transformers sets it

    def forward(self, position_ids: Tensor) -> None:
        """Never called; says which arguments there are."""


CONFIGS = {
    "full": LlamaConfig(),
    "window": MistralConfig(sliding_window=4096),
    "by layer": Gemma2Config(sliding_window=40),
    "chunks": Llama4TextConfig(attention_chunk_size=64),
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CONFIGS)
def test_masks_are_those_that_transformers_makes_for_each_text(name: str, attention: str) -> None:
    """Line for line, at windows that no probe reaches."""
    backbone = Backbone(CONFIGS[name], attention)
    segments = [
        Segment(row=row, start=start, n=n)
        for row, (start, n) in enumerate([(0, 3), (39, 2), (63, 2), (4095, 3), (4200, 1)])
    ]
    (grid,) = side_by_side(batch_of(*segments))
    found = ExplicitMasks(backbone).of(grid)
    for line, segment in enumerate(segments):
        expected = create_masks_for_generate(
            backbone.config,
            torch.zeros(1, segment.n, 1),
            torch.ones(1, grid.n_places),
            Length(segment.start, grid.n_places),
        )
        if not isinstance(expected, dict):
            expected = {"": expected}
        of_kind = found if isinstance(found, dict) else {"": found}
        assert of_kind.keys() == expected.keys()
        for kind, mask in expected.items():
            own = of_kind[kind][line : line + 1, :, : segment.n]
            # None where a flag of the attention says it; eager attention has them all.
            assert mask is not None or attention == "sdpa"
            assert mask is None or torch.equal(own, mask)


def test_a_mask_never_hides_all_from_padding() -> None:
    """A softmax over nothing is not a number, and would spoil what else the call computes."""
    (grid,) = side_by_side(batch_of(Segment(row=0, start=0, n=4), Segment(row=1, start=0)))
    mask = ExplicitMasks(Backbone(CONFIGS["full"], "sdpa")).of(grid)
    assert isinstance(mask, Tensor)
    assert mask.any(-1).all()


def test_a_sibling_sees_what_came_before_and_itself() -> None:
    (grid,) = side_by_side(batch_of(Segment(row=0, start=3, n=2, siblings=True)))
    mask = ExplicitMasks(Backbone(MistralConfig(sliding_window=3), "sdpa")).of(grid)
    assert isinstance(mask, Tensor)
    assert mask[0, 0].int().tolist() == [[0, 1, 1, 1, 0], [0, 1, 1, 0, 1]]


def test_a_padding_mask_ends_where_each_line_does() -> None:
    (grid,) = like_with_like(batch_of(Segment(row=0, start=3), Segment(row=1, start=1)))
    masks = PaddingMasks(Backbone(CONFIGS["full"], "sdpa"))
    mask = masks.of(grid)
    assert mask is not None
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert masks.n_seen(grid) == 3


@pytest.mark.parametrize("name", ["window", "by layer", "chunks"])
def test_windows_are_refused_where_only_padding_is_masked(name: str) -> None:
    with pytest.raises(ModelError, match="see a window"):
        PaddingMasks(Backbone(CONFIGS[name], "sdpa"))


def test_attention_that_takes_no_mask_is_refused() -> None:
    with pytest.raises(ModelError, match="'flash_attention_2' takes no explicit mask"):
        ExplicitMasks(Backbone(LlamaConfig(), "flash_attention_2"))


def test_unknown_layers_are_refused() -> None:
    config = Gemma2Config()
    config.layer_types = ["full_attention", "conv"]
    with pytest.raises(ModelError, match="layers of type 'conv'"):
        rules(config)
