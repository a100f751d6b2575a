"""What is written about the runs: README.md beside them, and the table of who leads where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sample_data.record.recordings import Recording
from sample_data.record.spans import SpanLead
from xlora_core.config import RoutingKnobs
from xlora_core.recording import Run

_N_BEGINNING = 60
_HEAD = """\
# Recorded runs

What the demo model did with {n} prompts, each showing one thing. The files open without the model:
in the app under *Open a run file*, with `xlora inspect` and `xlora export`, or as

```python
from xlora_core import Run

run = Run.load("sample_data/runs/{first}.safetensors")
print(run.text(0), run.scalings(0).shape)  # the answer; [tokens, modules, adapters]
```

Written by `python -m sample_data.record` from [recordings.json](../recordings.json), which holds
the whole prompts, knobs and seeds. The same command on the same machine records the same again,
but for the time of day and the seconds that tokens took. The answers are those of a very small
model: look at the mixture, not at the facts.

"""
_LEADS = """
## Who leads where

A token is led by the adapter whose scalings, summed over all modules, are the largest, after knobs
and steering; a part of the text by the adapter that leads most of its tokens. Parts are the
prompt's paragraphs and the answer, which is cut where knobs were turned. *Sharing* is how many
adapters share a token's work (the exponential of the mixture's entropy, mean over modules and
tokens): 1 is one alone. *Expected* is what the subject says, where it says anything.
`python -m sample_data.record --check` prints this table.

"""
_COLUMNS = ("run", "arm", "part", "begins with", "tokens", "leads", "then", "sharing", "expected")


def readme(runs: Sequence[tuple[Recording, Run, Sequence[SpanLead]]]) -> str:
    """Returns the page beside the runs.

    Args:
        runs: Recording, its run, and who leads where in it.
    """
    rows = [
        (
            f"[{recording.title}]({recording.id}.safetensors)",
            f"`{_beginning(recording.messages[0]['content'])}`",
            ", ".join(_arm_words(run)),
            recording.look_at,
            _in_short(run, leads),
        )
        for recording, run, leads in runs
    ]
    head = ("run", "the prompt begins with", "arms", "look at", "leads, part by part")
    leads = [lead for _, _, found in runs for lead in lead_rows(found)]
    names = [recording.id for recording, _, found in runs for _ in found]
    table = [(name, *row) for name, row in zip(names, leads, strict=True)]
    return (
        _HEAD.format(n=len(runs), first=runs[0][0].id)
        + markdown_table(head, rows)
        + _LEADS
        + markdown_table(_COLUMNS, table)
    )


def check_table(runs: Iterable[tuple[Recording, Sequence[SpanLead]]]) -> str:
    """Returns who leads where as lines of text for a terminal."""
    rows = [(recording.id, *row) for recording, leads in runs for row in lead_rows(leads)]
    cells = [_COLUMNS, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def lead_rows(leads: Iterable[SpanLead]) -> list[tuple[str, ...]]:
    """Returns the cells of the table of leads, without the run's name."""
    return [
        (
            lead.arm,
            lead.name,
            f"`{_beginning(lead.text, 24)}`",
            str(lead.n_tokens),
            ranked[0] if ranked else "nobody",
            ranked[1] if len(ranked) > 1 else "",
            f"{lead.sharing:.1f}",
            f"{lead.expected}: missed" if lead.is_miss else lead.expected or "",
        )
        for lead in leads
        for ranked in [_ranked(lead)]
    ]


def misses(recording: Recording, leads: Iterable[SpanLead]) -> list[str]:
    """Returns a sentence for every part that another adapter leads than expected."""
    return [
        f"{recording.id}, {lead.arm}, {lead.name} ({_beginning(lead.text)!r}): expected "
        f"{lead.expected}, which leads {lead.shares.get(str(lead.expected), 0.0):.0%} of "
        f"{lead.n_tokens} tokens; {', '.join(_ranked(lead)[:3]) or 'nobody leads'}"
        for lead in leads
        if lead.is_miss
    ]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown; a bar in a cell stays a bar."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )


def _arm_words(run: Run) -> list[str]:
    """Returns each arm's label with the knobs it started with and where they were turned."""
    words = []
    for label, track in zip(run.arm_labels, run.tracks, strict=True):
        knobs, off = track.arm.knobs or RoutingKnobs(), RoutingKnobs()
        told = [f"top-k {knobs.top_k}"] if knobs.top_k else []
        if knobs.temperature != off.temperature:
            told.append(f"temperature {knobs.temperature:g}")
        if knobs.global_weight != off.global_weight:
            told.append(f"global weight {knobs.global_weight:g}")
        told += [override.label for override in knobs.overrides]
        turns = [row - track.n_prompt for row in track.knob_changes() if row >= track.n_prompt]
        if turns:
            told.append(f"turned at {', '.join(map(str, turns))}")
        words.append(f"{label} ({'; '.join(told)})" if told else label)
    return words


def _in_short(run: Run, leads: Sequence[SpanLead]) -> str:
    """Returns the leaders in order, one line for each routed arm."""
    arms = list(dict.fromkeys(lead.arm for lead in leads))
    lines = []
    for arm in arms:
        prompt = [lead.leader or "nobody" for lead in leads if lead.arm == arm and _in_prompt(lead)]
        answer = [
            lead.leader or "nobody" for lead in leads if lead.arm == arm and not _in_prompt(lead)
        ]
        label = f"{arm}: " if len(run.arm_labels) > 1 else ""
        lines.append(f"{label}{', '.join(prompt)}; answer: {', '.join(answer) or 'none'}")
    return "<br>".join(lines)


def _in_prompt(lead: SpanLead) -> bool:
    return not lead.name.startswith("answer")


def _ranked(lead: SpanLead) -> list[str]:
    """Returns the adapters that lead any token, with their shares, the largest first."""
    return [f"{name} {share:.0%}" for name, share in lead.shares.items() if share]


def _beginning(text: str, n: int = _N_BEGINNING) -> str:
    """Returns the beginning of a text on one line, safe between back-ticks."""
    line = " ".join(text.split()).replace("`", "'")
    return line if len(line) <= n else f"{line[:n].rstrip()}…"
