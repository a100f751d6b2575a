"""Texts that are read in rows, step by step, and what the model makes of each alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.tiny_models import VOCAB_SIZE
from xlora_core.model import XLoraModel
from xlora_core.rows import RowBatch, RowReader, Segment


@dataclass
class RowText:
    """A text in a row.

    Attributes:
        row: Where it is read.
        token_ids: ``[T]`` int64.
        scalings: ``[T, L, K]``; None reads it as the scaling pass does.
        hidden: What was read of it so far, ``[n, H]`` each.
        n_read: How many of its tokens were read.
    """

    row: int
    token_ids: Tensor
    scalings: Tensor | None
    hidden: list[Tensor] = field(default_factory=list)
    n_read: int = 0

    @property
    def n_left(self) -> int:
        """How many tokens are still to be read."""
        return len(self.token_ids) - self.n_read


def random_text(
    model: XLoraModel, row: int, length: int, *, adapted: bool, seed: int = 0
) -> RowText:
    """Returns a random text; with adapters every token and module has scalings of its own."""
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(3, VOCAB_SIZE, (length,), generator=generator)
    shape = (length, len(model.lora_layer_names), len(model.adapter_names))
    scalings = torch.rand(shape, generator=generator, dtype=torch.float64) if adapted else None
    return RowText(row, token_ids, None if scalings is None else scalings.to(model.dtype))


def read_on(reader: RowReader, reads: Sequence[tuple[RowText, int]], n_wrong: int = 0) -> None:
    """Reads the next tokens of several texts in one batch.

    Args:
        reader: The reader; its cache grows as needed.
        reads: Texts and how many tokens of each.
        n_wrong: Siblings to read beside each single token; the right one is the last, and kept.
    """
    reads = sorted(reads, key=lambda read: read[0].scalings is None)
    segments, tokens, scalings = [], [], []
    for text, n in reads:
        first, last = text.n_read, text.n_read + n
        siblings = n == 1 and n_wrong > 0
        wrong = n_wrong if siblings else 0
        segments.append(Segment(row=text.row, start=first, n=n + wrong, siblings=siblings))
        own = text.token_ids[first:last]
        tokens += [(own + 1 + i) % VOCAB_SIZE for i in range(wrong)] + [own]
        if text.scalings is not None:
            of_own = text.scalings[first:last]
            scalings += [1 - of_own] * wrong + [of_own]
    reader.cache.grow(1 + max(s.row for s in segments), max(s.stop for s in segments))
    batch = RowBatch(
        token_ids=torch.cat(tokens),
        segments=segments,
        scalings=torch.cat(scalings) if scalings else None,
    )
    hidden = reader.read(batch).split([segment.n for segment in segments])
    for (text, n), segment, of_segment in zip(reads, segments, hidden, strict=True):
        if segment.siblings:
            reader.cache.keep(segment, segment.n - 1)
        text.hidden.append(of_segment[segment.n - n :])
        text.n_read += n


def assert_as_alone(model: XLoraModel, reader: RowReader, text: RowText, tolerance: float) -> None:
    """Compares what was read of a text with one ordinary uncached call over it alone."""
    ids = text.token_ids[None, : text.n_read]
    hidden = torch.cat(text.hidden)
    scalings = None if text.scalings is None else text.scalings[None, : text.n_read]
    with torch.no_grad():
        expected = model.main_pass(scalings=scalings, input_ids=ids, use_cache=False).logits[0]
        near = {"atol": tolerance * float(expected.abs().max()), "rtol": 0}
        torch.testing.assert_close(reader.logits(hidden), expected, **near)
        if scalings is None:
            routed = model.scaling_pass(input_ids=ids, use_cache=False).router_logits[0]
            near = {"atol": tolerance * float(routed.abs().max()), "rtol": 0}
            torch.testing.assert_close(model.classifier(hidden[None])[0], routed, **near)
