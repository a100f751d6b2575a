"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a new file beside ``path`` that takes its place when the block ends without an error.

    Raises:
        OSError: If the folder cannot be written, or ``path`` is a folder.
    """
    # Exclusive creation instead of tempfile, whose files only their owner may read.
    part = path.with_name(f".{path.name[:64]}.{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
