"""What the results have to be, and whether they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xlora_core.bench import Report
from xlora_core.bench.report import Cell

Rows = Sequence[Mapping[str, Any]]
# The record's arrays beside the router logits, in bytes a token.
_BESIDE_LOGITS = 1000


@dataclass(frozen=True, kw_only=True)
class Target:
    """One line of the table of targets.

    Attributes:
        what: What is compared.
        benchmark: Whose report holds it; with its options if it is not the first of its name.
        limits: What each figure may be at most, or has to be at least.
        figures: The figures of the report's rows; as many as limits, None where not measured.
        at_least: Whether the limits are lower ones.
    """

    what: str
    benchmark: str
    limits: tuple[float, ...]
    figures: Callable[[Rows], list[float | None]]
    at_least: bool = False

    def row(self, document: Mapping[str, Any] | None) -> dict[str, Cell]:
        """Returns the line of the table; ``document`` is a report's, None if there is none."""
        rows = document["rows"] if document else []
        figures = self.figures(rows) if rows else [None] * len(self.limits)
        sign = ">=" if self.at_least else "<="
        return {
            "what": self.what,
            "target": f"{sign} {_joined(self.limits)}",
            "measured": _joined(figures),
            "met": self._verdict(figures),
        }

    def _verdict(self, figures: Sequence[float | None]) -> str:
        if any(figure is None for figure in figures):
            return "not measured"
        met = [
            (figure >= limit) if self.at_least else (figure <= limit)
            for figure, limit in zip(figures, self.limits, strict=True)
            if figure is not None
        ]
        return "yes" if all(met) else "no"


def _joined(values: Sequence[float | None]) -> str:
    return " / ".join("-" if value is None else f"{value:,.3g}" for value in values)


def _column(name: str, *, where: Mapping[str, Sequence[Any]]) -> Callable[[Rows], Any]:
    """Returns what takes a column of the rows whose key column has one of the values, in order."""
    ((key, wanted),) = where.items()

    def take(rows: Rows) -> list[float | None]:
        return [next((row[name] for row in rows if row[key] == value), None) for value in wanted]

    return take


def _nth(name: str, *indices: int) -> Callable[[Rows], Any]:
    return lambda rows: [rows[i][name] if -len(rows) <= i < len(rows) else None for i in indices]


def _most(*names: str) -> Callable[[Rows], Any]:
    return lambda rows: [max(row[name] for row in rows for name in names)]


def _at_hit_rate(rows: Rows) -> list[float | None]:
    """Returns the least share of the bandwidth bound among rows with enough hits."""
    shares = [
        row["of it"] if row["of stated"] is None else row["of stated"]
        for row in rows
        if (row["hit rate"] or 0) >= 0.8
    ]
    return [min(shares, default=None)]


TARGETS = (
    Target(
        what="routed decode step / Hugging Face's cached base step, at 100 / 512 / 1,024 / 2,000",
        benchmark="decode",
        limits=(1.3, 1.3, 1.3, 1.3),
        figures=_nth("routed/hf", 0, 1, 2, 3),
    ),
    Target(
        what="PEFT's X-LoRA / routed, per token at 128 / 256 / 1,024",
        benchmark="peft_xlora",
        limits=(20, 35, 100),
        figures=_nth("PEFT/routed", 0, 1, 2),
        at_least=True,
    ),
    Target(
        what="routed tokens per second / mistral.rs's X-LoRA, both float32",
        benchmark="mistral_rs",
        limits=(10,),
        figures=_nth("routed/mistral.rs", -1),
        at_least=True,
    ),
    Target(
        what="the same, both float16, in which mistral.rs is fastest",
        benchmark="mistral_rs --dtype float16",
        limits=(10,),
        figures=_nth("routed/mistral.rs", -1),
        at_least=True,
    ),
    Target(
        what="routed step at 2,000 tokens of context / at 100",
        benchmark="decode",
        limits=(1.5,),
        figures=_nth("routed/first", -1),
    ),
    Target(
        what="16 adapters / 2 adapters",
        benchmark="adapters",
        limits=(1.4,),
        figures=_column("/first", where={"adapters": [16]}),
    ),
    Target(
        what="four arms (routed, merged, base, one expert) / one routed arm",
        benchmark="arms",
        limits=(1.4,),
        figures=_nth("/routed", -1),
    ),
    Target(
        what="eight concurrent requests: total tokens per second / one request",
        benchmark="requests",
        limits=(3,),
        figures=_column("/one", where={"requests": [8]}),
        at_least=True,
    ),
    Target(
        what="recording on / off", benchmark="recording", limits=(1.05,), figures=_nth("on/off", 0)
    ),
    Target(
        what="bytes kept per generated token beyond the KV cache and L*K*2",
        benchmark="recording",
        limits=(_BESIDE_LOGITS,),
        figures=_nth("beyond logits", 0),
    ),
    Target(
        what="re-routing 512 tokens x 210 modules x 8 adapters, slowest knobs (ms)",
        benchmark="reroute",
        limits=(30,),
        figures=_most("scalings (ms)", "effective (ms)"),
    ),
    Target(
        what="second start of the demo: loading (s)",
        benchmark="start",
        limits=(3,),
        figures=_column("loading (s)", where={"start": ["quietest"]}),
    ),
    Target(
        what="GPU, 1-8B in bfloat16: routed decode against one read, at hit rate >= 0.8",
        benchmark="bandwidth",
        limits=(0.6,),
        figures=_at_hit_rate,
        at_least=True,
    ),
)


def target_report(documents: Mapping[str, Mapping[str, Any]]) -> Report:
    """Returns the table of targets.

    Args:
        documents: Benchmark, named as in ``Target.benchmark`` -> its JSON document.
    """
    rows = [target.row(documents.get(target.benchmark)) for target in TARGETS]
    method = "What was aimed at, and what was measured; the figures are those of the tables above."
    return Report(name="targets", method=method, rows=rows)
