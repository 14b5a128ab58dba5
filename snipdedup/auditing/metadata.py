"""Checks that OUT/metadata holds the kept rows: their number, order, values and dup_count.

The input table is read beside each file, if it still is what it was; otherwise only the number of
rows and dup_count are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from snipdedup.auditing.proof import AuditedRun
from snipdedup.auditing.result import AuditResult
from snipdedup.errors import SnipError
from snipdedup.features.shards import plan_blocks
from snipdedup.metadata.tables import BATCH_ROWS, Metadata, Table, open_table

DUP_COUNT = "dup_count"


class Expected(NamedTuple):
    """What some rows of a file should hold: numbers of rows, dup_count, and the input's values.

    ``batch`` is None where the input is not known.
    """

    rows: np.ndarray
    dup_count: np.ndarray
    batch: Any


def check_metadata(
    run: AuditedRun,
    dup_counts: tuple[np.ndarray, np.ndarray],
    source: Metadata | None,
    result: AuditResult,
) -> None:
    """Compare the files of OUT/metadata with the mask, and with the input table.

    Parameters
    ----------
    run : AuditedRun
    dup_counts : ((m,) int64, (m,) int64)
        Ascending rows that represent others, and how many each.
    source : Metadata or None
        The input table.
    result : AuditResult

    Raises
    ------
    SnipError
        If ``source`` has other files than the input had.
    """
    described = run.manifest["request"].get("metadata")
    if described is None:
        result.note("metadata", "none was given to the run")
        return
    if source is not None and [f.rows for f in source.files] != [f["rows"] for f in described]:
        raise SnipError(
            "the metadata is not in the files that were filtered: expected "
            f"{', '.join(file['name'] for file in described)}"
        )
    rows = begin = 0
    for number, file in enumerate(described):
        end = begin + file["rows"]
        table = None if source is None else source.files[number]
        try:
            kept = open_table(run.folder / "metadata" / f"{Path(file['name']).stem}.parquet")
            check_file(run, kept, expected_rows(run, begin, end, dup_counts, table), result)
            rows += kept.rows
        except SnipError as error:
            result.fail("metadata", str(error))
        begin = end
    compared = "compared with the input"
    if source is None:
        compared = "only their number and dup_count: the input is not where it was"
    result.note("metadata", f"{rows:,} rows in {len(described):,} files, {compared}")


def expected_rows(
    run: AuditedRun,
    begin: int,
    end: int,
    dup_counts: tuple[np.ndarray, np.ndarray],
    source: Table | None,
) -> Iterator[Expected]:
    """Yield what the file of rows ``begin`` to ``end`` should hold, some rows at a time."""
    all_rows = bool(run.manifest["settings"].get("weights"))  # then removed rows are written too
    parts: Any = ((at, stop - at, None) for at, stop in plan_blocks(end - begin, BATCH_ROWS))
    if source is not None:
        parts = ((at, batch.num_rows, batch) for at, batch in source.batches())
    for at, size, batch in parts:
        first = begin + at
        kept = np.full(size, True) if all_rows else ~np.asarray(run.is_dup[first : first + size])
        low, high = np.searchsorted(dup_counts[0], [first, first + size])
        counts = np.zeros(size, np.int64)
        counts[dup_counts[0][low:high] - first] = dup_counts[1][low:high]
        values = None if batch is None else batch.filter(pa.array(kept))
        yield Expected(first + np.flatnonzero(kept), counts[kept], values)


def check_file(
    run: AuditedRun, kept: Table, expected: Iterator[Expected], result: AuditResult
) -> None:
    """Compare one file with what it should hold; name its first row that is wrong."""
    name, batches = f"metadata/{kept.path.name}", (batch for _, batch in kept.batches())
    waiting: Any = pa.Table.from_batches([], kept.schema)
    wanted, place, wrong = 0, 0, None
    for part in expected:
        size = len(part.rows)
        while waiting.num_rows < size and (batch := next(batches, None)) is not None:
            waiting = pa.concat_tables([waiting, pa.Table.from_batches([batch], kept.schema)])
        if wrong is None:
            at = first_difference(waiting.slice(0, size), part)
            if at is not None:
                wrong, place = run.place(int(part.rows[at])), wanted + at
        waiting = waiting.slice(size)
        wanted += size
    if kept.rows != wanted:
        late = f"; {wrong} is missing or comes too late" if wrong and kept.rows < wanted else ""
        found = f"{name}: {kept.rows:,} rows, is_dup.npy keeps {wanted:,} of this file{late}"
        result.fail("metadata", found)
    elif wrong is not None:
        result.fail("metadata", f"{name} row {place:,}: expected {wrong}, found other values")


def first_difference(found: Any, expected: Expected) -> int | None:
    """Return the first row in which a table differs from what is expected."""
    equal = np.zeros(len(expected.rows), bool)
    rows = found.num_rows
    equal[:rows] = True
    columns = [(DUP_COUNT, pa.array(expected.dup_count))]
    if expected.batch is not None:
        columns += zip(expected.batch.schema.names, expected.batch.columns, strict=True)
    for name, values in columns:
        if name not in found.schema.names:
            raise SnipError(f"metadata: expected a column {name}, found {found.schema.names}")
        equal[:rows] &= same_values(found[name].combine_chunks(), values.slice(0, rows))
    return None if equal.all() else int(np.argmin(equal))


def same_values(x: Any, y: Any) -> np.ndarray:
    """Return where two arrays hold the same, (n,) bool; NaN is the same as NaN."""
    if pa.types.is_floating(x.type) and x.type == y.type:  # compared by their bits
        x, y = (values.view(f"int{values.type.bit_width}") for values in (x, y))
    if x.equals(y):
        return np.ones(len(x), bool)
    pairs = zip(x.to_pylist(), y.to_pylist(), strict=True)
    return np.array([repr(a) == repr(b) for a, b in pairs], bool)  # repr: NaN inside lists too
