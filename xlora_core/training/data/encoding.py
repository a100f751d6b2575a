"""Rows -> tokens, with a loss on the answers only."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xlora_core.errors import PromptError
from xlora_core.training.data.rows import Row

IGNORE = -100  # the label that Hugging Face's losses leave out


@dataclass(frozen=True, kw_only=True)
class Example:
    """One tokenised row.

    Attributes:
        input_ids: Length T.
        labels: Length T; the token itself on answers, ``IGNORE`` elsewhere.
        domains: Length T; the domain of each answer token, "" elsewhere.
        topics: Length T; the domain of each token's row, its question included, "" where that is
            not known: in a prompt of two questions. Empty if nothing is known of any prompt.
    """

    input_ids: list[int]
    labels: list[int]
    domains: list[str]
    topics: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.input_ids)


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
        max_length: Longest example; a longer last answer is cut there (without end token), and
            so are later turns of one row.
        min_answer: Fewest answer tokens of a row worth keeping.

    Returns:
        The example, or None when the prompts leave no room for ``min_answer`` tokens.

    Raises:
        PromptError: If the tokenizer cannot lay out a chat.
    """
    if len(turns) == 1 and not turns[0].user:
        plain = _tokens(tokenizer, turns[0].assistant)[:max_length]
        domains = [turns[0].domain] * len(plain)
        return Example(input_ids=plain, labels=plain, domains=domains, topics=domains)
    ids: list[int] = []
    labels: list[int] = []
    domains = []
    topics: list[str] = []
    text, messages = "", []
    for row in turns:
        answered = False
        for role, content in row.messages:
            if role != "assistant":
                messages.append({"role": role, "content": content})
                continue
            rendered = chat_text(tokenizer, messages)
            if not rendered.startswith(text):
                raise PromptError(
                    "the tokenizer's chat template rewrites earlier turns, so turns cannot be "
                    "joined",
                    hint="train on rows of one question and one answer",
                )
            prompt = _tokens(tokenizer, rendered[len(text) :])
            answer = [*_tokens(tokenizer, content), tokenizer.eos_token_id]
            if len(ids) + len(prompt) + min(min_answer, len(answer)) > max_length:
                if not answered:
                    return None
                break
            ids += prompt + answer
            labels += [IGNORE] * len(prompt) + answer
            domains += [""] * len(prompt) + [row.domain] * len(answer)
            topics += [row.domain] * (len(prompt) + len(answer))
            messages.append({"role": "assistant", "content": content})
            text = rendered + content + tokenizer.eos_token
            answered = True
    return Example(
        input_ids=ids[:max_length],
        labels=labels[:max_length],
        domains=domains[:max_length],
        topics=topics[:max_length],
    )


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """Returns messages in the chat template, with the generation prompt.

    Raises:
        PromptError: If there is no chat template or no end token, or it refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None) or tokenizer.eos_token is None:
        raise PromptError(
            "this tokenizer has no chat template or no end token, so questions and answers cannot "
            "be laid out",
            hint='train on plain text instead: rows of {"text": ...}',
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        )
    except Exception as error:  # a template is a program of its own: it may raise anything
        raise PromptError(
            f"the tokenizer's chat template refuses these messages: {error}",
            hint="user and assistant messages usually have to alternate, system comes first",
        ) from error


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def joined(first: Row, second: Row, tokenizer: Any, max_length: int) -> Example | None:
    """Tokenises two questions asked in one prompt and answered in one answer.

    Returns:
        The example, each answer token with its own row's domain; None when it does not fit, or
        when one of the rows is plain text or a longer conversation.
    """
    if not (first.user and second.user) or first.history or second.history:
        return None
    question = {"role": "user", "content": f"{first.user}\n\n{second.user}"}
    prompt = _tokens(tokenizer, chat_text(tokenizer, [question]))
    head = _tokens(tokenizer, f"{first.assistant}\n\n")
    tail = [*_tokens(tokenizer, second.assistant), tokenizer.eos_token_id]
    ids = prompt + head + tail
    if len(ids) > max_length:
        return None
    domains = [""] * len(prompt) + [first.domain] * len(head) + [second.domain] * len(tail)
    same = [first.domain] * len(ids)
    return Example(
        input_ids=ids,
        labels=[IGNORE] * len(prompt) + head + tail,
        domains=domains,
        topics=same if first.domain == second.domain else domains,
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
