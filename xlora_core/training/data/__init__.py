"""Training text: JSON lines -> rows -> tokens with a loss on the answers only -> batches.

Everything here is deterministic by seed.
"""

from xlora_core.training.data.batches import (
    NO_DOMAIN,
    Batch,
    by_length,
    collate,
    pad_id,
    step_order,
)
from xlora_core.training.data.encoding import (
    IGNORE,
    Example,
    encode,
    encode_rows,
    joined,
    mixed_examples,
)
from xlora_core.training.data.rows import (
    SPLITS,
    Row,
    has_split,
    read_domain,
    read_rows,
    read_splits,
)

__all__ = [
    "IGNORE",
    "NO_DOMAIN",
    "SPLITS",
    "Batch",
    "Example",
    "Row",
    "by_length",
    "collate",
    "encode",
    "encode_rows",
    "has_split",
    "joined",
    "mixed_examples",
    "pad_id",
    "read_domain",
    "read_rows",
    "read_splits",
    "step_order",
]
