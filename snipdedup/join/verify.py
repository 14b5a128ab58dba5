"""Candidate pairs are verified on the raw rows; those below the threshold are dropped.

Rows are gathered once for many pairs, in row order; each pair's cosine is that of `cosine`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from snipdedup import native
from snipdedup.features.cosine import indexed_cosines
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.join.forest import Edges, best_first, make_edges
from snipdedup.parallel import ordered_map, scratch

GATHER_PAIRS = 1 << 13  # pairs from which on their rows are gathered


def verify_pairs(
    features: Features, a: np.ndarray, b: np.ndarray, threshold: float, threads: int
) -> Iterator[Edges]:
    """Yield the edges among candidate pairs of global rows, a block of pairs at a time.

    Pairs that lie together should share rows.
    """

    def verify(span: tuple[int, int]) -> Edges:
        return every_edge(features, a[slice(*span)], b[slice(*span)], threshold)

    yield from ordered_map(verify, plan_blocks(len(a), GATHER_PAIRS), threads)


def every_edge(features: Features, a: np.ndarray, b: np.ndarray, threshold: float) -> Edges:
    """Return all edges among a block of pairs of global rows."""
    rows, places = np.unique(np.concatenate([a, b]), return_inverse=True)
    i, j = places[: len(a)], places[len(a) :]
    return verify_places(features, rows, i, j, threshold, every=True)


def verify_places(
    features: Features,
    rows: np.ndarray,
    i: np.ndarray,
    j: np.ndarray,
    threshold: float,
    reference_rows: int = 0,
    *,
    every: bool = False,
) -> Edges:
    """Return the edges among candidate pairs; where there are many, a maximum spanning forest.

    With ``every`` all of them.

    Parameters
    ----------
    rows : (n,) int64
        Distinct global rows.
    i, j : (m,) int
        The pairs, as places in ``rows``.
    reference_rows : int
        There are two forests; see `forest.spanning_forest`.
    """
    used = np.zeros(len(rows), bool)
    used[i] = used[j] = True
    places = np.flatnonzero(used)
    places = places[np.argsort(rows[places])]
    number = np.empty(len(rows), np.int64)
    number[places] = np.arange(len(places))
    i, j, rows = number[i], number[j], rows[places]
    memory = scratch("gathered", (len(rows), features.dim), features.dtype)
    raw = features.gather_ascending(rows, memory)
    similarity = indexed_cosines(raw, raw, i, j)
    close = similarity >= np.float32(threshold)
    i, j, similarity = i[close], j[close], similarity[close]
    edges = make_edges(rows[i], rows[j], similarity)
    if every or len(i) < len(rows):  # a forest would hardly be smaller
        return edges
    references = int(np.searchsorted(rows, reference_rows))
    first = np.minimum(i, j) < references
    order = best_first(edges)
    chosen = []
    for kind in (first, ~first) if references else (np.ones(len(i), bool),):
        parent = np.arange(len(rows), dtype=np.uint32)
        chosen.append(native.join_best(i, j, parent, order[kind[order]]))
    return edges.where(np.concatenate(chosen))
