"""``snip filter`` by position: the keys of rows that go must be those that the run removed.

Numbers of rows say nothing of their order: a shuffled file fits as well. ``groups.parquet`` holds
the key of each row that goes, in another order than the files, so both sides are summed up by
blocks of rows, and only a block that differs is looked at row by row.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from snipdedup.errors import SnipError
from snipdedup.metadata.files import BATCH_ROWS, Table, open_table
from snipdedup.metadata.keys import fingerprints, is_bytes
from snipdedup.metadata.masks import MASK, Mask
from snipdedup.metadata.tables import Metadata, open_metadata
from snipdedup.storage import atomic
from snipdedup.storage.manifest import MANIFEST, read_manifest

BLOCK = BATCH_ROWS  # rows summed up together
# Odd constants with mixed bits, of splitmix64.
STEP, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Marked(NamedTuple):
    """Rows that go, (n,) int64 in the mask's numbers, and the fingerprints of their keys."""

    row: np.ndarray
    mark: np.ndarray
    table: Table
    keys: Any


def check_keys(metadata: Metadata, mask: Mask, first: int) -> str | None:
    """Compare the keys of rows that go with those that OUT removed; return what to say of it.

    Parameters
    ----------
    metadata : Metadata
        Placed in the mask by position.
    mask : Mask
    first : int
        The mask's row at which the metadata begins.

    Returns
    -------
    str or None
        None where OUT, the mask's folder, knows no keys of these rows.

    Raises
    ------
    SnipError
        If the key of a row is another one; names the first.
    """
    groups = groups_of(mask)
    column = None if groups is None else column_of(groups.parent, metadata)
    if groups is None or column is None:
        return None
    theirs, count = summed(removed(groups, first, metadata.rows), first, metadata.rows)
    if not count.any():
        return None
    mine, found = summed(going(metadata, column, mask, first), first, metadata.rows)
    if not np.array_equal(found, count):  # another kind of OUT than keys can vouch for
        return None
    differing = np.flatnonzero(mine != theirs)
    if len(differing):
        raise SnipError(contradiction(metadata, column, mask, first, groups, int(differing[0])))
    return f"  checked: the {column} of {int(count.sum()):,} rows that go is that in {groups}"


def groups_of(mask: Mask) -> Path | None:
    """Return the ``groups.parquet`` beside a mask that is as the run wrote it, None without one."""
    folder = mask.path.parent
    groups = folder / "groups.parquet"
    if mask.sizes is None or not groups.is_file() or not (folder / MANIFEST).is_file():
        return None
    written = read_manifest(folder, "dedup")["outputs"].get(MASK, {}).get("sha256")
    return groups if written == atomic.sha256(mask.path) else None


def column_of(folder: Path, metadata: Metadata) -> str | None:
    """Return the metadata's column that OUT holds as ``key``, None where there is none."""
    asked = read_manifest(folder, "dedup")["settings"].get("key")
    if asked is None and (folder / "metadata").is_dir():
        asked = open_metadata(folder / "metadata").column()
    same = [name for name in metadata.columns if asked and name.lower() == asked.lower()]
    files = metadata.files if len(same) == 1 else ()
    if not files or not all(is_key(file.schema.field(same[0]).type) for file in files):
        return None
    return same[0]


def is_key(kind: Any) -> bool:
    """Tell whether values of an arrow type have one text each, whatever file they are in."""
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_integer(kind)
        or is_bytes(kind)
    )


def removed(groups: Path, first: int, rows: int) -> Iterator[Marked]:
    """Yield the rows that go and the keys that OUT knows them by, of those from ``first`` on."""
    table = open_table(groups)
    for _, batch in table.batches(["row", "key", "is_dup"]):
        row = batch.column("row").to_numpy()
        inside = batch.column("is_dup").to_numpy(zero_copy_only=False)
        inside = inside & (row >= first) & (row < first + rows)
        keys = batch.column("key").filter(pa.array(inside))
        yield marked(row[inside], table, keys)


def going(
    metadata: Metadata, column: str, mask: Mask, first: int, rows: np.ndarray | None = None
) -> Iterator[Marked]:
    """Yield the same of the metadata; ``rows``, where given, are those of it that are wanted."""
    if rows is not None:
        for file, cut, batch in metadata.pick([column], rows):
            yield marked(first + rows[cut], file, batch.column(0))
        return
    for file, at, batch in metadata.read([column]):
        goes = np.asarray(mask.is_dup[first + at : first + at + batch.num_rows])
        keys = batch.column(0).filter(pa.array(goes))
        yield marked(first + at + np.flatnonzero(goes), file, keys)


def marked(row: np.ndarray, table: Table, keys: Any) -> Marked:
    """Return rows with the fingerprints of their keys; a null is as an empty text."""
    marks, _ = fingerprints(table, pa.RecordBatch.from_arrays([keys], ["key"]))
    return Marked(row, marks[0], table, keys)


def summed(parts: Iterator[Marked], first: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (sums, rows) by block, (blocks,) uint64 and int64: the same in whatever order."""
    blocks = -(-rows // BLOCK)
    sums, count = np.zeros(blocks, np.uint64), np.zeros(blocks, np.int64)
    for part in parts:
        block = (part.row - first) // BLOCK
        np.add.at(sums, block, mixed(part.row, part.mark))
        count += np.bincount(block, minlength=blocks)
    return sums, count


def mixed(row: np.ndarray, mark: np.ndarray) -> np.ndarray:
    """Return a number of a row and its key together, by the steps of splitmix64."""
    found = mark + row.astype(np.uint64) * np.uint64(STEP)
    found = (found ^ (found >> np.uint64(30))) * np.uint64(FIRST)
    found = (found ^ (found >> np.uint64(27))) * np.uint64(SECOND)
    return found ^ (found >> np.uint64(31))


def contradiction(
    metadata: Metadata, column: str, mask: Mask, first: int, groups: Path, block: int
) -> str:
    """Say which row of a block is the first whose key is another one."""
    begin, rows = first + block * BLOCK, min(BLOCK, metadata.rows - block * BLOCK)
    parts = list(removed(groups, begin, rows))
    row = np.concatenate([part.row for part in parts])
    mark = np.concatenate([part.mark for part in parts])
    keys = pa.chunked_array([part.keys for part in parts])
    order = np.argsort(row)
    at = 0
    for part in going(metadata, column, mask, first, row[order] - first):
        same = mark[order[at : at + len(part.row)]] == part.mark
        if not same.all():
            wrong = int(np.argmin(same))
            there, here = keys[int(order[at + wrong])].as_py(), part.keys[wrong].as_py()
            place = metadata.place(int(part.row[wrong]) - first)
            return (
                f"{place} has the {column} {here!r}, the row that {mask.path.parent} removed "
                f"there {there!r}: these rows lie in another order, or are others; find them by "
                f"--on {column}"
            )
        at += len(part.row)
    return f"{metadata.files[0].path}: its {column} is not that of the rows in {groups}"
