"""Which rows are kept: by the star rule, by one row a component, or by SemDeDup's rule.

Under the star rule a row is kept, in keep order, unless a kept row is its pair. The pairs of small
groups are listed, many groups at a time. Of a large group each block of rows is compared with the
rows that are kept so far, by tables of cosines. In a huge one that would cost rows × kept rows ×
width: int8 codes that bound the cosine rule out nearly all of these comparisons, and raw rows prove
the rest. So groups of hundreds of thousands of rows (long chains of similar pictures) are decided
exactly, in memory for their codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain
from typing import NamedTuple

import numpy as np

from snipdedup import native
from snipdedup.features.cosine import all_cosines
from snipdedup.features.shards import plan_blocks
from snipdedup.groups import pairs
from snipdedup.groups.members import (
    NO_PAIR,
    NO_ROW,
    Best,
    Members,
    Rank,
    group_starts,
    sort_members,
)
from snipdedup.groups.pairs import Also, Gather
from snipdedup.join.forest import Edges, components
from snipdedup.join.projection import WIDTHS, fit_projection
from snipdedup.parallel import given_threads, ordered_map

TABLE_GROUP = 8192  # larger groups are compared by codes first
TABLE_BLOCK = 256  # rows of a large group decided at a time
CROWDED = 1 / 8  # share of a block's pairs from which a table of all cosines is cheaper
CODED_BLOCK = 2048  # rows of a huge group decided, or kept rows compared with, at a time
FIT_ROWS = 1 << 14  # rows of a huge group that its projection is fitted to

# Pairs as two (m,) int64 arrays of places in a group's keep order, and their (m,) float32 cosines.
Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]
Match = Callable[[np.ndarray, np.ndarray], Pairs]  # of some places with some other places


class Compare(NamedTuple):
    """How the rows of a group are compared."""

    gather: Gather  # (n,) int64 rows to their features, (n, d)
    threshold: float
    also: Sequence[Also] = ()
    named: bool = True  # False: `NO_ROW` stands for all representatives of removed rows

    def verify(self, rows: np.ndarray, x: np.ndarray, y: np.ndarray) -> Pairs:
        """Return those of the pairs of places x, y in ``rows`` that match."""
        cosine = pairs.pair_cosines(self.gather, rows[x], rows[y])
        close = cosine >= np.float32(self.threshold)
        x, y, cosine = x[close], y[close], cosine[close]
        if self.also:
            holds = pairs.all_hold(self.also, rows[x], rows[y])
            x, y, cosine = x[holds], y[holds], cosine[holds]
        return x, y, cosine


def join_pairs(parts: list[Pairs]) -> Pairs:
    """Return several lists of pairs as one."""
    none = np.empty(0, np.int64)
    columns = zip((none, none, np.empty(0, np.float32)), *parts, strict=True)
    x, y, cosine = map(np.concatenate, columns)
    return x, y, cosine


def group_components(forest: Edges, rank: Rank) -> Members:
    """Keep one row a component, the first in keep order."""
    row, group = components(forest)
    order = np.lexsort((row, group))
    row, group = row[order], group[order]
    starts = group_starts(group)
    first = np.lexsort((rank(row), group))[starts[:-1]]
    keeper = np.repeat(row[first], np.diff(starts))
    unknown = np.full(len(row), np.nan, np.float32)  # until it is computed
    return Members(row, group, keeper, unknown, row != keeper)


def group_matches(matches: Edges, best: Best, threshold: float) -> Members:
    """Remove rows by SemDeDup's rule; the representative is the match, removed or not.

    ``matches`` are edges of `Best.edges`, whole groups of them.
    """
    row, group = components(matches)
    is_dup = best.similarity[row] > np.float32(threshold)
    representative = np.where(is_dup, best.match[row], row)
    unknown = np.full(len(row), np.nan, np.float32)
    return sort_members(Members(row, group, representative, unknown, is_dup))


def group_star(
    forest: Edges,
    rank: Rank,
    compare: Compare,
    removed: np.ndarray | None = None,
    done: Callable[[int], None] = lambda edges: None,
    kept: np.ndarray | None = None,
) -> Members:
    """Apply the star rule to the groups of a forest over distinct rows (`members.Copies`).

    ``removed``, (n,) int64, are rows that a row outside removes, whatever these rows are to one
    another. Their representative is the nearest kept row that matches, or the row itself with
    `NO_PAIR`. ``kept``, (m,) int64, are rows that are kept, even where two of them match. ``done``
    takes how many edges of the forest are decided.
    """
    row, group = components(forest)
    order = np.lexsort((rank(row), group))
    row, group = row[order], group[order]  # keep order inside each group
    starts = group_starts(group)
    sizes = np.diff(starts)
    representative, similarity = row.copy(), np.ones(len(row), np.float32)
    none = np.empty(0, np.int64)
    out, stay = (np.isin(row, none if rows is None else rows) for rows in (removed, kept))
    given = out | stay
    compared = (sizes > 2) | np.logical_or.reduceat(given, starts[:-1]) if len(row) else given
    two = starts[:-1][~compared]
    representative[two + 1], similarity[two + 1] = row[two], np.nan
    done(len(two))
    small = compared & (sizes <= pairs.LISTED_GROUP)
    in_small = np.flatnonzero(np.repeat(small, sizes))
    listed = [in_small[begin:end] for begin, end, *_ in pairs.plan_groups(sizes[small])]
    large = [np.arange(starts[n], starts[n + 1]) for n in np.flatnonzero(compared & ~small)]

    def decide(places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows, sizes = row[places], np.diff(group_starts(group[places]))
        given = out[places], stay[places]
        if len(sizes) > 1 or sizes[0] <= pairs.LISTED_GROUP:
            return *star_listed(rows, sizes, compare, *given), places
        return *star_large(rows, compare, *given), places

    huge = [places for places in large if len(places) > TABLE_GROUP]  # one by one, on all threads
    others = [*(places for places in large if len(places) <= TABLE_GROUP), *listed]
    with closing(ordered_map(decide, others, given_threads())) as decided:
        for chosen, cosine, places in chain(map(decide, huge), decided):
            representative[places], similarity[places] = chosen, cosine
            done(len(places) - len(np.unique(group[places])))
    is_dup = out | (representative != row)
    return sort_members(Members(row, group, representative, similarity, is_dup))


def star_listed(
    rows: np.ndarray, sizes: np.ndarray, compare: Compare, out: np.ndarray, stay: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Decide small groups of some ``sizes``: (n,) rows, in keep order inside each group.

    Rows that are ``out``, (n,) bool, are removed anyhow; those that ``stay`` are kept. Returns the
    representatives, (n,) int64, and the cosines with them, (n,) float32.
    """
    x, y, cosine = compare.verify(rows, *pairs.listed_pairs(sizes))
    both = join_pairs([(x, y, cosine), (y, x, cosine)])
    free = ~out & ~stay
    free[both[0][stay[both[1]]]] = False
    kept = stay | greedy_kept(x, y, free)
    use = ~kept[both[0]] & kept[both[1]]
    return name_representatives(rows, kept, [tuple(column[use] for column in both)])


def star_large(
    rows: np.ndarray, compare: Compare, out: np.ndarray, stay: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Decide one group, (n,) rows in keep order, block by block; return what `star_listed` does.

    Rows are compared with kept rows only, so the work is rows × kept rows.
    """
    by_codes = len(rows) > TABLE_GROUP
    size, kept = CODED_BLOCK if by_codes else TABLE_BLOCK, stay.copy()
    match = match_by_codes(rows, compare) if by_codes else match_by_tables(rows, compare)

    def kept_parts() -> Iterator[np.ndarray]:
        places = np.flatnonzero(kept)
        yield from (places[start:stop] for start, stop in plan_blocks(len(places), CODED_BLOCK))

    def matches_of(places: np.ndarray) -> Pairs:
        found = join_pairs([match(places, part) for part in kept_parts()])
        unseen = np.setdiff1d(places[~out[places]], found[0])  # codes miss a pair hardly ever
        every = np.flatnonzero(kept)
        x, y = np.repeat(unseen, len(every)), np.tile(every, len(unseen))
        return join_pairs([found, compare.verify(rows, x, y)])

    for start, stop in plan_blocks(len(rows), size):
        left = np.flatnonzero(~(out | stay)[start:stop]) + start
        for part in kept_parts():
            left = left[~np.isin(left, match(left, part)[0])]
        near, new = match_by_tables(rows[left], compare), np.zeros(len(left), bool)
        for begin, end in plan_blocks(len(left), TABLE_BLOCK):
            some = np.arange(begin, end)
            some = some[~np.isin(some, near(some, np.flatnonzero(new))[0])]
            x, y, _ = near(some, some)
            first, second = np.searchsorted(some, x[x < y]), np.searchsorted(some, y[x < y])
            new[some] = greedy_kept(first, second, np.ones(len(some), bool))
        kept[left] = new
    if not compare.named:
        return np.where(kept, rows, NO_ROW), np.where(kept, np.float32(1), NO_PAIR)
    removed = np.flatnonzero(~kept)
    blocks = (removed[start:stop] for start, stop in plan_blocks(len(removed), size))
    return name_representatives(rows, kept, map(matches_of, blocks))


def match_by_tables(rows: np.ndarray, compare: Compare) -> Match:
    """Return a function that finds the pairs of a group by tables of cosines."""
    held = [gather(rows) for gather in (compare.gather, *(one.gather for one in compare.also))]

    def match(x: np.ndarray, y: np.ndarray) -> Pairs:
        i, j, cosine = table_pairs(compare, [raw[x] for raw in held], [raw[y] for raw in held])
        return x[i], y[j], cosine

    return match


def table_pairs(compare: Compare, left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> Pairs:
    """Return the pairs of two sides, places in them; sides are of FEATURES and each of ``also``."""
    limits = np.array([compare.threshold, *(one.threshold for one in compare.also)], np.float32)
    table = all_cosines(left[0], right[0])
    close = table >= limits[0]
    for x, y, limit in zip(left[1:], right[1:], limits[1:], strict=True):
        if close.any():
            close &= all_cosines(x, y) >= limit
    i, j = np.nonzero(close)
    return i, j, table[i, j]


def match_by_codes(rows: np.ndarray, compare: Compare) -> Match:
    """Return a function that finds the pairs of a group by codes that raw rows verify.

    Where codes rule out few pairs, all of a block are compared by tables.
    """
    gathers = [compare.gather, *(one.gather for one in compare.also)]
    sample = np.sort(rows[:: -(-len(rows) // FIT_ROWS)])
    projection = fit_projection(compare.gather(sample), WIDTHS[-1], 0)
    codes = np.empty((len(rows), projection.width), np.int8)
    falls = np.empty(len(rows), np.int32)  # by how much each row's limit falls
    order = np.argsort(rows)  # rows are read in their order
    for start, stop in plan_blocks(len(rows), CODED_BLOCK):
        at = order[start:stop]
        codes[at], falls[at] = projection.encode(compare.gather(rows[at]))
    limit = projection.limit(compare.threshold)

    def match(x: np.ndarray, y: np.ndarray) -> Pairs:
        i, j = native.hits(codes[x], native.columns(codes[y], falls[y]), limit - falls[x])
        if len(i) <= CROWDED * len(x) * len(y):
            return compare.verify(rows, x[i], y[j])
        sides = ([gather(rows[side]) for gather in gathers] for side in (x, y))
        i, j, cosine = table_pairs(compare, *sides)
        return x[i], y[j], cosine

    return match


def greedy_kept(first: np.ndarray, second: np.ndarray, undecided: np.ndarray) -> np.ndarray:
    """Return which places are kept, (n,) bool: those that pair with no kept place before them.

    Pairs (first < second) are places in keep order. Each round keeps all places before which no
    undecided one is their pair. Only ``undecided`` places, (n,) bool, may be kept.
    """
    kept, undecided = np.zeros(len(undecided), bool), undecided.copy()
    while undecided.any():
        live = undecided[first] & undecided[second]
        first, second = first[live], second[live]
        new = undecided.copy()
        new[second] = False
        kept |= new
        undecided &= ~new
        undecided[second[new[first]]] = False
    return kept


def name_representatives(
    rows: np.ndarray, kept: np.ndarray, parts: Iterable[Pairs]
) -> tuple[np.ndarray, np.ndarray]:
    """Return what `star_listed` does; each part has all matches y of some removed rows x.

    Of several equally near kept rows the smallest is the representative.
    """
    representative, similarity = rows.copy(), np.where(kept, np.float32(1), NO_PAIR)
    for x, y, cosine in parts:
        order = np.lexsort((rows[y], -cosine, x))
        best = order[np.unique(x[order], return_index=True)[1]]
        representative[x[best]] = rows[y[best]]
        similarity[x[best]] = np.minimum(cosine[best], 1)
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
    is_dup = chosen != np.arange(len(row))
    unknown = np.full(len(row), np.nan, np.float32)
    return sort_members(Members(row, group, row[chosen], unknown, is_dup))
