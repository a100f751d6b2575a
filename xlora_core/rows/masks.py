"""Which places of a row a token sees, in the forms that Hugging Face's models take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xlora_core.errors import ModelError
from xlora_core.passes import accepted
from xlora_core.rows.batch import RowBatch
from xlora_core.rows.layout import Grid, like_with_like, side_by_side

# (position of the token, place of the key) -> whether the layer looks there; causal besides.
Rule = Callable[[Tensor, Tensor], Tensor]


class RowMasks(ABC):
    """How a model is told what a token sees: layout of the batch, and mask."""

    @abstractmethod
    def grids(self, batch: RowBatch) -> list[Grid]:
        """Lays a batch out so that the masks can say what its tokens see."""

    @abstractmethod
    def of(self, grid: Grid) -> Tensor | dict[str, Tensor] | None:
        """Returns the ``attention_mask`` of a grid; None if the model's own is right."""

    @abstractmethod
    def n_seen(self, grid: Grid) -> int:
        """Returns how many tokens the cache shall say it holds before the call."""


class ExplicitMasks(RowMasks):
    """``[S, 1, Q, T]`` masks, as models take them from ``generate`` with a static cache.

    Args:
        backbone: The model without its head; its config names the windows of its layers.

    Raises:
        ModelError: If the model's layers or its attention take no such mask.

    Source: transformers 5.23, ``create_masks_for_generate``.
    """

    def __init__(self, backbone: Any) -> None:
        if not accepted(backbone, {"position_ids": None}):
            # It counts places: a sibling's place is not its position.
            raise ModelError("the model takes no positions")
        config = backbone.config.get_text_config()
        self._rules = rules(config)
        self._boundaries = _rotary_boundaries(getattr(config, "rope_parameters", None))
        implementation = config._attn_implementation  # noqa: SLF001  # as the model asks
        if implementation not in ("eager", "sdpa"):
            raise ModelError(
                f"attention {implementation!r} takes no explicit mask, expected eager or sdpa"
            )
        self._additive: torch.dtype | None = backbone.dtype if implementation == "eager" else None

    def grids(self, batch: RowBatch) -> list[Grid]:
        """All lines side by side, but for those whose length chooses other rotary frequencies."""
        return side_by_side(batch, self._boundaries)

    def n_seen(self, grid: Grid) -> int:
        """The position of all lines; if they differ, the mask says it."""
        return grid.lines[0].segment.start

    def of(self, grid: Grid) -> Tensor | dict[str, Tensor] | None:
        """One mask, or one by layer type."""
        if grid.is_ordinary:
            return None
        if isinstance(self._rules, dict):
            return {kind: self._mask(rule, grid) for kind, rule in self._rules.items()}
        return self._mask(self._rules, grid)

    def _mask(self, rule: Rule | None, grid: Grid) -> Tensor:
        position = grid.positions[:, None, :, None]
        place = torch.arange(grid.n_places, device=position.device)
        seen = place <= position
        if rule is not None:
            seen &= rule(position, place)
        if grid.has_siblings:
            # The places from ``start`` on hold the other siblings.
            seen &= (place < position) | ~grid.are_siblings[:, None, None, None]
            seen |= place == grid.places[:, None, :, None]
        if self._additive is None:
            return seen
        hidden = torch.finfo(self._additive).min
        return torch.zeros_like(seen, dtype=self._additive).masked_fill_(~seen, hidden)


class PaddingMasks(RowMasks):
    """``[S, T]`` masks, for models that compute more from a mask than what is seen (ALiBi).

    They can say where a line ends, not what a token inside it sees: chunks share a
    call with their like alone.

    Args:
        backbone: The model without its head.

    Raises:
        ModelError: If what its tokens see depends on more than where a line ends.
    """

    def __init__(self, backbone: Any) -> None:
        config = backbone.config.get_text_config()
        found = rules(config)
        looks = found.values() if isinstance(found, dict) else [found]
        if any(rule is not None for rule in looks):
            raise ModelError("its layers see a window, which ends elsewhere in each line")
        if _rotary_boundaries(getattr(config, "rope_parameters", None)):
            raise ModelError("its rotary frequencies depend on how long a text is")

    def grids(self, batch: RowBatch) -> list[Grid]:
        """Single tokens side by side, chunks with their like."""
        return like_with_like(batch)

    def n_seen(self, grid: Grid) -> int:
        """All places of single tokens; the mask takes away what a line does not have."""
        return grid.n_places - grid.width

    def of(self, grid: Grid) -> Tensor | None:
        """1 for the places up to the token's position."""
        if grid.is_ordinary:
            return None
        place = torch.arange(grid.n_places, device=grid.positions.device)
        return (place <= grid.positions).to(torch.int64)


def rules(config: Any) -> Rule | dict[str, Rule | None] | None:
    """Returns what the layers look at, by layer type if the model takes one mask for each.

    None is everything before the token.

    Raises:
        ModelError: If a layer is not known to attend to keys and values alone.
    """
    if hasattr(config, "layer_types"):
        by_type: dict[str, Rule | None] = {}
        for kind in dict.fromkeys(config.layer_types):
            if kind == "full_attention":
                by_type[kind] = None
            elif kind == "sliding_attention":
                by_type[kind] = _window(config.sliding_window)
            elif kind == "chunked_attention":
                by_type[kind] = _chunks(config.attention_chunk_size)
            else:
                raise ModelError(f"the model has layers of type {kind!r}")
        return by_type
    if getattr(config, "sliding_window", None) is not None:
        return _window(config.sliding_window)
    if getattr(config, "attention_chunk_size", None) is not None:
        return _chunks(config.attention_chunk_size)
    return None


def _rotary_boundaries(parameters: object) -> list[int]:
    """Returns the lengths of text beyond which rotary frequencies are others.

    The longest text of a call chooses the frequencies for all of it.

    Args:
        parameters: The config's ``rope_parameters``, which may be one set per layer type.

    Raises:
        ModelError: If they are others at every length.

    Source: transformers 5.23, ``dynamic_rope_update``.
    """
    if not isinstance(parameters, dict):
        return []
    kind = str(parameters.get("rope_type"))
    if "dynamic" in kind:
        raise ModelError(f"its rotary frequencies ({kind}) depend on how long a text is")
    if kind == "longrope":
        return [int(parameters["original_max_position_embeddings"])]
    return [length for value in parameters.values() for length in _rotary_boundaries(value)]


def _window(size: int) -> Rule:
    return lambda position, place: place > position - size


def _chunks(size: int) -> Rule:
    return lambda position, place: place // size == position // size
