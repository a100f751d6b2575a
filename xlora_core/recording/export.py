"""Tables as CSV and Parquet files, with cells that a spreadsheet would run made harmless."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, get_args

from xlora_core.config import RoutingKnobs
from xlora_core.errors import ConfigError, RecordError
from xlora_core.recording.atomic_file import atomic_file
from xlora_core.recording.buckets import bucketed_tables
from xlora_core.recording.long_table import long_tables

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from xlora_core.recording.run import Run

ExportBy = Literal["position", "segment", "seq_len", "token"]
EXPORT_BY: tuple[str, ...] = get_args(ExportBy)

# The start of what a spreadsheet may run: the four signs or their full-width forms, a tab or a
# carriage return; also behind blanks and other characters that it does not show.
_FORMULA = re.compile(
    r"['\s\x00-\x1f\u200b-\u200f\u2060\ufeff]*(?:[=+\-@\uff1d\uff0b\uff0d\uff20]|(?<=[\t\r]))"
)


def defuse(text: str) -> str:
    """Returns the text with an apostrophe before it if a spreadsheet would run it as a formula.

    ``undefuse`` gives the text back. To that end a text that begins with an apostrophe and a
    formula gets another apostrophe.

    Example:
        >>> defuse("=1+1"), defuse(" -x"), defuse("a=b")
        ("'=1+1", "' -x", 'a=b')
    """
    return f"'{text}" if _FORMULA.match(text) else text


def undefuse(text: str) -> str:
    """Returns the text that ``defuse`` was given."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text[1:]) else text


def write_csv(run: Run, path: Path, by: ExportBy, **choice: Any) -> None:
    """Writes a table of the run as CSV. See ``Run.to_csv``."""
    first, tables = _tables(run, by, **choice)
    with _output(path) as file:
        _write_csv(file, first.schema, tables)


def csv_text(run: Run, by: ExportBy, **choice: Any) -> str:
    """Returns a table of the run as CSV. See ``Run.to_csv``."""
    file = io.BytesIO()
    first, tables = _tables(run, by, **choice)
    _write_csv(file, first.schema, tables)
    return file.getvalue().decode("utf-8")


def write_parquet(run: Run, path: Path, by: ExportBy, **choice: Any) -> None:
    """Writes a table of the run as Parquet. See ``Run.to_parquet``."""
    import pyarrow.parquet

    first, tables = _tables(run, by, **choice)
    with _output(path) as file, pyarrow.parquet.ParquetWriter(file, first.schema) as writer:
        for table in tables:
            writer.write_table(table)


def _tables(
    run: Run,
    by: ExportBy,
    *,
    width: int = 16,
    knobs: RoutingKnobs | None = None,
    arm: int | None = None,
) -> tuple[pa.Table, Iterator[pa.Table]]:
    """Returns the first of the table's parts, and all of them. Texts are defused.

    There is at least one part, and all have the first one's schema. Arguments are checked here.
    """
    if by not in EXPORT_BY:
        raise ConfigError(f"by must be one of {', '.join(EXPORT_BY)}, got {by!r}")
    if by == "token":
        frames = long_tables(run, knobs, arm=arm)
    else:
        frames = bucketed_tables(run, by, width=width, knobs=knobs, arm=arm)
    tables = map(_arrow, frames)
    first = next(tables)
    return first, chain([first], tables)


def _arrow(frame: pd.DataFrame) -> pa.Table:
    import pandas as pd
    import pyarrow as pa

    defused = {
        str(name): column.cat.rename_categories([defuse(text) for text in column.cat.categories])
        for name, column in frame.items()
        if isinstance(column.dtype, pd.CategoricalDtype)
    }
    return pa.Table.from_pandas(frame.assign(**defused), preserve_index=False)


def _write_csv(file: BinaryIO, schema: pa.Schema, tables: Iterator[pa.Table]) -> None:
    import pyarrow.csv

    # By hand: Arrow puts the names in quotes.
    file.write((",".join(schema.names) + "\n").encode("utf-8"))
    options = pyarrow.csv.WriteOptions(include_header=False)
    with pyarrow.csv.CSVWriter(file, schema, write_options=options) as writer:
        for table in tables:
            writer.write_table(table)


@contextmanager
def _output(path: Path) -> Iterator[BinaryIO]:
    try:
        with atomic_file(path) as file:
            yield file
    except OSError as error:
        raise RecordError(
            f"cannot write {path}: {error.strerror or error}",
            hint="choose a folder that exists, may be written and has room",
        ) from error
