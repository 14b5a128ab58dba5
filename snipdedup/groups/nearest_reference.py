"""A search over reference rows and others, cut down to the others and their nearest references.

Reference rows come before all others, so a group that has one is named by one. In such a group each
other row is compared with the reference rows only: pairs of small groups are listed and verified,
of large ones products of float64 unit rows show which cosines are the highest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from snipdedup.features.cosine import indexed_cosines, unit_rows64
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.groups.members import Nearest, group_starts
from snipdedup.join.forest import (
    BLOCK_EDGES,
    Edges,
    UnionFind,
    join_edges,
    make_edges,
    order_by,
)
from snipdedup.join.verify import GATHER_PAIRS, verify_block
from snipdedup.parallel import ordered_map
from snipdedup.storage.external_sort import Columns, Sorter, Spread, pack, row_kind

LISTED = 1 << 12  # pairs of a group up to which they are listed one by one
TILE = 1024  # rows of a larger group, and reference rows, compared at once
READ = 1 << 20  # rows whose groups are looked at at a time


class Mixed(NamedTuple):
    """Whole groups that have reference rows and others."""

    row: np.ndarray  # (n,) int64, ordered by group, then row: reference rows first in each
    begin: np.ndarray  # (groups,) int64: where in ``row`` each group begins,
    middle: np.ndarray  # where its other rows begin,
    end: np.ndarray  # and where it ends


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
    roots, rows = UnionFind(features.rows), features.rows - reference_rows
    for edges in (forest, twins):
        for start, stop in plan_blocks(len(edges.a), BLOCK_EDGES):
            roots.unite(edges.a[start:stop], edges.b[start:stop])
    nearest = nearest_within(features, roots.labels(), reference_rows, threshold, threads, folder)
    copy, original = copy - reference_rows, original - reference_rows
    if references_only:
        none = np.empty(0, np.int64)
        every = with_copies(nearest, copy, original, rows, folder and folder / "every")
        return join_edges([]), none, none, every
    kinds = {"a": "<i8", "b": "<i8", "similarity": "<f4"}
    columns = Columns(folder and folder / "forest", kinds)
    begin = int(np.searchsorted(forest.a, reference_rows))  # ascending
    for start, stop in plan_blocks(len(forest.a) - begin, BLOCK_EDGES):
        part = forest.where(slice(begin + start, begin + stop))
        columns.add(part.a - reference_rows, part.b - reference_rows, part.similarity)
    return Edges(*columns.arrays()), copy, original, nearest


def own_copies(
    copies: np.ndarray, originals: np.ndarray, reference_rows: int
) -> tuple[np.ndarray, np.ndarray, Edges]:
    """Return copies among the rows after the reference rows, their originals, and twins.

    A twin is the first of these rows that equals a reference row: an edge of cosine 1.
    """
    own = copies >= reference_rows
    copies, originals = copies[own], originals[own]
    outside = originals < reference_rows
    reference, place = np.unique(originals[outside], return_index=True)
    first = copies[outside][place]  # copies are ascending: the first of them is the smallest
    originals = originals.copy()
    originals[outside] = first[np.searchsorted(reference, originals[outside])]
    rest = copies != originals
    return copies[rest], originals[rest], make_edges(reference, first, np.ones(len(first)))


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
        for mixed in mixed_groups(labels, reference_rows, folder):
            tasks = plan_comparisons(mixed)
            for found in ordered_map(
                lambda t: find_nearest(features, *t, threshold), tasks, threads
            ):
                yield found._replace(row=found.row - reference_rows)

    return by_row(parts(), features.rows - reference_rows, folder and folder / "nearest")


def mixed_groups(labels: np.ndarray, reference_rows: int, folder: Path | None) -> Iterator[Mixed]:
    """Yield the groups that have reference rows and others, some at a time."""
    has_others, count = np.zeros(reference_rows, bool), 0
    for start, stop in plan_blocks(len(labels) - reference_rows, READ):
        label = labels[reference_rows + start : reference_rows + stop]
        label = label[label < reference_rows]
        has_others[label] = True
        count += len(label)
    rows = row_kind(len(labels))
    kind = np.dtype([("label", rows), ("row", rows)])
    spread = Spread(2 * count, 0, reference_rows)
    sorter = Sorter(
        folder and folder / "mixed", kind, lambda r: r["label"].astype(np.uint64), spread=spread
    )
    for start, stop in plan_blocks(len(labels), READ):
        label = np.asarray(labels[start:stop])
        at = np.flatnonzero(label < reference_rows)
        at = at[has_others[label[at]]]
        sorter.add(pack(kind, label[at], start + at))
    for records in sorter.ascending():
        label, row = (records[name].astype(np.int64) for name in ("label", "row"))
        order = order_by(label, row)
        label, row = label[order], row[order]
        starts = group_starts(label)
        begin, end = starts[:-1], starts[1:]
        before = np.concatenate([[0], np.cumsum(row < reference_rows)])
        yield Mixed(row, begin, begin + before[end] - before[begin], end)


def plan_comparisons(mixed: Mixed) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Yield comparisons as (reference rows, other rows, whether these are pairs one by one).

    Where they are not, each of the second is compared with all of the first.
    """
    references, others = mixed.middle - mixed.begin, mixed.end - mixed.middle
    pairs = references * others
    small = np.flatnonzero(pairs <= LISTED)
    ends = np.cumsum(pairs[small])
    start = 0
    while start < len(small):  # runs of groups of at most `GATHER_PAIRS`, or one group
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + GATHER_PAIRS, side="right")))
        yield *listed_references(mixed, small[start:stop]), True
        start = stop
    for group in np.flatnonzero(pairs > LISTED):
        begin, middle, end = (int(places[group]) for places in mixed[1:])
        for start in range(middle, end, TILE):
            yield mixed.row[begin:middle], mixed.row[start : min(start + TILE, end)], False


def listed_references(mixed: Mixed, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return all pairs of a reference row and another of some groups, two (n,) int64."""
    begin, middle, end = (places[groups] for places in mixed[1:])
    references, others = middle - begin, end - middle
    each = np.repeat(references, others)  # pairs of each of the other rows
    other = np.repeat(middle - (np.cumsum(others) - others), others) + np.arange(others.sum())
    place = np.arange(each.sum()) - np.repeat(np.cumsum(each) - each, each)
    reference = np.repeat(np.repeat(begin, others), each) + place
    return mixed.row[reference], mixed.row[np.repeat(other, each)]


def find_nearest(
    features: Features, a: np.ndarray, b: np.ndarray, pairs: bool, threshold: float
) -> Nearest:
    """Return the nearest row of ``a`` for each of ``b`` that matches one; see the plan."""
    if not pairs:
        return nearest_dense(features, a, b).at(threshold)
    edges = verify_block(features, a, b, threshold, every=True)
    order = np.lexsort((edges.a, -edges.similarity, edges.b))
    first = order[np.unique(edges.b[order], return_index=True)[1]]
    return Nearest(edges.b[first], edges.a[first], edges.similarity[first])


def nearest_dense(features: Features, references: np.ndarray, rows: np.ndarray) -> Nearest:
    """Return the nearest of ascending reference rows for each row, by products of unit rows.

    A product in float64 is so near the cosine that `pair_cosine` must be asked only where the two
    may be rounded to different float32 values. So the result is that of `pair_cosine`.
    """
    raw = features.gather(rows)
    unit = unit_rows64(raw)
    best = np.full(len(rows), -np.inf, np.float32)
    nearest = np.full(len(rows), -1)
    for start, stop in plan_blocks(len(references), TILE):
        others = features.gather(references[start:stop])
        cosine = likely_cosines(raw, unit, others, best)
        place = cosine.argmax(axis=1)  # the first of equal ones
        top = cosine[np.arange(len(rows)), place]
        better = top > best
        best[better], nearest[better] = top[better], references[start + place[better]]
    return Nearest(rows, nearest, best)


def likely_cosines(
    raw: np.ndarray, unit: np.ndarray, others: np.ndarray, best: np.ndarray
) -> np.ndarray:
    """Return cosines of rows with others, (m, n) float32: right where they may be a row's highest.

    Elsewhere, and where they are below the highest that is known of each row, ``best``, they may be
    one float32 step too low. ``unit`` are the rows as float64 unit rows.
    """
    import torch

    product = (torch.from_numpy(unit) @ torch.from_numpy(unit_rows64(others)).T).numpy()
    error = 4 * unit.shape[1] * np.finfo(np.float64).eps  # of both, by any order of sums
    low, high = (np.minimum(product + side, 1).astype(np.float32) for side in (-error, error))
    enough = np.maximum(best, low.max(axis=1))
    i, j = np.nonzero((low != high) & (high >= enough[:, None]))
    low[i, j] = indexed_cosines(raw, others, i, j)
    return low


def by_row(parts: Iterable[Nearest], rows: int, path: Path | None) -> Nearest:
    """Return the entries of all parts ordered by row, each of another row; many are mapped."""
    kinds = {"row": "<i8", "reference": "<i8", "similarity": "<f4"}
    kind = np.dtype(list({**kinds, "row": row_kind(rows)}.items()))
    sorter = Sorter(path, kind, lambda r: r["row"].astype(np.uint64), spread=Spread(rows, 0, rows))
    for part in parts:
        sorter.add(pack(kind, *part))
    columns = Columns(path and path.with_name(f"{path.name}-rows"), kinds)
    for records in sorter.ascending():
        order = np.argsort(records["row"])
        columns.add(*(records[name][order] for name in kinds))
    return Nearest(*columns.arrays())


def with_copies(
    nearest: Nearest, copies: np.ndarray, originals: np.ndarray, rows: int, path: Path | None
) -> Nearest:
    """Return it with the copies of its rows beside these: each has what its original has."""

    def parts() -> Iterator[Nearest]:
        for start, stop in plan_blocks(len(nearest.row), BLOCK_EDGES):
            yield Nearest(*(np.asarray(column[start:stop]) for column in nearest))
        for start, stop in plan_blocks(len(copies) if len(nearest.row) else 0, BLOCK_EDGES):
            original = originals[start:stop]
            place = np.minimum(np.searchsorted(nearest.row, original), len(nearest.row) - 1)
            at = np.flatnonzero(nearest.row[place] == original)
            place = place[at]
            yield Nearest(
                copies[start:stop][at], nearest.reference[place], nearest.similarity[place]
            )

    return by_row(parts(), rows, path)
