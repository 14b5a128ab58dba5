"""The forest of more edges than fit into memory: they wait in files, and come back best first.

Of each row four bytes are held, of edges a block; all else is on disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from snipdedup.ground.store import explained, writing_npy
from snipdedup.search.forest import (
    BLOCK_EDGES,
    Edges,
    ForestBuilder,
    Roots,
    best_first,
    join_edges,
    order_by,
    worth_key,
)

HELD_EDGES = 1 << 22  # edges of a forest in memory; more go to files
PARTS = 64  # files into which too large a file is split

Key = Callable[[Edges], np.ndarray]


class EdgeFile:
    """Edges in a file, with the range of their keys.

    Parameters
    ----------
    path : Path
    key : function of Edges
        Returns a number for each edge, (n,) uint64, by which they are to be ordered.
    rows : int
        Rows that there are; up to 2^32 of them are written in four bytes.
    """

    def __init__(self, path: Path, key: Key, rows: int) -> None:
        row = "<u4" if rows <= 1 << 32 else "<i8"
        self.kind = np.dtype([("a", row), ("b", row), ("similarity", "<f4")])
        self.path, self.key, self.rows = path, key, rows
        self.count, self.low, self.high = 0, (1 << 64) - 1, 0

    def add(self, edges: Edges) -> None:
        """Append edges."""
        if not len(edges.a):
            return
        key = self.key(edges)
        self.low = min(self.low, int(key.min()))
        self.high = max(self.high, int(key.max()))
        self.count += len(key)
        records = np.empty(len(key), self.kind)
        for name, column in edges._asdict().items():
            records[name] = column
        with explained(self.path), self.path.open("ab") as file:
            records.tofile(file)

    def blocks(self, most: int) -> Iterator[Edges]:
        """Yield the edges as they were added, at most so many at a time."""
        if not self.count:
            return
        with self.path.open("rb") as file:
            while len(records := np.fromfile(file, self.kind, most)):
                yield Edges(
                    records["a"].astype(np.int64),
                    records["b"].astype(np.int64),
                    records["similarity"],
                )

    def ascending(self) -> Iterator[Edges]:
        """Yield all edges in parts whose keys ascend; the file is gone after it."""
        if self.count <= HELD_EDGES or self.low == self.high:
            yield join_edges(list(self.blocks(HELD_EDGES)))
        else:
            for part in self._split():
                yield from part.ascending()
        self.path.unlink(missing_ok=True)

    def _split(self) -> list[EdgeFile]:
        """Return the same edges in files of ascending, equally wide ranges of keys."""
        width = np.uint64((self.high - self.low) // PARTS + 1)
        parts = [
            EdgeFile(self.path.with_name(f"{self.path.name}-{number:02d}"), self.key, self.rows)
            for number in range(PARTS)
        ]
        for edges in self.blocks(HELD_EDGES):
            part = ((self.key(edges) - np.uint64(self.low)) // width).astype(np.uint8)
            order = np.argsort(part, kind="stable")
            cuts = np.searchsorted(part[order], np.arange(PARTS + 1))
            for number in np.flatnonzero(np.diff(cuts)):
                parts[number].add(edges.where(order[cuts[number] : cuts[number + 1]]))
        self.path.unlink()
        return parts


class ForestFile:
    """Takes edges as `ForestBuilder` does, whatever their number.

    Parameters
    ----------
    folder : Path
        For what does not fit into memory; emptied first. The forest stays there.
    rows : int
        Rows that there are.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder, self.rows = folder, rows
        self.builder, self.waiting = ForestBuilder(), self._file("edges", self._worth)
        shutil.rmtree(folder, ignore_errors=True)

    def _file(self, name: str, key: Key) -> EdgeFile:
        return EdgeFile(self.folder / name, key, self.rows)

    def _worth(self, edges: Edges) -> np.ndarray:
        """Similarity first, then the top bits of ``a``: edges of one key can be many only at one
        row (where there are no more than 2^32).
        """
        spare = max(0, (self.rows - 1).bit_length() - 32)
        return worth_key(edges.similarity) << np.uint64(32) | edges.a.astype(np.uint64) >> spare

    def add(self, edges: Edges) -> None:
        """Take more edges."""
        self.builder.add(edges)
        if self.builder.forest_size > HELD_EDGES:
            self._spill()

    def _spill(self) -> None:
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.waiting.add(self.builder.forest())
        self.builder = ForestBuilder()

    def forest(self) -> Edges:
        """Return the maximum spanning forest of all edges taken; more than fit are on disk."""
        if not self.waiting.count:
            return self.builder.forest()
        self._spill()
        chosen = self._file("chosen", lambda edges: edges.a.astype(np.uint64))
        roots = Roots(self.rows)
        for edges in self.waiting.ascending():
            order = best_first(edges)
            for start in range(0, len(order), BLOCK_EDGES):
                places = order[start : start + BLOCK_EDGES]
                chosen.add(edges.where(places[roots.join(edges.a[places], edges.b[places])]))
        del roots
        return self._write(chosen)

    def _write(self, chosen: EdgeFile) -> Edges:
        """Write edges ordered by (a, b), and return them as they lie on disk."""
        count, kinds = chosen.count, (np.int64, np.int64, np.float32)
        paths = [self.folder / f"{name}.npy" for name in Edges._fields]
        a, b, similarity = (
            writing_npy(path, np.dtype(kind), (count,))
            for path, kind in zip(paths, kinds, strict=True)
        )
        with a as a_file, b as b_file, similarity as similarity_file:
            for edges in chosen.ascending():
                part = edges.where(order_by(edges.a, edges.b))
                for column, file in zip(part, (a_file, b_file, similarity_file), strict=True):
                    column.tofile(file)
        return Edges(*(np.load(path, mmap_mode="r") for path in paths))
