"""Records that do not fit into memory: sorted by a number each, or kept as mapped columns.

Up to ``held`` records are in memory, the rest is in files. The result does not depend on ``held``,
except for where its parts are cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from snipdedup.errors import SnipError
from snipdedup.storage.atomic import explained

HELD = 1 << 19  # records in memory; more go to files
PARTS = 1024  # files into which records are split at the most
READ = 1 << 18  # records read at a time, to be split
SHORT_ROWS = 1 << 32  # rows whose numbers fit four bytes

Key = Callable[[np.ndarray], np.ndarray]


class Spread(NamedTuple):
    """What is known of records before they come: how many, and the range of their keys."""

    total: int
    low: int
    high: int


class RecordFile:
    """Records of one type one after another in a file, with the range of their keys."""

    def __init__(self, path: Path, kind: np.dtype) -> None:
        self.path, self.kind = path, kind
        self.count, self.low, self.high = 0, (1 << 64) - 1, 0
        path.unlink(missing_ok=True)  # of a stopped run

    def add(self, records: np.ndarray, key: np.ndarray) -> None:
        """Append records that have these keys."""
        self.low, self.high = min(self.low, int(key.min())), max(self.high, int(key.max()))
        self.count += len(records)
        with explained(self.path), self.path.open("ab") as file:
            records.tofile(file)

    def blocks(self, most: int) -> Iterator[np.ndarray]:
        """Yield the records as they were added, at most so many at a time; remove the file."""
        left = self.count
        if not left:
            return
        with self.path.open("rb") as file:
            while left:
                records = np.fromfile(file, self.kind, min(most, left))
                if not len(records):
                    raise SnipError(f"{self.path}: cut short while the run went on; start it again")
                left -= len(records)
                yield records
        self.path.unlink()


class Sorter:
    """Takes records of one type in any order, and returns them by their keys, (n,) uint64.

    Files begin with the name ``path``; without it all is in memory. ``held`` records are in memory,
    by default `HELD`. A ``spread`` saves a file that is written and read once.
    """

    def __init__(
        self, path: Path | None, kind: np.dtype, key: Key,
        *, held: int | None = None, spread: Spread | None = None,
    ) -> None:  # fmt: skip
        self.path, self.kind, self.key = path, kind, key
        self.held = HELD if held is None else held
        self.spread = spread or Spread(0, 0, 0)
        self.waiting: list[np.ndarray] = []
        self.inside = self.count = 0  # records in memory; all records
        self.files: list[RecordFile] = []

    def add(self, records: np.ndarray) -> None:
        """Take more records."""
        self.waiting.append(records)
        self.inside += len(records)
        self.count += len(records)
        if self.inside > self.held and self.path is not None:
            self.spill()

    def spill(self) -> None:
        """Write the records that are in memory, to files of ascending, equally wide key ranges."""
        if self.path is None or not self.inside:
            return
        if not self.files:
            count = min(PARTS, 1 + 2 * self.spread.total // self.held)
            paths = [Path(f"{self.path}-{part:03d}") for part in range(count)]
            with explained(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.files = [RecordFile(path, self.kind) for path in paths]
        records, files = self._taken(), self.files
        key = self.key(records)
        width = np.uint64((self.spread.high - self.spread.low) // len(files) + 1)
        part = np.minimum((key - np.uint64(self.spread.low)) // width, np.uint64(len(files) - 1))
        order = np.argsort(part.astype(np.uint16), kind="stable")
        cuts = np.searchsorted(part[order], np.arange(len(files) + 1))
        records, key = records[order], key[order]
        for number in np.flatnonzero(np.diff(cuts)).tolist():
            at = slice(cuts[number], cuts[number + 1])
            files[number].add(records[at], key[at])

    def ascending(self) -> Iterator[np.ndarray]:
        """Yield all records in parts whose keys ascend, no key in two of them; remove the files.

        A part has at most ``held`` records, unless they have one key. Within a part they are as
        they were added.
        """
        if not self.files:
            yield self._taken()
            return
        self.spill()
        parts, total = [np.empty(0, self.kind)], 0
        for file in self.files:
            for part in self._pieces(file):
                if total and total + len(part) > self.held:
                    yield np.concatenate(parts)
                    parts, total = [], 0
                parts.append(part)
                total += len(part)
        yield np.concatenate(parts)
        self.files, self.count = [], 0

    def _taken(self) -> np.ndarray:
        """Return what waits in memory, and forget it."""
        records = np.concatenate([np.empty(0, self.kind), *self.waiting])
        self.waiting, self.inside = [], 0
        return records

    def _pieces(self, file: RecordFile) -> Iterator[np.ndarray]:
        """Yield the records of a file in parts that are held, or have one key."""
        if file.count <= self.held or file.low == file.high:
            yield np.concatenate([np.empty(0, self.kind), *file.blocks(self.held)])
            return
        spread = Spread(file.count, file.low, file.high)
        inner = Sorter(file.path, self.kind, self.key, held=self.held, spread=spread)
        for records in file.blocks(READ):
            inner.add(records)
        yield from inner.ascending()


class Columns:
    """Columns that grow at their end: in memory while they are short, then in files.

    ``kinds`` are names and types. Files begin with the name ``path``; without it all is in memory.
    ``held`` entries are in memory, by default `HELD`.
    """

    def __init__(
        self, path: Path | None, kinds: dict[str, str], *, held: int | None = None
    ) -> None:
        self.path, self.held = path, HELD if held is None else held
        self.kinds = {name: np.dtype(kind) for name, kind in kinds.items()}
        self.waiting: list[tuple[np.ndarray, ...]] = []
        self.inside = self.count = 0
        self.written = False

    def add(self, *columns: np.ndarray) -> None:
        """Append entries, in the order of the columns."""
        self.waiting.append(columns)
        self.inside += len(columns[0])
        self.count += len(columns[0])
        if self.inside > self.held and self.path is not None:
            self._write()

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Return the columns; files are mapped."""
        if not self.written:
            return self._taken()
        self._write()
        return tuple(np.memmap(self._file(name), kind, "r") for name, kind in self.kinds.items())

    def _taken(self) -> tuple[np.ndarray, ...]:
        parts = [tuple(np.empty(0, kind) for kind in self.kinds.values()), *self.waiting]
        self.waiting, self.inside = [], 0
        columns = zip(zip(*parts, strict=True), self.kinds.values(), strict=True)
        return tuple(np.concatenate(c).astype(kind, copy=False) for c, kind in columns)

    def _file(self, name: str) -> Path:
        return Path(f"{self.path}.{name}")

    def _write(self) -> None:
        for name, column in zip(self.kinds, self._taken(), strict=True):
            path = self._file(name)
            with explained(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                if not self.written:  # the file of a stopped run may still be mapped
                    path.unlink(missing_ok=True)
                with path.open("ab") as file:
                    np.ascontiguousarray(column).tofile(file)
        self.written = True


def pack(kind: np.dtype, *columns: np.ndarray) -> np.ndarray:
    """Return columns as records, in the order of their fields."""
    records = np.empty(len(columns[0]), kind)
    for name, column in zip(kind.names or (), columns, strict=True):
        records[name] = column
    return records


def row_kind(rows: int) -> str:
    """Return the type of a row number where there are many: four bytes up to 2^32 rows."""
    return "<u4" if rows <= SHORT_ROWS else "<i8"


def load_column(path: Path) -> np.ndarray:
    """Return the array of a ``.npy``; a long one is mapped."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return array if array.size > HELD else np.array(array)


def among(known: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return which rows are among some ascending ones, (n,) bool; those may be mapped."""
    if not len(known):
        return np.zeros(len(rows), bool)
    place = np.minimum(np.searchsorted(known, rows), len(known) - 1)
    return np.asarray(known[place] == rows)


def distinct(values: np.ndarray) -> np.ndarray:
    """Return each value once, ascending (``np.unique`` hashes them, which takes longer)."""
    values = np.sort(values)
    first = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=first[1:])
    return values[first]
