"""The plainest way to read rows: every segment alone, by the model's own passes."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from xlora_core.model import XLoraModel
from xlora_core.rows import BlockShape, RowBatch, RowCache, RowReader, Segment


class LoneRows(RowReader):
    """Reads every token of every segment by itself, so nothing is shared that could be mixed up.

    Args:
        model: A model whose blocks cache one key and one value per token.
    """

    def __init__(self, model: XLoraModel) -> None:
        config = model.config.get_text_config()
        size = getattr(config, "head_dim", None)
        size = size or config.hidden_size // config.num_attention_heads
        n_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        shape = BlockShape(n_heads=n_heads, key_size=size, value_size=size)
        self._model = model
        self.cache = RowCache(
            [shape] * config.num_hidden_layers, dtype=model.dtype, device=model.device
        )
        self.batches: list[RowBatch] = []

    def read(self, batch: RowBatch) -> Tensor:
        """Reads token by token."""
        self.batches.append(batch)
        hidden, n = [], 0
        for segment in batch.segments:
            for i in range(segment.n):
                scalings = batch.scalings[n : n + 1] if n < batch.n_adapted else None
                place = segment.start + i
                known = segment.start if segment.siblings else place
                hidden.append(
                    self._read_one(int(batch.token_ids[n]), segment, known, place, scalings)
                )
                n += 1
        return torch.stack(hidden)

    def _read_one(
        self, token_id: int, segment: Segment, known: int, place: int, scalings: Tensor | None
    ) -> Tensor:
        cache = DynamicCache()
        tensors = zip(self.cache.keys, self.cache.values, strict=True)
        for block, (keys, values) in enumerate(tensors):
            if known:
                row = slice(segment.row, segment.row + 1)
                cache.update(keys[row, :, :known].clone(), values[row, :, :known].clone(), block)
        output = self._model.main_pass(
            scalings=None if scalings is None else scalings[None],
            input_ids=torch.tensor([[token_id]], device=self._model.device),
            past_key_values=cache,
            output_hidden_states=True,
        )
        for block, layer in enumerate(cache.layers):
            self.cache.keys[block][segment.row, :, place] = layer.keys[0, :, -1]
            self.cache.values[block][segment.row, :, place] = layer.values[0, :, -1]
        return output.hidden_states[-1][0, -1]

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns the head's logits."""
        return self._model.get_output_embeddings()(hidden)
