"""Checks that OUT/metadata holds the kept rows: their number, order, values and dup_count.

The input table is read beside each file, if it still is what it was; otherwise only the number of
rows and dup_count are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from snipdedup.auditing.removed_rows import AuditedRun
from snipdedup.errors import SnipError
from snipdedup.features.shards import plan_blocks
from snipdedup.metadata.tables import BATCH_ROWS, Metadata, Table


def check_metadata(
    run: AuditedRun, dup_counts: tuple[np.ndarray, np.ndarray], source: Metadata | None
) -> None:
    """Compare the files of OUT/metadata with the mask, and with the input table ``source``.

    ``dup_counts`` are the rows that represent others, ascending, and how many each, (m,) int64. A
    ``source`` that has other files than the input had is refused.
    """
    described = run.manifest["request"].get("metadata")
    if described is None:
        run.note("metadata", "none was given to the run")
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
            written = Table(run.folder / "metadata" / f"{Path(file['name']).stem}.parquet")
            check_file(run, written, expected_rows(run, begin, end, dup_counts, table))
            rows += written.rows
        except SnipError as error:
            run.fail("metadata", str(error))
        begin = end
    compared = "compared with the input"
    if source is None:
        compared = "only their number and dup_count: the input is not where it was"
    run.note("metadata", f"{rows:,} rows in {len(described):,} files, {compared}")


def expected_rows(
    run: AuditedRun, begin: int, end: int, dup_counts: tuple[np.ndarray, np.ndarray],
    source: Table | None,
) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:  # fmt: skip
    """Yield rows that the file of rows ``begin`` to ``end`` should hold, and their columns."""
    all_rows = bool(run.manifest["settings"].get("weights"))  # then removed rows are written too
    parts: Any = ((at, None) for at, _ in plan_blocks(end - begin, BATCH_ROWS))
    for at, batch in parts if source is None else source.batches():
        first = begin + at
        size = min(BATCH_ROWS, end - first) if batch is None else batch.num_rows
        kept = np.full(size, True) if all_rows else ~np.asarray(run.is_dup[first : first + size])
        low, high = np.searchsorted(dup_counts[0], [first, first + size])
        counts = np.zeros(size, np.int64)
        counts[dup_counts[0][low:high] - first] = dup_counts[1][low:high]
        columns = {} if batch is None else dict(zip(batch.schema.names, batch.columns, strict=True))
        columns["dup_count"] = pa.array(counts)
        mask = pa.array(kept)
        yield (
            first + np.flatnonzero(kept),
            {name: values.filter(mask) for name, values in columns.items()},
        )


def check_file(
    run: AuditedRun, written: Table, expected: Iterator[tuple[np.ndarray, dict[str, Any]]]
) -> None:
    """Compare one file with what it should hold; name its first row that is wrong."""
    name, batches = f"metadata/{written.path.name}", (batch for _, batch in written.batches())
    waiting: Any = pa.Table.from_batches([], written.schema)
    wanted, place, wrong = 0, 0, None
    for rows, columns in expected:
        while waiting.num_rows < len(rows) and (batch := next(batches, None)) is not None:
            waiting = pa.concat_tables([waiting, pa.Table.from_batches([batch], written.schema)])
        if wrong is None:
            equal = equal_rows(waiting.slice(0, len(rows)), columns, len(rows))
            if not equal.all():
                at = int(np.argmin(equal))
                wrong, place = run.place(int(rows[at])), wanted + at
        waiting = waiting.slice(len(rows))
        wanted += len(rows)
    if written.rows != wanted:
        late = f"; {wrong} is missing or comes too late" if wrong and written.rows < wanted else ""
        found = f"{name}: {written.rows:,} rows, is_dup.npy keeps {wanted:,} of this file{late}"
        run.fail("metadata", found)
    elif wrong is not None:
        run.fail("metadata", f"{name} row {place:,}: expected {wrong}, found other values")


def equal_rows(found: Any, expected: dict[str, Any], size: int) -> np.ndarray:
    """Return in which of ``size`` rows a table is as expected, (size,) bool; NaN equals NaN."""
    rows = found.num_rows
    equal = np.arange(size) < rows
    for name, wanted in expected.items():
        if name not in found.schema.names:
            raise SnipError(f"metadata: expected a column {name}, found {found.schema.names}")
        x, y = found[name].combine_chunks(), wanted.slice(0, rows)
        if pa.types.is_floating(x.type) and x.type == y.type:  # compared by their bits
            x, y = (values.view(f"int{values.type.bit_width}") for values in (x, y))
        if not x.equals(y):  # repr: NaN inside lists too
            pairs = zip(x.to_pylist(), y.to_pylist(), strict=True)
            equal[:rows] &= np.array([repr(a) == repr(b) for a, b in pairs], bool)
    return equal
