"""Who stays: the rows of a group in keep order, by the star rule or one row a component."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import chain, compress
from typing import NamedTuple

import numpy as np

from snipdedup.features.cosine import pair_cosine, row_sums, unit_rows64, unsettled
from snipdedup.groups.huge_star import Gather, star_huge
from snipdedup.join.forest import Edges, components, make_edges, order_by
from snipdedup.parallel import ordered_map

Rank = Callable[[np.ndarray], np.ndarray]

STAR_BLOCK = 1024  # rows of a large group compared at once
PACKED_GROUP = 32  # groups up to this size are compared many at a time
FLOAT64_GROUP = 8192  # larger groups are compared by codes first
STAR_STEP = 64  # of them decided together
PACKED_ROWS = 1 << 12  # rows gathered for one such batch
NO_PAIR = np.float32(-2)  # less than any cosine
NO_COSINE = 1e-5  # cosines nearer to 0 are rounded as the processor adds them up; none is a pair


class Members(NamedTuple):
    """The rows of groups of two or more, ordered by group, then row.

    Attributes
    ----------
    row, group : (n,) int64
        A row, and the smallest row of its group.
    representative : (n,) int64
        For a removed row the staying row that stands for it; else the row itself.
    similarity : (n,) float32
        Cosine with the representative, 1 for the row itself. While rows are chosen, what rules
        compare by, often NaN: a result's are computed once all is decided.
    is_dup : (n,) bool
        True: the row is removed.
    """

    row: np.ndarray
    group: np.ndarray
    representative: np.ndarray
    similarity: np.ndarray
    is_dup: np.ndarray


def no_members() -> Members:
    """Return no rows."""
    return Members(*(np.empty(0, kind) for kind in (*[np.int64] * 3, np.float32, bool)))


class Nearest(NamedTuple):
    """The nearest reference row of each row that matches one, ordered by row.

    Attributes
    ----------
    row, reference : (n,) int64
        A distinct row, and the number of the reference row; of equally near ones the first.
    similarity : (n,) float32
    """

    row: np.ndarray
    reference: np.ndarray
    similarity: np.ndarray

    def at(self, threshold: float) -> Nearest:
        """Return those with a cosine of float32(threshold) or more."""
        near = self.similarity >= np.float32(threshold)
        return Nearest(self.row[near], self.reference[near], self.similarity[near])


class Best(NamedTuple):
    """What SemDeDup's rule looks at, one entry a row.

    Attributes
    ----------
    cluster : (rows,) int32
        -1 for rows that cannot be compared.
    nearness : (rows,) float32
        Cosine with the cluster's centroid.
    match : (rows,) int64
        The nearest earlier row of the cluster, which may itself be removed; -1 without one.
    similarity : (rows,) float32
        Their cosine; NaN without one.
    centroids : (clusters, d) float32
        Of norm 1.
    """

    cluster: np.ndarray
    nearness: np.ndarray
    match: np.ndarray
    similarity: np.ndarray
    centroids: np.ndarray

    def removed(self, threshold: float) -> np.ndarray:
        """Return which rows go, (rows,) bool: those above 1 - epsilon; NaN never is."""
        return np.asarray(self.similarity > np.float32(threshold))

    def edges(self, threshold: float) -> Edges:
        """Return the pairs of removed rows and their matches: a forest."""
        row = np.flatnonzero(self.removed(threshold))
        return make_edges(row, self.match[row], self.similarity[row])


def keep_rank(rows: np.ndarray, keep: str, seed: int) -> np.ndarray:
    """Return the place of each row in keep order, (n,) uint64; the smallest stays.

    ``random`` is a hash of seed and row (splitmix64), the same wherever the row is met. It is a
    bijection, so no two rows tie.
    """
    rank = rows.astype(np.uint64)
    if keep == "last":
        return ~rank
    if keep == "random":
        with np.errstate(over="ignore"):
            rank += np.uint64(seed) * np.uint64(0xD1342543DE82EF95)
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                rank = (rank ^ (rank >> np.uint64(shift))) * np.uint64(factor)
            rank ^= rank >> np.uint64(31)
    return rank


def group_components(forest: Edges, rank: Rank) -> Members:
    """Let one row a component stay, the first in keep order."""
    row, group = components(forest)
    order = np.lexsort((row, group))
    row, group = row[order], group[order]
    starts = group_starts(group)
    first = np.lexsort((rank(row), group))[starts[:-1]]
    keeper = np.repeat(row[first], np.diff(starts))
    is_dup = row != keeper
    similarity = np.where(is_dup, np.float32(np.nan), np.float32(1))
    return Members(row, group, keeper, similarity, is_dup)


def group_matches(matches: Edges, best: Best, threshold: float) -> Members:
    """Let rows go by SemDeDup's rule; the representative is the match, removed or not.

    ``matches`` are edges of `Best.edges`, whole groups of them.
    """
    row, group = components(matches)
    is_dup = best.similarity[row] > np.float32(threshold)
    representative = np.where(is_dup, best.match[row], row)
    similarity = np.where(is_dup, np.float32(np.nan), np.float32(1))
    return ordered(Members(row, group, representative, similarity, is_dup))


def group_starts(group: np.ndarray) -> np.ndarray:
    """Return where each group of a sorted label array begins, and its length at the end."""
    if not len(group):
        return np.zeros(1, np.int64)
    cuts = np.flatnonzero(np.diff(group)) + 1
    return np.concatenate([[0], cuts, [len(group)]]).astype(np.int64)


class Also(NamedTuple):
    """What a pair must besides: a cosine of other vectors of the same rows (their captions').

    Attributes
    ----------
    gather : function of (n,) int64 rows
        Returns those rows' other vectors, (n, dim).
    threshold : float
    dim : int
    """

    gather: Gather
    threshold: float
    dim: int

    def holds(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return for which of the rows a, b it holds, (n,) bool."""
        parts = [np.empty(0, bool)]
        for start in range(0, len(a), PACKED_ROWS):
            rows = np.stack([a[start : start + PACKED_ROWS], b[start : start + PACKED_ROWS]])
            x, y = (self.gather(side) for side in rows)
            parts.append(pair_cosine(x, y) >= np.float32(self.threshold))
        return np.concatenate(parts)


class Compare(NamedTuple):
    """How the rows of a group are compared.

    Attributes
    ----------
    gather : function of (n,) int64 rows
        Returns those rows' features, (n, d).
    threshold : float
        Cosine from which two rows are a pair.
    also : Also, optional
    """

    gather: Gather
    threshold: float
    also: Also | None = None

    def load(self, rows: np.ndarray) -> np.ndarray:
        """Return what `table` compares of rows: float64 unit rows, of ``also`` beside them."""
        unit = unit_rows64(self.gather(rows))
        if self.also is None:
            return unit
        return np.concatenate([unit, unit_rows64(self.also.gather(rows))], axis=1)

    def table(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return cosines, (..., m, n) float32; `NO_PAIR` where ``also`` does not hold."""
        if self.also is None:
            return products(x, y)
        cut = x.shape[-1] - self.also.dim
        cosine = products(x[..., :cut], y[..., :cut])
        other = products(x[..., cut:], y[..., cut:])
        cosine[other < np.float32(self.also.threshold)] = NO_PAIR
        return cosine


def group_star(
    forest: Edges,
    rank: Rank,
    compare: Compare,
    done: Callable[[int], None],
    gone: np.ndarray | None = None,
) -> Members:
    """Let a row stay unless a row that already stays forms a pair with it, in keep order.

    Exact copies are not among these rows: `Copies` folds them away before and back after.

    Parameters
    ----------
    forest : Edges
        Over distinct rows; defines the groups.
    rank : function of (n,) int64 rows
        Place in keep order, smaller first.
    compare : Compare
    done : function of int
        Told how many edges of the forest are settled, for progress: the rows of groups, less one
        for each group.
    gone : (g,) int64, optional
        Rows that go whatever these rows are to one another: a row outside matches them. Their
        representative is the nearest staying row, with `NO_PAIR` where there is none.
    """
    row, group = components(forest)
    order = np.lexsort((rank(row), group))
    row, group = row[order], group[order]  # keep order inside each group
    starts = group_starts(group)
    representative, similarity = row.copy(), np.ones(len(row), np.float32)
    out = np.zeros(len(row), bool) if gone is None else np.isin(row, gone)
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
    with closing(ordered_map(decide, beside, torch_threads())) as others:
        for places, chosen, cosine in chain(map(decide, alone), others):
            representative[places], similarity[places] = chosen, cosine
            done(places.size - (len(places) if places.ndim == 2 else 1))
    return ordered(Members(row, group, representative, similarity, out | (representative != row)))


def torch_threads() -> int:
    """Return how many threads torch has been given."""
    import torch

    return torch.get_num_threads()


def star_batches(starts: np.ndarray, open_: np.ndarray) -> Iterator[np.ndarray]:
    """Yield places to compare together: (groups, size) for small groups, (size,) for large ones.

    Parameters
    ----------
    starts : (groups + 1,) int64
        Where each group begins.
    open_ : (groups,) bool
        Which groups need a comparison; others are left out.
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
    """Decide many groups of one size: (g, s) rows in keep order, and which of them go anyhow.

    Returns
    -------
    representative : (g, s) int64
    similarity : (g, s) float32
    """
    groups, size = rows.shape
    unit = compare.load(rows.ravel()).reshape(groups, size, -1)
    cosine = compare.table(unit, unit)
    match = cosine >= np.float32(compare.threshold)
    stays = np.zeros((groups, size), bool)
    for place in range(size):
        covered = (match[:, place, :place] & stays[:, :place]).any(axis=1)
        stays[:, place] = ~out[:, place] & ~covered
    cosine[~np.broadcast_to(stays[:, None, :], cosine.shape)] = NO_PAIR
    best = cosine.max(axis=2)
    tied = np.where(cosine == best[:, :, None], rows[:, None, :], np.iinfo(np.int64).max)
    representative = np.where(stays, rows, tied.min(axis=2))
    return representative, np.where(stays, np.float32(1), np.minimum(best, 1))


def products(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the cosines of float64 unit rows, (..., m, n) float32, on the threads torch has.

    The same on every processor, but for those below `NO_COSINE` in size.
    """
    import torch

    quick = (torch.from_numpy(x) @ torch.from_numpy(y).mT).numpy()
    cosine = quick.astype(np.float32)
    again = unsettled(quick, x.shape[-1])
    again &= np.abs(quick) > NO_COSINE
    *group, i, j = np.nonzero(again)
    cosine[again] = row_sums(x[*group, i] * y[*group, j])
    return np.asarray(cosine)


def star_large(
    rows: np.ndarray, compare: Compare, out: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Decide one large group, (n,) rows in keep order, block by block; ``out`` go anyhow.

    Rows are compared with the rows that stay only, so memory is that of the staying rows' features
    and the work is rows × staying rows.
    """
    limit = np.float32(compare.threshold)
    kept: list[np.ndarray] = []
    stays = np.zeros(len(rows), bool)
    for start in range(0, len(rows), STAR_BLOCK):
        unit = compare.load(rows[start : start + STAR_BLOCK])
        covered = out[start : start + STAR_BLOCK].copy()
        for block in kept:
            open_ = np.flatnonzero(~covered)
            covered[open_] = (compare.table(unit[open_], block) >= limit).any(axis=1)
        open_ = np.flatnonzero(~covered)
        while len(open_):  # a few at a time: what they cover needs no more comparison
            head, open_ = open_[:STAR_STEP], open_[STAR_STEP:]
            match = compare.table(unit[head], unit[head]) >= limit
            for place in range(len(head)):
                stays[start + head[place]] = not match[place][stays[start + head]].any()
            last = unit[head[stays[start + head]]]
            open_ = open_[~(compare.table(unit[open_], last) >= limit).any(axis=1)]
        if stays[start : start + len(unit)].any():
            kept.append(unit[stays[start : start + len(unit)]])
    return nearest_staying(rows, stays, kept, compare)


def nearest_staying(
    rows: np.ndarray, stays: np.ndarray, kept: list[np.ndarray], compare: Compare
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each row its nearest staying row (ties: the smaller) and their cosine."""
    representative, similarity = rows.copy(), np.ones(len(rows), np.float32)
    ends = np.cumsum([len(block) for block in kept], dtype=np.int64)
    keepers = np.split(rows[stays], ends[:-1])[: len(kept)]
    removed = np.flatnonzero(~stays)
    for start in range(0, len(removed), STAR_BLOCK):
        places = removed[start : start + STAR_BLOCK]
        unit = compare.load(rows[places])
        best = np.full(len(places), NO_PAIR)
        chosen = np.full(len(places), np.iinfo(np.int64).max)
        for block, names in zip(kept, keepers, strict=True):
            cosine = compare.table(unit, block)
            top = cosine.max(axis=1)
            name = np.where(cosine == top[:, None], names, np.iinfo(np.int64).max).min(axis=1)
            better = (top > best) | ((top == best) & (name < chosen))
            best[better], chosen[better] = top[better], name[better]
        representative[places], similarity[places] = chosen, np.minimum(best, 1)
    return representative, similarity


def refer_star(members: Members, nearest: Nearest) -> Members:
    """Let rows that match a reference row go for it, where no staying row is nearer.

    A representative r < 0 is the reference row ~r.
    """
    members, at = with_lone(members, nearest)
    closer = nearest.similarity >= members.similarity[at]  # reference rows come before others
    members.representative[at[closer]] = ~nearest.reference[closer]
    members.similarity[at[closer]] = nearest.similarity[closer]
    return ordered(members)


def refer_components(members: Members, nearest: Nearest) -> Members:
    """Let all rows of a group go that a reference row is chained to.

    A row goes for the reference row that it matches, else for the first one of its group.
    """
    members, at = with_lone(members, nearest)
    group, place = np.unique(members.group[at], return_inverse=True)
    first = np.full(len(group), np.iinfo(np.int64).max)
    np.minimum.at(first, place, nearest.reference)
    chained = np.flatnonzero(np.isin(members.group, group))
    members.representative[chained] = ~first[np.searchsorted(group, members.group[chained])]
    members.similarity[chained] = np.nan
    members.is_dup[chained] = True
    members.representative[at] = ~nearest.reference
    members.similarity[at] = nearest.similarity
    return ordered(members)


def with_lone(members: Members, nearest: Nearest) -> tuple[Members, np.ndarray]:
    """Return members and rows that match a reference row only, and where the latter all are."""
    lone = nearest.row[~np.isin(nearest.row, members.row)]
    unknown = np.full(len(lone), NO_PAIR)
    members = concatenate(members, Members(lone, lone, lone, unknown, np.ones(len(lone), bool)))
    order = np.argsort(members.row)
    return members, order[np.searchsorted(members.row, nearest.row, sorter=order)]


def star_from_pairs(row: np.ndarray, group: np.ndarray, rank: np.ndarray, pairs: Edges) -> Members:
    """The star rule on a given list of pairs, where no features are at hand.

    The representative is the staying row, first in keep order, that pairs with the removed one;
    similarities are NaN for removed rows.

    Parameters
    ----------
    row, group : (n,) int64
        Members in ascending row order, and the label of each one's group.
    rank : (n,) uint64
        Place of each member in keep order.
    pairs : Edges
        All pairs among the members.
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
    similarity = np.where(is_dup, np.float32(np.nan), np.float32(1))
    return ordered(Members(row, group, row[chosen], similarity, is_dup))


class Copies:
    """Classes of rows that are equal bit for bit, each with the row that comes first in keep order.

    Attributes
    ----------
    first, keeper : (classes,) int64
        Of each class its smallest row, ascending, and its first row in keep order.
    row, row_keeper : (n,) int64
        All other rows of the classes, and the keeper of each one's class.
    """

    def __init__(self, copies: np.ndarray, firsts: np.ndarray, rank: Rank) -> None:
        self.first = np.unique(firsts)
        row = np.concatenate([self.first, copies])
        label = np.concatenate([self.first, firsts])
        order = np.lexsort((rank(row), label))
        row, label = row[order], label[order]
        starts = group_starts(label)
        self.keeper = row[starts[:-1]]
        keeper = np.repeat(self.keeper, np.diff(starts))
        self.row, self.row_keeper = row[row != keeper], keeper[row != keeper]

    def fold(self, forest: Edges) -> Edges:
        """Return edges over first rows as edges over keepers."""
        return make_edges(self._keeper_of(forest.a), self._keeper_of(forest.b), forest.similarity)

    def fold_nearest(self, nearest: Nearest) -> Nearest:
        """Return nearest reference rows of first rows as those of keepers."""
        row = self._keeper_of(nearest.row)
        order = np.argsort(row)
        return Nearest(row[order], nearest.reference[order], nearest.similarity[order])

    def _keeper_of(self, rows: np.ndarray) -> np.ndarray:
        if not len(self.first):
            return rows
        place = np.minimum(np.searchsorted(self.first, rows), len(self.first) - 1)
        return np.where(self.first[place] == rows, self.keeper[place], rows)

    def unfold(self, members: Members) -> Members:
        """Add the folded rows: a copy goes, for its keeper or for what its keeper goes for."""
        rows = np.append(np.sort(members.row), np.iinfo(np.int64).max)
        lone = self.keeper[rows[np.searchsorted(rows, self.keeper)] != self.keeper]
        ones = np.ones(len(lone), np.float32)
        keepers = concatenate(members, Members(lone, lone, lone, ones, np.zeros(len(lone), bool)))
        by_row = np.argsort(keepers.row)
        at = by_row[np.searchsorted(keepers.row, self.row_keeper, sorter=by_row)]
        copies = Members(
            self.row,
            keepers.group[at],
            keepers.representative[at],
            keepers.similarity[at],
            np.ones(len(at), bool),
        )
        return relabel(concatenate(keepers, copies))


def concatenate(*parts: Members) -> Members:
    """Return the rows of several lists of members as one list."""
    return Members(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def ordered(members: Members) -> Members:
    """Return members ordered by group, then row."""
    order = order_by(members.group, members.row)
    return Members(*(column[order] for column in members))


def relabel(members: Members) -> Members:
    """Give each group its smallest row as label, and order by group, then row."""
    members = ordered(members)
    starts = group_starts(members.group)
    smallest = np.repeat(members.row[starts[:-1]], np.diff(starts))
    return ordered(members._replace(group=smallest))
