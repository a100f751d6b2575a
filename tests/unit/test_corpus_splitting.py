"""Choices, passages, the split and the files: complete, without overlap, the same every time."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from sample_data.build.choice import fraction, pick
from sample_data.build.passages import passages
from sample_data.build.rows import Row
from sample_data.build.splitting import held_out, split, up_to
from sample_data.build.writing import write_split
from xlora_core.training.data import read_rows

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
ROWS = st.lists(st.builds(Row, st.just("math"), TEXT, TEXT, TEXT), max_size=30)


@given(ROWS, st.sets(TEXT))
def test_no_group_is_on_both_sides_and_no_row_is_lost(rows: list[Row], groups: set[str]) -> None:
    for is_held_out in (held_out, groups.__contains__):
        train, heldout = split(rows, is_held_out)
        assert not {row.id for row in train} & {row.id for row in heldout}
        assert all(is_held_out(row.id) for row in heldout)
        assert len(train) + len(heldout) == len(set(rows))
        assert {*train, *heldout} == set(rows)


@given(ROWS, st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(rows: list[Row], shuffler: random.Random) -> None:
    shuffled = list(rows)
    shuffler.shuffle(shuffled)
    assert split(shuffled) == split(rows)


@given(ROWS, ROWS)
def test_further_rows_do_not_reorder_the_others(rows: list[Row], more: list[Row]) -> None:
    for small, large in zip(split(rows), split(rows + more), strict=True):
        assert [row for row in large if row in set(small)] == small


def test_one_group_in_twenty_is_held_out_and_known_ones_stay_there() -> None:
    share = sum(held_out(f"group {number}") for number in range(4000)) / 4000
    assert 0.04 < share < 0.06
    # Compounds, terms and licences that the shipped experts were not trained on.
    assert all(map(held_out, ["56-72-4", "HP:0032077", "wiki:Carcinogen", "CC-BY-NC-SA-4.0"]))
    assert not any(map(held_out, ["5625-50-3", "GO:0055004", "wiki:Thyme", "APL-1.0"]))


@given(ROWS, st.integers(0, 200))
def test_a_limit_is_reached_and_barely_passed(rows: list[Row], limit: int) -> None:
    kept = list(up_to(rows, limit))
    assert kept == rows[: len(kept)]
    assert sum(row.characters for row in kept[:-1]) < max(limit, 1)
    if len(kept) < len(rows):
        assert sum(row.characters for row in kept) >= limit


def test_choices_are_even_and_weighted() -> None:
    draws = [pick("abc", "test", str(number), weights=(1, 0, 3)) for number in range(4000)]
    assert "b" not in draws
    assert 0.22 < draws.count("a") / 4000 < 0.28
    assert 0.47 < sum(fraction("even", str(number)) for number in range(4000)) / 4000 < 0.53


@given(st.lists(TEXT, min_size=1, max_size=4))
def test_a_fraction_is_one(words: list[str]) -> None:
    assert 0 <= fraction(*words) < 1


def test_choices_do_not_change_between_versions() -> None:
    # Another result here means another wording for every row of the corpus.
    assert "".join(pick("abcdefgh", "pinned", str(number)) for number in range(8)) == "hdhaebda"
    assert fraction("a", "b") != fraction("ab")


def test_passages_are_full_and_in_order() -> None:
    paragraphs = [" a" * 30, "b" * 50, "", "c" * 101, "d" * 20]
    assert list(passages(paragraphs, target=100, least=19)) == [
        f"{(' a' * 30).strip()}\n\n{'b' * 50}",
        "c" * 101,
        "d" * 20,
    ]
    assert len(list(passages(paragraphs, target=100, least=20))) == 2


@given(st.lists(st.text("xy", min_size=1, max_size=30)), st.integers(1, 60))
def test_passages_lose_nothing_but_a_short_end(paragraphs: list[str], target: int) -> None:
    cut = list(passages(paragraphs, target, least=0))
    assert "\n\n".join(cut) == "\n\n".join(paragraphs)
    assert all(len(passage.replace("\n\n", "")) > target for passage in cut[:-1])


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    rows = [Row("law", "MIT", "", "§ 1\u2028line\x85 separators\r\n"), Row("law", "0BSD", "q", "a")]
    entries = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        entries.append(write_split(tmp_path / name / "law.train.jsonl.gz", rows))
    one, two = (tmp_path / name / "law.train.jsonl.gz" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert entries[0] == entries[1]
    assert entries[0]["rows"] == 2
    assert not list(tmp_path.rglob("*.partial"))
    lines = gzip.decompress(one.read_bytes()).decode().split("\n")
    assert [json.loads(line)["assistant"] for line in lines[:-1]] == [r.assistant for r in rows]
    # What is written is what training reads.
    assert [(r.id, r.user, r.assistant) for r in read_rows(one)] == [
        (r.id, r.user, r.assistant) for r in rows
    ]


def test_hashes_of_the_interpreter_play_no_part() -> None:
    program = (
        "from sample_data.build.rows import Row\n"
        "from sample_data.build.splitting import split\n"
        "rows = {Row('d', f'{n}', 'q', 'a') for n in range(50)}\n"
        "print([row.id for side in split(rows) for row in side])"
    )
    orders = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            cwd=Path(__file__).resolve().parents[2],
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(orders) == 1
