"""All pairs inside groups: every one has both ends in one group, so nothing else is compared.

Small groups are listed many at a time and verified like candidate pairs; the rows of large ones are
compared tile by tile. What is held at once does not grow with a group.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from snipdedup.features.shards import Features
from snipdedup.groups.members import group_starts
from snipdedup.groups.star import Also
from snipdedup.join.brute_force import load_panel, tile_pairs
from snipdedup.join.forest import Edges, components
from snipdedup.join.verify import verify_block
from snipdedup.parallel import ordered_map

LISTED_GROUP = 64  # groups up to this size are listed pair by pair
LISTED_PAIRS = 1 << 15  # pairs listed at a time
TILE = 1024  # rows of a large group compared at once


def all_pairs(
    features: Features, forest: Edges, threshold: float, threads: int, also: Also | None = None
) -> Iterator[Edges]:
    """Yield all pairs among the rows of the groups of a forest over distinct rows."""
    row, group = components(forest)
    order = np.lexsort((row, group))
    yield from pairs_within(features, row[order], group[order], threshold, threads, also)


def pairs_within(
    features: Features,
    row: np.ndarray,
    group: np.ndarray,
    threshold: float,
    threads: int,
    also: Also | None = None,
) -> Iterator[Edges]:
    """Yield all pairs of rows that share a group, each once; ``also`` must hold for them.

    ``row`` and ``group``, (n,) int64, are ordered by group, then row. Pairs come by group; inside a
    large group by tiles of its rows; inside these by (a, b).
    """

    def find(task: tuple[int, int, int, int]) -> Edges:
        begin, end, i, j = task
        part = row[begin:end]
        if i < 0:
            a, b = listed_pairs(np.diff(group_starts(group[begin:end])))
            edges = verify_block(features, part[a], part[b], threshold, every=True)
        else:
            left = load_panel(features, part[i : i + TILE])
            right = left if j == i else load_panel(features, part[j : j + TILE])
            edges = tile_pairs(left, right, 0, 0, threshold)
        return edges if also is None else edges.where(also.holds(edges.a, edges.b))

    yield from ordered_map(find, plan_groups(np.diff(group_starts(group))), threads)


def plan_groups(sizes: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """Yield the comparisons of groups that lie one after another, as (begin, end, i, j).

    These are the rows of one large group, or of a run of small ones; and tiles of the large group,
    by their first rows in it, -1 for a run of small groups.
    """
    ends = np.cumsum(sizes)
    pairs = sizes * (sizes - 1) // 2
    begin, held = 0, 0
    for size, end, count in zip(sizes.tolist(), ends.tolist(), pairs.tolist(), strict=True):
        if held and (size > LISTED_GROUP or held + count > LISTED_PAIRS):
            yield begin, end - size, -1, -1
            begin, held = end - size, 0
        if size <= LISTED_GROUP:
            held += count
            continue
        starts = range(0, size, TILE)
        yield from ((end - size, end, i, j) for i in starts for j in starts if j >= i)
        begin = end
    if held:
        yield begin, int(ends[-1]), -1, -1


def listed_pairs(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return all pairs (a < b) of places that share one of some groups of these sizes."""
    starts = np.cumsum(sizes) - sizes
    later = np.repeat(starts + sizes, sizes) - np.arange(sizes.sum()) - 1
    a = np.repeat(np.arange(len(later)), later)
    b = a + 1 + np.arange(len(a)) - np.repeat(np.cumsum(later) - later, later)
    return a, b
