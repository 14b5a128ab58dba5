"""Groups as arrays: their rows, what a search knows of these, and which of them are removed.

Few enough rows are decided together. Of more, the group of each row is found first, in four bytes
a row; edges, copies and all else then wait in files, sorted by group, and come as blocks of whole
groups. So a decision needs no more memory than a block, or the largest group. Exact copies are
folded into one row a class before a rule decides, and unfolded after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from snipdedup.features.shards import plan_blocks
from snipdedup.join.forest import (
    BLOCK_EDGES,
    Edges,
    UnionFind,
    join_edges,
    make_edges,
    order_by,
)
from snipdedup.storage import external_sort
from snipdedup.storage.external_sort import Columns, Sorter, Spread, distinct, pack, row_kind

Rank = Callable[[np.ndarray], np.ndarray]  # (n,) int64 rows to (n,) uint64 places in keep order
NO_PAIR, NO_ROW = np.float32(-2), np.iinfo(np.int64).max  # less than any cosine; past all rows
EDGE, COPY, NEAREST, PAIR = range(4)  # what a record in a file is
KINDS = {
    "row": "<i8", "group": "<i8", "representative": "<i8", "similarity": "<f4", "is_dup": "?",
}  # fmt: skip


class Members(NamedTuple):
    """The rows of groups of two or more, ordered by group, then row.

    While rows are chosen, ``similarity`` holds what rules compare by, often NaN; a result's are
    computed once all is decided.
    """

    row: np.ndarray  # (n,) int64
    group: np.ndarray  # (n,) int64: the smallest row of its group
    representative: np.ndarray  # (n,) int64: the row that a removed row duplicates; else itself
    similarity: np.ndarray  # (n,) float32: cosine with the representative, 1 for the row itself
    is_dup: np.ndarray  # (n,) bool: removed


class Nearest(NamedTuple):
    """The nearest reference row of each row that matches one, ordered by row."""

    row: np.ndarray  # (n,) int64, distinct
    reference: np.ndarray  # (n,) int64: number of the reference row, of equally near ones the first
    similarity: np.ndarray  # (n,) float32

    def at(self, threshold: float) -> Nearest:
        """Return those with a cosine of float32(threshold) or more."""
        near = self.similarity >= np.float32(threshold)
        return Nearest(self.row[near], self.reference[near], self.similarity[near])


class Best(NamedTuple):
    """What SemDeDup's rule looks at, one entry a row."""

    cluster: np.ndarray  # (rows,) int32; -1 for rows that cannot be compared
    nearness: np.ndarray  # (rows,) float32: cosine with the cluster's centroid
    match: np.ndarray  # (rows,) int64: the nearest earlier row of the cluster, or -1
    similarity: np.ndarray  # (rows,) float32: their cosine; NaN without a match
    centroids: np.ndarray  # (clusters, d) float32, of norm 1

    def removed(self, threshold: float) -> np.ndarray:
        """Return which rows are removed, (rows,) bool: those above 1 - epsilon; NaN never is."""
        return np.asarray(self.similarity > np.float32(threshold))

    def edges(self, threshold: float) -> Edges:
        """Return the pairs of removed rows and their matches: a forest."""
        row = np.flatnonzero(self.removed(threshold))
        return make_edges(row, self.match[row], self.similarity[row])


class Block(NamedTuple):
    """Whole groups, and what is known of their rows; all groups together are a block too."""

    forest: Edges  # over distinct rows
    copies: np.ndarray  # (c,) int64, ascending: rows that equal an earlier row bit for bit
    originals: np.ndarray  # (c,) int64: the first row that each one equals
    nearest: Nearest | None = None  # of each distinct row that matches a reference row
    pairs: Edges | None = None  # all pairs, where they could not be verified

    def at(self, threshold: float) -> Block:
        """Return the edges and nearest rows with a cosine of float32(threshold) or more."""
        nearest = None if self.nearest is None else self.nearest.at(threshold)
        return self._replace(forest=self.forest.at(threshold), nearest=nearest)

    def of(self, rows: np.ndarray) -> Block:
        """Return what it holds of whole groups: of ascending ``rows``, (n,) int64."""
        copied, near = np.isin(self.copies, rows), self.nearest
        if near is not None:
            near = Nearest(*(column[np.isin(near.row, rows)] for column in near))
        forest = self.forest.where(np.isin(self.forest.a, rows))
        return Block(forest, self.copies[copied], self.originals[copied], near)

    def lists(self) -> dict[int, Edges]:
        """Return what it holds as edges, by what they are; those of `NEAREST` go to references."""
        ones = np.broadcast_to(np.float32(1), len(self.copies))
        lists = {EDGE: self.forest, COPY: Edges(self.originals, self.copies, ones)}
        if self.nearest is not None:
            lists[NEAREST] = Edges(*self.nearest)
        if self.pairs is not None:
            lists[PAIR] = self.pairs
        return lists

    def whole_forest(self) -> Edges:
        """Return the forest with exact copies, ordered by (a, b)."""
        edges = join_edges([self.lists()[what] for what in (EDGE, COPY)])
        return edges.where(order_by(edges.a, edges.b))

    def parts(self, threshold: float) -> Iterator[tuple[int, Edges]]:
        """Yield what it holds as edges, some at a time, each part with what these are."""
        for what, edges in self.lists().items():
            for start, stop in plan_blocks(len(edges.a), BLOCK_EDGES):
                yield what, edges.where(slice(start, stop)).at(threshold)

    def size(self) -> int:
        """Return how many edges, copies and other entries it holds."""
        return sum(len(edges.a) for edges in self.lists().values())


def blocks_of_groups(
    known: Block, threshold: float, rows: int, folder: Path | None
) -> Iterator[Block]:
    """Yield whole groups at a threshold, by their smallest rows ascending.

    ``known`` are all groups, at a threshold no higher; ``rows`` is how many the set has. What does
    not fit into memory goes to ``folder``; without one, all is one block.
    """
    if folder is None or known.size() <= external_sort.HELD:
        yield known.at(threshold)
        return
    row, other = row_kind(rows), "<i8" if known.nearest is not None else row_kind(rows)
    fields = {"label": row, "what": "u1", "a": row, "b": other, "similarity": "<f4"}

    def labelled() -> Iterator[tuple[np.ndarray, ...]]:
        sets = UnionFind(rows)
        for what, part in known.parts(threshold):
            if what in (EDGE, COPY):
                sets.unite(part.a, part.b)
        labels = sets.labels()  # the smallest row of each row's group
        for what, part in known.parts(threshold):
            yield labels[part.a], np.full(len(part.a), what, np.uint8), *part

    for records in in_row_order(labelled(), fields, known.size(), rows, folder / "groups"):
        yield block_of(records, known)


def block_of(records: np.ndarray, known: Block) -> Block:
    """Return records of a file as a block, ordered as all of it is."""

    def some(what: int, by: str) -> Edges:
        part = records[records["what"] == what]
        part = part[np.argsort(part[by], kind="stable")]
        a, b = (part[name].astype(np.int64) for name in ("a", "b"))
        return Edges(a, b, part["similarity"].astype(np.float32))

    edges, copies = some(EDGE, "a"), some(COPY, "b")
    return Block(
        edges.where(order_by(edges.a, edges.b)),
        copies.b,
        copies.a,
        None if known.nearest is None else Nearest(*some(NEAREST, "a")),
        None if known.pairs is None else some(PAIR, "a"),
    )


def cut_groups(group: np.ndarray) -> np.ndarray:
    """Return where to cut a sorted array of labels so that no group is cut, ends included.

    Between two cuts lie at most `external_sort.HELD` members, or one group.
    """
    cuts, most = [0], external_sort.HELD
    while cuts[-1] + most < len(group):
        stop = cuts[-1] + most
        begin = int(np.searchsorted(group, group[stop]))
        if begin <= cuts[-1]:
            begin = max(stop, int(np.searchsorted(group, group[stop], side="right")))
        cuts.append(begin)
    return np.array(cuts + [len(group)] * (len(group) > cuts[-1] or len(cuts) == 1), np.int64)


def slices(members: Members) -> Iterator[Members]:
    """Yield members some at a time, whole groups; at least once."""
    cuts = cut_groups(members.group).tolist()
    for start, stop in pairwise(cuts):
        yield Members(*(np.asarray(column[start:stop]) for column in members))


def in_row_order(
    parts: Iterable[tuple[np.ndarray, ...]], kinds: dict[str, str], count: int, rows: int,
    path: Path | None,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Yield the columns of all parts as records, by the first column: rows below ``rows``.

    ``kinds`` are the columns' names and dtypes, ``count`` about how many entries there are. No row
    is in two of the arrays; inside each, records are as they came. ``path`` begins the names of
    files for what memory cannot hold; without it all is in memory.
    """
    kind, first = np.dtype(list(kinds.items())), next(iter(kinds))
    spread = Spread(count, 0, rows)
    sorter = Sorter(path, kind, lambda r: r[first].astype(np.uint64), spread=spread)
    for part in parts:
        sorter.add(pack(kind, *part))
    yield from sorter.ascending()


def sorted_by_row(
    parts: Iterable[tuple[np.ndarray, ...]], kinds: dict[str, str], count: int, rows: int,
    path: Path | None,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """Return the columns of all parts ordered by the first, each row once; long ones are mapped.

    The parameters are those of `in_row_order`.
    """
    columns = Columns(path and path.with_name(f"{path.name}-rows"), kinds)
    in_files = {**kinds, next(iter(kinds)): row_kind(rows)}
    for records in in_row_order(parts, in_files, count, rows, path):
        order = np.argsort(records[next(iter(kinds))])
        columns.add(*(records[name][order] for name in kinds))
    return columns.arrays()


def no_members() -> Members:
    """Return no rows."""
    return Members(*(np.empty(0, kind) for kind in (*[np.int64] * 3, np.float32, bool)))


def concatenate(*parts: Members) -> Members:
    """Return the rows of several lists of members as one list."""
    return Members(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def sort_members(members: Members) -> Members:
    """Return members ordered by group, then row."""
    order = order_by(members.group, members.row)
    return Members(*(column[order] for column in members))


def group_starts(group: np.ndarray) -> np.ndarray:
    """Return where each group of a sorted label array begins, and its length at the end."""
    if not len(group):
        return np.zeros(1, np.int64)
    cuts = np.flatnonzero(np.diff(group)) + 1
    return np.concatenate([[0], cuts, [len(group)]]).astype(np.int64)


def replace_rows(rows: np.ndarray, known: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return rows with each that is among the ascending ``known`` replaced by its other, (n,)."""
    if not len(known):
        return rows
    place = np.minimum(np.searchsorted(known, rows), len(known) - 1)
    return np.where(known[place] == rows, others[place], rows)


class Copies:
    """Classes of rows that are equal bit for bit, each with its keeper: the first in keep order.

    ``copies`` and ``originals``, (c,) int64, are rows and the first row that each one equals.
    """

    def __init__(self, copies: np.ndarray, originals: np.ndarray, rank: Rank) -> None:
        self.original = distinct(originals)  # (classes,)
        row = np.concatenate([self.original, copies])
        label = np.concatenate([self.original, originals])
        order = np.lexsort((rank(row), label))
        row, label = row[order], label[order]
        starts = group_starts(label)
        self.keeper = row[starts[:-1]]  # (classes,)
        keeper = np.repeat(self.keeper, np.diff(starts))
        self.row, self.row_keeper = row[row != keeper], keeper[row != keeper]  # all other rows

    def fold(self, forest: Edges) -> Edges:
        """Return edges over originals as edges over keepers."""
        a, b = (replace_rows(end, self.original, self.keeper) for end in forest[:2])
        return make_edges(a, b, forest.similarity)

    def fold_nearest(self, nearest: Nearest) -> Nearest:
        """Return nearest reference rows of originals as those of keepers."""
        row = replace_rows(nearest.row, self.original, self.keeper)
        order = np.argsort(row)
        return Nearest(row[order], nearest.reference[order], nearest.similarity[order])

    def unfold(self, members: Members) -> Members:
        """Add the folded rows: a copy is removed because of its keeper, or of what removes that."""
        lone = self.keeper[~np.isin(self.keeper, members.row)]
        ones = np.ones(len(lone), np.float32)
        keepers = concatenate(members, Members(lone, lone, lone, ones, np.zeros(len(lone), bool)))
        by_row = np.argsort(keepers.row)
        at = by_row[np.searchsorted(keepers.row, self.row_keeper, sorter=by_row)]
        removed = np.ones(len(at), bool)
        like = (keepers.group[at], keepers.representative[at], keepers.similarity[at])
        whole = sort_members(concatenate(keepers, Members(self.row, *like, removed)))
        starts = group_starts(whole.group)
        smallest = np.repeat(whole.row[starts[:-1]], np.diff(starts))
        return sort_members(whole._replace(group=smallest))


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
