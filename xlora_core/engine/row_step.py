"""One run over the weights for any number of arms and passes, and what each gets out of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xlora_core.rows import RowBatch, RowReader, Segment

if TYPE_CHECKING:
    from xlora_core.model import XLoraModel


@dataclass(frozen=True, kw_only=True)
class RowRead:
    """What one pass of one arm reads.

    Attributes:
        segment: Where the tokens stand.
        token_ids: The segment's n tokens.
        scalings: ``[n or 1, L or 1, K]``, effective; None runs the base layers alone.
        routes: Whether this is a scaling pass, whose hidden states the classifier reads.
        n_logits: Of how many of its last tokens the language model's logits are wanted.
        n_drafts: How many of its last tokens are drafts: nothing is lost if they are not read.
    """

    segment: Segment
    token_ids: Sequence[int]
    scalings: Tensor | None
    routes: bool = False
    n_logits: int = 0
    n_drafts: int = 0

    def without_drafts(self) -> RowRead | None:
        """Returns the read of its other tokens; None if it has no others."""
        n = self.segment.n - self.n_drafts
        if n == 0:
            return None
        if self.n_drafts == 0:
            return self
        # The scalings stay: a draft has those of the token before.
        return replace(
            self,
            segment=replace(self.segment, n=n),
            token_ids=self.token_ids[:n],
            n_logits=max(self.n_logits - self.n_drafts, 0),
            n_drafts=0,
        )


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """What came out of a ``RowRead``.

    Attributes:
        router_logits: ``[n, L or 1, K]`` of a scaling pass; None of any other.
        logits: ``[n_logits, V]``, fewer if drafts were not read; None if none were wanted.
    """

    router_logits: Tensor | None
    logits: Tensor | None


class RowStep:
    """Runs reads together.

    Args:
        model: The model: its classifier is what routes.
        reader: Runs its base over rows.
    """

    def __init__(self, model: XLoraModel, reader: RowReader) -> None:
        self._model = model
        self._reader = reader

    def run(self, reads: Sequence[RowRead]) -> list[RowResult]:
        """Reads all at once; no work is done for classifier or head that nobody asked for.

        A broken expert makes NaN, and 0 times NaN is NaN: it may reach rows in which the expert
        has a scaling of 0, and from a draft the token before it. So if anything is not finite, all
        are read again one by one and without drafts, and only what is broken by itself stays so.

        Args:
            reads: At least one, no two of the same row.

        Returns:
            One result per read, in their order.
        """
        results, are_finite = self._run(reads)
        alone = [read.without_drafts() for read in reads]
        if are_finite or (len(reads) == 1 and alone[0] is reads[0]):
            return results
        nothing = RowResult(router_logits=None, logits=None)
        return [nothing if read is None else self._run([read])[0][0] for read in alone]

    def _run(self, reads: Sequence[RowRead]) -> tuple[list[RowResult], bool]:
        """Returns the results, and whether no hidden state behind them has a NaN or infinity."""
        # Those with adapters first, as a batch has them.
        order = sorted(range(len(reads)), key=lambda i: reads[i].scalings is None)
        ordered = [reads[i] for i in order]
        hidden = self._reader.read(self._batch(ordered))
        spans = _spans([read.segment.n for read in ordered])
        routed = _gathered(hidden, [s for r, s in zip(ordered, spans, strict=True) if r.routes])
        wanted = [
            slice(span.stop - read.n_logits, span.stop)
            for read, span in zip(ordered, spans, strict=True)
            if read.n_logits
        ]
        chosen = _gathered(hidden, wanted)
        router_logits = None if routed is None else self._model.classifier(routed[None])[0]
        logits = None if chosen is None else self._reader.logits(chosen)
        are_finite = all(rows is None or bool(rows.isfinite().all()) for rows in (routed, chosen))
        return _dealt(reads, order, router_logits, logits), are_finite

    def _batch(self, reads: Sequence[RowRead]) -> RowBatch:
        token_ids = [token for read in reads for token in read.token_ids]
        adapted = [r.scalings.expand(r.segment.n, -1, -1) for r in reads if r.scalings is not None]
        n_layers = max((s.shape[1] for s in adapted), default=1)
        return RowBatch(
            token_ids=torch.tensor(token_ids, dtype=torch.long, device=self._model.device),
            segments=[read.segment for read in reads],
            scalings=torch.cat([s.expand(-1, n_layers, -1) for s in adapted]) if adapted else None,
        )


def _spans(sizes: Sequence[int]) -> list[slice]:
    """Returns where runs of these sizes lie, one after the other."""
    spans, start = [], 0
    for size in sizes:
        spans.append(slice(start, start + size))
        start += size
    return spans


def _gathered(hidden: Tensor, spans: Sequence[slice]) -> Tensor | None:
    """Returns the rows of all spans, one after the other; None if there are none."""
    if not spans:
        return None
    follow = all(a.stop == b.start for a, b in itertools.pairwise(spans))
    if follow:
        return hidden[spans[0].start : spans[-1].stop]
    return torch.cat([hidden[span] for span in spans])


def _dealt(
    reads: Sequence[RowRead],
    order: Sequence[int],
    router_logits: Tensor | None,
    logits: Tensor | None,
) -> list[RowResult]:
    """Deals the rows of both tensors out to the reads they belong to."""
    results: dict[int, RowResult] = {}
    n_routed = n_logits = 0
    for i in order:
        read = reads[i]
        routing = read_logits = None
        if read.routes and router_logits is not None:
            routing = router_logits[n_routed : n_routed + read.segment.n]
            n_routed += read.segment.n
        if read.n_logits and logits is not None:
            read_logits = logits[n_logits : n_logits + read.n_logits]
            n_logits += read.n_logits
        results[i] = RowResult(router_logits=routing, logits=read_logits)
    return [results[i] for i in range(len(reads))]
