"""Rows of groups, which of them are removed, and because of which row.

Exact copies are folded into one row a class before a rule decides, and unfolded after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from snipdedup.join.forest import Edges, make_edges, order_by

Rank = Callable[[np.ndarray], np.ndarray]  # (n,) int64 rows to (n,) uint64 places in keep order


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


class Copies:
    """Classes of rows that are equal bit for bit, each with its keeper: the first in keep order.

    ``copies`` and ``originals``, (c,) int64, are rows and the first row that each one equals.
    """

    def __init__(self, copies: np.ndarray, originals: np.ndarray, rank: Rank) -> None:
        self.original = np.unique(originals)  # (classes,)
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
        return make_edges(self._keeper_of(forest.a), self._keeper_of(forest.b), forest.similarity)

    def fold_nearest(self, nearest: Nearest) -> Nearest:
        """Return nearest reference rows of originals as those of keepers."""
        row = self._keeper_of(nearest.row)
        order = np.argsort(row)
        return Nearest(row[order], nearest.reference[order], nearest.similarity[order])

    def _keeper_of(self, rows: np.ndarray) -> np.ndarray:
        if not len(self.original):
            return rows
        place = np.minimum(np.searchsorted(self.original, rows), len(self.original) - 1)
        return np.where(self.original[place] == rows, self.keeper[place], rows)

    def unfold(self, members: Members) -> Members:
        """Add the folded rows: a copy is removed because of its keeper, or of what removes that."""
        rows = np.append(np.sort(members.row), np.iinfo(np.int64).max)
        lone = self.keeper[rows[np.searchsorted(rows, self.keeper)] != self.keeper]
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
