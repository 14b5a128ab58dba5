"""The forest of more edges than fit into memory: they wait in files, and come back best first.

Of each row four bytes are held, of edges a block; all else is on disk.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from snipdedup.join.forest import (
    BLOCK_EDGES,
    Edges,
    ForestBuilder,
    Roots,
    best_first,
    order_by,
    worth_key,
)
from snipdedup.storage.external_sort import Columns, Sorter, pack, row_kind

HELD_EDGES = 1 << 20  # edges of a forest in memory; more go to files


def edge_kind(rows: int) -> np.dtype:
    """Return the type of edges between so many rows, as they lie in files."""
    return np.dtype([("a", row_kind(rows)), ("b", row_kind(rows)), ("similarity", "<f4")])


def edges_of(records: np.ndarray) -> Edges:
    """Return records as edges."""
    a, b = (records[name].astype(np.int64) for name in ("a", "b"))
    return Edges(a, b, records["similarity"].astype(np.float32))


def by_first(records: np.ndarray) -> np.ndarray:
    """Return the keys of records that are to be ordered by ``a``."""
    return np.asarray(records["a"].astype(np.uint64))


class ForestFile:
    """Takes edges as `ForestBuilder` does, whatever their number.

    Parameters
    ----------
    folder : Path
        For what does not fit into memory; emptied first. The forest stays there.
    rows : int
        Rows that there are.
    frozen : int, optional
        As `spanning_forest` takes it; twice the bytes a row are held then.
    """

    def __init__(self, folder: Path, rows: int, frozen: int = 0) -> None:
        self.folder, self.rows, self.kind = folder, rows, edge_kind(rows)
        self.frozen = frozen
        self.builder = ForestBuilder(HELD_EDGES, frozen)
        self.waiting = Sorter(folder / "edges", self.kind, self._worth, held=HELD_EDGES)
        shutil.rmtree(folder, ignore_errors=True)

    def _worth(self, records: np.ndarray) -> np.ndarray:
        """Similarity first, then the top bits of ``a``: edges of one key can be many only at one
        row (where there are no more than 2^32).
        """
        spare = max(0, (self.rows - 1).bit_length() - 32)
        worth = worth_key(records["similarity"].astype(np.float32)) << np.uint64(32)
        return np.asarray(worth | records["a"].astype(np.uint64) >> np.uint64(spare))

    def add(self, edges: Edges) -> None:
        """Take more edges."""
        self.builder.add(edges)
        if self.builder.forest_size > HELD_EDGES:
            self._spill()

    def _spill(self) -> None:
        self.waiting.add(pack(self.kind, *self.builder.forest()))
        self.waiting.spill()
        self.builder = ForestBuilder(HELD_EDGES, self.frozen)

    def forest(self) -> Edges:
        """Return the maximum spanning forest of all edges taken; more than fit are on disk."""
        if not self.waiting.count:
            return self.builder.forest()
        self._spill()
        chosen = Sorter(self.folder / "chosen", self.kind, by_first, held=HELD_EDGES)
        roots = [Roots(self.rows) for _ in range(2 if self.frozen else 1)]
        for records in self.waiting.ascending():
            edges = edges_of(records)
            order = best_first(edges)
            for start in range(0, len(order), BLOCK_EDGES):
                places = order[start : start + BLOCK_EDGES]
                below = edges.a[places] < self.frozen
                for root, part in zip(roots, (places[~below], places[below]), strict=False):
                    chosen.add(records[part[root.join(edges.a[part], edges.b[part])]])
        del roots
        forest = Columns(
            self.folder / "forest",
            {"a": "<i8", "b": "<i8", "similarity": "<f4"},
            held=HELD_EDGES,
        )
        for records in chosen.ascending():
            edges = edges_of(records)
            forest.add(*edges.where(order_by(edges.a, edges.b)))
        return Edges(*forest.arrays())
