"""The prompts that benchmarks run: questions with long answers, after any number of tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xlora_core.engine.prompts import Prompt
from xlora_core.errors import ConfigError

# How often the base model guesses the mixture's next token depends on the text, so they are of
# different kinds.
QUESTIONS = (
    "Write a Python function that counts how often each word occurs in a text, and explain it.",
    "Solve 3*x + 17 = 62 for x, step by step, and check the result.",
    "Write a scene in the style of Shakespeare: two friends meet in a storm.",
    "Describe the structure and the properties of 2,3-dimethoxybenzoic acid.",
    "Why is the sky blue? Explain it to a child.",
    "A train leaves at 9:40 and arrives at 13:05 after 246 km. How fast was it on average?",
    "Write a letter to a neighbour whose dog barks all night.",
    "List the steps to bake bread, with times and temperatures.",
)
_TRIES = 8
# Characters; few words of English are longer.
_LONGEST_TOKEN = 12


def read_questions(path: str | Path | None) -> tuple[str, ...]:
    """Returns the questions of a file; the built-in ones without a file.

    Args:
        path: JSON: a list of texts, or of objects with a ``prompt``.

    Raises:
        ConfigError: If the file cannot be read or holds something else.
    """
    if path is None:
        return QUESTIONS
    hint = 'it must hold JSON such as ["Why is the sky blue?"] or [{"prompt": "..."}]'
    try:
        items = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the prompts in {path} cannot be read: {error}", hint=hint) from error
    items = items if isinstance(items, list) else [items]
    given = [item.get("prompt") if isinstance(item, dict) else item for item in items]
    texts = tuple(text for text in given if isinstance(text, str) and text.strip())
    if not texts or len(texts) < len(given):
        raise ConfigError(f"{path} holds no list of prompts", hint=hint)
    return texts


def prompt_of(tokenizer: Any, question: str, n_tokens: int = 0) -> Prompt:
    """Returns a question as a prompt of nearly ``n_tokens`` tokens.

    What is missing comes before the question: prose, from Python's own reference manual. A
    prompt is chat messages where the tokenizer has a template, and text otherwise.

    Args:
        tokenizer: A Hugging Face tokenizer.
        question: What the model is to answer.
        n_tokens: Size of the whole prompt; a smaller one than the question's leaves it as it is.
    """
    prompt = _prompt(tokenizer, question)
    missing = n_tokens - _count(tokenizer, prompt)
    if missing <= 0:
        return prompt
    prose = tokenizer(_prose(missing), add_special_tokens=False, verbose=False)["input_ids"]
    n_prose = missing
    for _ in range(_TRIES):  # a text cut anywhere may be read as other tokens than it was cut from
        cut = tokenizer.decode(_first(prose, n_prose), skip_special_tokens=False)
        prompt = _prompt(tokenizer, f"{cut}\n\n{question}")
        excess = _count(tokenizer, prompt) - n_tokens
        if not excess:
            break
        n_prose = max(n_prose - excess, 1)
    return prompt


def _first(token_ids: Sequence[int], n: int) -> list[int]:
    """Returns the first n tokens of a text that starts again at its end."""
    return [token_ids[i % len(token_ids)] for i in range(n)]


def _prompt(tokenizer: Any, text: str) -> Prompt:
    if getattr(tokenizer, "chat_template", None):
        return [{"role": "user", "content": text}]
    return text


def _count(tokenizer: Any, prompt: Prompt) -> int:
    from xlora_core.engine.prompts import encode_prompt

    size = int(1e9)  # how long a prompt may be is for the engine to say
    encoded = encode_prompt(tokenizer, prompt, context_length=size, vocab_size=size)
    return len(encoded.token_ids)


def _prose(n_tokens: int) -> str:
    """Returns prose of at least so many tokens, or all there is."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))[: _LONGEST_TOKEN * n_tokens]
