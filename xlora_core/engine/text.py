"""Incremental detokenisation: one piece of text per token, and the pieces join to the text."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Any, Protocol

from tokenizers import decoders

_REPLACEMENT = "\ufffd"


class PieceDecoder(Protocol):
    """Turns token ids into pieces of text, one per token, as they come."""

    def push(self, token_id: int, *, last: bool = False) -> str:
        """Returns the text that this token completes; ``""`` while a character is incomplete.

        Args:
            token_id: The next token.
            last: No token follows: an incomplete character at the end comes out as U+FFFD.
        """
        ...


def piece_decoder(tokenizer: Any) -> PieceDecoder:
    """Returns a fresh decoder for one text.

    The pieces of all tokens, joined, are exactly
    ``tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)``.
    One exception: a SentencePiece vocabulary with byte fallback decides over a whole row of
    byte tokens whether they are valid, so text that is not valid UTF-8 may hold another number
    of U+FFFD than the decoded whole.

    Args:
        tokenizer: A Hugging Face tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and isinstance(backend.decoder, decoders.ByteLevel):
        return ByteLevelPieces(backend)
    return WindowPieces(tokenizer)


def decode_pieces(decoder: PieceDecoder, token_ids: Iterable[int]) -> list[str]:
    """Returns one piece per token."""
    return [decoder.push(token_id) for token_id in token_ids]


def _byte_alphabet() -> dict[str, int]:
    """Returns the printable stand-in character of each byte in a byte-level BPE vocabulary.

    Source: GPT-2. Printable Latin-1 bytes stand for themselves, the other bytes are numbered
    from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }


_BYTE_OF = _byte_alphabet()


class ByteLevelPieces:
    """Exact and O(1) per token, for byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM, ...).

    Args:
        backend: The ``tokenizers.Tokenizer``.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int, *, last: bool = False) -> str:
        """Returns the text that this token completes."""
        # A model's vocabulary may be padded beyond the tokenizer's: such ids have no text.
        token = self._backend.id_to_token(token_id) or ""
        try:
            data = bytes(_BYTE_OF[character] for character in token)
        except KeyError:
            data = token.encode("utf-8", errors="replace")  # an added token holds plain text
        return self._utf8.decode(data, final=last)


class WindowPieces:
    """For any tokenizer: decodes a short window twice and takes what the new token added.

    The window starts at the last token whose text was complete, which gives the decoder the
    context it needs for spaces between words.

    Args:
        tokenizer: A Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._n_emitted = 0  # leading tokens of the window whose text is out

    def push(self, token_id: int, *, last: bool = False) -> str:
        """Returns the text that this token completes."""
        self._window.append(token_id)
        emitted = self._decode(self._window[: self._n_emitted])
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT) and not last:
            return ""
        self._window = self._window[self._n_emitted :]
        self._n_emitted = len(self._window)
        return text[len(emitted) :]

    def _decode(self, token_ids: list[int]) -> str:
        if not token_ids:
            return ""
        return str(
            self._tokenizer.decode(
                token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )
