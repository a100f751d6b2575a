"""Whether a reader of rows gives a model's own numbers: a few tokens, read both ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from xlora_core.errors import ModelError
from xlora_core.model import XLoraModel
from xlora_core.rows.batch import RowBatch, Segment
from xlora_core.rows.cache import RowCache
from xlora_core.rows.reader import RowReader

# Largest part of the logits' size that rounding explains; some architectures compute parts in
# float32 always. A wrong mask or position is of the size of the logits themselves.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Made-up keys and values that may be held for the length of the probe, in bytes.
_MAX_BYTES = 2**28
_SHORT_PAST, _PAST = 2, 7
_N_ADAPTED, _N_PLAIN = 6, 3


class Probe:
    """A few random tokens after a made-up past, and what the model makes of them.

    The pasts differ in length; the longer one reaches beyond the model's windows. Reading so much
    would take long: they are the keys and values of a few tokens, over and over.

    Args:
        model: The model; it is only called.
        empty: An empty cache of its blocks' shapes.
    """

    def __init__(self, model: XLoraModel, empty: RowCache) -> None:
        self._model = model
        self._generator = torch.Generator().manual_seed(0)
        longest = min(model.context_length - _N_ADAPTED, _MAX_BYTES // empty.bytes_per_token)
        self._starts = (_SHORT_PAST, min(_past(model), longest))
        self._tokens = [self._random_tokens(n) for n in (_N_ADAPTED, _N_PLAIN)]
        few = self._keys_and_values(self._random_tokens(_PAST))
        self._pasts = [[_over_and_over(pair, n) for pair in few] for n in self._starts]
        shape = (_N_ADAPTED, len(model.lora_layer_names), len(model.adapter_names))
        mixture = torch.rand(shape, generator=self._generator)
        self._scalings = (mixture / mixture.sum(-1, keepdim=True)).to(model.device)
        self._expected = [
            self._own_logits(0, self._scalings[None]),
            self._own_logits(1, None),
        ]

    def _random_tokens(self, n: int) -> Tensor:
        """Returns random token ids ``[n]``."""
        vocabulary = self._model.base_model.get_input_embeddings().num_embeddings
        return torch.randint(vocabulary, (n,), generator=self._generator).to(self._model.device)

    def _keys_and_values(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Returns what every block keeps of some tokens, ``[1, heads, n, size]`` each."""
        # Without a config it keeps all of them, whatever the window.
        cache = DynamicCache()
        self._model.main_pass(
            scalings=None, input_ids=tokens[None], past_key_values=cache, use_cache=True
        )
        return [(keys, values) for keys, values, _ in cache]

    def _own_logits(self, text: int, scalings: Tensor | None) -> Tensor:
        """Returns the model's logits ``[n, V]`` of a text, in one ordinary call."""
        cache = DynamicCache(config=self._model.base_model.config)
        for block, (keys, values) in enumerate(self._pasts[text]):
            cache.update(keys, values, block)
        output: Any = self._model.main_pass(
            scalings=scalings,
            input_ids=self._tokens[text][None],
            past_key_values=cache,
            use_cache=True,
        )
        logits: Tensor = output.logits[0]
        return logits

    def check(self, reader: RowReader) -> None:
        """Raises unless a reader gives the model's logits. Its cache is empty afterwards.

        Raises:
            ModelError: If it gives others.
        """
        try:
            found = self._in_rows(reader)
            dtype = reader.cache.keys[0].dtype
        finally:
            reader.cache.clear()
        tolerance = TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])
        for text, what in enumerate(("with adapters", "without adapters")):
            expected, logits = self._expected[text].double(), found[text].double()
            off = float((logits - expected).norm() / expected.norm())
            if not off <= tolerance:  # NaN is not, either
                raise ModelError(
                    f"logits {what} differ from the model's own by {off:.1e} of their size, "
                    f"expected {tolerance:.0e} at most"
                )

    def _in_rows(self, reader: RowReader) -> list[Tensor]:
        """Returns the logits ``[n, V]`` of both texts, read in rows in every way there is."""
        cache, a, b = reader.cache, *self._starts
        cache.grow(2, max(a + _N_ADAPTED, b + _N_PLAIN + 1))
        for row, past in enumerate(self._pasts):
            segment = Segment(row=row, start=0, n=self._starts[row])
            for block, (keys, values) in enumerate(past):
                cache.write(block, segment, keys[0], values[0])
        adapted, plain = self._tokens
        # A chunk alone, a chunk beside a token, a token beside siblings, two tokens.
        first = self._read(reader, [(adapted[:2], Segment(row=0, start=a, n=2))])
        second = self._read(
            reader,
            [
                (adapted[2:4], Segment(row=0, start=a + 2, n=2)),
                (plain[:1], Segment(row=1, start=b)),
            ],
        )
        siblings = Segment(row=1, start=b + 1, n=2, siblings=True)
        token = (adapted[4:5], Segment(row=0, start=a + 4))
        third = self._read(reader, [token, (plain[[2, 1]], siblings)])
        cache.keep(siblings, 1)
        token = (adapted[5:], Segment(row=0, start=a + 5))
        fourth = self._read(reader, [token, (plain[2:], Segment(row=1, start=b + 2))])
        return [
            torch.cat([first[0], second[0], third[0], fourth[0]]),
            torch.cat([second[1], third[1][1:], fourth[1]]),
        ]

    def _read(self, reader: RowReader, reads: Sequence[tuple[Tensor, Segment]]) -> list[Tensor]:
        """Returns the logits ``[n, V]`` of each segment; the first has adapters."""
        segments = [segment for _, segment in reads]
        of_adapted = slice(segments[0].start - self._starts[0], segments[0].stop - self._starts[0])
        batch = RowBatch(
            token_ids=torch.cat([tokens for tokens, _ in reads]),
            segments=segments,
            scalings=self._scalings[of_adapted],
        )
        logits = reader.logits(reader.read(batch))
        return list(logits.split([segment.n for segment in segments]))


def _over_and_over(pair: tuple[Tensor, Tensor], n: int) -> tuple[Tensor, Tensor]:
    """Returns keys and values as of n tokens, made of those of a few."""
    places = torch.arange(n, device=pair[0].device) % pair[0].shape[2]
    return pair[0][:, :, places], pair[1][:, :, places]


def _past(model: XLoraModel) -> int:
    """Returns a length of text that reaches beyond every window of the model's layers."""
    config = model.base_model.config.get_text_config().to_dict()
    windows = [
        value
        for name, value in config.items()
        if isinstance(value, int) and ("window" in name or "chunk" in name) and "layers" not in name
    ]
    return max([_PAST, *(size + 2 for size in windows)])
