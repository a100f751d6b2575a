"""A row of the corpus and its line in a file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Row:
    """A question and its answer.

    Args:
        domain: The expert it is for.
        id: The group it belongs to: compound, protein, term, task, play or licence. All rows of a
            group land on the same side of the split.
        user: The prompt; empty for an answer that begins out of nothing.
        assistant: The answer that is learnt.
        shareable: False if the source's licence lets it be trained on, but is not known to let it
            be passed on.
    """

    domain: str
    id: str
    user: str
    assistant: str
    shareable: bool = True

    @property
    def characters(self) -> int:
        """Length of prompt and answer, the measure of all limits."""
        return len(self.user) + len(self.assistant)

    def line(self) -> str:
        """The row as a JSON line, with its line end.

        >>> print(Row("math", "1+1?", "1+1?", "2").line().strip())
        {"domain": "math", "id": "1+1?", "user": "1+1?", "assistant": "2"}
        """
        fields = asdict(self)
        del fields["shareable"]
        return json.dumps(fields, ensure_ascii=False) + "\n"
