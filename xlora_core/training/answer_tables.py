"""The table of what checks of written answers found, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xlora_core.training.markdown import markdown

# Key of a check -> its column: somebody who gives the same value to every question.
_CONSTANTS = {"usual": "usual value", "constant": "best constant"}
_LEGEND = """\
Answers to held-out questions, the most likely token each time, at most {limit} tokens. Only rows
whose own answer fits are asked.

- right / read / distinct: answers that are right, those that a value could be read in, and how many
  different values these gave; of all the rows. One that cannot be read is wrong, as are code in a
  block without an end and a calculation that was cut
- median error: of the answers that could be read, which are not the same rows for everyone; hence
  the line of those that all were read in, where there are any
- usual value: the one that is right for the most training rows, given to every question
- best constant: the one that is right for the most of these very rows. Who is not clearly better
  than that has not shown to compute, whatever the others score
- cut: answers that had not ended at the last token; not shown where there are none
- parsing says nothing of what the code does; a few rows tell large differences only"""
_ASKED = """\
Only questions are put that name what is checked, the same to everyone. Where a row's own question
leaves out a quantity that its answer gives, it is put anew, which is harder for the experts: they
learnt the wording of their rows. For example:"""
_NOTHING = "-"


def answer_section(answers: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """Returns the table of the checks, what it means, and what was asked.

    Args:
        answers: Settings and checks, as read from the JSON file.
        columns: Arm -> its column, in the order of the table.
    """
    checks = answers["checks"]
    legend = _LEGEND.format(limit=answers["settings"]["max_new_tokens"])
    parts = [legend, answer_table(checks, columns)]
    if all("question" in check for check in checks):
        parts += [_ASKED, question_list(checks)]
    return "\n\n".join(parts)


def answer_table(checks: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Returns what the checks found: lines for what is right, for the error, and for what was cut.

    What an older record lacks is a dash.
    """
    arms = [arm for arm in columns if any(arm in check["arms"] for check in checks)]
    header = ["domain", "check", "rows", *_CONSTANTS.values(), *(columns[arm] for arm in arms)]
    lines = []
    for check in checks:
        constants = [check.get(key) for key in _CONSTANTS]
        scores = [check["arms"].get(arm) for arm in arms]
        common = [check.get("common", {}).get(arm) for arm in arms]
        cut = check.get("cut", {})
        right = [*map(_constant, constants), *map(_counts, scores)]
        figures = {f"{check['right_when']}; right / read / distinct": right}
        if check["unit"]:
            errors = [_error(constant and constant["score"]) for constant in constants]
            figures[f"median error, {check['unit']}"] = [*errors, *map(_error, scores)]
        if common[0] is not None and common[0]["rows"] < check["rows"]:
            what = f"right of the {common[0]['rows']} that all were read in"
            what += "; median error" if check["unit"] else ""
            figures[what] = [_NOTHING for _ in constants] + [_on_common(score) for score in common]
        if any(cut.values()):
            figures["cut"] = [_NOTHING for _ in constants] + [str(cut[arm]) for arm in arms]
        for what, cells in figures.items():
            name = f"{check['check']}: {what}"
            lines.append([check["domain"], name, str(check["rows"]), *cells])
    return markdown(header, lines, texts=2)


def question_list(checks: Sequence[Mapping[str, Any]]) -> str:
    """Returns an example of what was asked in each check, as code: SMILES have meaning there."""
    lines = []
    for check in checks:
        question = check["question"].replace("`", "'")
        lines.append(f"- {check['domain']}, {check['check']}: `{question}`")
    return "\n".join(lines)


def _constant(constant: Mapping[str, Any] | None) -> str:
    if constant is None:
        return _NOTHING
    return f"{constant['score']['right']} ({constant['value']})"


def _counts(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return _NOTHING
    return f"{score['right']} / {score['read']} / {score.get('distinct', _NOTHING)}"


def _error(score: Mapping[str, Any] | None) -> str:
    if score is None or score["median_error"] is None:
        return _NOTHING
    error = score["median_error"]
    return format(error, ".2f" if error < 100 else ",.0f")


def _on_common(score: Mapping[str, Any]) -> str:
    error = _error(score)
    return str(score["right"]) if error == _NOTHING else f"{score['right']}; {error}"
