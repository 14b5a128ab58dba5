"""Columns added to the rows that are written: dup_count, weight, captions of removed rows.

What concerns group members is sorted by row, in files where it is long; captions are put on disk,
in the order in which the rows that stay will ask for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from snipdedup.features.shards import plan_blocks
from snipdedup.metadata.files import Table
from snipdedup.metadata.precheck import Use
from snipdedup.metadata.spill import Spill, spilling
from snipdedup.metadata.tables import Added, Metadata, as_texts
from snipdedup.storage.external_sort import READ, Columns, Sorter, among, pack

DUP_COUNT = "dup_count"
WEIGHT = "weight"
MERGED = "merged_captions"
CAPTION_COLUMNS = ("caption", "text")
PART_CAPTIONS = 1 << 18  # captions held in memory at a time
SIGN = np.uint64(1 << 63)


class ColumnSettings(NamedTuple):
    """Which columns a run adds: up to so many merged captions of a column, weights."""

    merge_captions: int | None = None
    caption: str | None = None
    weights: bool = False


def added_names(settings: ColumnSettings) -> list[str]:
    """Return the names of the columns that a run adds."""
    merges = settings.merge_captions is not None
    names = {DUP_COUNT: True, WEIGHT: settings.weights, MERGED: merges}
    return [name for name, wanted in names.items() if wanted]


def caption_column(settings: ColumnSettings, metadata: Metadata) -> str:
    """Return the column that captions are taken from, or refuse metadata without one."""
    return metadata.needed(settings.caption, CAPTION_COLUMNS, "--caption")


def uses(settings: ColumnSettings, metadata: Metadata) -> list[Use]:
    """Return what columns are read for to make those that a run adds."""
    if settings.merge_captions is None:
        return []
    remedy = "name a column of texts with --caption"
    return [Use([caption_column(settings, metadata)], captions, remedy)]


@contextmanager
def added_columns(
    settings: ColumnSettings, metadata: Metadata, removed: Removed, work: Path
) -> Iterator[list[Added]]:
    """Yield the columns that a run adds, in the order of `added_names`."""
    with ExitStack() as stack:
        columns: list[Added] = [dup_counts(removed, work / "counts")]
        removed = removed.followed()
        if settings.weights:
            columns.append(Weights(removed, work / "weights"))
        if settings.merge_captions is not None:
            column, most = caption_column(settings, metadata), settings.merge_captions
            merged = merged_captions(metadata, column, removed.here(), most, work / "captions")
            columns.append(stack.enter_context(merged))
        yield columns


class Removed(NamedTuple):
    """The rows that go, ascending, and the row that stands for each; both (n,) int64, or maps.

    A representative below 0 is a row of a reference, which no file of metadata here holds.
    """

    row: np.ndarray
    representative: np.ndarray

    def parts(self) -> Iterator[Removed]:
        """Yield them some at a time; at least once."""
        for start, stop in plan_blocks(len(self.row), READ) or [(0, 0)]:
            yield Removed(*(np.asarray(column[start:stop]) for column in self))

    def followed(self) -> Removed:
        """Return the same with a representative that stays, where it goes itself (semdedup)."""
        if not any(among(self.row, part.representative).any() for part in self.parts()):
            return self
        end = self.representative
        while True:
            place = np.minimum(np.searchsorted(self.row, end), len(self.row) - 1)
            goes = self.row[place] == end
            if not goes.any():
                return Removed(self.row, end)
            end = np.where(goes, self.representative[place], end)

    def here(self) -> Removed:
        """Return those whose representative is no row of a reference."""
        if not any((part.representative < 0).any() for part in self.parts()):
            return self
        return Removed(*(column[self.representative >= 0] for column in self))

    def counts(self, path: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows that represent others, ascending, and how many each.

        Where they do not fit into memory they are mapped from files that begin as ``path``.
        """
        kind = np.dtype([("row", "<i8")])
        sorter = Sorter(path, kind, lambda r: r["row"].view(np.uint64) ^ SIGN)
        for part in self.parts():
            sorter.add(pack(kind, part.representative))
        counts = Columns(path, {"row": "<i8", "count": "<i8"})
        for records in sorter.ascending():
            counts.add(*np.unique(records["row"], return_counts=True))
        row, count = counts.arrays()
        return row, count


class Listed:
    """A column of one value, but for some rows that are listed.

    Parameters
    ----------
    field : pyarrow.Field
    rows : (n,) int64
        Ascending; may be mapped.
    values : (n,) array
    other : scalar
        The value of all rows that are not listed.
    """

    def __init__(self, field: Any, rows: np.ndarray, values: np.ndarray, other: Any) -> None:
        self.field, self.rows, self.values, self.other = field, rows, values, other

    def between(self, start: int, stop: int) -> Any:
        """See `metadata.Added`."""
        low, high = np.searchsorted(self.rows, [start, stop])
        found = np.full(stop - start, self.other)
        found[self.rows[low:high] - start] = self.values[low:high]
        return pa.array(found, self.field.type)


def dup_counts(removed: Removed, path: Path | None = None) -> Listed:
    """Return the column ``dup_count``: how many removed rows a row stands for."""
    return Listed(pa.field(DUP_COUNT, pa.int64()), *removed.counts(path), 0)


class Weights:
    """The column ``weight``: a row shares 1 with those that have its representative."""

    field = pa.field(WEIGHT, pa.float64())

    def __init__(self, removed: Removed, path: Path | None = None) -> None:
        self.removed = removed
        self.stay, self.counts = removed.counts(path)

    def between(self, start: int, stop: int) -> Any:
        """See `metadata.Added`."""
        found = np.ones(stop - start)
        low, high = np.searchsorted(self.stay, [start, stop])
        found[self.stay[low:high] - start] = 1 / (1 + self.counts[low:high])
        low, high = np.searchsorted(self.removed.row, [start, stop])
        of = np.searchsorted(self.stay, self.removed.representative[low:high])
        found[self.removed.row[low:high] - start] = 1 / (1 + self.counts[of])
        return pa.array(found, self.field.type)


class MergedCaptions:
    """The column ``merged_captions``: captions of the rows that a row stands for.

    Distinct ones, in row order, ``most`` at the most, without the row's own; rows that stand for
    none have an empty list.
    """

    field = pa.field(MERGED, pa.list_(pa.string()))

    def __init__(self, stay: np.ndarray, cuts: np.ndarray, spill: Spill, most: int) -> None:
        self.stay, self.cuts, self.spill, self.most = stay, cuts, spill, most
        self.loaded: tuple[int, dict[int, list[str]]] = -1, {}

    def between(self, start: int, stop: int) -> Any:
        """See `metadata.Added`."""
        low, high = np.searchsorted(self.stay, [start, stop])
        lists = [self._captions(place) for place in range(low, high)]
        sizes = np.zeros(stop - start + 1, np.int32)
        sizes[self.stay[low:high] - start + 1] = [len(captions) for captions in lists]
        return pa.ListArray.from_arrays(
            pa.array(np.cumsum(sizes, dtype=np.int32)),
            pa.array(chain.from_iterable(lists), pa.string()),
        )

    def _captions(self, place: int) -> list[str]:
        part = int(np.searchsorted(self.cuts, place, side="right"))
        if self.loaded[0] != part:
            self.loaded = part, self._load(part)
        return self.loaded[1].get(place, [])

    def _load(self, part: int) -> dict[int, list[str]]:
        """Return the captions of one part, by the place of their row among those that stay."""
        table = self.spill.read(part)
        if table is None:
            return {}
        own: set[tuple[int, str]] = set()
        others: dict[int, dict[str, None]] = {}  # a dict, unlike a set, remembers the order
        for place, is_own, caption in zip(
            *(table[name].to_pylist() for name in ("place", "own", "caption")), strict=True
        ):
            if is_own:
                own.add((place, caption))
            else:
                others.setdefault(place, {})[caption] = None
        return {
            place: list(islice((c for c in found if (place, c) not in own), self.most))
            for place, found in others.items()
        }


@contextmanager
def merged_captions(
    metadata: Metadata, column: str, removed: Removed, most: int, folder: Path
) -> Iterator[MergedCaptions]:
    """Yield the column ``merged_captions``; what it puts into ``folder`` is gone afterwards."""
    stay, counts = removed.counts(folder.with_name(f"{folder.name}-counts"))
    cuts = cut_captions(counts)
    with spilling(folder, len(cuts) + 1) as spill:
        for start, stop in pairwise(metadata.offsets.tolist()):  # a file at a time
            rows, place, own = speakers(removed, stay, start, stop)
            for file, which, batch in metadata.pick([column], rows):
                texts, said = captions(file, batch)
                held = {"place": place[which], "own": own[which], "caption": texts}
                label = np.searchsorted(cuts, place[which], side="right")
                label = label[said.to_numpy(zero_copy_only=False)]
                spill.add(label, pa.RecordBatch.from_pydict(held).filter(said))
        yield MergedCaptions(stay, cuts, spill, most)


def captions(file: Table, batch: Any) -> tuple[Any, Any]:
    """Return the captions of a record batch's one column, and which of them say something."""
    texts = as_texts(file, batch.schema.names[0], batch.column(0))
    return texts, pc.fill_null(pc.not_equal(texts, ""), False)


def cut_captions(counts: np.ndarray) -> np.ndarray:
    """Return where to cut the rows that stay so that each part has some `PART_CAPTIONS` captions.

    A row has its own caption and those of the ``counts`` rows that it stands for.
    """
    cuts, before = [np.empty(0, np.int64)], 0
    for start, stop in plan_blocks(len(counts), READ):
        total = before + np.cumsum(counts[start:stop] + 1)
        bounds = np.arange(before // PART_CAPTIONS + 1, int(total[-1]) // PART_CAPTIONS + 1)
        cuts.append(start + np.searchsorted(total, bounds * PART_CAPTIONS))
        before = int(total[-1])
    return np.concatenate(cuts)


def speakers(
    removed: Removed, stay: np.ndarray, start: int, stop: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows from ``start`` to ``stop`` whose captions count, ascending.

    Returns
    -------
    rows, place : (n,) int64
        Rows that stand for others, or go; and the place of who stays among those that stay.
    own : (n,) bool
        Rows that stand for others.
    """
    low, high = np.searchsorted(stay, [start, stop])
    first, last = np.searchsorted(removed.row, [start, stop])
    rows = np.concatenate([stay[low:high], removed.row[first:last]])
    of = np.searchsorted(stay, removed.representative[first:last])
    place = np.concatenate([np.arange(low, high), of])
    order = np.argsort(rows)
    return rows[order], place[order], order < high - low
