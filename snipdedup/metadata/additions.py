"""Columns added to the rows that are written: dup_count, weight, captions of removed rows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, groupby, islice, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from snipdedup.features.shards import plan_blocks
from snipdedup.metadata.gather import gather_column
from snipdedup.metadata.kept_rows import AddedColumn
from snipdedup.metadata.tables import Metadata, as_texts
from snipdedup.storage.external_sort import READ, Columns, Sorter, among, pack

CAPTION_COLUMNS = ("caption", "text")
PART_CAPTIONS = 1 << 18  # captions in memory at a time
SIGN = np.uint64(1 << 63)
END = 1 << 63  # after all rows


class ColumnSettings(NamedTuple):
    """Which columns a run adds: so many merged captions of the column ``caption``; weights."""

    merge_captions: int | None = None
    caption: str | None = None
    weights: bool = False


def added_names(settings: ColumnSettings) -> list[str]:
    """Return the names of the columns that a run adds."""
    merges = settings.merge_captions is not None
    fields = {DupCounts.field: True, Weights.field: settings.weights, MergedCaptions.field: merges}
    return [field.name for field, wanted in fields.items() if wanted]


def add_columns(
    settings: ColumnSettings, metadata: Metadata, removed: RemovedPairs, work: Path
) -> list[AddedColumn]:
    """Return the columns that a run adds, in the order of `added_names`."""
    columns: list[AddedColumn] = [DupCounts(removed, work / "counts")]
    removed = removed.followed()
    if settings.weights:
        columns.append(Weights(removed, work / "weights"))
    if settings.merge_captions is not None:
        of = str(settings.caption), removed, settings.merge_captions
        columns.append(MergedCaptions(metadata, *of, work / "captions"))
    return columns


class RemovedPairs(NamedTuple):
    """The removed rows, ascending, and the representative of each; (n,) int64, or maps.

    A representative below 0 is a reference row, which the metadata does not hold.
    """

    row: np.ndarray
    representative: np.ndarray

    def parts(self) -> Iterator[RemovedPairs]:
        """Yield them some at a time; at least once."""
        for start, stop in plan_blocks(len(self.row), READ) or [(0, 0)]:
            yield RemovedPairs(*(np.asarray(column[start:stop]) for column in self))

    def followed(self) -> RemovedPairs:
        """Return the same with representatives that are kept, where they are not (semdedup)."""
        if not any(among(self.row, part.representative).any() for part in self.parts()):
            return self
        end = self.representative
        while True:
            place = np.minimum(np.searchsorted(self.row, end), len(self.row) - 1)
            is_removed = self.row[place] == end
            if not is_removed.any():
                return RemovedPairs(self.row, end)
            end = np.where(is_removed, self.representative[place], end)


class DupCounts:
    """The column ``dup_count``: how many removed rows have this representative.

    Many representatives are mapped from files that begin as ``path``.
    """

    field = pa.field("dup_count", pa.int64())

    def __init__(self, removed: RemovedPairs, path: Path | None = None) -> None:
        self.removed = removed
        kind = np.dtype([("row", "<i8")])
        sorter = Sorter(path, kind, lambda r: r["row"].view(np.uint64) ^ SIGN)
        for part in removed.parts():
            sorter.add(pack(kind, part.representative))
        columns = Columns(path, {"row": "<i8", "count": "<i8"})
        for records in sorter.ascending():
            columns.add(*np.unique(records["row"], return_counts=True))
        self.representatives, self.counts = columns.arrays()

    def between(self, start: int, stop: int) -> Any:
        """See `AddedColumn`."""
        return pa.array(self.copies(start, stop))

    def copies(self, start: int, stop: int) -> np.ndarray:
        """Return how many removed rows each row represents, (stop - start,) int64."""
        low, high = np.searchsorted(self.representatives, [start, stop])
        found = np.zeros(stop - start, np.int64)
        found[self.representatives[low:high] - start] = self.counts[low:high]
        return found


class Weights(DupCounts):
    """The column ``weight``: the rows of one representative, and it, share 1."""

    field = pa.field("weight", pa.float64())

    def between(self, start: int, stop: int) -> Any:
        """See `AddedColumn`."""
        copies = self.copies(start, stop)
        low, high = np.searchsorted(self.removed.row, [start, stop])
        of = np.searchsorted(self.representatives, self.removed.representative[low:high])
        copies[self.removed.row[low:high] - start] = self.counts[of]
        return pa.array(1 / (1 + copies))


class MergedCaptions:
    """The column ``merged_captions``: captions of the rows that have this representative.

    Distinct ones, in row order, ``most`` at the most, without the representative's own; an empty
    list for all other rows. Its temporary files lie in ``folder``.
    """

    field = pa.field("merged_captions", pa.list_(pa.string()))

    def __init__(
        self, metadata: Metadata, column: str, removed: RemovedPairs, most: int, folder: Path
    ) -> None:
        representative, row, cuts = _caption_rows(removed, folder.with_name(f"{folder.name}-rows"))
        gathered = gather_column(metadata, column, row, cuts, as_texts, folder)
        self.merged = _merge_captions(gathered, representative, row, cuts, most)
        self.ahead: tuple[int, list[str]] = -1, []  # read, but not asked for yet

    def between(self, start: int, stop: int) -> Any:
        """See `AddedColumn`."""
        found: list[list[str]] = [[] for _ in range(start, stop)]
        while self.ahead[0] < stop:
            if self.ahead[0] >= start:
                found[self.ahead[0] - start] = self.ahead[1]
            self.ahead = next(self.merged, (END, []))
        cuts = np.cumsum([0, *map(len, found)], dtype=np.int32)
        texts = pa.array(chain.from_iterable(found), pa.string())
        return pa.ListArray.from_arrays(pa.array(cuts), texts)


def _merge_captions(
    gathered: Iterator[Any],
    representative: np.ndarray,
    row: np.ndarray,
    cuts: np.ndarray,
    most: int,
) -> Iterator[tuple[int, list[str]]]:
    """Yield each representative, ascending, and its merged captions, from gathered ones."""
    for values, ends in zip(gathered, pairwise(cuts), strict=True):
        part = slice(*ends)
        captions = [] if values is None else values.to_pylist()
        triples = zip(representative[part].tolist(), row[part].tolist(), captions, strict=True)
        for of, group in groupby(triples, itemgetter(0)):
            by_row = {number: caption for _, number, caption in group}
            own = by_row.pop(of)
            others = (caption for caption in by_row.values() if caption and caption != own)
            yield of, list(islice(dict.fromkeys(others), most))  # unlike a set, it keeps the order


def _caption_rows(removed: RemovedPairs, path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows whose captions are needed, sorted by representative, then row.

    Representatives (n,), rows (n,) int64 (removed rows, and representatives themselves; none of
    references), and where to cut them into parts of some `PART_CAPTIONS`, (parts + 1,) int64.
    """
    kind = np.dtype([("representative", "<i8"), ("row", "<i8")])
    sorter = Sorter(path, kind, lambda r: r["representative"].view(np.uint64), held=PART_CAPTIONS)
    for part in removed.parts():
        of, row = (column[part.representative >= 0] for column in (part.representative, part.row))
        sorter.add(pack(kind, of, row))
        own = np.unique(of)
        sorter.add(pack(kind, own, own))
    columns, cuts = Columns(path, {"representative": "<i8", "row": "<i8"}), [0]
    for records in sorter.ascending():
        distinct = np.unique(records)  # a representative may have been added several times
        columns.add(distinct["representative"], distinct["row"])
        cuts.append(columns.count)
    representative, row = columns.arrays()
    return representative, row, np.array(cuts, np.int64)
