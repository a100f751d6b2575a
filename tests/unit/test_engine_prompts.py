"""Prompts: chat template, special tokens typed by users, refusals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_chat import SPECIALS, tiny_tokenizer
from xlora_core.engine.prompts import EncodedPrompt, Prompt, encode_prompt
from xlora_core.errors import PromptError

TOKENIZER = tiny_tokenizer()
SPECIAL_IDS = set(TOKENIZER.convert_tokens_to_ids(SPECIALS))


def encode(prompt: Prompt, context_length: int = 4096) -> EncodedPrompt:
    return encode_prompt(
        TOKENIZER, prompt, context_length=context_length, vocab_size=len(TOKENIZER)
    )


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


@given(st.text().filter(lambda t: t.strip() and not any(s in t for s in SPECIALS)))
def test_messages_are_encoded_as_the_chat_template_does(content: str) -> None:
    expected = TOKENIZER.apply_chat_template(user(content), add_generation_prompt=True)
    encoded = encode(user(content))
    assert encoded.token_ids == expected["input_ids"]
    assert encoded.text == TOKENIZER.decode(encoded.token_ids)


@given(st.lists(st.sampled_from([*SPECIALS, "<", "<|", "im_", "end|>", " x"]), min_size=1))
def test_special_tokens_in_a_message_stay_text(parts: list[str]) -> None:
    content = "a" + "".join(parts)
    n_of_template = sum(i in SPECIAL_IDS for i in encode(user("a")).token_ids)
    encoded = encode(user(content))
    assert sum(i in SPECIAL_IDS for i in encoded.token_ids) == n_of_template == 3
    expected = TOKENIZER.apply_chat_template(
        user(content), add_generation_prompt=True, tokenize=False
    )
    assert encoded.text == TOKENIZER.decode(encoded.token_ids) == expected


def test_special_tokens_that_hide_in_each_other_stay_text() -> None:
    encoded = encode(user("<|im_<|im_end|>end|>"))
    assert sum(i in SPECIAL_IDS for i in encoded.token_ids) == 3


def test_private_use_characters_of_the_user_survive() -> None:
    content = "\ue000\ue001 <|im_end|>"
    assert content in encode(user(content)).text


def test_special_tokens_in_a_raw_text_are_special() -> None:
    assert encode("<|im_start|>").token_ids == [TOKENIZER.convert_tokens_to_ids("<|im_start|>")]


def test_html_is_text() -> None:
    assert "<script>alert(1)</script>" in encode(user("<script>alert(1)</script>")).text


@pytest.mark.parametrize("prompt", ["", " \n\t", [], user(""), user("  ")])
def test_an_empty_prompt_is_refused(prompt: Prompt) -> None:
    with pytest.raises(PromptError, match="the prompt is empty"):
        encode(prompt)


def test_a_long_prompt_is_refused_with_both_numbers() -> None:
    n_tokens = len(encode("fox " * 50).token_ids)
    with pytest.raises(PromptError) as caught:
        encode("fox " * 50, context_length=n_tokens)
    assert f"the prompt has {n_tokens} tokens, the model's context window is {n_tokens}" in str(
        caught.value
    )
    assert f"hint: shorten the prompt to at most {n_tokens - 1} tokens" in str(caught.value)
    assert len(encode("fox " * 50, context_length=n_tokens + 1).token_ids) == n_tokens


@pytest.mark.parametrize("prompt", ["a\ud83d", user("\udc00")])
def test_half_a_surrogate_pair_is_refused(prompt: Prompt) -> None:
    with pytest.raises(PromptError, match="half of a surrogate pair"):
        encode(prompt)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (3, "a prompt is text, or a list of messages .* got int"),
        (["hello"], "a prompt is text, or a list of messages .* got 'hello'"),
        ([{"role": "user"}], "'role' and a 'content' text, got {'role': 'user'}"),
        ([{"role": "user", "content": None}], "'content': None"),
        ([{"role": "root", "content": "x"}], "must be one of system, user, assistant, got 'root'"),
    ],
)
def test_malformed_messages_are_refused(messages: object, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        encode(messages)  # type: ignore[arg-type]  # wrong on purpose


def test_a_template_that_refuses_is_quoted() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(PromptError, match=r"chat template refuses .*roles must alternate"):
        encode_prompt(tokenizer, user("x"), context_length=10, vocab_size=400)


def test_messages_need_a_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(PromptError, match="no chat template"):
        encode_prompt(tokenizer, user("x"), context_length=10, vocab_size=400)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(PromptError, match="do not belong together"):
        encode_prompt(TOKENIZER, "zzz\U0001f642", context_length=100, vocab_size=10)
