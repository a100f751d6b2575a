"""Training text: JSON lines -> token rows with loss on the answers only -> batches.

A row is ``{"domain", "id", "user", "assistant"}``. Rows with an empty ``user`` are plain text to
continue. Everything here is deterministic by seed.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xlora_core.errors import ConfigError, PromptError

IGNORE = -100  # the label that Hugging Face's losses leave out
_FIELDS = ("domain", "id", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One question and its answer; ``user`` empty means plain text to continue."""

    domain: str
    id: str
    user: str
    assistant: str


@dataclass(frozen=True, kw_only=True)
class Example:
    """One tokenised row.

    Attributes:
        input_ids: Length T.
        labels: Length T; the token itself on answers, ``IGNORE`` elsewhere.
        domains: Length T; the domain of each answer token, "" elsewhere.
    """

    input_ids: list[int]
    labels: list[int]
    domains: list[str]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Right-padded examples.

    Attributes:
        input_ids: ``[B, T]`` int64.
        attention_mask: ``[B, T]`` int64, 0 on padding.
        labels: ``[B, T]`` int64, ``IGNORE`` outside the answers.
        domains: B lists of T domains, "" outside the answers and on padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    domains: list[list[str]]

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch on a device."""
        return Batch(
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            labels=self.labels.to(device),
            domains=self.domains,
        )


def read_rows(path: str | Path) -> list[Row]:
    """Reads one JSON-lines file, plain or ``.gz``.

    Raises:
        ConfigError: If the file is missing, or a line is not such a row; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"training data not found: {path}",
            hint="give a .jsonl or .jsonl.gz file of rows with domain, id, user, assistant",
        )
    opener: Any = gzip.open if path.suffix == ".gz" else open
    rows = []
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
                row = Row(**{name: values[name] for name in _FIELDS})
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{path.name}, line {number}: expected a JSON object with the keys "
                    f"{', '.join(_FIELDS)}"
                ) from error
            if not row.assistant:
                raise ConfigError(f"{path.name}, line {number}: assistant is empty")
            rows.append(row)
    if not rows:
        raise ConfigError(f"{path.name} has no rows")
    return rows


def read_domain(data: str | Path, domain: str, split: str) -> list[Row]:
    """Reads the rows of a domain from a file, or from ``{domain}.{split}.jsonl[.gz]`` in a folder.

    Args:
        data: A file (its rows of this domain are taken) or a folder.
        domain: The domain to read.
        split: ``"train"`` or ``"heldout"``; only used for a folder.

    Raises:
        ConfigError: If there are no such rows.
    """
    data = Path(data)
    if data.is_dir():
        names = [f"{domain}.{split}.jsonl.gz", f"{domain}.{split}.jsonl"]
        found = [data / name for name in names if (data / name).is_file()]
        if not found:
            raise ConfigError(f"no {' or '.join(names)} in {data}")
        data = found[0]
    rows = [row for row in read_rows(data) if row.domain == domain]
    if not rows:
        raise ConfigError(f"{data.name} has no rows of the domain {domain!r}")
    return rows


def encode(
    turns: Sequence[Row], tokenizer: Any, max_length: int, *, min_answer: int = 1
) -> Example | None:
    """Tokenises rows as the turns of one chat, the prompt exactly as in inference.

    Each prompt is the tokenizer's chat template with the generation prompt, each answer is
    followed by the end-of-turn token. The loss covers answers and end tokens. A single row
    without ``user`` is its plain text.

    Args:
        turns: The rows, in order.
        tokenizer: The base model's tokenizer.
        max_length: Longest example; a longer last answer is cut there (without end token).
        min_answer: Fewest answer tokens of the last turn worth keeping.

    Returns:
        The example, or None when the prompts leave no room for ``min_answer`` tokens.
    """
    ids: list[int] = []
    labels: list[int] = []
    domains: list[str] = []
    if len(turns) == 1 and not turns[0].user:
        plain = _tokens(tokenizer, turns[0].assistant)[:max_length]
        return Example(input_ids=plain, labels=plain, domains=[turns[0].domain] * len(plain))
    text, messages = "", []
    for row in turns:
        messages.append({"role": "user", "content": row.user})
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        if not rendered.startswith(text):
            raise PromptError(
                "the tokenizer's chat template rewrites earlier turns, so turns cannot be joined"
            )
        prompt = _tokens(tokenizer, rendered[len(text) :])
        answer = [*_tokens(tokenizer, row.assistant), tokenizer.eos_token_id]
        if len(ids) + len(prompt) + min(min_answer, len(answer)) > max_length:
            return None
        ids += prompt + answer
        labels += [IGNORE] * len(prompt) + answer
        domains += [""] * len(prompt) + [row.domain] * len(answer)
        messages.append({"role": "assistant", "content": row.assistant})
        text = rendered + row.assistant + tokenizer.eos_token
    return Example(
        input_ids=ids[:max_length], labels=labels[:max_length], domains=domains[:max_length]
    )


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def joined(first: Row, second: Row, tokenizer: Any, max_length: int) -> Example | None:
    """Tokenises two questions asked in one prompt and answered in one answer.

    Returns:
        The example, each answer token with its own row's domain; None when it does not fit, or
        when one of the rows is plain text.
    """
    if not (first.user and second.user):
        return None
    prompt = _tokens(
        tokenizer,
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{first.user}\n\n{second.user}"}],
            tokenize=False,
            add_generation_prompt=True,
        ),
    )
    head = _tokens(tokenizer, f"{first.assistant}\n\n")
    tail = [*_tokens(tokenizer, second.assistant), tokenizer.eos_token_id]
    ids = prompt + head + tail
    if len(ids) > max_length:
        return None
    return Example(
        input_ids=ids,
        labels=[IGNORE] * len(prompt) + head + tail,
        domains=[""] * len(prompt) + [first.domain] * len(head) + [second.domain] * len(tail),
    )


def encode_rows(
    rows: Sequence[Row],
    tokenizer: Any,
    max_length: int,
    *,
    limit: int | None = None,
    join_share: float = 0.0,
    seed: int = 0,
) -> list[Example]:
    """Tokenises rows in a seeded order; rows whose prompt is too long are left out.

    Args:
        rows: The rows.
        tokenizer: The base model's tokenizer.
        max_length: Longest example in tokens.
        limit: Stop after this many examples.
        join_share: Share of examples that ask two rows in one prompt, in [0, 1].
        seed: Seed of the order.
    """
    rng = random.Random(seed)
    order = rng.sample(range(len(rows)), len(rows))
    examples: list[Example] = []
    for index in order:
        if limit is not None and len(examples) >= limit:
            break
        example = None
        if rng.random() < join_share:
            example = joined(rows[index], rng.choice(rows), tokenizer, max_length)
        example = example or encode([rows[index]], tokenizer, max_length, min_answer=8)
        if example is not None:
            examples.append(example)
    return examples


def mixed_examples(
    rows: Mapping[str, Sequence[Row]], tokenizer: Any, max_length: int, count: int, *, seed: int = 0
) -> list[Example]:
    """Tokenises pairs of rows of two domains, so that the domain changes midway.

    Half of them ask both questions in one prompt, half are two turns of a chat. All ordered
    pairs of domains take turns; rows that do not fit are drawn again, a pair that never fits is
    skipped.

    Args:
        rows: Domain -> its rows.
        tokenizer: The base model's tokenizer.
        max_length: Longest example in tokens; the last answer of two turns is cut there.
        count: How many to make; fewer if most pairs do not fit.
        seed: Seed of the draw.
    """
    rng = random.Random(seed)
    asked = {domain: [row for row in group if row.user] for domain, group in rows.items()}
    pairs = [(a, b) for a in asked for b in asked if a != b and asked[a] and asked[b]]
    examples: list[Example] = []
    for attempt in range(20 * count):
        if len(examples) >= count or not pairs:
            break
        if attempt % len(pairs) == 0:
            rng.shuffle(pairs)
        first, second = (rng.choice(asked[domain]) for domain in pairs[attempt % len(pairs)])
        if rng.random() < 0.5:
            example = joined(first, second, tokenizer, max_length)
        else:
            example = encode([first, second], tokenizer, max_length, min_answer=24)
        if example is not None:
            examples.append(example)
    return examples


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pads examples on the right to one batch ``[B, T]``."""
    width = max(len(example) for example in examples)
    input_ids = torch.full((len(examples), width), pad_id)
    labels = torch.full_like(input_ids, IGNORE)
    mask = torch.zeros_like(input_ids)
    for i, example in enumerate(examples):
        input_ids[i, : len(example)] = torch.tensor(example.input_ids)
        labels[i, : len(example)] = torch.tensor(example.labels)
        mask[i, : len(example)] = 1
    return Batch(
        input_ids=input_ids,
        attention_mask=mask,
        labels=labels,
        domains=[e.domains + [""] * (width - len(e)) for e in examples],
    )


def batches(
    examples: Sequence[Example], rows: int, pad_id: int, *, seed: int = 0, window: int = 32
) -> Iterator[Batch]:
    """Endless batches of ``rows`` examples of similar length, in a seeded order.

    Examples are shuffled, sorted by length within windows of ``window`` batches (so that little
    is padded), and the batches of a window are shuffled again. A last, smaller window of an
    epoch is carried into the next one.
    """
    if len(examples) < rows:
        raise ConfigError(f"a batch has {rows} rows, but there are only {len(examples)} examples")
    rng = random.Random(seed)
    pool: list[Example] = []
    while True:
        pool += rng.sample(list(examples), len(examples))
        while len(pool) >= rows:
            chunk, pool = pool[: rows * window], pool[rows * window :]
            chunk, rest = chunk[: len(chunk) // rows * rows], chunk[len(chunk) // rows * rows :]
            pool = rest + pool
            chunk.sort(key=len)
            groups = [chunk[i : i + rows] for i in range(0, len(chunk), rows)]
            rng.shuffle(groups)
            for group in groups:
                yield collate(group, pad_id)
