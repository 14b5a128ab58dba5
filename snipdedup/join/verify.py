"""Candidate pairs are verified on the raw rows; those below the threshold are dropped.

Rows are gathered once for many pairs, in row order. Where many candidates are no pairs, a float32
product rules them out; the rest is decided in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from snipdedup.features.cosine import PROPOSAL_ERROR, Directions, directions, indexed_cosines
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.join.forest import Edges, make_edges, spanning_forest
from snipdedup.parallel import ordered_map, scratch

GATHER_PAIRS = 1 << 13  # pairs whose rows are gathered together
TRIED, MOSTLY = 16, 0.5  # one pair in so many is tried: do at least half of these hold?
PRODUCT_PAIRS = 256  # pairs whose rows are copied side by side at a time, to stay in the cache


def verify_pairs(
    features: Features,
    a: np.ndarray,
    b: np.ndarray,
    threshold: float,
    threads: int,
    *,
    every: bool = False,
    reference_rows: int = 0,
) -> Iterator[Edges]:
    """Yield the edges among candidate pairs (a, b) in any order, a block of pairs at a time.

    Pairs that lie together should share rows. With ``every`` all pairs are returned; by default a
    maximum spanning forest of a block's pairs will do.
    """

    def verify(span: tuple[int, int]) -> Edges:
        part = slice(*span)
        return verify_block(features, a[part], b[part], threshold, every, reference_rows)

    yield from ordered_map(verify, plan_blocks(len(a), GATHER_PAIRS), threads)


def verify_block(
    features: Features,
    a: np.ndarray,
    b: np.ndarray,
    threshold: float,
    every: bool,
    reference_rows: int = 0,
) -> Edges:
    """Return the edges among one block of pairs; see `verify_pairs`."""
    import torch

    rows, places = np.unique(np.concatenate([a, b]), return_inverse=True)
    i, j = places[: len(a)], places[len(a) :]
    shape = (len(rows), features.dim)
    raw = features.gather_ascending(rows, scratch("gathered", shape, features.dtype))
    tried = indexed_cosines(raw, raw, i[::TRIED], j[::TRIED]) >= np.float32(threshold)
    if np.count_nonzero(tried) < MOSTLY * len(tried):
        wide = directions(raw, torch.from_numpy(scratch("gathered wide", shape, np.float32)))
        products = listed_products(wide, i, j)
        likely = np.flatnonzero(products >= np.float32(threshold - PROPOSAL_ERROR))
        i, j = i[likely], j[likely]
    edges = make_edges(rows[i], rows[j], indexed_cosines(raw, raw, i, j)).at(threshold)
    if every or len(edges.a) < len(rows):  # a forest would hardly be smaller
        return edges
    return spanning_forest(edges, reference_rows)


def listed_products(rows: Directions, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Return the float32 products of rows i with rows j, scaled to norm 1, (n,) float32."""
    import torch

    parts = [np.empty(0, np.float32)]
    shape = (PRODUCT_PAIRS, rows.values.shape[1])
    x, y = (torch.from_numpy(scratch(use, shape, np.float32)) for use in ("pair x", "pair y"))
    for start, stop in plan_blocks(len(i), PRODUCT_PAIRS):
        left, right = (torch.from_numpy(side[start:stop]) for side in (i, j))
        torch.index_select(rows.values, 0, left, out=x[: stop - start])
        torch.index_select(rows.values, 0, right, out=y[: stop - start])
        product = x[: stop - start].mul_(y[: stop - start]).sum(1)
        parts.append((product * rows.factor[left] * rows.factor[right]).numpy())
    return np.concatenate(parts)
