"""The first read of all rows: checksums, rows that cannot be compared, and exact copies.

Every method starts here. Rows of one 64-bit hash are compared bit for bit, so that what follows
sees distinct rows only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from snipdedup import progress
from snipdedup.errors import InputError
from snipdedup.features.cosine import bad_rows, integer_rows, same_bits
from snipdedup.features.hashing import Checksums, row_hashes, sum_checksums
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.parallel import ordered_map, scratch
from snipdedup.storage.external_sort import Columns, Sorter, Spread, among, pack, row_kind

# Rows computed together: few enough to stay in the cache from the file to the code. Fixed, so that
# results do not depend on chunk sizes.
BLOCK = 2048
SORT_ROWS = 1 << 22  # rows sorted by their hashes at a time
COMPARE_ROWS = 4096  # rows gathered at a time to compare copies
SHOWN_ROWS = 3  # bad rows named in a message

Visit = Callable[[int, np.ndarray, np.ndarray], None]


class Scan(NamedTuple):
    """What one read of all rows finds.

    ``bad`` (m,) int64 are rows with NaN, infinity or zeros only, ascending; ``copies`` (c,) int64
    rows that equal an earlier row bit for bit, ascending; ``firsts`` the first such row of each.
    ``checksums`` are those of the shards.
    """

    bad: np.ndarray
    copies: np.ndarray
    firsts: np.ndarray
    checksums: list[int]

    def skipped(self, rows: int, reference_rows: int = 0) -> np.ndarray:
        """Return which rows take no part in a search, (rows,) bool.

        The first ``reference_rows`` are not compared with each other. Of the copies of such a row,
        the first one after them takes part: its pairs are wanted.
        """
        skip = np.zeros(rows, bool)
        skip[self.bad] = True
        for start, stop in plan_blocks(len(self.copies), SORT_ROWS):
            skip[self.copies[start:stop]] = True
        if reference_rows:
            beside = (self.copies >= reference_rows) & (self.firsts < reference_rows)
            first = np.unique(self.firsts[beside], return_index=True)[1]
            skip[self.copies[beside][first]] = False
        return skip


class Seen(NamedTuple):
    """What reading a range of rows finds.

    ``bad`` (m,) int64 are rows that cannot be compared; ``hashes`` (n,) uint64, or the ``.npy``
    that holds them, those of all rows.
    """

    checksums: Checksums
    bad: np.ndarray
    hashes: np.ndarray | Path

    def load_hashes(self) -> np.ndarray:
        """Return the hashes."""
        return np.load(self.hashes) if isinstance(self.hashes, Path) else self.hashes


def scan(features: Features, *, chunk_rows: int, threads: int, keep_bad: bool) -> Scan:
    """Read all rows once, ``chunk_rows`` (rounded up to whole blocks) at a time."""
    spans = plan_blocks(features.rows, whole_blocks(chunk_rows))
    seen = ordered_map(
        lambda span: read_range(features, *span, chunk_rows=chunk_rows), spans, threads
    )
    parts = []
    with progress.bar(features.rows, "reading", "rows") as bar:
        for (start, stop), part in zip(spans, seen, strict=True):
            parts.append(part)
            bar.update(stop - start)
    return finish_scan(features, parts, keep_bad, threads)


def whole_blocks(rows: int) -> int:
    """Return ``rows`` rounded up to whole blocks."""
    return -(-rows // BLOCK) * BLOCK


def read_range(
    features: Features, begin: int, end: int, *, chunk_rows: int, visit: Visit | None = None
) -> Seen:
    """Read global rows ``begin`` to ``end``; ``begin`` is a multiple of `BLOCK`.

    ``visit(first row, rows, integer rows)`` sees each block of `BLOCK` rows, in order.
    """
    hashes: list[np.ndarray] = []
    bad, checksums = [], []
    chunk = min(whole_blocks(chunk_rows), whole_blocks(end - begin))
    buffer = scratch("rows read", (chunk, features.dim), features.dtype)
    for start, stop in plan_blocks(end - begin, chunk):
        rows = features.read(begin + start, begin + stop, buffer)
        known = len(hashes)
        for low, high in plan_blocks(len(rows), BLOCK):
            first, block = begin + start + low, rows[low:high]
            whole, odd = integer_rows(block)
            bad.append(np.flatnonzero(odd) + first)
            hashes.append(row_hashes(block))
            if visit is not None:
                visit(first, block, whole)
        checksums += features.checksums(begin + start, rows, np.concatenate(hashes[known:]))
    return Seen(checksums, np.concatenate(bad), np.concatenate(hashes))


def finish_scan(
    features: Features, parts: list[Seen], keep_bad: bool, threads: int, folder: Path | None = None
) -> Scan:
    """Join the parts of a scan: refuse or list bad rows, find exact copies (`find_copies`)."""
    bad = np.concatenate([part.bad for part in parts])
    if len(bad) and not keep_bad:
        raise bad_rows_error(features, bad)
    copies, firsts = find_copies(features, parts, threads, bad=bad, folder=folder)
    checksums = sum_checksums((part.checksums for part in parts), len(features.shards))
    return Scan(bad, copies, firsts, checksums)


def refuse_bad(features: Features, numbers: np.ndarray, rows: np.ndarray) -> None:
    """Refuse rows that cannot be compared: (n,) global numbers, and (n, d) what they hold."""
    if len(bad := numbers[bad_rows(rows)]):
        raise bad_rows_error(features, bad, partial=True)


def bad_rows_error(features: Features, bad: np.ndarray, *, partial: bool = False) -> InputError:
    """Return the refusal of rows that cannot be compared: how many, where and what they are.

    ``partial``: not all rows were looked at, and there is no way to keep bad ones.
    """
    todo = "mend or remove them" if partial else "mend them, or keep them with --bad_rows keep"
    places = []
    for row in bad[:SHOWN_ROWS].tolist():
        path, place = features.place(row)
        values = features.read(row, row + 1)
        what = "NaN" if np.isnan(values).any() else "infinity" if values.any() else "zeros only"
        places.append(f"{path} row {place} ({what})")
    shown = ", ".join(places) + (", ..." if len(bad) > SHOWN_ROWS else "")
    return InputError(
        f"{'at least ' * partial}{len(bad):,} of {features.rows:,} rows cannot be compared: "
        f"{shown}; expected finite values that are not all zero: {todo}"
    )


def find_copies(
    features: Features,
    parts: Sequence[Seen],
    threads: int = 1,
    *,
    bad: np.ndarray,
    folder: Path | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows that equal an earlier row bit for bit, and the first such row of each.

    ``parts`` are of consecutive rows, in row order. Rows of ``bad``, ascending, are not listed.
    ``folder`` is for hashes and copies that do not fit into memory; the latter stay there, mapped.
    """
    row = row_kind(features.rows)
    hashed = np.dtype([("hash", "<u8"), ("row", row)])
    even = Spread(features.rows, 0, (1 << 64) - 1)  # as hashes are
    path = folder and folder / "hashes"
    hashes = Sorter(path, hashed, lambda r: r["hash"], held=SORT_ROWS, spread=even)
    for part in parts:
        found = part.load_hashes()
        hashes.add(pack(hashed, found, np.arange(hashes.count, hashes.count + len(found))))
    pair, known = np.dtype([("row", row), ("first", row)]), Spread(features.rows, 0, features.rows)
    path = folder and folder / "pairs"
    pairs = Sorter(path, pair, lambda r: r["row"].astype(np.uint64), spread=known)
    for records in hashes.ascending():
        copies, firsts = equal_to_first(features, records, threads)
        listed = ~among(bad, copies)
        pairs.add(pack(pair, copies[listed], firsts[listed]))
    columns = Columns(folder and folder / "copies", {"row": "<i8", "first": "<i8"})
    for records in pairs.ascending():
        order = np.argsort(records["row"])
        columns.add(records["row"][order], records["first"][order])
    copies, firsts = columns.arrays()
    return copies, firsts


def equal_to_first(
    features: Features, records: np.ndarray, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return those rows that equal an earlier one, and the first such row.

    ``records`` have ``hash`` and ``row``: all rows of each hash among them.
    """
    hashes = np.ascontiguousarray(records["hash"])
    order = np.argsort(hashes)  # not a stable sort, which takes five times as long
    hashes = hashes[order]
    same = hashes[1:] == hashes[:-1]
    in_run = np.flatnonzero(np.append(same, False) | np.append(False, same))
    rows, hashes = records["row"][order[in_run]].astype(np.int64), hashes[in_run]
    ascending = np.lexsort((rows, hashes))
    rows, hashes = rows[ascending], hashes[ascending]
    copies, firsts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    while len(rows):  # more than one round only where different rows share a hash
        starts = np.concatenate([[True], hashes[1:] != hashes[:-1]])
        first = rows[starts][np.cumsum(starts) - 1]
        rows, first, hashes = rows[~starts], first[~starts], hashes[~starts]
        equal = equal_pairs(features, rows, first, threads)
        copies.append(rows[equal])
        firsts.append(first[equal])
        rows, hashes = rows[~equal], hashes[~equal]
    return np.concatenate(copies), np.concatenate(firsts)


def equal_pairs(features: Features, x: np.ndarray, y: np.ndarray, threads: int = 1) -> np.ndarray:
    """Return which pairs of rows are equal bit for bit, gathering them in row order."""
    order = np.argsort(x)

    def compare(span: tuple[int, int]) -> np.ndarray:
        part = order[slice(*span)]
        return same_bits(features.gather(x[part]), features.gather(y[part]))

    parts = ordered_map(compare, plan_blocks(len(x), COMPARE_ROWS), threads)
    equal = np.zeros(len(x), bool)
    equal[order] = np.concatenate([np.empty(0, bool), *parts])
    return equal
