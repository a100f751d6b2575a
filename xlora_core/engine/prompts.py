"""A prompt of text or chat messages -> token ids, refused clearly where it cannot be served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xlora_core.errors import PromptError

Message = dict[str, str]
Prompt = str | Sequence[Message]

_ROLES = ("system", "user", "assistant")
_PRIVATE_USE = range(0xE000, 0xF8FF)


@dataclass(frozen=True, kw_only=True)
class EncodedPrompt:
    """A prompt as the model reads it.

    Attributes:
        token_ids: One id per token, chat template and special tokens included.
        text: The text behind them.
    """

    token_ids: list[int]
    text: str


def encode_prompt(
    tokenizer: Any, prompt: Prompt, *, context_length: int, vocab_size: int
) -> EncodedPrompt:
    """Returns a prompt's tokens.

    A string is raw text, taken as is: special tokens written in it are special tokens. Messages
    go through the tokenizer's chat template; special tokens written in their *content* stay
    ordinary text, so a user who types ``<|im_end|>`` cannot end his own turn.

    Args:
        tokenizer: A Hugging Face tokenizer.
        prompt: Text, or messages with ``role`` and ``content``.
        context_length: Most tokens the model can read, prompt and answer together.
        vocab_size: Number of token embeddings of the model.

    Raises:
        PromptError: If the prompt is empty, malformed, not valid Unicode, or leaves no room for
            one new token; or if the tokenizer does not belong to the model.
    """
    if isinstance(prompt, str):
        _refuse_empty(prompt)
        encoded = EncodedPrompt(token_ids=_tokenize(tokenizer, prompt, raw=True), text=prompt)
    else:
        encoded = _encode_messages(tokenizer, _checked_messages(prompt))
    _check_ids(encoded.token_ids, context_length, vocab_size)
    return encoded


def _refuse_empty(text: str) -> None:
    if not text.strip():
        raise PromptError("the prompt is empty", hint="write at least one word")


def _checked_messages(messages: object) -> list[Message]:
    expected = "a prompt is text, or a list of messages with a 'role' and a 'content' text"
    if not isinstance(messages, Sequence):
        raise PromptError(f"{expected}, got {type(messages).__name__}")
    for message in messages:
        if (
            not isinstance(message, dict)
            or set(message) != {"role", "content"}
            or not isinstance(message["content"], str)
        ):
            raise PromptError(f"{expected}, got {message!r:.200}")
        if message["role"] not in _ROLES:
            raise PromptError(
                f"a message's role must be one of {', '.join(_ROLES)}, got {message['role']!r}"
            )
    _refuse_empty(messages[-1]["content"] if messages else "")
    return list(messages)


def _encode_messages(tokenizer: Any, messages: list[Message]) -> EncodedPrompt:
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(
            "this tokenizer has no chat template, so messages cannot be laid out",
            hint="give the prompt as one text instead (command line: --raw)",
        )
    cut = _unused_character(messages)
    specials = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    safe = [m | {"content": _cut_specials(m["content"], specials, cut)} for m in messages]
    try:
        text = tokenizer.apply_chat_template(safe, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of its own: it may raise anything
        raise PromptError(
            f"the tokenizer's chat template refuses these messages: {error}",
            hint="user and assistant messages usually have to alternate, system comes first",
        ) from error
    # Cut apart, a special token's text is no longer found as a special token.
    token_ids: list[int] = []
    for chunk in str(text).split(cut):
        token_ids += _tokenize(tokenizer, chunk, raw=False)
    return EncodedPrompt(token_ids=token_ids, text=str(text).replace(cut, ""))


def _unused_character(messages: list[Message]) -> str:
    used = set("".join(m["content"] for m in messages))
    return next(chr(code) for code in _PRIVATE_USE if chr(code) not in used)


def _cut_specials(content: str, specials: list[str], cut: str) -> str:
    """Returns the content with ``cut`` after the first character of every special token in it."""
    cuts = set()
    for special in specials:
        start = content.find(special)
        while start >= 0:
            cuts.add(start + 1)
            start = content.find(special, start + 1)
    for position in sorted(cuts, reverse=True):
        content = content[:position] + cut + content[position:]
    return content


def _tokenize(tokenizer: Any, text: str, *, raw: bool) -> list[int]:
    try:
        # A chat template writes its own begin-of-text token.
        return [int(i) for i in tokenizer(text, add_special_tokens=raw)["input_ids"]]
    except (UnicodeEncodeError, TypeError) as error:
        raise PromptError(
            "the prompt is not valid Unicode text (it holds half of a surrogate pair)",
            hint="remove the broken character; it often comes from a cut-off emoji",
        ) from error


def _check_ids(token_ids: list[int], context_length: int, vocab_size: int) -> None:
    n_tokens = len(token_ids)
    if n_tokens == 0:
        raise PromptError("the prompt is empty: it has no tokens", hint="write at least one word")
    if n_tokens >= context_length:
        raise PromptError(
            f"the prompt has {n_tokens:,} tokens, the model's context window is "
            f"{context_length:,} and one token must be left for the answer",
            hint=f"shorten the prompt to at most {context_length - 1:,} tokens",
        )
    if max(token_ids) >= vocab_size:
        raise PromptError(
            f"the tokenizer gives token id {max(token_ids)}, the model knows ids below "
            f"{vocab_size}: they do not belong together",
            hint="load the tokenizer that came with the base model",
        )
