"""Texts as token rows: what a mixture is averaged over, and what its loss is measured on."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from xlora_core.errors import ConfigError, PromptError
from xlora_core.training.data import IGNORE, Batch, Example, Row, collate, encode, read_rows

TokenChoice = Literal["response", "prompt", "all"]


def read_texts(path: str | Path) -> list[Row]:
    """Returns the rows of a JSON-lines file, or the lines of a ``.txt`` file, each a text.

    Raises:
        ConfigError: If the file is missing, empty, or a line is not a row; names the line.
    """
    path = Path(path)
    if path.suffix != ".txt":
        return read_rows(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read as text: {error}", hint="give a UTF-8 file of one text a line"
        ) from error
    return plain_rows([line for line in lines if line.strip()], name=path.name)


def plain_rows(texts: Sequence[str], *, name: str = "the list") -> list[Row]:
    """Returns texts as rows without a prompt.

    Args:
        texts: One text each.
        name: What errors call them.

    Raises:
        ConfigError: If there is none.
    """
    if not texts:
        raise ConfigError(f"{name} holds no text")
    return [Row(domain="", id=str(n), user="", assistant=text) for n, text in enumerate(texts, 1)]


def token_rows(
    rows: Sequence[Row | str], tokenizer: Any, *, context_length: int, cut_at: int | None = None
) -> list[Example]:
    """Tokenises rows as training does: a question in the chat template, answer tokens labelled.

    Args:
        rows: Rows; or plain texts, in which every token is labelled.
        tokenizer: The base model's tokenizer.
        context_length: Most tokens the model can read.
        cut_at: Cut longer rows there; None refuses those longer than the context.

    Raises:
        PromptError: If a row is too long, or cutting leaves nothing of its answer.
        ConfigError: If there are no rows.
    """
    if not rows:
        raise ConfigError("there are no rows to read")
    limit = context_length if cut_at is None else min(cut_at, context_length)
    examples = []
    for number, row in enumerate(rows, start=1):
        turn = row if isinstance(row, Row) else plain_rows([row])[0]
        example = encode([turn], tokenizer, sys.maxsize if cut_at is None else limit)
        if example is None:
            raise PromptError(
                f"row {number}: its prompt alone has {limit} tokens or more, which leaves no room "
                "for an answer",
                hint="leave the row out, or cut rows later",
            )
        if len(example) > limit:
            raise PromptError(
                f"row {number} has {len(example)} tokens, the model's context window is {limit}",
                hint="leave the row out, or have long rows cut (--max-length, cut_at)",
            )
        examples.append(example)
    return examples


def length_sorted_batches(examples: Sequence[Example], tokens: int) -> Iterator[Batch]:
    """Yields right-padded batches of rows of similar length, of at most ``tokens`` positions.

    A row that is longer alone makes a batch of its own.
    """
    group: list[Example] = []
    for example in sorted(examples, key=len):
        if group and len(example) * (len(group) + 1) > tokens:
            yield collate(group, pad_id=0)  # masked, so any id will do
            group = []
        group.append(example)
    if group:
        yield collate(group, pad_id=0)


def chosen(batch: Batch, tokens: TokenChoice) -> Tensor:
    """Returns ``[B, T]`` bool: the tokens of a kind; never padding.

    Args:
        batch: B rows of T tokens.
        tokens: ``"response"`` (the labelled ones), ``"prompt"`` (the others) or ``"all"``.

    Raises:
        ConfigError: If ``tokens`` is something else.
    """
    check_choice(tokens)
    real = batch.attention_mask.bool()
    labelled = batch.labels != IGNORE
    if tokens == "all":
        return real
    return real & (labelled if tokens == "response" else ~labelled)


def check_choice(tokens: str) -> None:
    """Raises ``ConfigError`` unless it is one of ``TokenChoice``."""
    if tokens not in get_args(TokenChoice):
        raise ConfigError(
            f"tokens must be one of {', '.join(map(repr, get_args(TokenChoice)))}, got {tokens!r}"
        )
