"""Which rows are kept: by the star rule, or one row a component; and what reference rows remove.

Under the star rule a row is kept, in keep order, unless a kept row is its pair. Small groups are
decided many at a time and large ones in blocks, by tables of cosines; huge ones by
codes (`huge_star`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, compress
from typing import Any, NamedTuple

import numpy as np

from snipdedup import native
from snipdedup.features.cosine import pair_cosine, rescaled
from snipdedup.groups.huge_star import Gather, star_huge
from snipdedup.groups.members import (
    Best,
    Members,
    Nearest,
    Rank,
    concatenate,
    group_starts,
    sort_members,
)
from snipdedup.join.forest import Edges, components
from snipdedup.parallel import given_threads, ordered_map

STAR_BLOCK = 1024  # rows of a large group compared at once
PACKED_GROUP = 32  # groups up to this size are compared many at a time
FLOAT64_GROUP = 8192  # larger groups are compared by codes first
STAR_STEP = 64  # rows of a large group decided together
PACKED_ROWS = 1 << 12  # rows gathered for one batch of small groups
NO_PAIR = np.float32(-2)  # less than any cosine
NO_ROW = np.iinfo(np.int64).max


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
            other = native.cosine_tables(
                x.other.rows, y.other.rows, x.other.norms, y.other.norms, groups
            )
            cosine[other < np.float32(self.also.threshold)] = NO_PAIR
        return cosine


@dataclass(frozen=True)
class Vectors:
    """Vectors of rows as stored, with their squared norms; and other vectors of the same rows."""

    rows: np.ndarray  # (n, d)
    norms: np.ndarray  # (n,) float64
    other: Any = None  # Vectors, if pairs must match in them too

    @classmethod
    def of(cls, rows: np.ndarray, also: np.ndarray | None = None) -> Vectors:
        """Return vectors, float64 ones scaled so that their squares do not overflow."""
        rows = rescaled(rows)
        return cls(rows, native.square_norms(rows), None if also is None else cls.of(also))

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
    with closing(ordered_map(decide, beside, given_threads())) as others:
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
    for size in np.unique(sizes[open_ & (sizes <= PACKED_GROUP)]):
        firsts = starts[:-1][open_ & (sizes == size)]
        step = max(1, PACKED_ROWS // int(size))
        for cut in range(0, len(firsts), step):
            yield firsts[cut : cut + step, None] + np.arange(size)
    for which in np.flatnonzero(open_ & (sizes > PACKED_GROUP)):
        yield np.arange(starts[which], starts[which + 1])


def star_packed(
    rows: np.ndarray, compare: Compare, out: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Decide many groups of one size: (g, s) rows in keep order, and which are removed anyhow.

    Returns the representatives, (g, s) int64, and the cosines with them, (g, s) float32.
    """
    groups, size = rows.shape
    vectors = compare.load(rows.ravel())
    cosine = compare.table(vectors, vectors, groups)
    match = cosine >= np.float32(compare.threshold)
    kept = np.zeros((groups, size), bool)
    for place in range(size):
        covered = (match[:, place, :place] & kept[:, :place]).any(axis=1)
        kept[:, place] = ~out[:, place] & ~covered
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
    limit = np.float32(compare.threshold)
    blocks: list[Vectors] = []  # of kept rows
    kept = np.zeros(len(rows), bool)
    for start in range(0, len(rows), STAR_BLOCK):
        vectors = compare.load(rows[start : start + STAR_BLOCK])
        covered = out[start : start + STAR_BLOCK].copy()
        for block in blocks:
            open_ = np.flatnonzero(~covered)
            covered[open_] = (compare.table(vectors.where(open_), block)[0] >= limit).any(axis=1)
        open_ = np.flatnonzero(~covered)
        while len(open_):  # a few at a time: what they cover needs no more comparison
            head, open_ = open_[:STAR_STEP], open_[STAR_STEP:]
            first = vectors.where(head)
            match = compare.table(first, first)[0] >= limit
            for place in range(len(head)):
                kept[start + head[place]] = not match[place][kept[start + head]].any()
            last = vectors.where(head[kept[start + head]])
            covered = (compare.table(vectors.where(open_), last)[0] >= limit).any(axis=1)
            open_ = open_[~covered]
        part = kept[start : start + STAR_BLOCK]
        if part.any():
            blocks.append(vectors.where(np.flatnonzero(part)))
    return nearest_kept(rows, kept, blocks, compare)


def nearest_kept(
    rows: np.ndarray, kept: np.ndarray, blocks: list[Vectors], compare: Compare
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each row its nearest kept row (ties: the smaller) and their cosine."""
    representative, similarity = rows.copy(), np.ones(len(rows), np.float32)
    ends = np.cumsum([len(block.norms) for block in blocks], dtype=np.int64)
    keepers = np.split(rows[kept], ends[:-1])[: len(blocks)]
    removed = np.flatnonzero(~kept)
    for start in range(0, len(removed), STAR_BLOCK):
        places = removed[start : start + STAR_BLOCK]
        vectors = compare.load(rows[places])
        best, chosen = np.full(len(places), NO_PAIR), np.full(len(places), NO_ROW)
        for block, names in zip(blocks, keepers, strict=True):
            cosine = compare.table(vectors, block)[0]
            top = cosine.max(axis=1)
            name = np.where(cosine == top[:, None], names, NO_ROW).min(axis=1)
            better = (top > best) | ((top == best) & (name < chosen))
            best[better], chosen[better] = top[better], name[better]
        representative[places], similarity[places] = chosen, np.minimum(best, 1)
    return representative, similarity


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


def refer_star(members: Members, nearest: Nearest) -> Members:
    """Remove rows that match a reference row because of it, where no kept row is nearer.

    A representative r < 0 is the reference row ~r.
    """
    members, at = with_lone(members, nearest)
    closer = nearest.similarity >= members.similarity[at]  # reference rows come before others
    members.representative[at[closer]] = ~nearest.reference[closer]
    members.similarity[at[closer]] = nearest.similarity[closer]
    return sort_members(members)


def refer_components(members: Members, nearest: Nearest) -> Members:
    """Remove all rows of a group that a reference row is chained to.

    The representative is the reference row that a row matches, else the first one of its group.
    """
    members, at = with_lone(members, nearest)
    group, place = np.unique(members.group[at], return_inverse=True)
    first = np.full(len(group), NO_ROW)
    np.minimum.at(first, place, nearest.reference)
    chained = np.flatnonzero(np.isin(members.group, group))
    members.representative[chained] = ~first[np.searchsorted(group, members.group[chained])]
    members.similarity[chained] = np.nan
    members.is_dup[chained] = True
    members.representative[at] = ~nearest.reference
    members.similarity[at] = nearest.similarity
    return sort_members(members)


def with_lone(members: Members, nearest: Nearest) -> tuple[Members, np.ndarray]:
    """Return members and rows that match a reference row only, and where the latter all are."""
    lone = nearest.row[~np.isin(nearest.row, members.row)]
    unknown = np.full(len(lone), NO_PAIR)
    members = concatenate(members, Members(lone, lone, lone, unknown, np.ones(len(lone), bool)))
    order = np.argsort(members.row)
    return members, order[np.searchsorted(members.row, nearest.row, sorter=order)]
