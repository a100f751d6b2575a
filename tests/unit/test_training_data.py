"""Rows -> tokens -> batches."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from xlora_core.errors import ConfigError
from xlora_core.training.data import (
    IGNORE,
    Example,
    Row,
    batches,
    collate,
    encode,
    encode_rows,
    joined,
    mixed_examples,
    read_domain,
    read_rows,
)

CHARACTERS = "abcdefghijklmnopqrstuvwxyzUA0123456789 .?\n"
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}U{{ m['content'] }}\nA"
    "{% else %}{{ m['content'] }}<e>{% endif %}{% endfor %}"
)


def letter_tokenizer() -> Any:
    """A tokenizer of one token per letter, ids below the tiny models' vocabulary size."""
    vocab = {"<p>": 0, "<b>": 1, "<e>": 2, "<u>": 3}
    vocab |= {c: i for i, c in enumerate(CHARACTERS, start=4)}
    letters = Tokenizer(models.WordLevel(vocab, unk_token="<u>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=letters,
        eos_token="<e>",
        pad_token="<p>",
        unk_token="<u>",
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return letter_tokenizer()


def row(user: str = "one?", assistant: str = "two", domain: str = "math") -> Row:
    return Row(domain=domain, id=user, user=user, assistant=assistant)


def text_of(tokenizer: Any, ids: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def answers(tokenizer: Any, example: Example) -> str:
    return text_of(tokenizer, [i for i in example.labels if i != IGNORE])


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


def test_mixed_examples_hold_two_domains_and_repeat_by_seed(tokenizer: Any) -> None:
    rows = {d: [row(f"{d}{i}?", "ab" * i, d) for i in range(1, 9)] for d in ("math", "verse")}
    first = mixed_examples(rows, tokenizer, 90, 6, seed=3)
    assert len(first) == 6
    assert all({d for d in e.domains if d} == {"math", "verse"} for e in first)
    assert first == mixed_examples(rows, tokenizer, 90, 6, seed=3)
    assert first != mixed_examples(rows, tokenizer, 90, 6, seed=4)


def test_batches_repeat_by_seed_and_see_every_example_once_an_epoch(tokenizer: Any) -> None:
    rows = [row("q", "a" * n) for n in range(1, 25)]
    examples = encode_rows(rows, tokenizer, 60, seed=1)

    def epoch(seed: int) -> list[torch.Tensor]:
        stream = batches(examples, 4, 0, seed=seed, window=3)
        return [b.input_ids for b in itertools.islice(stream, 6)]

    first, again, other = epoch(5), epoch(5), epoch(6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(
        a.shape != b.shape or not torch.equal(a, b) for a, b in zip(first, other, strict=True)
    )
    lengths = sorted(int((ids != 0).sum()) for batch in first for ids in batch)
    assert lengths == sorted(len(e) for e in examples)


def test_padding_has_no_label_no_attention_no_domain(tokenizer: Any) -> None:
    examples = [e for n in (2, 9) if (e := encode([row("a", "b" * n)], tokenizer, 60))]
    batch = collate(examples, 0)
    short = len(examples[0])
    assert batch.input_ids.shape == (2, len(examples[1]))
    assert batch.attention_mask[0].tolist() == [1] * short + [0] * 7
    assert (batch.labels[0, short:] == IGNORE).all()
    assert batch.domains[0][short:] == [""] * 7


def test_reads_plain_and_gzipped_rows_of_a_domain(tmp_path: Path) -> None:
    lines = "\n".join(
        json.dumps({"domain": d, "id": "1", "user": "u", "assistant": "a"}) for d in ("x", "y")
    )
    (tmp_path / "x.train.jsonl").write_text(lines)
    (tmp_path / "x.heldout.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert [r.domain for r in read_domain(tmp_path, "x", "train")] == ["x"]
    assert [r.domain for r in read_domain(tmp_path, "x", "heldout")] == ["x"]
    assert len(read_rows(tmp_path / "x.train.jsonl")) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"domain": "x"}', "rows.jsonl, line 1: expected a JSON object with the keys domain"),
        ('\n{"domain"', "rows.jsonl, line 2: expected a JSON object"),
        ("[1]", "line 1: expected a JSON object"),
        (
            '{"domain": "x", "id": "1", "user": "u", "assistant": ""}',
            "rows.jsonl, line 1: assistant is empty",
        ),
        ("", "rows.jsonl has no rows"),
    ],
)
def test_bad_rows_are_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        read_rows(tmp_path / "rows.jsonl")


def test_missing_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no x\.train\.jsonl\.gz or x\.train\.jsonl in"):
        read_domain(tmp_path, "x", "train")
    with pytest.raises(ConfigError, match="training data not found"):
        read_domain(tmp_path / "none.jsonl", "x", "train")


def test_too_few_rows_for_a_batch_is_an_error(tokenizer: Any) -> None:
    examples = encode_rows([row()], tokenizer, 60)
    with pytest.raises(ConfigError, match="a batch has 8 rows, but there are only 1 examples"):
        next(batches(examples, 8, 0))
