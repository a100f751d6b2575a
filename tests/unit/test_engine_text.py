"""Pieces of text, one per token, join to the decoded text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from tests.tiny_chat import tiny_tokenizer
from xlora_core.engine.text import ByteLevelPieces, WindowPieces, decode_pieces, piece_decoder

TOKENIZER = tiny_tokenizer()


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece-like: words with U+2581, unknown characters as byte tokens."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    for character in "▁abcdefghijklmnopqrstuvwxyz":
        vocab[character] = len(vocab)
    backend = Tokenizer(
        models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=False)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


FALLBACK = byte_fallback_tokenizer()


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def pieces_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    decoder = piece_decoder(tokenizer)
    if not ids:
        return []
    return [*decode_pieces(decoder, ids[:-1]), decoder.push(ids[-1], last=True)]


@given(st.text())
def test_byte_level_pieces_join_to_the_text(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(TOKENIZER, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text == decoded(TOKENIZER, ids)


@given(st.lists(st.integers(0, len(TOKENIZER) - 1)))
def test_byte_level_pieces_of_any_tokens_join_to_what_the_tokenizer_decodes(ids: list[int]) -> None:
    assert "".join(pieces_of(TOKENIZER, ids)) == decoded(TOKENIZER, ids)


@given(st.text())
def test_byte_fallback_pieces_join_to_the_text(text: str) -> None:
    ids = FALLBACK(text, add_special_tokens=False)["input_ids"]
    assert "".join(pieces_of(FALLBACK, ids)) == decoded(FALLBACK, ids)


@pytest.mark.parametrize(
    "decoder", [ByteLevelPieces(TOKENIZER.backend_tokenizer), WindowPieces(TOKENIZER)]
)
def test_a_character_comes_out_with_the_token_that_completes_it(decoder: object) -> None:
    ids = TOKENIZER("a" + "𐍈" + "b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 6  # the tiny vocabulary has no token for a part of this one
    assert decode_pieces(decoder, ids) == ["a", "", "", "", "𐍈", "b"]  # type: ignore[arg-type]


def test_the_right_decoder_is_chosen() -> None:
    assert isinstance(piece_decoder(TOKENIZER), ByteLevelPieces)
    assert isinstance(piece_decoder(FALLBACK), WindowPieces)


def test_an_incomplete_character_at_the_end_is_a_replacement_character() -> None:
    ids = TOKENIZER("a𐍈", add_special_tokens=False)["input_ids"][:-1]
    assert pieces_of(TOKENIZER, ids) == ["a", "", "", "\ufffd"]


def test_special_and_unknown_tokens() -> None:
    decoder = piece_decoder(TOKENIZER)
    end = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    assert decoder.push(end) == "<|im_end|>"
    assert decoder.push(len(TOKENIZER) + 5) == ""  # padding of a model's vocabulary


class CountingTokenizer:
    """Counts the tokens that are decoded."""

    def __init__(self) -> None:
        self.n_decoded = 0

    def decode(self, ids: list[int], **_: object) -> str:
        self.n_decoded += len(ids)
        return FALLBACK.decode(ids)


def test_the_window_does_not_grow_with_the_text() -> None:
    tokenizer = CountingTokenizer()
    ids = FALLBACK("some words " * 50, add_special_tokens=False)["input_ids"]
    decode_pieces(WindowPieces(tokenizer), ids)
    assert tokenizer.n_decoded < 4 * len(ids)
