"""Rows through a model's own modules: for any decoder of Hugging Face's that keeps a KV cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from xlora_core.errors import ModelError
from xlora_core.model import XLoraModel
from xlora_core.passes import accepted
from xlora_core.rows.batch import RowBatch
from xlora_core.rows.cache import BlockShape, RowCache
from xlora_core.rows.head import logits_of
from xlora_core.rows.hf_cache import RowCacheView
from xlora_core.rows.layout import Grid
from xlora_core.rows.masks import RowMasks
from xlora_core.rows.reader import RowReader


class ModuleRows(RowReader):
    """Reads rows with the backbone's own forward: explicit positions and masks, a cache of rows.

    Args:
        model: The model; its modules are used as they are.
        cache: Where keys and values are kept, of the shapes that ``cached_shapes`` finds.
        masks: The form in which the model is told what a token sees.
    """

    def __init__(self, model: XLoraModel, cache: RowCache, masks: RowMasks) -> None:
        self.cache = cache
        self._model = model
        self._masks = masks
        self._view = RowCacheView(cache)

    @torch.no_grad()
    def read(self, batch: RowBatch) -> Tensor:
        """Reads a batch in as many calls of the backbone as its layout needs, mostly one.

        Raises:
            ModelError: If a segment lies outside of the cache.
        """
        self.cache.check_room(batch.segments)
        read = [(grid, self._read(grid, batch)) for grid in self._masks.grids(batch)]
        hidden = read[0][1].new_empty(batch.n_tokens, read[0][1].shape[-1])
        for grid, of_grid in read:
            grid.collect(of_grid, into=hidden)
        return hidden

    def _read(self, grid: Grid, batch: RowBatch) -> Tensor:
        """Returns ``[S, Q, H]``."""
        backbone: Any = self._model.base_model.base_model
        inputs: dict[str, Any] = {
            "input_ids": batch.token_ids[grid.tokens],
            "position_ids": grid.positions,
            "past_key_values": self._view,
            "use_cache": True,
            "return_dict": True,
        }
        if (mask := self._masks.of(grid)) is not None:
            inputs["attention_mask"] = mask
        with (
            self._view.reading(grid, self._masks.n_seen(grid)),
            self._model.active_scalings.hold(grid.scalings(batch)),
        ):
            hidden: Tensor = backbone(**accepted(backbone, inputs)).last_hidden_state
        return hidden

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Runs the model's own head, with whatever its architecture does around it."""
        return logits_of(self._model.base_model, hidden)


def cached_shapes(model: XLoraModel) -> RowCache:
    """Returns an empty cache of the shapes that a model's blocks keep, by reading one token.

    Raises:
        ModelError: If a block keeps anything but keys and values per token.
    """
    cache = DynamicCache(config=model.base_model.config)
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    model.main_pass(scalings=None, input_ids=token, past_key_values=cache, use_cache=True)
    kept = [_keys_and_values(layer) for layer in cache.layers]
    dtypes = {tensor.dtype for pair in kept for tensor in pair}
    if len(dtypes) != 1:
        raise ModelError(f"its blocks keep keys and values in {len(dtypes)} dtypes, expected one")
    blocks = [
        BlockShape(
            n_heads=keys.shape[1],
            key_size=keys.shape[3],
            value_size=values.shape[3],
            device=keys.device,  # of this block: a model may be spread over several
        )
        for keys, values in kept
    ]
    return RowCache(blocks, dtype=dtypes.pop(), device=model.device)


def _keys_and_values(layer: object) -> tuple[Tensor, Tensor]:
    """Returns what a block keeps of one token, ``[1, heads, 1, size]`` each."""
    # By exact class: heirs of these keep more than keys and values.
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise ModelError(f"its cache has a {type(layer).__name__}, not keys and values alone")
    keys, values = layer.keys, layer.values  # type: ignore[attr-defined]  # has been checked
    if keys is None or keys.ndim != 4 or keys.shape[:3] != values.shape[:3] or keys.shape[2] != 1:
        raise ModelError("its blocks do not each keep the keys and values of every token")
    return keys, values
