"""Edges between rows, and the maximum spanning forest that stands for all of them.

Edges are ordered totally: higher cosine first, then smaller ``a``, then smaller ``b``. So the
forest of a set of pairs is unique, and the forest of the union of two sets is the forest of the
union of their forests: parts can be reduced anywhere, in any order, and merged.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

BUFFER_EDGES = 1 << 22  # edges collected before a forest is reduced again


class Edges(NamedTuple):
    """Pairs of rows with their cosines.

    Attributes
    ----------
    a, b : (n,) int64
        Rows, a < b.
    similarity : (n,) float32
    """

    a: np.ndarray
    b: np.ndarray
    similarity: np.ndarray

    def where(self, mask: np.ndarray) -> Edges:
        """Return the edges that ``mask`` or an index array selects."""
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


def spanning_forest(edges: Edges) -> Edges:
    """Return the maximum spanning forest, its edges ordered by (a, b).

    The edges are totally ordered, so the result is unique whatever their order and repeats.
    """
    forest = edges.where(forest_places(edges))
    return forest.where(np.lexsort((forest.b, forest.a)))


def forest_places(edges: Edges) -> np.ndarray:
    """Return which edges make up the maximum spanning forest, (f,) int64.

    Borůvka's method on whole arrays: in each round every component takes its best edge.
    """
    order = np.lexsort((edges.b, edges.a, -edges.similarity))
    nodes, ends = np.unique(np.concatenate([edges.a, edges.b]), return_inverse=True)
    start, end = ends[: len(order)][order], ends[len(order) :][order]
    u, v, rank = start, end, np.arange(len(order))
    label = np.arange(len(nodes))
    chosen = [np.empty(0, np.int64)]
    while len(u):
        best = best_edge(u, v, rank, len(nodes))
        picks = np.unique(best[best < len(order)])
        chosen.append(picks)
        link_smaller(label, label[start[picks]], label[end[picks]])
        u, v = label[u], label[v]
        open_ = u != v
        u, v, rank = u[open_], v[open_], rank[open_]
    return order[np.concatenate(chosen)]


def best_edge(u: np.ndarray, v: np.ndarray, rank: np.ndarray, nodes: int) -> np.ndarray:
    """Return for each node the smallest rank of an edge at it; ``rank`` is ascending.

    A node without an edge gets the largest int64. Assignments are made from the worst edge to the
    best, and the last one to a node holds.
    """
    best = np.full(nodes, np.iinfo(np.int64).max)
    best[u[::-1]] = rank[::-1]
    other = np.full(nodes, np.iinfo(np.int64).max)
    other[v[::-1]] = rank[::-1]
    return np.minimum(best, other)


def link_smaller(label: np.ndarray, u: np.ndarray, v: np.ndarray) -> None:
    """Join the components of ``u`` and ``v`` in place; labels become each component's smallest.

    Union by minimum with pointer jumping. ``label`` must be fully compressed (label[label] ==
    label) before, and is so afterwards.
    """
    while len(u):
        low, high = np.minimum(u, v), np.maximum(u, v)
        np.minimum.at(label, high, low)
        while True:
            jumped = label[label]
            if np.array_equal(jumped, label):
                break
            label[:] = jumped
        u, v = label[u], label[v]
        open_ = u != v
        u, v = u[open_], v[open_]


class ForestBuilder:
    """Takes edges as they are found; holds no more than a forest and a buffer."""

    def __init__(self) -> None:
        self.parts: list[Edges] = []
        self.held = 0
        self.forest_size = 0

    def add(self, edges: Edges) -> None:
        """Take more edges."""
        self.parts.append(edges)
        self.held += len(edges.a)
        if self.held > BUFFER_EDGES + 2 * self.forest_size:
            self.forest()

    def forest(self) -> Edges:
        """Return the maximum spanning forest of all edges taken so far."""
        forest = spanning_forest(join_edges(self.parts))
        self.parts = [forest]
        self.held = self.forest_size = len(forest.a)
        return forest


def components(edges: Edges) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows that edges touch, ascending, and the smallest row of each one's group."""
    nodes, ends = np.unique(np.concatenate([edges.a, edges.b]), return_inverse=True)
    label = np.arange(len(nodes))
    link_smaller(label, ends[: len(edges.a)], ends[len(edges.a) :])
    return nodes, nodes[label]
