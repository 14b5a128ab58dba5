"""Rows that share list and code, as one entry of a search.

Hundreds of copies would else fill all k places. Rows of a class are duplicates by definition: no
code tells them apart, and each is linked to the first of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from snipdedup.features.shards import plan_blocks
from snipdedup.index.codes import WALK_ROWS, Lists, unpack


def same_codes(lists: Lists) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first place, first) over all places: the first place with the same list and code.

    ``first`` is (n,) int64; in a list rows ascend, so it is also the smallest row.
    """
    for low, high in lists.spans():
        codes = lists.codes[low:high]
        words = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 8))).view(np.uint64)
        of = lists.list_of(low, high)
        order = np.lexsort((*words.T, of))
        words, of = words[order], of[order]
        starts = np.ones(high - low, bool)
        starts[1:] = (words[1:] != words[:-1]).any(axis=1) | (of[1:] != of[:-1])
        first = np.empty(high - low, np.int64)
        first[order] = order[starts][np.cumsum(starts) - 1]
        yield low, first + low


class Classes(NamedTuple):
    """Rows grouped by list and code; each class is one entry of a search.

    Attributes
    ----------
    lists : Lists
        One entry a class, with its smallest row.
    members : (n, width) uint8
        All rows, packed, class by class in the order of ``lists``, ascending in each.
    begins : (classes + 1,) int64
        Where each class begins in ``members``, then n.
    """

    lists: Lists
    members: np.ndarray
    begins: np.ndarray

    def rows(self, classes: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Return up to ``most`` rows of each class: (place in ``classes``, row), int64 each."""
        begin = self.begins[classes]
        counts = np.minimum(self.begins[classes + 1] - begin, most)
        at = np.repeat(np.arange(len(classes)), counts)
        within = np.arange(len(at)) - np.repeat(np.cumsum(counts) - counts, counts)
        return at, unpack(self.members[begin[at] + within])

    def links(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield blocks of (smallest row, row) over all rows that are not the smallest."""
        for low, high in plan_blocks(len(self.begins) - 1, WALK_ROWS):
            counts = np.diff(self.begins[low : high + 1])
            first = np.repeat(self.lists.rows(slice(low, high)), counts)
            row = unpack(self.members[self.begins[low] : self.begins[high]])
            if (first != row).any():
                yield first[first != row], row[first != row]

    def shared(self, rows: int) -> np.ndarray:
        """Return which of ``rows`` rows share their code with another, (rows,) bool."""
        shared = np.zeros(rows, bool)
        for first, row in self.links():
            shared[first] = shared[row] = True
        return shared


def classes_of(lists: Lists) -> Classes:
    """Group the entries of lists by list and code."""
    places, members, counts = [np.empty(0, np.int64)], [lists.ids[:0]], [np.zeros(1, np.int64)]
    for low, first in same_codes(lists):
        members.append(lists.ids[low + np.argsort(first, kind="stable")])
        place, count = np.unique(first, return_counts=True)
        places.append(place)
        counts.append(count)
    kept = np.concatenate(places)
    starts = np.searchsorted(kept, lists.starts)
    begins = np.cumsum(np.concatenate(counts))
    return Classes(
        Lists(lists.codes[kept], lists.ids[kept], starts), np.concatenate(members), begins
    )
