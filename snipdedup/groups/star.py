"""Which rows are kept: by the star rule, by one row a component, or by SemDeDup's rule.

Under the star rule a row is kept, in keep order, unless a kept row is its pair. Small groups are
decided many at a time and large ones in blocks, by tables of cosines. In huge ones that
would cost rows × kept rows × width: int8 codes that bound the cosine rule out nearly all of these
comparisons, and raw rows prove the rest. So groups of hundreds of thousands of rows (long chains of
similar pictures) are decided exactly, in memory for their codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, compress
from typing import Any, NamedTuple

import numpy as np

from snipdedup import native
from snipdedup.features.cosine import (
    all_cosines,
    indexed_cosines,
    pair_cosine,
    rescaled,
)
from snipdedup.features.shards import plan_blocks
from snipdedup.groups.members import (
    NO_PAIR,
    NO_ROW,
    Best,
    Members,
    Rank,
    group_starts,
    sort_members,
)
from snipdedup.join.forest import Edges, components
from snipdedup.join.projection import WIDTHS, fit_projection
from snipdedup.parallel import given_threads, ordered_map
from snipdedup.storage.external_sort import distinct

Gather = Callable[[np.ndarray], np.ndarray]  # (n,) int64 rows to their vectors, (n, d)

STAR_BLOCK = 1024  # rows of a large group compared at once
PACKED_GROUP = 32  # groups up to this size are compared many at a time
FLOAT64_GROUP = 8192  # larger groups are compared by codes first
STAR_STEP = 64  # rows of a large group decided together
PACKED_ROWS = 1 << 12  # rows gathered for one batch of small groups
HUGE_BLOCK = 2048  # rows of a huge group decided, or kept rows compared with, at a time
FIT_ROWS = 1 << 14  # rows of a huge group that its projection is fitted to
VERIFY_PAIRS = 1 << 16


class Also(NamedTuple):
    """What a pair must besides: a cosine of other vectors of the same rows (their captions')."""

    gather: Gather  # (n,) int64 rows to their other vectors, (n, dim)
    threshold: float
    dim: int

    def holds(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return for which of the rows a, b it holds, (n,) bool."""
        parts = [np.empty(0, bool)]
        for start in range(0, len(a), PACKED_ROWS):
            x, y = (self.gather(side[start : start + PACKED_ROWS]) for side in (a, b))
            parts.append(pair_cosine(x, y) >= np.float32(self.threshold))
        return np.concatenate(parts)


class Compare(NamedTuple):
    """How the rows of a group are compared."""

    gather: Gather  # (n,) int64 rows to their features, (n, d)
    threshold: float
    also: Also | None = None

    def load(self, rows: np.ndarray) -> Vectors:
        """Return the features of rows, and their other vectors."""
        also = None if self.also is None else self.also.gather(rows)
        return Vectors.of(self.gather(rows), also)

    def table(self, x: Vectors, y: Vectors, groups: int = 1) -> np.ndarray:
        """Return all cosines of x with y in each group; `NO_PAIR` where ``also`` does not hold.

        (groups, m, n) float32.
        """
        cosine = native.cosine_tables(x.rows, y.rows, x.norms, y.norms, groups)
        if self.also is not None:
            sides = x.other.rows, y.other.rows, x.other.norms, y.other.norms
            other = native.cosine_tables(*sides, groups)
            cosine[other < np.float32(self.also.threshold)] = NO_PAIR
        return cosine

    def match(self, x: Vectors, y: Vectors) -> np.ndarray:
        """Return which rows of x pair with which of y, (m, n) bool."""
        return np.asarray(self.table(x, y)[0] >= np.float32(self.threshold))


@dataclass(frozen=True)
class Vectors:
    """Vectors of rows as stored, with their norms; and other vectors of the same rows."""

    rows: np.ndarray  # (n, d)
    norms: np.ndarray  # (n,) float64
    other: Any = None  # Vectors, if pairs must match in them too

    @classmethod
    def of(cls, rows: np.ndarray, also: np.ndarray | None = None) -> Vectors:
        """Return vectors, float64 ones scaled so that their squares do not overflow."""
        rows = rescaled(rows)
        return cls(rows, native.row_norms(rows), None if also is None else cls.of(also))

    def where(self, places: np.ndarray) -> Vectors:
        """Return the vectors that a mask or an index array selects."""
        other = None if self.other is None else self.other.where(places)
        return Vectors(self.rows[places], self.norms[places], other)


def group_components(forest: Edges, rank: Rank) -> Members:
    """Keep one row a component, the first in keep order."""
    row, group = components(forest)
    order = np.lexsort((row, group))
    row, group = row[order], group[order]
    starts = group_starts(group)
    first = np.lexsort((rank(row), group))[starts[:-1]]
    keeper = np.repeat(row[first], np.diff(starts))
    return Members(row, group, keeper, unknown_but_1(row == keeper), row != keeper)


def group_matches(matches: Edges, best: Best, threshold: float) -> Members:
    """Remove rows by SemDeDup's rule; the representative is the match, removed or not.

    ``matches`` are edges of `Best.edges`, whole groups of them.
    """
    row, group = components(matches)
    is_dup = best.similarity[row] > np.float32(threshold)
    representative = np.where(is_dup, best.match[row], row)
    return sort_members(Members(row, group, representative, unknown_but_1(~is_dup), is_dup))


def unknown_but_1(kept: np.ndarray) -> np.ndarray:
    """Return similarities: 1 for kept rows, NaN for removed ones, until they are computed."""
    return np.where(kept, np.float32(1), np.float32(np.nan))


def group_star(
    forest: Edges,
    rank: Rank,
    compare: Compare,
    done: Callable[[int], None],
    removed: np.ndarray | None = None,
) -> Members:
    """Apply the star rule to the groups of a forest over distinct rows (`members.Copies`).

    Parameters
    ----------
    done : function of int
        Called with how many edges of the forest are settled, for progress.
    removed : (n,) int64, optional
        Rows that a row outside removes, whatever these rows are to one another. Their
        representative is the nearest kept row, with similarity `NO_PAIR` where there is none.
    """
    row, group = components(forest)
    order = np.lexsort((rank(row), group))
    row, group = row[order], group[order]  # keep order inside each group
    starts = group_starts(group)
    representative, similarity = row.copy(), np.ones(len(row), np.float32)
    out = np.zeros(len(row), bool) if removed is None else np.isin(row, removed)
    open_ = (np.diff(starts) > 2) | np.logical_or.reduceat(out, starts[:-1]) if len(row) else out
    two = starts[:-1][~open_]
    representative[two + 1], similarity[two + 1] = row[two], np.nan
    done(len(two))

    def decide(places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if places.ndim == 2:
            return places, *star_packed(row[places], compare, out[places])
        if places.size <= FLOAT64_GROUP or compare.also is not None or out[places].any():
            return places, *star_large(row[places], compare, out[places])
        return places, *star_huge(row[places], compare.gather, compare.threshold)

    batches = list(star_batches(starts, open_))
    huge = [p.ndim == 1 and p.size > FLOAT64_GROUP for p in batches]  # on all threads, one by one
    alone, beside = (list(compress(batches, which)) for which in (huge, np.logical_not(huge)))
    beside.sort(key=lambda places: -places.size * places.shape[-1])  # so that threads end together
    # all of them wait at once: results are small, and one group may take as long as many others
    with closing(ordered_map(decide, beside, given_threads(), window=len(beside))) as others:
        for places, chosen, cosine in chain(map(decide, alone), others):
            representative[places], similarity[places] = chosen, cosine
            done(places.size - (len(places) if places.ndim == 2 else 1))
    is_dup = out | (representative != row)
    return sort_members(Members(row, group, representative, similarity, is_dup))


def star_batches(starts: np.ndarray, open_: np.ndarray) -> Iterator[np.ndarray]:
    """Yield places to compare together: (groups, size) for small groups, (size,) for large ones.

    ``starts``, (groups + 1,) int64, is where each group begins; ``open_``, (groups,) bool, which
    groups need a comparison.
    """
    sizes = np.diff(starts)
    for size in distinct(sizes[open_ & (sizes <= PACKED_GROUP)]):
        firsts = starts[:-1][open_ & (sizes == size)]
        step = max(1, PACKED_ROWS // int(size))
        for cut in range(0, len(firsts), step):
            yield firsts[cut : cut + step, None] + np.arange(size)
    for which in np.flatnonzero(open_ & (sizes > PACKED_GROUP)):
        yield np.arange(starts[which], starts[which + 1])


def greedy_kept(match: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Return which rows of groups are kept, (g, s) bool: those that pair with no kept row before.

    ``match``, (g, s, s) bool, are pairs in keep order; rows that are ``out``, (g, s), never stay.
    """
    kept = np.zeros(out.shape, bool)
    for place in range(out.shape[1]):
        covered = (match[:, place, :place] & kept[:, :place]).any(axis=1)
        kept[:, place] = ~out[:, place] & ~covered
    return kept


def star_packed(
    rows: np.ndarray, compare: Compare, out: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Decide many groups of one size: (g, s) rows in keep order, and which are removed anyhow.

    Returns the representatives, (g, s) int64, and the cosines with them, (g, s) float32.
    """
    groups = len(rows)
    vectors = compare.load(rows.ravel())
    cosine = compare.table(vectors, vectors, groups)
    kept = greedy_kept(cosine >= np.float32(compare.threshold), out)
    cosine[~np.broadcast_to(kept[:, None, :], cosine.shape)] = NO_PAIR
    best = cosine.max(axis=2)
    tied = np.where(cosine == best[:, :, None], rows[:, None, :], NO_ROW)
    representative = np.where(kept, rows, tied.min(axis=2))
    return representative, np.where(kept, np.float32(1), np.minimum(best, 1))


def star_large(
    rows: np.ndarray, compare: Compare, out: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Decide one large group, (n,) rows in keep order, block by block; ``out`` are removed anyhow.

    Rows are compared with kept rows only, so memory is that of the kept rows' features and the work
    is rows × kept rows. Returns what `star_packed` does, (n,).
    """
    blocks: list[Vectors] = []  # of kept rows
    kept = np.zeros(len(rows), bool)
    for start in range(0, len(rows), STAR_BLOCK):
        vectors = compare.load(rows[start : start + STAR_BLOCK])
        covered = out[start : start + STAR_BLOCK].copy()
        for block in blocks:
            open_ = np.flatnonzero(~covered)
            covered[open_] = compare.match(vectors.where(open_), block).any(axis=1)
        open_ = np.flatnonzero(~covered)
        while len(open_):  # a few at a time: what they cover needs no more comparison
            head, open_ = open_[:STAR_STEP], open_[STAR_STEP:]
            first = vectors.where(head)
            match = compare.match(first, first)
            kept[start + head] = greedy_kept(match[None], np.zeros((1, len(head)), bool))[0]
            last = vectors.where(head[kept[start + head]])
            open_ = open_[~compare.match(vectors.where(open_), last).any(axis=1)]
        its_kept = np.flatnonzero(kept[start : start + STAR_BLOCK])
        if len(its_kept):
            blocks.append(vectors.where(its_kept))
    return nearest_kept(rows, kept, blocks, compare, vectors if len(rows) <= STAR_BLOCK else None)


def nearest_kept(
    rows: np.ndarray, kept: np.ndarray, blocks: list[Vectors], compare: Compare,
    known: Vectors | None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Return for each row its nearest kept row (ties: the smaller) and their cosine.

    ``known`` are the vectors of the rows, where they need not be loaded again.
    """
    representative, similarity = rows.copy(), np.ones(len(rows), np.float32)
    ends = np.cumsum([len(block.norms) for block in blocks], dtype=np.int64)
    keepers = np.split(rows[kept], ends[:-1])[: len(blocks)]
    removed = np.flatnonzero(~kept)
    for start in range(0, len(removed), STAR_BLOCK):
        places = removed[start : start + STAR_BLOCK]
        vectors = compare.load(rows[places]) if known is None else known.where(places)
        best, chosen = np.full(len(places), NO_PAIR), np.full(len(places), NO_ROW)
        for block, names in zip(blocks, keepers, strict=True):
            cosine = compare.table(vectors, block)[0]
            top = cosine.max(axis=1)
            name = np.where(cosine == top[:, None], names, NO_ROW).min(axis=1)
            better = (top > best) | ((top == best) & (name < chosen))
            best[better], chosen[better] = top[better], name[better]
        representative[places], similarity[places] = chosen, np.minimum(best, 1)
    return representative, similarity


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
            used, back = np.unique(ends, return_inverse=True)
            yield self.gather(used), back[: stop - start], back[stop - start :]

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
    for start, stop in plan_blocks(len(removed), HUGE_BLOCK):
        places = removed[start:stop]
        found = [coded.candidates(places, kept[s:e]) for s, e in plan_blocks(len(kept), HUGE_BLOCK)]
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
    for start, stop in plan_blocks(len(rows), HUGE_BLOCK):
        at = order[start:stop]
        codes[at], falls[at] = projection.encode(gather(rows[at]))
    return CodedGroup(rows, gather, threshold, codes, falls, projection.limit(threshold))


def decide_kept(coded: CodedGroup) -> np.ndarray:
    """Return which rows are kept, (n,) bool: those that pair with no kept row before them."""
    is_kept = np.zeros(len(coded.rows), bool)
    for start, stop in plan_blocks(len(coded.rows), HUGE_BLOCK):
        block = np.arange(start, stop)
        covered = np.zeros(len(block), bool)
        kept = np.flatnonzero(is_kept)
        for s, e in plan_blocks(len(kept), HUGE_BLOCK):
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
    match = all_cosines(raw, raw) >= np.float32(threshold)
    return greedy_kept(match[None], np.zeros((1, len(raw)), bool))[0]


def nearest_candidates(
    coded: CodedGroup, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each place its nearest row among the pairs (x, y), ordered by place.

    The row, (n,) int64, of several the smallest; and their cosine, (n,) float32.
    """
    cosine = coded.cosines(x, y)
    order = np.lexsort((coded.rows[y], -cosine, x))
    first = order[np.unique(x[order], return_index=True)[1]]
    return coded.rows[y[first]], cosine[first]


def star_from_pairs(row: np.ndarray, group: np.ndarray, rank: np.ndarray, pairs: Edges) -> Members:
    """Apply the star rule to a list of pairs, where no features are at hand.

    The representative is the kept row, first in keep order, that pairs with the removed one.
    Members ``row`` ascend; ``group`` and ``rank`` are their groups and places in keep order;
    ``pairs`` are all pairs among them.
    """
    u, v = np.searchsorted(row, pairs.a), np.searchsorted(row, pairs.b)
    source, target = np.concatenate([u, v]), np.concatenate([v, u])
    by_source = np.argsort(source, kind="stable")
    target = target[by_source]
    starts = np.searchsorted(source[by_source], np.arange(len(row) + 1))
    chosen = np.full(len(row), -1)
    for place in np.argsort(rank, kind="stable"):
        if chosen[place] < 0:
            near = target[starts[place] : starts[place + 1]]
            chosen[near[chosen[near] < 0]] = place
            chosen[place] = place
    kept = chosen == np.arange(len(row))
    return sort_members(Members(row, group, row[chosen], unknown_but_1(kept), ~kept))
