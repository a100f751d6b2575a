"""The result of a calculation, read out of a written answer, and when two results are the same.

Lenient about form (an equation, Markdown, LaTeX, a sentence) and strict about content: a text that
hedges, denies or leaves the sum undone has no result.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_NUMBER = r"-?\d{1,40}(?:,\d{3})*(?:\.\d{1,60})?"
_RATIONAL = rf"{_NUMBER}(?:/\d{{1,40}})?"
_WORDS_OF_RESULTS = frozenset(("sqrt", "log", "true", "false", "yes", "no", "am", "pm"))
_TOLD = r"(?:answer is|answer\s*:|####)[:\s]*([^\n]+)"
_FILLERS = (
    r"(?:[\s:=~≈]|(?:approximately|about|around|roughly|exactly|simply|just|equal to|given by)\b)*"
)
# After a number these say that it is not the result by itself.
_GOES_ON = (
    r"(?:or|to|and|through)\b[\s$]*-?\d"
    r"|(?:times|plus|minus|divided|over|more|less|fewer|squared|cubed|hundred|thousand|million"
    r"|billion|trillion|dozen)\b"
)
_HEDGES = (
    r"\b(?:not|never|between|at least|at most|(?:less|more|greater|fewer) than)\b|n't\b"
    rf"|{_NUMBER}\s*(?:or|to)\s+[$]?{_NUMBER}"
)
_CLAIM = (
    r"\bis (not )?(?:an? )?(?:(?:prime|proper) )?"
    r"(?:factor|divisor|multiple|divisible|prime|composite)\b"
)


def final_answer(text: str) -> str | None:
    r"""Reads the result of a calculation, without spaces and in lower case.

    It is what stands in the last ``\boxed{}``; else what follows the last "the answer is" or
    "####"; else the text itself if it is a single expression; else what its last sentence ends
    in; else its last number. Of a chain of equations it is the last value.
    """
    text = _without_markup(text)
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
    if boxed:
        return _told(boxed[-1])
    told = re.findall(_TOLD, text, flags=re.IGNORECASE)
    if told:
        return _told(told[-1])
    if "\n" not in text and not _words(text):
        return _result(text)
    judged = re.match(r"(true|false|yes|no)\b(?! (?:more|less|fewer)\b)", text, flags=re.IGNORECASE)
    if judged:
        return _plain(judged[1])
    return _concluded(text)


def _told(text: str) -> str | None:
    """Reads the result at the beginning of a sentence: "28 stickers" is a number, "2 - x" not."""
    sentence = _sentences(text)[0]
    sentence = re.sub(rf"^{_FILLERS}", "", sentence, flags=re.IGNORECASE)
    words = _words(sentence)
    if not words:
        return _result(sentence)
    start = words[0].start()
    expression, rest = sentence[:start].rstrip(" ,;:("), sentence[start:]
    if re.match(_GOES_ON, rest, flags=re.IGNORECASE):
        return None
    # "5 a day", "5, I think": the letter belongs to the words
    expression = re.sub(r"(?<=[\w)])[,;]?\s+[A-Za-z]$", "", expression)
    if expression:
        return _result(expression)
    numbers = set(re.findall(rf"(?<![\w.]){_RATIONAL}(?!\w)", sentence))
    if len(numbers) != 1 or re.search(_HEDGES, sentence, flags=re.IGNORECASE):
        return None
    return _plain(numbers.pop())


def _concluded(text: str) -> str | None:
    """Reads the result that a text in words comes to in the end."""
    sentences = _sentences(text)
    claim = re.search(_CLAIM, sentences[0], flags=re.IGNORECASE)
    if claim and len(sentences) == 1:
        return "false" if claim[1] else "true"
    if len(_unknowns(sentences[-1] if _words(text) else text)) > 1:
        return None
    end = re.split(r"=|≈|:\s|\b(?:is|are|equals)\b", sentences[-1])[-1]
    if end != sentences[-1] and re.search(r"\w", end) and not _words(end):
        return _result(end)
    for sentence in reversed(sentences):
        numbers = list(re.finditer(rf"(?<![\w.]){_RATIONAL}(?![\w^])", sentence))
        if numbers:
            hedged = re.search(_HEDGES, sentence, flags=re.IGNORECASE)
            return None if hedged or _is_operand(numbers[-1]) else _plain(numbers[-1][0])
    return None


def _is_operand(number: re.Match[str]) -> bool:
    """Whether a number is part of a sum that the text leaves undone."""
    before, after = number.string[: number.start()], number.string[number.end() :]
    operand = r"(?:\d|\)|(?<![A-Za-z])[A-Za-z])\s*"
    if number[0].startswith("-") and re.search(rf"{operand}$", before):
        return True
    return bool(
        re.search(rf"{operand}[-+*/^]+\s*$", before)
        or re.match(r"\s*(?:[+*/^]|-\s*(?:\d|[A-Za-z]\b))", after)
    )


def _result(expression: str) -> str | None:
    """Returns the last value of a chain of equations; None for the values of two unknowns."""
    if len(_unknowns(expression)) > 1:
        return None
    value = expression.rpartition("=")[2].strip(" ,;:")
    with_unit = re.fullmatch(rf"[$]?({_NUMBER})\s+[A-Za-z]\.?", value)  # "5 m"
    value = _plain(with_unit[1] if with_unit else value)
    return value if re.search(r"\w", value) else None


def _unknowns(text: str) -> set[str]:
    """Returns the letters that a text gives values."""
    return set(re.findall(r"(?:^|[,;\s])([A-Za-z])\s*=", text))


def _without_markup(text: str) -> str:
    """Takes Markdown and LaTeX away that says how a result looks, not what it is."""
    text = unicodedata.normalize("NFKC", text)
    for sign, plain in (("−", "-"), ("⁄", "/"), ("×", "*"), ("·", "*"), ("^", "**"), ("`", "")):
        text = text.replace(sign, plain)
    text = re.sub(r"\\(?:left|right)\b|\\[()\[\],;!]", "", text)
    text = re.sub(r"\\(?:times|cdot)\b", "*", text)
    text = re.sub(r"\\(?:text|mathrm)\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", text).strip()
    # Two asterisks are a power between operands, and bold around a result.
    text = re.sub(r"(?<![\w)*])\*\*(?=[^\s*])([^*\n]+?)(?<=[^\s*])\*\*(?![\w(*])", r"\1", text)
    return re.sub(r"^\*\*(.+)\*\*\.?$", r"\1", text)


def _sentences(text: str) -> list[str]:
    found = re.split(r"[.!?](?:\s+|$)|\n+", text.strip())
    return [sentence for sentence in found if sentence.strip()] or [""]


def _words(text: str) -> list[re.Match[str]]:
    """Returns the words that are no part of a result."""
    words = re.finditer(r"[A-Za-z]{2,}", text)
    return [word for word in words if word[0].lower() not in _WORDS_OF_RESULTS]


def _plain(text: str) -> str:
    text = re.sub(r"[\s$€£]", "", text).rstrip(".").lower()
    if re.fullmatch(r"\([a-z]\)", text):
        text = text[1]
    return {"yes": "true", "no": "false"}.get(text, text)


def same_result(value: str, reference: str) -> bool:
    """Whether two results of ``final_answer`` are the same text, or the same number."""
    if value == reference:
        return True
    numbers = [_rational(text) for text in (value, reference)]
    return None not in numbers and numbers[0] == numbers[1]


def _rational(text: str) -> Fraction | None:
    match = re.fullmatch(rf"({_NUMBER})(?:/(\d{{1,40}}))?%?", text)
    if match is None or (match[2] is not None and not int(match[2])):
        return None
    return Fraction(match[1].replace(",", "")) / int(match[2] or 1)
