"""Rows -> tokens -> batches."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.training_models import letter_tokenizer, row, write_rows
from xlora_core.errors import ConfigError, PromptError
from xlora_core.training.data import (
    IGNORE,
    Example,
    Row,
    by_length,
    collate,
    encode,
    encode_rows,
    has_split,
    joined,
    mixed_examples,
    read_domain,
    read_rows,
    read_splits,
    step_order,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return letter_tokenizer()


def text_of(tokenizer: Any, ids: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def answers(tokenizer: Any, example: Example) -> str:
    return text_of(tokenizer, [i for i in example.labels if i != IGNORE])


# -------------------------------------------------------------------- reading


def test_the_three_forms_of_a_row(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    path = write_rows(
        tmp_path / "rows.jsonl",
        [
            {"domain": "x", "id": "k", "user": "u", "assistant": "a", "further": 1},
            {"domain": "x", "id": 7, "messages": messages},
            {"text": "once upon a time"},
        ],
    )
    history = (("system", "be brief"), ("user", "a"), ("assistant", "b"))
    assert read_rows(path) == [
        Row(domain="x", id="k", user="u", assistant="a"),
        Row(domain="x", id="7", user="c", assistant="d", history=history),
        Row(domain="", id="3", user="", assistant="once upon a time"),
    ]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "not JSON: "),
        ("[1]", "expected a JSON object, got list"),
        ("{}", "expected user and assistant, or messages, or text; its keys are none"),
        ('{"prompt": "x"}', "or text; its keys are prompt"),
        ('{"assistant": "x"}', "user is missing"),
        ('{"user": "x"}', "expected user and assistant, or messages, or text"),
        ('{"user": 1, "assistant": "x"}', "user must be text, got int"),
        ('{"user": "x", "assistant": " "}', "assistant is empty"),
        ('{"text": ""}', "text is empty"),
        ('{"text": "x", "domain": null}', "domain must be text, got NoneType"),
        ('{"text": "x", "id": [1]}', "id must be text or a number, got list"),
        ('{"messages": []}', "messages must be a list of objects"),
        ('{"messages": ["x"]}', "messages must be a list of objects"),
        ('{"messages": [{"role": "user"}]}', "content is missing"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "got 'tool'"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "must end with one of the user and"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "must end with one of the user"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_row_is_refused_by_its_line(tmp_path: Path, line: str, fault: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "good"}}\n\n{line}\n')
    with pytest.raises(ConfigError) as caught:
        read_rows(path)
    (found,) = caught.value.faults
    assert found.startswith("rows.jsonl, line 3: ")
    assert fault in found
    assert "a row has user and assistant, or messages, or text" in caught.value.hint


def test_every_fault_of_a_file_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n{}\n{"text": 1}\n{"text": "good"}\n[]\n')
    with pytest.raises(ConfigError) as caught:
        read_rows(path)
    assert [fault.split(":")[0] for fault in caught.value.faults] == [
        f"rows.jsonl, line {n}" for n in (2, 3, 5)
    ]
    path.write_text("{}\n" * 250)
    with pytest.raises(ConfigError) as caught:
        read_rows(path)
    assert len(caught.value.faults) == 101
    assert caught.value.faults[-1] == "and 150 more lines"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"", "rows.jsonl has no rows"),
        ("rows.jsonl", b"\xff\xfe\xfa", "rows.jsonl is not UTF-8 text"),
        ("rows.jsonl.gz", b"not gzip", "rows.jsonl.gz cannot be read"),
        (
            "rows.jsonl.gz",
            gzip.compress(b'{"text": "x"}' * 99, mtime=0)[:-12],
            "rows.jsonl.gz cannot be read",
        ),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_rows(tmp_path / name)


def test_reads_plain_and_gzipped_rows_of_a_domain(tmp_path: Path) -> None:
    lines = "\n".join(
        json.dumps({"domain": d, "id": "1", "user": "u", "assistant": "a"}) for d in ("x", "y")
    )
    (tmp_path / "x.train.jsonl").write_text(lines)
    (tmp_path / "x.heldout.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "train.jsonl").write_text(lines)
    assert [r.domain for r in read_domain(tmp_path, "x", "train")] == ["x"]
    assert [r.domain for r in read_domain(tmp_path, "x", "heldout")] == ["x"]
    assert [r.domain for r in read_domain(tmp_path, "y", "train")] == ["y"]
    with pytest.raises(ConfigError, match=r"no y\.heldout\.jsonl in") as caught:
        read_domain(tmp_path, "y", "heldout")
    assert "y.heldout.jsonl.gz, y.heldout.jsonl, heldout.jsonl.gz" in caught.value.hint


def test_missing_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="training data not found"):
        read_domain(tmp_path / "none.jsonl", "x", "train")
    path = write_rows(tmp_path / "rows.jsonl", [{"domain": "y", "text": "a"}])
    with pytest.raises(ConfigError, match="no rows of the domain 'x'") as caught:
        read_domain(path, "x", "train")
    assert caught.value.hint == "the domains in it are y"


def test_a_file_is_split_by_id_the_same_way_each_time(tmp_path: Path) -> None:
    rows = [{"id": i // 2, "text": f"text {i}"} for i in range(80)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    splits = read_splits(path, ["x"])
    train, heldout = splits["train"]["x"], splits["heldout"]["x"]
    assert (len(train), len(heldout)) == (76, 4)
    assert not {r.id for r in train} & {r.id for r in heldout}
    assert {r.domain for r in (*train, *heldout)} == {"x"}  # the only expert that is trained
    assert splits == read_splits(path, ["x"])
    path.write_text('{"id": 1, "text": "a"}')
    with pytest.raises(ConfigError, match="only one id, so no row can be held out"):
        read_splits(path, ["x"])


def test_held_out_rows_may_come_from_elsewhere(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "a.jsonl", [{"text": "a"}])
    heldout = write_rows(tmp_path / "b.jsonl", [{"text": "b"}])
    splits = read_splits(train, ["x"], heldout)
    assert [r.assistant for r in splits["train"]["x"]] == ["a"]
    assert [r.assistant for r in splits["heldout"]["x"]] == ["b"]


def test_rows_of_several_experts_must_name_their_domain(tmp_path: Path) -> None:
    rows = [{"domain": d, "id": i, "text": "t"} for d in "xy" for i in range(4)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    splits = read_splits(path, ["x", "y"])
    assert {len(rows) for rows in splits["train"].values()} == {3}
    write_rows(path, [*rows, {"text": "whose?"}])
    with pytest.raises(ConfigError, match="1 rows of rows.jsonl name no domain"):
        read_splits(path, ["x", "y"])


def test_a_folder_says_whose_rows_it_has(tmp_path: Path) -> None:
    for split, domains in (("heldout", "ab"), ("train", "a")):
        lines = [json.dumps({"domain": d, "user": "u", "assistant": "v"}) for d in domains]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    has = {(d, s): has_split(tmp_path, d, s) for d in "ab" for s in ("train", "heldout")}
    assert has == {
        ("a", "train"): True,
        ("a", "heldout"): True,
        ("b", "train"): False,
        ("b", "heldout"): True,
    }
    assert not has_split(tmp_path / "train.jsonl", "a", "train")


# -------------------------------------------------------------------- tokens


def test_loss_covers_the_answer_and_its_end_only(tokenizer: Any) -> None:
    example = encode([row()], tokenizer, 50)
    assert example is not None
    assert text_of(tokenizer, example.input_ids) == "Uone?\nAtwo<e>"
    assert example.labels[:7] == [IGNORE] * 7
    assert answers(tokenizer, example) == "two<e>"
    assert example.domains == [""] * 7 + ["math"] * 4


def test_prompt_tokens_are_those_of_inference(tokenizer: Any) -> None:
    example = encode([row()], tokenizer, 50)
    assert example is not None
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "one?"}], add_generation_prompt=True
    )["input_ids"]
    assert example.input_ids[: len(prompt)] == prompt


def test_a_conversation_has_loss_on_all_its_answers(tokenizer: Any) -> None:
    history = (("system", "be brief"), ("user", "a"), ("assistant", "b"))
    talk = Row(domain="math", id="1", user="c", assistant="d", history=history)
    example = encode([talk], tokenizer, 50)
    assert example is not None
    assert text_of(tokenizer, example.input_ids) == "be brief\nUa\nAb<e>Uc\nAd<e>"
    assert answers(tokenizer, example) == "b<e>d<e>"
    # What does not fit is left out from the end, as long as one answer is there.
    short = encode([talk], tokenizer, 16)
    assert short is not None
    assert text_of(tokenizer, short.input_ids) == "be brief\nUa\nAb<e>"
    assert encode([talk], tokenizer, 12) is None


def test_plain_text_has_loss_everywhere_and_no_template(tokenizer: Any) -> None:
    example = encode([row(user="", assistant="abc")], tokenizer, 50)
    assert example is not None
    assert text_of(tokenizer, example.input_ids) == "abc"
    assert example.labels == example.input_ids


def test_turns_carry_their_own_domains(tokenizer: Any) -> None:
    turns = [row("a", "b", "math"), row("c", "d", "verse")]
    example = encode(turns, tokenizer, 50)
    assert example is not None
    assert text_of(tokenizer, example.input_ids) == "Ua\nAb<e>Uc\nAd<e>"
    assert answers(tokenizer, example) == "b<e>d<e>"
    assert [d for d in example.domains if d] == ["math"] * 2 + ["verse"] * 2


def test_joined_rows_are_one_prompt_and_one_answer(tokenizer: Any) -> None:
    example = joined(row("a", "b", "math"), row("c", "d", "verse"), tokenizer, 50)
    assert example is not None
    assert text_of(tokenizer, example.input_ids) == "Ua\n\nc\nAb\n\nd<e>"
    assert [d for d in example.domains if d] == ["math"] * 3 + ["verse"] * 2


def test_a_long_answer_is_cut_and_a_long_prompt_refused(tokenizer: Any) -> None:
    cut = encode([row("a", "b" * 40)], tokenizer, 20)
    assert cut is not None
    assert len(cut) == 20
    assert cut.labels[-1] != tokenizer.eos_token_id
    assert encode([row("a" * 40, "b")], tokenizer, 20) is None


def test_a_tokenizer_that_cannot_lay_out_a_chat_is_refused() -> None:
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(PromptError, match="no chat template") as caught:
        encode([row()], tokenizer, 50)
    assert "plain text instead" in caught.value.hint
    assert encode([row(user="", assistant="abc")], tokenizer, 50) is not None
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(PromptError, match="refuses these messages: no system message"):
        encode([row()], tokenizer, 50)


def test_mixed_examples_hold_two_domains_and_repeat_by_seed(tokenizer: Any) -> None:
    rows = {d: [row(f"{d}{i}?", "ab" * i, d) for i in range(1, 9)] for d in ("math", "verse")}
    first = mixed_examples(rows, tokenizer, 90, 6, seed=3)
    assert len(first) == 6
    assert all({d for d in e.domains if d} == {"math", "verse"} for e in first)
    assert first == mixed_examples(rows, tokenizer, 90, 6, seed=3)
    assert first != mixed_examples(rows, tokenizer, 90, 6, seed=4)


# -------------------------------------------------------------------- batches


def test_the_order_of_steps_repeats_by_seed_and_sees_every_example_once_an_epoch() -> None:
    lengths = [(7 * i) % 24 + 1 for i in range(24)]
    order = step_order(lengths, 4, 12, seed=5, window=3)
    assert order == step_order(lengths, 4, 12, seed=5, window=3)
    assert order != step_order(lengths, 4, 12, seed=6, window=3)
    assert order[:6] == step_order(lengths, 4, 6, seed=5, window=3)
    for epoch in (order[:6], order[6:]):
        assert sorted(index for step in epoch for index in step) == list(range(24))
    # Rows of a step are neighbours among the 12 of their window.
    for window in (order[:3], order[3:6]):
        spans = sorted((min(lengths[i] for i in s), max(lengths[i] for i in s)) for s in window)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def test_too_few_rows_for_a_step_is_an_error() -> None:
    with pytest.raises(ConfigError, match="a step has 8 rows, but there are only 1 examples"):
        step_order([3], 8, 1)


def test_padding_has_no_label_no_attention_no_domain(tokenizer: Any) -> None:
    examples = [e for n in (2, 9) if (e := encode([row("a", "b" * n)], tokenizer, 60))]
    batch = collate(examples, 0)
    short = len(examples[0])
    assert batch.input_ids.shape == (2, len(examples[1]))
    assert batch.attention_mask[0].tolist() == [1] * short + [0] * 7
    assert (batch.labels[0, short:] == IGNORE).all()
    assert batch.domains[0][short:] == [""] * 7
    indices = batch.domain_indices({"math": 3})
    assert indices[0].tolist() == [-1] * 4 + [3] * 3 + [-1] * 7


def test_groups_by_length_hold_every_example(tokenizer: Any) -> None:
    examples = encode_rows([row("q", "a" * n) for n in (9, 2, 5)], tokenizer, 60)
    assert [[len(e) for e in group] for group in by_length(examples, 2)] == [[7, 10], [14]]
