"""The star rule inside huge groups: int8 codes propose pairs, raw rows prove them.

Comparing in float64 would cost rows × kept rows × width. Codes that bound the cosine rule out
nearly all of these comparisons at a fraction of the price, so groups of hundreds of thousands of
rows (long chains of similar pictures) are decided exactly, in memory for their codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from snipdedup import native
from snipdedup.features.cosine import PROPOSAL_ERROR, indexed_cosines, unit_rows
from snipdedup.features.shards import plan_blocks
from snipdedup.join.projection import WIDTHS, fit_projection

BLOCK = 2048  # rows decided, or kept rows compared with, at a time
FIT_ROWS = 1 << 14
VERIFY_PAIRS = 1 << 16

Gather = Callable[[np.ndarray], np.ndarray]


class CodedGroup(NamedTuple):
    """The rows of a group in keep order, with what rules pairs out."""

    rows: np.ndarray  # (n,) int64
    gather: Gather
    threshold: float
    codes: np.ndarray  # (n, w) int8
    falls: np.ndarray  # (n,) int32: by how much each row's limit falls
    limit: float  # product from which two codes may be a pair, before it falls

    def candidates(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which places x may pair with which places y: two (n,) int64 arrays of places."""
        columns = native.columns(self.codes[y], self.falls[y])
        i, j = native.hits(self.codes[x], columns, self.limit - self.falls[x])
        return x[i], y[j]

    def blocks(
        self, x: np.ndarray, y: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield pairs of places x, y in blocks: (raw rows, place of x among them, place of y)."""
        for start, stop in plan_blocks(len(x), VERIFY_PAIRS):
            ends = np.concatenate([self.rows[x[start:stop]], self.rows[y[start:stop]]])
            distinct, back = np.unique(ends, return_inverse=True)
            yield self.gather(distinct), back[: stop - start], back[stop - start :]

    def cosines(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the cosines of places x and y, (n,) float32."""
        parts = [indexed_cosines(raw, raw, i, j) for raw, i, j in self.blocks(x, y)]
        return np.concatenate([np.empty(0, np.float32), *parts])


def star_huge(rows: np.ndarray, gather: Gather, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Decide one huge group, (n,) rows in keep order; return as `star.star_packed` does, (n,)."""
    coded = encode_group(rows, gather, threshold)
    is_kept = decide_kept(coded)
    representative, similarity = rows.copy(), np.ones(len(rows), np.float32)
    kept, removed = np.flatnonzero(is_kept), np.flatnonzero(~is_kept)
    for start, stop in plan_blocks(len(removed), BLOCK):
        places = removed[start:stop]
        found = [coded.candidates(places, kept[s:e]) for s, e in plan_blocks(len(kept), BLOCK)]
        unseen = np.setdiff1d(places, np.concatenate([x for x, _ in found]))  # hardly ever any
        found.append((np.repeat(unseen, len(kept)), np.tile(kept, len(unseen))))
        x, y = (np.concatenate(side) for side in zip(*found, strict=True))
        representative[places], similarity[places] = nearest_candidates(coded, x, y)
    return representative, similarity


def encode_group(rows: np.ndarray, gather: Gather, threshold: float) -> CodedGroup:
    """Fit a projection to the group and encode its rows, read in row order."""
    sample = np.sort(rows[:: -(-len(rows) // FIT_ROWS)])
    projection = fit_projection(gather(sample), WIDTHS[-1], 0)
    codes = np.empty((len(rows), projection.width), np.int8)
    falls = np.empty(len(rows), np.int32)
    order = np.argsort(rows)
    for start, stop in plan_blocks(len(rows), BLOCK):
        at = order[start:stop]
        codes[at], falls[at] = projection.encode(gather(rows[at]))
    return CodedGroup(rows, gather, threshold, codes, falls, projection.limit(threshold))


def decide_kept(coded: CodedGroup) -> np.ndarray:
    """Return which rows are kept, (n,) bool: those that pair with no kept row before them."""
    is_kept = np.zeros(len(coded.rows), bool)
    for start, stop in plan_blocks(len(coded.rows), BLOCK):
        block = np.arange(start, stop)
        covered = np.zeros(len(block), bool)
        kept = np.flatnonzero(is_kept)
        for s, e in plan_blocks(len(kept), BLOCK):
            x, y = coded.candidates(block[~covered], kept[s:e])
            first = np.unique(x, return_index=True)[1]  # one pair often settles a row
            rest = np.delete(np.arange(len(x)), first)
            for pairs in (first, rest):
                at = pairs[~covered[x[pairs] - start]]
                true = coded.cosines(x[at], y[at]) >= np.float32(coded.threshold)
                covered[x[at][true] - start] = True
        left = block[~covered]
        is_kept[left] = kept_within(coded.gather(coded.rows[left]), coded.threshold)
    return is_kept


def kept_within(raw: np.ndarray, threshold: float) -> np.ndarray:
    """Return which rows of a block pair with no kept row of it before them, (n,) bool."""
    unit = unit_rows(raw)
    table = unit @ unit.T
    i, j = np.nonzero(np.abs(table - np.float32(threshold)) <= PROPOSAL_ERROR)
    table[i, j] = indexed_cosines(raw, raw, i, j)
    match = table >= np.float32(threshold)
    covered, kept = np.zeros(len(raw), bool), np.zeros(len(raw), bool)
    for place in range(len(raw)):
        if not covered[place]:
            kept[place] = True
            covered |= match[place]
    return kept


def nearest_candidates(
    coded: CodedGroup, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each place its nearest row among the pairs (x, y).

    The row, (n,) int64, of several the smallest; and their cosine, (n,) float32.
    """
    cosine = coded.cosines(x, y)
    order = np.lexsort((coded.rows[y], -cosine, x))
    first = order[np.unique(x[order], return_index=True)[1]]
    return coded.rows[y[first]], cosine[first]
