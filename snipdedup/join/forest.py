"""Edges between rows, and the maximum spanning forest that stands for all of them.

Edges are ordered totally: higher cosine first, then smaller ``a``, then smaller ``b``. So the
forest of a set of pairs is unique, and the forest of the union of two sets is the forest of the
union of their forests: parts can be reduced anywhere, in any order, and merged.

Where an argument is called ``reference_rows``, the rows below it are reference rows. There are then
two forests: one of the edges with a reference row, and one of the edges between two other rows.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snipdedup import native
from snipdedup.native.fallback import find_roots, link_smaller
from snipdedup.storage.external_sort import Columns, Sorter, pack, row_kind

BUFFER_EDGES = 1 << 22  # edges collected before a forest is reduced again
HELD_EDGES = 1 << 20  # edges of an `ExternalForest` in memory; more go to files
BLOCK_EDGES = 1 << 16  # edges joined at a time: few enough to stay in the cache
SPREAD = 8  # rows up to the last one touched for each edge, from which rows get new numbers


class Edges(NamedTuple):
    """Pairs of rows with their cosines."""

    a: np.ndarray  # (n,) int64
    b: np.ndarray  # (n,) int64, the larger row
    similarity: np.ndarray  # (n,) float32

    def where(self, mask: Any) -> Edges:
        """Return the edges that a mask, slice or index array selects."""
        return Edges(self.a[mask], self.b[mask], self.similarity[mask])

    def at(self, threshold: float) -> Edges:
        """Return the edges with a cosine of float32(threshold) or more."""
        return self.where(self.similarity >= np.float32(threshold))


def make_edges(a: np.ndarray, b: np.ndarray, similarity: np.ndarray) -> Edges:
    """Return edges with each pair turned so that a < b."""
    low, high = np.minimum(a, b), np.maximum(a, b)
    return Edges(low.astype(np.int64), high.astype(np.int64), similarity.astype(np.float32))


def join_edges(parts: list[Edges]) -> Edges:
    """Return several lists of edges as one."""
    return Edges(
        np.concatenate([np.empty(0, np.int64), *(p.a for p in parts)]),
        np.concatenate([np.empty(0, np.int64), *(p.b for p in parts)]),
        np.concatenate([np.empty(0, np.float32), *(p.similarity for p in parts)]),
    )


def spanning_forest(edges: Edges, reference_rows: int = 0) -> Edges:
    """Return the maximum spanning forest, its edges ordered by (a, b).

    The edges are totally ordered, so the result is unique whatever their order and repeats. Of two
    forests the one with reference rows comes first.
    """
    if reference_rows:
        below = edges.a < reference_rows
        return join_edges([spanning_forest(edges.where(part)) for part in (below, ~below)])
    forest = edges.where(forest_places(edges))
    return forest.where(order_by(forest.a, forest.b))


def forest_places(edges: Edges) -> np.ndarray:
    """Return which edges make up the maximum spanning forest, (f,) int64.

    Kruskal's method: the best edge first.
    """
    nodes, start, end = number_ends(edges)
    parent = np.arange(nodes, dtype=row_kind(nodes))
    return native.join_best(start, end, parent, best_first(edges))


def best_first(edges: Edges) -> np.ndarray:
    """Return the places of edges in their total order, (n,) int64; NaN comes last."""
    key, largest = similarity_key(edges.similarity), edges.b.max(initial=0)
    if largest >= 1 << 32:
        return np.lexsort((edges.b, edges.a, key))
    key <<= np.uint64(32)
    key |= edges.a.astype(np.uint64)
    order = np.argsort(key)
    key = key[order]
    same = key[1:] == key[:-1]  # equal but for b
    tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
    part = order[tied]
    order[tied] = part[np.lexsort((edges.b[part], key[tied]))]
    return order


def similarity_key(similarity: np.ndarray) -> np.ndarray:
    """Return numbers that are ordered as similarities are from high to low, (n,) uint64 < 2^32.

    The bits of floats are ordered as they are, but for the sign.
    """
    value = np.where(np.isnan(similarity), np.float32(-np.inf), similarity + np.float32(0))
    bits = value.view(np.uint32)
    return np.where(bits >> 31, bits, ~bits & np.uint32(0x7FFFFFFF)).astype(np.uint64)


def order_by(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Return the order of pairs of non-negative numbers by ``high``, then ``low``, (n,) int64.

    As one number a pair where they fit: that sorts ten times faster.
    """
    if max(high.max(initial=0), low.max(initial=0)) >= 1 << 32:
        return np.lexsort((low, high))
    key = high.astype(np.uint64)
    key <<= np.uint64(32)
    key |= low.astype(np.uint64)
    return np.argsort(key)


def number_ends(edges: Edges) -> tuple[int, np.ndarray, np.ndarray]:
    """Return how many nodes edges may touch, and the numbers of ``a`` and ``b`` as nodes.

    Rows are their own numbers unless they are few among many.
    """
    top = int(edges.b.max(initial=-1)) + 1
    if top <= SPREAD * len(edges.a):
        return top, edges.a, edges.b
    nodes, ends = np.unique(np.concatenate([edges.a, edges.b]), return_inverse=True)
    return len(nodes), ends[: len(edges.a)], ends[len(edges.a) :]


class UnionFind:
    """Which rows are connected: each points to a smaller one, the smallest to itself."""

    def __init__(self, rows: int) -> None:
        self.parent = np.arange(rows, dtype=row_kind(rows))  # four bytes a row up to 2^32 rows

    def find(self, rows: np.ndarray) -> np.ndarray:
        """Return the smallest row connected with each row, in ``parent``'s type."""
        return find_roots(self.parent, rows)

    def join_best(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Connect the ends of edges given best first; return the places of the forest's edges."""
        return native.join_best(a, b, self.parent)

    def unite(self, a: np.ndarray, b: np.ndarray) -> None:
        """Connect the ends of edges whose order does not matter."""
        native.join_best(a, b, self.parent)

    def labels(self) -> np.ndarray:
        """Return the smallest row of each row's component, (rows,): ``parent`` itself."""
        for start in range(0, len(self.parent), BLOCK_EDGES):
            part = slice(start, start + BLOCK_EDGES)
            self.parent[part] = self.find(self.parent[part])
        return self.parent


class ForestBuilder:
    """The forest of edges that come in parts; holds a forest and a ``buffer`` of edges."""

    def __init__(self, reference_rows: int = 0, buffer: int | None = None) -> None:
        self.buffer = BUFFER_EDGES if buffer is None else buffer
        self.reference_rows = reference_rows
        self.parts: list[Edges] = []
        self.held = self.forest_size = 0

    def add(self, edges: Edges) -> None:
        """Take more edges."""
        self.parts.append(edges)
        self.held += len(edges.a)
        if self.held > self.buffer + 2 * self.forest_size:
            self.forest()

    def forest(self) -> Edges:
        """Return the maximum spanning forest of all edges taken so far."""
        edges, self.parts = join_edges(self.parts), []  # not held twice
        forest = spanning_forest(edges, self.reference_rows)
        self.parts = [forest]
        self.held = self.forest_size = len(forest.a)
        return forest


class ExternalForest:
    """The forest of more edges than fit into memory: they wait in files and come back best first.

    Of each of the set's rows a `UnionFind` holds four bytes (twice that beside reference rows). The
    folder is emptied first; the forest stays there.
    """

    def __init__(self, folder: Path, rows: int, reference_rows: int = 0) -> None:
        self.folder, self.rows, self.kind = folder, rows, edge_kind(rows)
        self.reference_rows = reference_rows
        self.builder = ForestBuilder(reference_rows, HELD_EDGES)
        self.waiting = Sorter(folder / "edges", self.kind, self._key, held=HELD_EDGES)
        shutil.rmtree(folder, ignore_errors=True)

    def _key(self, records: np.ndarray) -> np.ndarray:
        """Order by similarity, then by the top 32 bits of ``a``."""
        spare = max(0, (self.rows - 1).bit_length() - 32)
        key = similarity_key(records["similarity"].astype(np.float32)) << np.uint64(32)
        return np.asarray(key | records["a"].astype(np.uint64) >> np.uint64(spare))

    def add(self, edges: Edges) -> None:
        """Take more edges."""
        self.builder.add(edges)
        if self.builder.forest_size > HELD_EDGES:
            self._spill()

    def _spill(self) -> None:
        self.waiting.add(pack(self.kind, *self.builder.forest()))
        self.waiting.spill()
        self.builder = ForestBuilder(self.reference_rows, HELD_EDGES)

    def forest(self) -> Edges:
        """Return the maximum spanning forest of all edges taken; a long one is mapped."""
        if not self.waiting.count:
            return self.builder.forest()
        self._spill()
        chosen = Sorter(self.folder / "chosen", self.kind, by_first, held=HELD_EDGES)
        sets = [UnionFind(self.rows) for _ in range(2 if self.reference_rows else 1)]
        for records in self.waiting.ascending():
            edges = edges_of(records)
            order = best_first(edges)
            for start in range(0, len(order), BLOCK_EDGES):
                places = order[start : start + BLOCK_EDGES]
                below = edges.a[places] < self.reference_rows
                for one, part in zip(sets, (places[~below], places[below]), strict=False):
                    chosen.add(records[part[one.join_best(edges.a[part], edges.b[part])]])
        del sets
        kinds = {"a": "<i8", "b": "<i8", "similarity": "<f4"}
        forest = Columns(self.folder / "forest", kinds, held=HELD_EDGES)
        for records in chosen.ascending():
            edges = edges_of(records)
            forest.add(*edges.where(order_by(edges.a, edges.b)))
        return Edges(*forest.arrays())


def edge_kind(rows: int) -> np.dtype:
    """Return the type of an edge between so many rows in files."""
    return np.dtype([("a", row_kind(rows)), ("b", row_kind(rows)), ("similarity", "<f4")])


def edges_of(records: np.ndarray) -> Edges:
    """Return records of `edge_kind` as edges."""
    a, b = (records[name].astype(np.int64) for name in ("a", "b"))
    return Edges(a, b, records["similarity"].astype(np.float32))


def by_first(records: np.ndarray) -> np.ndarray:
    """Return the sort keys of records that are to be ordered by ``a``."""
    return np.asarray(records["a"].astype(np.uint64))


def components(edges: Edges) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows that edges touch, ascending, and the smallest row of each one's group."""
    top = int(edges.b.max(initial=-1)) + 1
    if top > SPREAD * len(edges.a):
        nodes, ends = np.unique(np.concatenate([edges.a, edges.b]), return_inverse=True)
        label = np.arange(len(nodes))
        link_smaller(label, ends[: len(edges.a)], ends[len(edges.a) :])
        return nodes, nodes[label]
    sets, touched = UnionFind(top), np.zeros(top, bool)
    for low in range(0, len(edges.a), BLOCK_EDGES):
        part = edges.where(slice(low, low + BLOCK_EDGES))
        sets.unite(part.a, part.b)
        touched[part.a] = touched[part.b] = True
    nodes = np.flatnonzero(touched)
    return nodes, sets.labels()[nodes].astype(np.int64)
