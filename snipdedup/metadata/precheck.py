"""Conversions of columns, tried on each file's first rows before hours of work begin.

The functions tried are those that the end of a run calls, so a column that passes here is not
refused for its type later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from snipdedup.errors import SnipError
from snipdedup.metadata.tables import Metadata, Table
from snipdedup.storage.remote import map_requests


class ColumnUse(NamedTuple):
    """What a run will do with columns (None: all of a file).

    ``convert`` takes a file, a global row and the record batch of these columns from there on; it
    raises `SnipError` where it cannot take them. ``remedy`` is what the user can do then.
    ``by_schema``: only types can make it fail, so that one file of each schema is enough.
    """

    columns: Sequence[str] | None
    convert: Callable[[Table, int, Any], Any]
    remedy: str
    by_schema: bool = False


def try_column_uses(metadata: Metadata, uses: Sequence[ColumnUse]) -> None:
    """Convert the first rows of each file in all ways that are to come."""
    seen: set[str] = set()
    tasks = []
    for file, first in zip(metadata.files, metadata.offsets.tolist(), strict=False):
        schema = str(file.schema)
        due = [use for use in uses if schema not in seen or not use.by_schema]
        tasks.append((file, first, due))
        seen.add(schema)
    map_requests(lambda task: _try_file(*task), [task for task in tasks if task[2]])


def _try_file(file: Table, first: int, uses: Sequence[ColumnUse]) -> None:
    """Convert no rows of a file (types alone may be refused), then its first rows."""
    whole = any(use.columns is None for use in uses)
    names = dict.fromkeys(name for use in uses for name in use.columns or ())
    columns = list(file.schema.names) if whole else list(names)
    schema = pa.schema([file.schema.field(name) for name in columns])
    batches = [pa.RecordBatch.from_pylist([], schema)]
    first_row = np.zeros(min(1, file.rows), np.int64)
    batches += [batch for _, batch in islice(file.batches(columns, first_row), 1)]
    for use in uses:
        for batch in batches:
            try:
                use.convert(file, first, batch.select(list(use.columns or columns)))
            except SnipError as error:
                raise type(error)(f"{error}; {use.remedy}") from error
