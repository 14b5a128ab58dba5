"""What the end of a run does with columns, tried on each file's first rows before it begins.

The very functions of the end are called, so that what passes here is not refused for its type when
hours of work are done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from snipdedup.errors import SnipError
from snipdedup.metadata.files import Table
from snipdedup.metadata.tables import Metadata
from snipdedup.storage.remote import map_requests


class Use(NamedTuple):
    """What columns are read for.

    Attributes
    ----------
    columns : sequence of str, optional
        In the order that ``convert`` takes them; None: all of a file.
    convert : function of (Table, record batch)
        Raises `SnipError` where it cannot take the columns.
    remedy : str
        What to do then.
    by_schema : bool
        Whether it can fail by types only, so that one file of each schema is enough.
    """

    columns: Sequence[str] | None
    convert: Callable[[Table, Any], Any]
    remedy: str
    by_schema: bool = False


def rehearse(metadata: Metadata, uses: Sequence[Use]) -> None:
    """Convert the first rows of each file in all ways that are to come.

    Raises
    ------
    SnipError
        Names the file, the column, what was found and expected, and what to do.
    """
    seen: set[str] = set()

    def new(file: Table) -> bool:
        schema = str(file.schema)
        known = schema in seen
        seen.add(schema)
        return not known

    tasks = [(file, [use for use in uses if fresh or not use.by_schema])
             for file, fresh in [(file, new(file)) for file in metadata.files]]  # fmt: skip
    map_requests(lambda task: try_file(*task), [task for task in tasks if task[1]])


def try_file(file: Table, uses: Sequence[Use]) -> None:
    """Convert the first rows of one file, and none of them: types alone may be refused."""
    whole = any(use.columns is None for use in uses)
    names = dict.fromkeys(name for use in uses for name in use.columns or ())
    columns = list(file.schema.names) if whole else list(names)
    empty = pa.schema([file.schema.field(name) for name in columns]).empty_table()
    batches = [pa.RecordBatch.from_arrays([c.combine_chunks() for c in empty.columns], columns)]
    for _, batch in file.batches(columns, np.zeros(min(1, file.rows), np.int64)):
        batches.append(batch)
        break
    for use in uses:
        for batch in batches:
            try:
                use.convert(file, batch.select(list(use.columns or columns)))
            except SnipError as error:
                raise type(error)(f"{error}; {use.remedy}") from error
