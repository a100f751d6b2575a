"""Which rows are trained on, which are held out, and which are kept of too many."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator

from sample_data.build.choice import fraction
from sample_data.build.rows import Row

# One group in so many is held out.
_GROUPS = 20


def held_out(group: str) -> bool:
    """Whether a group of rows is kept from training: one in 20, by its name alone.

    So a group's side never depends on which other rows there are, and a corpus built from newer
    packages never trains on what an older one held out.
    """
    digest = hashlib.sha1(group.encode(), usedforsecurity=False).digest()
    return int.from_bytes(digest, "big") % _GROUPS == 0


def split(
    rows: Iterable[Row], is_held_out: Callable[[str], bool] = held_out
) -> tuple[list[Row], list[Row]]:
    """Parts rows by their group and shuffles each side; a row that comes twice is taken once.

    The order depends on each row alone, so a row's neighbours may change and its place among the
    others does not.

    Args:
        rows: In any order.
        is_held_out: Tells the side from a row's ``id``.

    Returns:
        Training rows and held-out rows.
    """
    ordered = sorted(dict.fromkeys(rows), key=_place)
    train = [row for row in ordered if not is_held_out(row.id)]
    heldout = [row for row in ordered if is_held_out(row.id)]
    return train, heldout


def up_to(rows: Iterable[Row], characters: int) -> Iterator[Row]:
    """The first rows until they hold ``characters`` characters; the last one may go beyond."""
    total = 0
    for row in rows:
        if total >= characters:
            return
        total += row.characters
        yield row


def _place(row: Row) -> tuple[float, str]:
    line = row.line()
    return fraction("order", line), line
