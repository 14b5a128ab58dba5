"""Columns of rows in any order, a slice at a time: the files are read once, in row order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from snipdedup.features.shards import plan_blocks
from snipdedup.metadata.files import Table
from snipdedup.metadata.spill import spilling
from snipdedup.metadata.tables import Metadata
from snipdedup.storage.external_sort import READ, Sorter, Spread, pack, row_kind

Convert = Callable[[Table, Any], dict[str, Any]]


def gather_columns(
    metadata: Metadata,
    columns: Sequence[str],
    rows: np.ndarray,
    cuts: np.ndarray,
    convert: Convert,
    folder: Path,
) -> Generator[Any, None, None]:
    """Yield, for each slice of ``rows``, what columns hold there, as a ``pyarrow.Table``.

    None for a slice of no rows. Close it: left to itself, a generator that was broken off removes
    its files when its memory is freed, when they may be those of a later run.

    Parameters
    ----------
    metadata : Metadata
    columns : sequence of str
        Exact names, from `Metadata.column`.
    rows : (n,) int64
        Global rows in any order, each once; may be mapped.
    cuts : (slices + 1,) int64
        Where each slice begins, then where the last one ends.
    convert : function of (Table, record batch)
        Returns named columns, of the same types for all files.
    folder : Path
        Where they wait; gone afterwards.
    """
    kind = np.dtype([("row", row_kind(metadata.rows)), ("place", row_kind(len(rows)))])
    spread = Spread(len(rows), 0, metadata.rows)
    by_row = Sorter(folder / "rows", kind, lambda r: r["row"].astype(np.uint64), spread=spread)
    with spilling(folder, len(cuts) - 1) as spill:
        for start, stop in plan_blocks(len(rows), READ):
            by_row.add(pack(kind, rows[start:stop], np.arange(start, stop)))
        for records in by_row.ascending():
            order = np.argsort(records["row"])
            row, place = (records[name][order].astype(np.int64) for name in ("row", "place"))
            for file, which, batch in metadata.pick(columns, row):
                at = place[which]
                held = pa.RecordBatch.from_pydict({"place": at, **convert(file, batch)})
                spill.add(np.searchsorted(cuts, at, side="right") - 1, held)
        for number in range(len(cuts) - 1):
            table = spill.read(number)
            if table is not None:
                table = table.take(pa.array(np.argsort(table["place"].to_numpy())))
            yield table
            pa.default_memory_pool().release_unused()
