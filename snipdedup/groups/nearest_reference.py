"""Of each row the nearest reference row of its group, where one matches.

Reference rows come before all others, so a group that has one is named by one. In such a group each
other row is compared with the reference rows only: pairs of small groups are listed and proved, of
large ones products of float64 unit rows say which cosines are the highest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from snipdedup.features.cosine import indexed_cosines, unit_rows64
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.groups.star import Nearest, group_starts
from snipdedup.join.forest import BLOCK_EDGES, order_by
from snipdedup.join.verify import GATHER_PAIRS, prove
from snipdedup.parallel import ordered_map
from snipdedup.storage.external_sort import Columns, Sorter, Spread, pack, row_kind

LISTED = 1 << 12  # pairs of a group up to which they are listed one by one
TILE = 1024  # rows of a larger group, and reference rows, compared at once
READ = 1 << 20  # rows whose groups are looked at at a time


class Mixed(NamedTuple):
    """Whole groups that have reference rows and others.

    Attributes
    ----------
    row : (n,) int64
        Their rows, ordered by group, then row: reference rows first in each.
    begin, middle, end : (groups,) int64
        Where in ``row`` each group begins, where its other rows begin, and where it ends.
    """

    row: np.ndarray
    begin: np.ndarray
    middle: np.ndarray
    end: np.ndarray


def nearest_within(
    features: Features,
    labels: np.ndarray,
    frozen: int,
    threshold: float,
    threads: int,
    folder: Path | None,
) -> Nearest:
    """Return the nearest reference row of each row whose group has one that matches it.

    Parameters
    ----------
    features : Features
        All rows, reference rows first.
    labels : (rows,) unsigned int or int64
        The smallest row of each row's group.
    frozen : int
        How many rows are reference rows; the others are numbered from 0 in what is returned.
    threshold : float
        Cosine from which two rows are a pair.
    threads : int
    folder : Path or None
        For what does not fit into memory; None: all is held.
    """

    def parts() -> Iterator[Nearest]:
        for mixed in mixed_groups(labels, frozen, folder):
            for found in ordered_map(
                lambda task: nearest_of(features, *task, threshold), plan(mixed), threads
            ):
                yield found._replace(row=found.row - frozen)

    return by_row(parts(), features.rows - frozen, folder and folder / "nearest")


def mixed_groups(labels: np.ndarray, frozen: int, folder: Path | None) -> Iterator[Mixed]:
    """Yield the groups that have rows on both sides of ``frozen``, some at a time."""
    has_others, count = np.zeros(frozen, bool), 0
    for start, stop in plan_blocks(len(labels) - frozen, READ):
        label = labels[frozen + start : frozen + stop]
        label = label[label < frozen]
        has_others[label] = True
        count += len(label)
    rows = row_kind(len(labels))
    kind = np.dtype([("label", rows), ("row", rows)])
    spread = Spread(2 * count, 0, frozen)
    sorter = Sorter(
        folder and folder / "mixed", kind, lambda r: r["label"].astype(np.uint64), spread=spread
    )
    for start, stop in plan_blocks(len(labels), READ):
        label = np.asarray(labels[start:stop])
        at = np.flatnonzero(label < frozen)
        at = at[has_others[label[at]]]
        sorter.add(pack(kind, label[at], start + at))
    for records in sorter.ascending():
        label, row = (records[name].astype(np.int64) for name in ("label", "row"))
        order = order_by(label, row)
        label, row = label[order], row[order]
        starts = group_starts(label)
        begin, end = starts[:-1], starts[1:]
        references = np.add.reduceat(row < frozen, begin, dtype=np.int64) if len(row) else begin
        yield Mixed(row, begin, begin + references, end)


def plan(mixed: Mixed) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Yield comparisons as (reference rows, other rows, whether these are pairs one by one).

    Where they are not, each of the second is compared with all of the first.
    """
    references, others = mixed.middle - mixed.begin, mixed.end - mixed.middle
    pairs = references * others
    small = np.flatnonzero(pairs <= LISTED)
    for start, stop in cut_sums(pairs[small], GATHER_PAIRS):
        some = small[start:stop]
        yield *listed(mixed, some), True
    for group in np.flatnonzero(pairs > LISTED):
        begin, middle, end = (int(places[group]) for places in mixed[1:])
        for start in range(middle, end, TILE):
            yield mixed.row[begin:middle], mixed.row[start : min(start + TILE, end)], False


def cut_sums(sizes: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Cut sizes into runs (start, stop) whose sum is at most ``most``, or that are one size."""
    ends = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        before = ends[start] - sizes[start]
        stop = max(start + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield start, stop
        start = stop


def listed(mixed: Mixed, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return all pairs of a reference row and another of some groups, two (n,) int64."""
    begin, middle, end = (places[groups] for places in mixed[1:])
    references, others = middle - begin, end - middle
    each = np.repeat(references, others)  # pairs of each of the other rows
    other = np.repeat(middle - (np.cumsum(others) - others), others) + np.arange(others.sum())
    place = np.arange(each.sum()) - np.repeat(np.cumsum(each) - each, each)
    reference = np.repeat(np.repeat(begin, others), each) + place
    return mixed.row[reference], mixed.row[np.repeat(other, each)]


def nearest_of(
    features: Features, a: np.ndarray, b: np.ndarray, pairs: bool, threshold: float
) -> Nearest:
    """Return the nearest row of ``a`` for each of ``b`` that matches one; see `plan`."""
    if not pairs:
        return nearest_dense(features, a, b).at(threshold)
    edges = prove(features, a, b, threshold, every=True)
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

    Elsewhere, and where they are below ``best``, they may be one float32 step too low.

    Parameters
    ----------
    raw, others : (m, d), (n, d)
    unit : (m, d) float64
        Of ``raw``.
    best : (m,) float32
        The highest cosine known of each row.
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
    kind = np.dtype([("row", row_kind(rows)), ("reference", "<i8"), ("similarity", "<f4")])
    sorter = Sorter(path, kind, lambda r: r["row"].astype(np.uint64), spread=Spread(rows, 0, rows))
    for part in parts:
        sorter.add(pack(kind, *part))
    columns = Columns(
        path and path.with_name(f"{path.name}-rows"),
        {"row": "<i8", "reference": "<i8", "similarity": "<f4"},
    )
    for records in sorter.ascending():
        order = np.argsort(records["row"])
        columns.add(*(records[name][order] for name in kind.names or ()))
    return Nearest(*columns.arrays())


def with_copies(
    nearest: Nearest, copies: np.ndarray, firsts: np.ndarray, rows: int, path: Path | None
) -> Nearest:
    """Return it with the copies of its rows beside these: each has what its first row has."""

    def parts() -> Iterator[Nearest]:
        for start, stop in plan_blocks(len(nearest.row), BLOCK_EDGES):
            yield Nearest(*(np.asarray(column[start:stop]) for column in nearest))
        for start, stop in plan_blocks(len(copies) if len(nearest.row) else 0, BLOCK_EDGES):
            first = firsts[start:stop]
            place = np.minimum(np.searchsorted(nearest.row, first), len(nearest.row) - 1)
            at = np.flatnonzero(nearest.row[place] == first)
            place = place[at]
            yield Nearest(
                copies[start:stop][at], nearest.reference[place], nearest.similarity[place]
            )

    return by_row(parts(), rows, path)
