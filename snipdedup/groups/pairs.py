"""Pairs inside groups: all of them, or of each row the one with its nearest reference row.

Every pair has both ends in one group, so nothing else is compared. Small groups are listed many at
a time and verified like candidate pairs; the rows of large ones are compared tile by tile. What is
held at once does not grow with a group.

A search over reference rows and others is cut down to the others (`own_pairs`). Reference rows
come before all others, so a group that has one is named by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from snipdedup.features.cosine import indexed_cosines
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.groups.members import Nearest, group_starts, in_row_order, sorted_by_row
from snipdedup.join.brute_force import load_panel, tile_pairs
from snipdedup.join.forest import (
    BLOCK_EDGES,
    Edges,
    UnionFind,
    components,
    join_edges,
    order_by,
)
from snipdedup.join.verify import every_edge
from snipdedup.parallel import ordered_map
from snipdedup.storage.external_sort import Columns, row_kind

LISTED_GROUP = 64  # groups up to this size are listed pair by pair
LISTED_PAIRS = 1 << 15  # pairs listed at a time
TILE = 1024  # rows of a large group compared at once
READ = 1 << 20  # rows whose groups are looked at at a time
GATHER_PAIRS = 1 << 12  # pairs whose rows are gathered together

Gather = Callable[[np.ndarray], np.ndarray]  # (n,) int64 rows to their vectors, (n, d)


class Also(NamedTuple):
    """What a pair must besides: a cosine of second features, other vectors of the same rows."""

    gather: Gather  # (n,) int64 rows to their other vectors, (n, dim)
    threshold: float

    def holds(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return for which of the rows a, b it holds, (n,) bool."""
        return pair_cosines(self.gather, a, b) >= np.float32(self.threshold)


def all_hold(also: Sequence[Also], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return for which of the rows a, b all of them hold, (n,) bool."""
    left = np.arange(len(a))
    for one in also:
        left = left[one.holds(a[left], b[left])]
    holds = np.zeros(len(a), bool)
    holds[left] = True
    return holds


def pair_cosines(gather: Gather, a: np.ndarray, b: np.ndarray, threads: int = 1) -> np.ndarray:
    """Return the cosine of each row a with row b, (n,) float32; both are (n,) int64."""

    def compare(span: tuple[int, int]) -> np.ndarray:
        both = np.concatenate([a[slice(*span)], b[slice(*span)]])
        rows, place = np.unique(both, return_inverse=True)
        raw = gather(rows)
        return indexed_cosines(raw, raw, *np.split(place, 2))

    parts = ordered_map(compare, plan_blocks(len(a), GATHER_PAIRS), threads)
    return np.concatenate([np.empty(0, np.float32), *parts])


def all_pairs(
    features: Features, forest: Edges, threshold: float, threads: int, also: Sequence[Also] = ()
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
    also: Sequence[Also] = (),
) -> Iterator[Edges]:
    """Yield all pairs of rows that share a group, each once; all of ``also`` must hold for them.

    ``row`` and ``group``, (n,) int64, are ordered by group, then row. Pairs come by group; inside a
    large group by tiles of its rows; inside these by (a, b).
    """

    def find(task: tuple[int, int, int, int]) -> Edges:
        begin, end, i, j = task
        part = row[begin:end]
        if i < 0:
            a, b = listed_pairs(np.diff(group_starts(group[begin:end])))
            edges = every_edge(features, part[a], part[b], threshold)
        else:
            left = load_panel(features, part[i : i + TILE])
            right = left if j == i else load_panel(features, part[j : j + TILE])
            edges = tile_pairs(left, right, 0, 0, threshold)
        return edges.where(all_hold(also, edges.a, edges.b)) if also else edges

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


def own_pairs(
    features: Features,
    reference_rows: int,
    forest: Edges,
    copies: tuple[np.ndarray, np.ndarray],
    threshold: float,
    threads: int,
    *,
    references_only: bool = False,
    folder: Path | None = None,
) -> tuple[Edges, np.ndarray, np.ndarray, Nearest]:
    """Cut a search over all rows down to those after the first ``reference_rows``.

    Return the forest, copies and originals of these, numbered from there, and the nearest
    reference row of each distinct row that matches one. Where a group has reference rows, its
    other rows are compared with all of these: the search may have found a pair with another one
    only.

    ``forest`` is over distinct rows, with a forest of its own for pairs of two rows that are no
    reference rows, see `forest.spanning_forest`; pairs of two reference rows may be in it or not.
    ``copies`` are exact copies, (c,) int64, and the original of each. ``references_only`` leaves
    out pairs and copies among the rows themselves. ``folder`` is for what does not fit into memory.
    """
    copy, original, twins = own_copies(*copies, reference_rows)
    linked = [(forest.a, forest.b), twins]
    if references_only:  # then copies are compared with the references as other rows are
        linked.append((original, copy))
    roots = UnionFind(features.rows)
    for a, b in linked:
        for start, stop in plan_blocks(len(a), BLOCK_EDGES):
            roots.unite(a[start:stop], b[start:stop])
    nearest = nearest_within(features, roots.labels(), reference_rows, threshold, threads, folder)
    if references_only:
        return join_edges([]), copy[:0], copy[:0], nearest
    kinds = {"a": "<i8", "b": "<i8", "similarity": "<f4"}
    columns = Columns(folder and folder / "forest", kinds)
    begin = int(np.searchsorted(forest.a, reference_rows))  # ascending
    for start, stop in plan_blocks(len(forest.a) - begin, BLOCK_EDGES):
        part = forest.where(slice(begin + start, begin + stop))
        columns.add(part.a - reference_rows, part.b - reference_rows, part.similarity)
    return Edges(*columns.arrays()), copy - reference_rows, original - reference_rows, nearest


def own_copies(
    copies: np.ndarray, originals: np.ndarray, reference_rows: int
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Return copies among the rows after the reference rows, their originals, and twins.

    Twins are reference rows and the first row after them that equals each.
    """
    own = copies >= reference_rows
    copies, originals = copies[own], originals[own].copy()
    outside = originals < reference_rows
    reference, place, back = np.unique(originals[outside], return_index=True, return_inverse=True)
    first = copies[outside][place]  # copies are ascending: the first of them is the smallest
    originals[outside] = first[back]
    rest = copies != originals
    return copies[rest], originals[rest], (reference, first)


def nearest_within(
    features: Features,
    labels: np.ndarray,
    reference_rows: int,
    threshold: float,
    threads: int,
    folder: Path | None,
) -> Nearest:
    """Return the nearest reference row of each row whose group has one that matches it.

    Reference rows come first in ``features``; the others are numbered from 0 in what is returned.
    ``labels`` is the smallest row of each row's group. What does not fit into memory goes to
    ``folder``; without one, all is held.
    """

    def parts() -> Iterator[Nearest]:
        for row, label in mixed_groups(labels, reference_rows, folder):
            find = partial(nearest_in_groups, features, row, label, reference_rows, threshold)
            tasks = (task for task in plan_groups(np.diff(group_starts(label))) if task[2] <= 0)
            yield from ordered_map(find, tasks, threads)

    kinds, rows = {"row": "<i8", "reference": "<i8", "similarity": "<f4"}, features.rows
    count, path = rows - reference_rows, folder and folder / "nearest"
    return Nearest(*sorted_by_row(parts(), kinds, count, count, path))


def nearest_of(edges: Edges) -> Edges:
    """Return the edge with the highest cosine of each row b; of equal ones that of the first a."""
    order = np.lexsort((edges.a, -edges.similarity, edges.b))
    return edges.where(order[np.unique(edges.b[order], return_index=True)[1]])


def nearest_in_groups(
    features: Features, row: np.ndarray, label: np.ndarray, reference_rows: int, threshold: float,
    task: tuple[int, int, int, int],
) -> Nearest:  # fmt: skip
    """Return what `nearest_within` does for a run of small groups, or for a tile of a large one.

    ``row`` and ``label``, (n,) int64, are whole groups, ordered by label, then row; ``task`` is one
    of `plan_groups`. The tile is compared with all reference rows of its group.
    """
    begin, end, i, tile = task
    part = row[begin:end]
    if i < 0:
        a, b = (part[place] for place in listed_pairs(np.diff(group_starts(label[begin:end]))))
        mixed = (a < reference_rows) & (b >= reference_rows)
        best = nearest_of(every_edge(features, a[mixed], b[mixed], threshold))
    else:
        references, others = part[part < reference_rows], part[tile : tile + TILE]
        others = others[others >= reference_rows]
        best, panel = join_edges([]), load_panel(features, others)
        for start, stop in plan_blocks(len(references) if len(others) else 0, TILE):
            found = tile_pairs(load_panel(features, references[start:stop]), panel, 0, 0, threshold)
            best = nearest_of(join_edges([best, found]))
    return Nearest(best.b - reference_rows, best.a, best.similarity)


def mixed_groups(
    labels: np.ndarray, reference_rows: int, folder: Path | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the groups that have reference rows and others, some at a time: rows and labels."""
    has_others, count = np.zeros(reference_rows, bool), 0
    for start, stop in plan_blocks(len(labels) - reference_rows, READ):
        label = labels[reference_rows + start : reference_rows + stop]
        label = label[label < reference_rows]
        has_others[label] = True
        count += len(label)

    def members() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start, stop in plan_blocks(len(labels), READ):
            label = np.asarray(labels[start:stop])
            at = np.flatnonzero(label < reference_rows)
            at = at[has_others[label[at]]]
            yield label[at], start + at

    kinds, path = (
        dict.fromkeys(("label", "row"), row_kind(len(labels))),
        folder and folder / "mixed",
    )
    for records in in_row_order(members(), kinds, 2 * count, reference_rows, path):
        label, row = (records[name].astype(np.int64) for name in kinds)
        order = order_by(label, row)
        yield row[order], label[order]
