"""The benchmark of guesses: what prompt lookup counts, and a run on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.guessing import lookup, measure
from tests.tiny_chat import tiny_chat_xlora, tiny_tokenizer


@pytest.mark.parametrize(
    ("token_ids", "n_prompt", "length", "expected"),
    [
        # Nothing repeats: a round for each token.
        ([1, 2, 3, 4, 5], 2, 4, (3, 0, 0)),
        # "1 2" occurred before and was followed by "3 4 9": two are right, the fifth is written.
        ([1, 2, 3, 4, 9, 1, 2, 3, 4, 5], 7, 3, (1, 3, 2)),
        # A proposal of one token: right, and one more; then "3 4" is found, and 9 is wrong.
        ([1, 2, 3, 4, 9, 1, 2, 3, 4, 5], 7, 1, (2, 2, 1)),
        # The latest occurrence counts.
        ([1, 2, 7, 1, 2, 8, 1, 2, 8, 6], 8, 1, (1, 1, 1)),
    ],
)
def test_prompt_lookup(
    token_ids: list[int], n_prompt: int, length: int, expected: tuple[int, int, int]
) -> None:
    assert lookup(token_ids, n_prompt, length) == expected


def test_all_ways_on_a_tiny_model(tmp_path: Path) -> None:
    report = measure(
        tiny_chat_xlora(tmp_path),
        tiny_tokenizer(),
        questions=["the quick fox", "add 2 and 3"],
        n_tokens=8,
        siblings=[1, 4],
        drafts=[2],
    )
    ways = {row["way"]: row["reads/token"] for row in report.rows}
    assert list(ways) == ["none", "guess", "guess, 4 at once", "prompt lookup, 2 tokens"]
    none, one, four, looked_up = ways.values()
    assert none == 2
    assert isinstance(one, float)
    assert isinstance(four, float)
    assert 1 <= four <= one <= 2
    assert isinstance(looked_up, float)
    assert 0 < looked_up <= 2
