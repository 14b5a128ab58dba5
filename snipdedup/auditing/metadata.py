"""Does OUT/metadata hold the rows that stay: their number, their order, what they say, dup_count.

The table that was filtered is read beside each file, where it still is what it was; without it,
numbers of rows and dup_count are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from snipdedup.auditing.proof import Run
from snipdedup.auditing.verdict import Verdict
from snipdedup.errors import SnipError
from snipdedup.features.shards import plan_blocks
from snipdedup.metadata.tables import BATCH_ROWS, Metadata, Table, open_table

DUP_COUNT = "dup_count"


class Expected(NamedTuple):
    """What a stretch of a file should hold.

    Attributes
    ----------
    rows : (n,) int64
        The rows of the set, in order.
    dup_count : (n,) int64
    batch : pyarrow.RecordBatch or None
        Their values in the table that was filtered, where that is known.
    """

    rows: np.ndarray
    dup_count: np.ndarray
    batch: Any


def check_kept(
    run: Run,
    dup_counts: tuple[np.ndarray, np.ndarray],
    source: Metadata | None,
    verdict: Verdict,
) -> None:
    """Compare the files of OUT/metadata with the mask, and with what was filtered.

    Parameters
    ----------
    run : Run
    dup_counts : ((m,) int64, (m,) int64)
        Ascending rows that represent others, and how many each.
    source : Metadata or None
        The table that was filtered.
    verdict : Verdict

    Raises
    ------
    SnipError
        If ``source`` is cut into other files.
    """
    described = run.manifest["request"].get("metadata")
    if described is None:
        verdict.say("metadata", "none was given to the run")
        return
    if source is not None and [f.rows for f in source.files] != [f["rows"] for f in described]:
        raise SnipError(
            "the metadata is not in the files that were filtered: expected "
            f"{', '.join(file['name'] for file in described)}"
        )
    rows = 0
    offsets = np.concatenate([[0], np.cumsum([file["rows"] for file in described])])
    for number, file in enumerate(described):
        path = run.folder / "metadata" / f"{Path(file['name']).stem}.parquet"
        table = None if source is None else source.files[number]
        begin, end = int(offsets[number]), int(offsets[number + 1])
        try:
            kept = open_table(path)
            check_file(run, kept, expected_rows(run, begin, end, dup_counts, table), verdict)
            rows += kept.rows
        except SnipError as error:
            verdict.fail("metadata", str(error))
    compared = "compared with what was filtered"
    if source is None:
        compared = "their number and dup_count only: what was filtered is not where it was"
    verdict.say("metadata", f"{rows:,} rows in {len(described):,} files, {compared}")


def expected_rows(
    run: Run,
    begin: int,
    end: int,
    dup_counts: tuple[np.ndarray, np.ndarray],
    source: Table | None,
) -> Iterator[Expected]:
    """Yield what the file of rows ``begin`` to ``end`` should hold, a stretch at a time."""
    every = bool(run.manifest["settings"].get("weights"))  # then removed rows are written too
    stretches: Any = ((at, stop - at, None) for at, stop in plan_blocks(end - begin, BATCH_ROWS))
    if source is not None:
        stretches = ((at, batch.num_rows, batch) for at, batch in source.batches())
    for at, size, batch in stretches:
        first = begin + at
        stay = np.full(size, True) if every else ~np.asarray(run.is_dup[first : first + size])
        low, high = np.searchsorted(dup_counts[0], [first, first + size])
        counts = np.zeros(size, np.int64)
        counts[dup_counts[0][low:high] - first] = dup_counts[1][low:high]
        rows = first + np.flatnonzero(stay)
        yield Expected(rows, counts[stay], None if batch is None else batch.filter(pa.array(stay)))


def check_file(run: Run, kept: Table, expected: Iterator[Expected], verdict: Verdict) -> None:
    """Compare one file with what it should hold; its first row that is wrong is named."""
    name = f"metadata/{kept.path.name}"
    reader, wanted, place, wrong = Reader(kept), 0, 0, None
    for stretch in expected:
        wanted += len(stretch.rows)
        if wrong is None:
            found = reader.take(len(stretch.rows))
            at = first_difference(found, stretch)
            if at is not None:
                wrong = run.place(int(stretch.rows[at]))
                place = wanted - len(stretch.rows) + at
    if kept.rows != wanted:
        verdict.fail(
            "metadata",
            f"{name}: {kept.rows:,} rows, is_dup.npy lets {wanted:,} of this file stay"
            + (f"; {wrong} is missing or comes too late" if wrong and kept.rows < wanted else ""),
        )
    elif wrong is not None:
        verdict.fail("metadata", f"{name} row {place:,}: expected {wrong}, found other values")


class Reader:
    """Reads a file's rows in order, as many at a time as are asked for."""

    def __init__(self, table: Table) -> None:
        self.batches = table.batches()
        self.schema = table.schema
        self.waiting: list[Any] = []

    def take(self, count: int) -> Any:
        """Return the next ``count`` rows, or what is left, as one record batch."""
        taken: list[Any] = []
        while count:
            if not self.waiting:
                _, batch = next(self.batches, (0, None))
                if batch is None:
                    break
                self.waiting.append(batch)
            batch = self.waiting.pop()
            taken.append(batch.slice(0, count))
            if batch.num_rows > count:
                self.waiting.append(batch.slice(count))
            count -= taken[-1].num_rows
        table = pa.Table.from_batches(taken, self.schema).combine_chunks()
        return (table.to_batches() or [pa.RecordBatch.from_pylist([], self.schema)])[0]


def first_difference(found: Any, expected: Expected) -> int | None:
    """Return the first row in which a record batch differs from what is expected."""
    size = len(expected.rows)
    equal = np.zeros(size, bool)
    rows = min(size, found.num_rows)
    equal[:rows] = True
    columns = [(DUP_COUNT, pa.array(expected.dup_count))]
    if expected.batch is not None:
        columns += zip(expected.batch.schema.names, expected.batch.columns, strict=True)
    for name, values in columns:
        place = found.schema.get_field_index(name)
        if place < 0:
            raise SnipError(f"metadata: expected a column {name}, found {found.schema.names}")
        equal[:rows] &= same_values(found.column(place).slice(0, rows), values.slice(0, rows))
    return None if equal.all() else int(np.argmin(equal))


def same_values(x: Any, y: Any) -> np.ndarray:
    """Return where two arrays hold the same, (n,) bool; NaN is the same as NaN."""
    x, y = (as_words(values) for values in (x, y))
    if x.equals(y):
        return np.ones(len(x), bool)
    pairs = zip(x.to_pylist(), y.to_pylist(), strict=True)
    return np.array([repr(a) == repr(b) for a, b in pairs], bool)  # repr: NaN inside lists too


def as_words(values: Any) -> Any:
    """Return floats as the integers of their bits, which can be compared; others as they are."""
    if pa.types.is_floating(values.type):
        return values.view(f"int{values.type.bit_width}")
    return values
