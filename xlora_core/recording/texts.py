"""Texts as table columns, and texts as bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd


def printable(text: str) -> str:
    r"""Returns the text with lone surrogates written out, since no UTF-8 table can hold them.

    Example:
        >>> printable("half an emoji: \ud83d")
        'half an emoji: \\ud83d'
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def categorical(codes: NDArray[Any], texts: Iterable[str]) -> pd.Categorical:
    """Returns a column that stores each text once.

    Args:
        codes: ``[rows]``, the number of each row's text, -1 where it has none; truth values
            count as 0 and 1.
        texts: The texts; equal ones share a category.
    """
    import pandas as pd

    numbers: dict[str, int] = {}
    of_text = [numbers.setdefault(printable(text), len(numbers)) for text in texts]
    row_codes = np.array([*of_text, -1], dtype=np.int64)[codes.astype(np.int64)]
    dtype = pd.CategoricalDtype(pd.Index(list(numbers), dtype="str"))
    return pd.Categorical.from_codes(row_codes, dtype=dtype)


def to_bytes(text: str) -> bytes:
    """Returns UTF-8, in which a lone surrogate has three bytes, so that nothing is lost."""
    return text.encode("utf-8", "surrogatepass")


def from_bytes(data: bytes) -> str:
    """Returns the text of ``to_bytes``.

    Raises:
        UnicodeDecodeError: If the bytes are no such text.
    """
    return data.decode("utf-8", "surrogatepass")
