"""The star rule inside huge groups: int8 codes propose, raw rows prove.

Comparing in float64 would cost rows × staying rows × width. Codes that bound the cosine rule out
nearly all of these comparisons at a fraction of the price, so groups of hundreds of thousands of
rows (long chains of similar pictures) are decided exactly, in memory for their codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from snipdedup.features.cosine import PROPOSAL_ERROR, directions, indexed_cosines, unit_rows
from snipdedup.features.shards import plan_blocks
from snipdedup.join.kernels import hit_places, pick_kernel
from snipdedup.join.projection import WIDTHS, fit_projection
from snipdedup.join.verify import pair_products

BLOCK = 2048  # rows decided, or staying rows compared with, at a time
FIT_ROWS = 1 << 14
VERIFY_PAIRS = 1 << 16

Gather = Callable[[np.ndarray], np.ndarray]


class Coded(NamedTuple):
    """The rows of a group in keep order, with what rules pairs out.

    Attributes
    ----------
    rows : (n,) int64
    codes : (n, w) int8
    slack : (n,) float64
    limit : float
        Product from which two codes without slack may be a pair.
    """

    rows: np.ndarray
    codes: np.ndarray
    slack: np.ndarray
    limit: float

    def hits(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which places x may pair with which places y: two (n,) int64 arrays of places."""
        import torch

        kernel = pick_kernel("cpu")
        columns = kernel.prepare(torch.from_numpy(self.codes[y]))
        products = kernel.multiply(torch.from_numpy(self.codes[x]), columns)
        lowest = self.limit - self.slack[y].max(initial=0)
        i, j = hit_places(products, lowest - self.slack[x])
        return x[i], y[j]


def star_huge(rows: np.ndarray, gather: Gather, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Decide one huge group, (n,) rows in keep order.

    Returns
    -------
    representative : (n,) int64
        For a removed row the staying row with the highest cosine (ties: the smaller row).
    similarity : (n,) float32
    """
    coded = encode(rows, gather, threshold)
    stays = decide(coded, gather, threshold)
    representative, similarity = rows.copy(), np.ones(len(rows), np.float32)
    kept, removed = np.flatnonzero(stays), np.flatnonzero(~stays)
    for start, stop in plan_blocks(len(removed), BLOCK):
        places = removed[start:stop]
        found = [coded.hits(places, kept[s:e]) for s, e in plan_blocks(len(kept), BLOCK)]
        unseen = np.setdiff1d(places, np.concatenate([x for x, _ in found]))  # none, but for luck
        found.append((np.repeat(unseen, len(kept)), np.tile(kept, len(unseen))))
        x, y = (np.concatenate(side) for side in zip(*found, strict=True))
        near, cosine = nearest(rows, gather, x, y, places)
        representative[places], similarity[places] = near, cosine
    return representative, similarity


def encode(rows: np.ndarray, gather: Gather, threshold: float) -> Coded:
    """Fit a projection to the group and encode its rows, read in row order."""
    sample = np.sort(rows[:: -(-len(rows) // FIT_ROWS)])
    projection = fit_projection(gather(sample), WIDTHS[-1], 0)
    codes = np.empty((len(rows), projection.width), np.int8)
    excess = np.empty(len(rows), np.float32)
    order = np.argsort(rows)
    for start, stop in plan_blocks(len(rows), BLOCK):
        at = order[start:stop]
        codes[at], excess[at] = projection.encode(gather(rows[at]))
    return Coded(rows, codes, projection.slack(excess), projection.limit(threshold))


def decide(coded: Coded, gather: Gather, threshold: float) -> np.ndarray:
    """Return which rows stay, (n,) bool: those that pair with no row that stays before them."""
    stays = np.zeros(len(coded.rows), bool)
    for start, stop in plan_blocks(len(coded.rows), BLOCK):
        block = np.arange(start, stop)
        covered = np.zeros(len(block), bool)
        kept = np.flatnonzero(stays)
        for s, e in plan_blocks(len(kept), BLOCK):
            open_ = np.flatnonzero(~covered)
            x, y = coded.hits(block[open_], kept[s:e])
            for pairs in one_each_first(x):
                left = ~covered[x[pairs] - start]
                at = pairs[left]
                true = is_pair(coded.rows, gather, x[at], y[at], threshold)
                covered[x[at][true] - start] = True
        open_ = np.flatnonzero(~covered)
        stays[block[open_]] = first_staying(gather(coded.rows[block[open_]]), threshold)
    return stays


def one_each_first(x: np.ndarray) -> Iterator[np.ndarray]:
    """Yield places of pairs: first one pair of each x, which often settles it, then the others."""
    first = np.unique(x, return_index=True)[1]
    yield first
    rest = np.ones(len(x), bool)
    rest[first] = False
    yield np.flatnonzero(rest)


def first_staying(raw: np.ndarray, threshold: float) -> np.ndarray:
    """Return which rows of a block pair with no row of it that stays before them, (n,) bool."""
    import torch

    unit = torch.from_numpy(unit_rows(raw))
    table = (unit @ unit.T).numpy()
    i, j = np.nonzero(np.abs(table - np.float32(threshold)) <= PROPOSAL_ERROR)
    table[i, j] = indexed_cosines(raw, raw, i, j)
    match = table >= np.float32(threshold)
    covered, stays = np.zeros(len(raw), bool), np.zeros(len(raw), bool)
    for place in range(len(raw)):
        if not covered[place]:
            stays[place] = True
            covered |= match[place]
    return stays


def is_pair(
    rows: np.ndarray, gather: Gather, x: np.ndarray, y: np.ndarray, threshold: float
) -> np.ndarray:
    """Return which of the places x, y are pairs by their cosine, (n,) bool."""
    limit = np.float32(threshold)
    parts = [np.empty(0, bool)]
    for raw, i, j in gathered(rows, gather, x, y):
        product = pair_products(directions(raw), i, j)
        close = np.flatnonzero(np.abs(product - limit) <= PROPOSAL_ERROR)
        product[close] = indexed_cosines(raw, raw, i[close], j[close])
        parts.append(product >= limit)
    return np.concatenate(parts)


def nearest(
    rows: np.ndarray, gather: Gather, x: np.ndarray, y: np.ndarray, places: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each of the ascending ``places`` its nearest y among the pairs (x, y).

    Returns
    -------
    row : (n,) int64
        The nearest row; of several the smallest.
    cosine : (n,) float32
    """
    product = np.concatenate([
        np.empty(0, np.float32),
        *(pair_products(directions(raw), i, j) for raw, i, j in gathered(rows, gather, x, y)),
    ])  # fmt: skip
    at = np.searchsorted(places, x)
    best = np.full(len(places), -2, np.float32)
    np.maximum.at(best, at, product)
    close = np.flatnonzero(product >= best[at] - PROPOSAL_ERROR)
    cosine = np.concatenate([
        np.empty(0, np.float32),
        *(
            indexed_cosines(raw, raw, i, j)
            for raw, i, j in gathered(rows, gather, x[close], y[close])
        ),
    ])  # fmt: skip
    order = np.lexsort((rows[y[close]], -cosine, at[close]))
    first = order[np.unique(at[close][order], return_index=True)[1]]
    return rows[y[close][first]], cosine[first]


def gathered(
    rows: np.ndarray, gather: Gather, x: np.ndarray, y: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield blocks of pairs as (raw rows, place of x in them, place of y)."""
    for start, stop in plan_blocks(len(x), VERIFY_PAIRS):
        ends = np.concatenate([rows[x[start:stop]], rows[y[start:stop]]])
        distinct, back = np.unique(ends, return_inverse=True)
        yield gather(distinct), back[: stop - start], back[stop - start :]
