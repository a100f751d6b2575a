"""The tables of an evaluation, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from xlora_core.training.answer_tables import answer_section
from xlora_core.training.evaluation import MIXED, mean_losses
from xlora_core.training.markdown import markdown

# Arm of the record -> its column, in the order of the table.
_ARMS = {
    "base": "base",
    "uniform": "uniform merge",
    "best_merge": "best merge",
    "routed": "routed",
    "right": "right expert",
}
# Figure of a result -> its form, in the order of the columns.
_ROUTING = {"right_mass": ".2f", "right_top": ".0%", "entropy": ".2f"}
_MEAN = "mean of domains"
_LOSSES = f"""\
Held-out loss in nats a token of the answers. Bold is the lowest of the columns that are not told
the domain.

- uniform merge: every expert at 1/K
- best merge: one fitted weight for each expert, the same for all text
- routed: X-LoRA
- right expert: the oracle, every row with its own domain's expert alone
- mass on right: mean scaling of the right expert, over answer tokens and modules
- right is strongest: share of answer tokens whose strongest expert, on average over modules, is
  the right one
- router entropy: 1 is uniform, 0 a single expert
- {MIXED}: rows that change domain midway; not in the mean"""
_EXPERTS = "Every expert alone, nats a token; bold where a domain's own expert is the best of them."
_NOTHING = "-"
_EXPERT = "expert:"  # before the expert's name, in the name of its arm


def tables(record: Mapping[str, Any]) -> str:
    """Returns all tables of a record (as read from the JSON file), with what they mean."""
    results = record["results"]
    parts = [_legend(results), table(results)]
    if _experts(results):
        parts += [_EXPERTS, expert_table(results)]
    merge = record.get("merge")
    if merge:
        parts += [_merge_text(merge), merge_table(merge["weights"])]
    answers = record.get("answers")
    if answers and answers["checks"]:
        parts.append(answer_section(answers, _ARMS))
    parts += record.get("notes", [])
    parts.append(_made_by(record))
    return "\n\n".join(parts)


def _arms(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the arms that some domain has; among several always ``right``, if only as a dash."""
    there = {arm for result in results.values() for arm in result["losses"]}
    return [arm for arm in _ARMS if arm in there or (arm == "right" and "base" in there)]


def _experts(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the arms of the experts alone; none of a record of the routed model."""
    return [arm for arm in next(iter(results.values()))["losses"] if arm.startswith(_EXPERT)]


def _legend(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns what the columns of the losses mean, those that there are."""
    shown = _arms(results)
    absent = tuple(f"- {column}:" for arm, column in _ARMS.items() if arm not in shown)
    return "\n".join(line for line in _LOSSES.splitlines() if not line.startswith(absent))


def _merge_text(merge: Mapping[str, Any]) -> str:
    """Returns how the best merge was fitted; earlier records do not know its losses."""
    if "loss_at_half" not in merge:
        return f"Weights of the best merge, fitted on {merge['rows']} training rows."
    ended = "" if merge["converged"] else ", with no step left"
    return (
        f"Weights of the best merge, fitted to the mean of domains of {merge['rows']} training "
        f"rows ({merge['tokens']} answer\ntokens): {merge['uniform_loss']:.3f} as the uniform "
        f"merge, {merge['loss_at_half']:.3f} after half of the {merge['steps']} steps over all of "
        f"them, {merge['loss']:.3f} at the end{ended}."
    )


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns losses and routing: a line for each domain, and one for the mean of the domains.

    The lowest loss of the arms that do not know the domain is bold; ``right expert`` is the
    oracle, that does. The mean leaves ``MIXED`` out.
    """
    means = mean_losses(results)
    arms = _arms(results)
    header = ["domain", "answer tokens", *(_ARMS[arm] for arm in arms)]
    header += ["mass on right", "right is strongest", "router entropy"]
    lines = []
    for name, result in results.items():
        routing = [_figure(result[key], form) for key, form in _ROUTING.items()]
        lines.append([name, str(result["tokens"]), *_losses(result["losses"], arms), *routing])
    domains = [result for name, result in results.items() if name != MIXED]
    routing = [_mean(domains, key, form) for key, form in _ROUTING.items()]
    lines.append([_MEAN, _NOTHING, *_losses(means, arms), *routing])
    return markdown(header, lines)


def expert_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns each expert's loss alone, in every domain; an own expert that is the best is bold."""
    means = mean_losses(results)
    experts = _experts(results)
    lines = []
    of_lines = {name: result["losses"] for name, result in results.items()}
    for name, losses in {**of_lines, _MEAN: means}.items():
        best = min(losses[arm] for arm in experts)
        lines.append(
            [name]
            + [
                f"**{losses[arm]:.2f}**"
                if arm == _EXPERT + name and losses[arm] == best
                else f"{losses[arm]:.2f}"
                for arm in experts
            ]
        )
    return markdown(["domain", *(arm.removeprefix(_EXPERT) for arm in experts)], lines)


def merge_table(weights: Mapping[str, float]) -> str:
    """Returns the weights of a merge."""
    cells = [f"{weight:.2f}" for weight in (*weights.values(), sum(weights.values()))]
    return markdown(["expert", *weights, "sum"], [["weight", *cells]])


def _losses(losses: Mapping[str, float], arms: Sequence[str]) -> list[str]:
    compared = [losses[arm] for arm in arms if arm in losses and arm != "right"]
    cells = []
    for arm in arms:
        text = _figure(losses.get(arm), ".3f")
        bold = len(compared) > 1 and arm != "right" and losses.get(arm) == min(compared)
        cells.append(f"**{text}**" if bold else text)
    return cells


def _mean(results: Sequence[Mapping[str, Any]], key: str, form: str) -> str:
    values = [result[key] for result in results]
    return _figure(None if None in values else statistics.fmean(values), form)


def _figure(value: float | None, form: str) -> str:
    return _NOTHING if value is None else format(value, form)


def _made_by(record: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    tokens = sum(result["tokens"] for result in record["results"].values())
    return (
        f"Measured by `{record['command']}`: {record['rows_per_domain']} held-out rows a domain "
        f"at most, of at most {record['max_length']} tokens; {tokens} answer tokens; "
        f"{record['dtype']}; {versions}."
    )
