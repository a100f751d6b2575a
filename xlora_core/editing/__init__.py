"""Editing the adapters of a model that stands: add, remove, rename, reorder.

The router's rows follow: every pair of module and adapter that stays keeps its logit, bit by bit.
"""

from xlora_core.editing.guard import EditGuard
from xlora_core.editing.model import DEFAULT_SHARE, XLoraEditing
from xlora_core.editing.rows import Moves, Newcomer, moved_rows, newcomer_for

__all__ = [
    "DEFAULT_SHARE",
    "EditGuard",
    "Moves",
    "Newcomer",
    "XLoraEditing",
    "moved_rows",
    "newcomer_for",
]
