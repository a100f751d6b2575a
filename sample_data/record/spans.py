"""Which adapter leads in which part of a run: the prompt's paragraphs, and the answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

from sample_data.record.errors import RecordingError
from sample_data.record.recordings import Recording, paragraphs
from xlora_core.recording import Run, Track
from xlora_core.recording.summaries import effective_number, lead_share


@dataclass(frozen=True, kw_only=True)
class SpanLead:
    """Who leads in a span of one arm.

    A token is led by the adapter whose effective scalings, summed over the modules, are the
    largest; a span by the adapter that leads most of its tokens.

    Attributes:
        arm: The arm's label.
        name: ``"paragraph 2"``, ``"answer"``, or ``"answer from 24"`` where knobs were turned.
        text: The span's text.
        n_tokens: How many tokens.
        shares: Adapter -> share of the tokens that it leads, from 0 to 1; the largest first.
        sharing: How many adapters share a token's work (``effective_number``), mean over the span.
        expected: The adapter that should lead; None where none is expected.
    """

    arm: str
    name: str
    text: str
    n_tokens: int
    shares: dict[str, float]
    sharing: float
    expected: str | None

    @property
    def leader(self) -> str | None:
        """The adapter that leads the span; None if nobody leads any token."""
        name, share = next(iter(self.shares.items()))
        return name if share else None

    @property
    def is_miss(self) -> bool:
        """Whether another adapter leads than expected."""
        return self.expected is not None and self.leader != self.expected


@dataclass(frozen=True, kw_only=True)
class _Span:
    name: str
    start: int
    stop: int
    expected: str | None


def span_leads(run: Run, recording: Recording) -> list[SpanLead]:
    """Returns who leads where, for every routed arm of a run.

    Args:
        run: A run of the recording.
        recording: What was recorded.

    Raises:
        RecordingError: If the run's prompt is not the recording's.
    """
    return [
        _lead(run, arm, span)
        for arm, track in enumerate(run.tracks)
        if track.arm.kind == "routed"
        for span in _spans(track, recording)
    ]


def _lead(run: Run, arm: int, span: _Span) -> SpanLead:
    scalings = run.scalings(arm, effective=True)[span.start : span.stop]
    shares = zip(run.header.adapter_names, lead_share(scalings).tolist(), strict=True)
    return SpanLead(
        arm=run.arm_labels[arm],
        name=span.name,
        text="".join(run.tracks[arm].pieces[span.start : span.stop]),
        n_tokens=span.stop - span.start,
        shares=dict(sorted(shares, key=lambda item: item[1], reverse=True)),
        sharing=float(effective_number(scalings).mean()),
        expected=span.expected,
    )


def _spans(track: Track, recording: Recording) -> Iterator[_Span]:
    begins = [0, *accumulate(map(len, track.pieces[: track.n_prompt]))]
    for n, (start, end) in enumerate(_characters(track, recording)):
        rows = [row for row in range(track.n_prompt) if start <= begins[row] < end]
        yield _Span(
            name=f"paragraph {n + 1}",
            start=rows[0],
            stop=rows[-1] + 1,
            expected=recording.experts[n],
        )
    end_of_text = track.n_tokens - (track.finish_reason == "stop")
    turns = [row for row in track.knob_changes() if track.n_prompt < row < end_of_text]
    for start, stop in pairwise([track.n_prompt, *turns, end_of_text]):
        if start < stop:
            where = f" from {start - track.n_prompt}" if turns else ""
            yield _Span(name=f"answer{where}", start=start, stop=stop, expected=recording.answer)


def _characters(track: Track, recording: Recording) -> Iterator[tuple[int, int]]:
    """Yields where each paragraph of the messages begins and ends in the prompt's text."""
    prompt = "".join(track.pieces[: track.n_prompt])
    position = 0
    for message in recording.messages:
        content = message["content"].strip()
        begin = prompt.find(content, position)
        if begin < 0:
            raise RecordingError(
                f"{recording.id}: the run's prompt is not the one of recordings.json",
                hint="record it again",
            )
        for start, end in paragraphs(content):
            yield begin + start, begin + end
        position = begin + len(content)
