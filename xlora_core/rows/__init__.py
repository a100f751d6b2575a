"""Rows: many texts, arms and passes in one run over the model's weights."""

from __future__ import annotations

from xlora_core.rows.batch import RowBatch, Segment
from xlora_core.rows.cache import BlockShape, RowCache
from xlora_core.rows.reader import RowReader

__all__ = ["BlockShape", "RowBatch", "RowCache", "RowReader", "Segment"]
