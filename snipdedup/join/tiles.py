"""Tiles: products of the codes of two blocks of rows, and the pairs they do not rule out.

Most tiles hold few close pairs, which are verified one by one. Where very many are close (thousands
of copies of one picture), that would cost the square of their number: such a crowded tile gives a
spanning forest of its pairs instead, by a table of all cosines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from snipdedup import native
from snipdedup.features.cosine import all_cosines
from snipdedup.features.shards import Features
from snipdedup.join.forest import Edges, join_edges, make_edges
from snipdedup.join.kernels import TileColumns
from snipdedup.join.verify import GATHER_PAIRS, verify_places
from snipdedup.native.fallback import best_edge, link_smaller
from snipdedup.parallel import scratch
from snipdedup.storage.external_sort import distinct

ROW_TILE, COLUMN_TILE = 1024, 2048
CROWDED = 1 / 8  # share of a tile's pairs from which they are not verified one by one
NO_PAIR = np.float32(-2)  # less than any cosine


class RowCodes(NamedTuple):
    """Codes of rows: narrow ones that rule out most pairs, wide ones for the others."""

    narrow: np.ndarray  # (n, w) int8
    falls: np.ndarray  # (n,) int32: by how much each row's limit falls
    wide: np.ndarray  # (n, v) int8; v is 0 where narrow codes do
    wide_falls: np.ndarray  # (n,) int32


def code_record(widths: tuple[int, int]) -> np.dtype:
    """Return the type of a row's codes as they are stored, with the fields of `RowCodes`."""
    narrow, wide = widths
    return np.dtype(
        [("narrow", "i1", narrow), ("falls", "<i4"), ("wide", "i1", wide), ("wide_falls", "<i4")]
    )


class CodeStore:
    """Codes in row order, in parts: mapped files, or memory.

    A row lives in one list and visits others, but its codes are stored once: the tile that needs
    them gathers them.
    """

    def __init__(self, parts: Sequence[np.ndarray], size: int) -> None:
        """Each part, (n,) of `code_record`, but the last has ``size`` rows."""
        self.row_bytes = parts[0].itemsize
        self.records = native.Records(parts, size)

    def take(self, places: np.ndarray, use: str) -> RowCodes:
        """Return the codes at places, (n,) int64, in memory that stays in the cache.

        The next call of a thread with the same ``use`` overwrites them.
        """
        memory = scratch(use, (len(places) * self.row_bytes,), np.uint8)
        return RowCodes(*self.records.take(places, memory))


class Members(NamedTuple):
    """Rows that are compared: those of a list, or some of them."""

    row: np.ndarray  # (n,) int64: global rows
    place: np.ndarray  # (n,) int64: of their codes in a store

    def where(self, places: slice | np.ndarray) -> Members:
        """Return the rows that a slice or mask selects."""
        return Members(self.row[places], self.place[places])


class Limits(NamedTuple):
    """Products from which two rows may be a pair, before their limits fall."""

    narrow: float
    wide: float


def compare_tiles(
    features: Features,
    codes: CodeStore,
    members: Members,
    columns: int,
    *,
    limits: Limits,
    threshold: float,
    device: str = "cpu",
    reference_rows: int = 0,
    references_only: bool = False,
) -> tuple[list[Edges], int]:
    """Compare the first ``columns`` rows, at most `COLUMN_TILE`, with themselves and all others.

    Global rows below ``reference_rows`` are not compared with one another; with
    ``references_only`` the others are not either. Return verified edges, where there are many
    spanning forests of parts of them; and how many pairs the codes could not rule out.
    """
    right = members.where(slice(columns))
    y = codes.take(right.place, "columns")
    old = right.row < reference_rows
    members, first = compared_rows(members, old, reference_rows, references_only)
    wide = (y.wide, y.wide_falls) if y.wide.shape[1] else None
    narrow_limit, wide_limit = native.whole_limits(np.array(limits))
    tiles = TileColumns(y.narrow, y.falls, wide, device, old)
    rows = np.concatenate([right.row, members.row]) if first else members.row
    found: list[Edges] = []
    listed: list[tuple[np.ndarray, np.ndarray]] = []
    candidates, waiting = 0, 0

    def verify() -> None:
        a, b = (np.concatenate(side) for side in zip(*listed, strict=True))
        found.append(verify_places(features, rows, a, b, threshold, reference_rows))

    for start in range(0, len(members.row), ROW_TILE):
        left = members.where(slice(start, start + ROW_TILE))
        x = codes.take(left.place, "rows")
        i, j = tiles.hits(
            x.narrow, narrow_limit - x.falls, x.wide, wide_limit - x.wide_falls,
            first=start if first + start < columns else native.EVERY_COLUMN,
            references=left.row < reference_rows, references_only=references_only,
        )  # fmt: skip
        candidates += len(i)
        if len(i) > CROWDED * ROW_TILE * COLUMN_TILE:
            parts = left.row, right.row, i, j
            found += crowded_forests(features, *parts, threshold, reference_rows)
            continue
        listed.append((i + np.int64(first + start), j))
        waiting += len(i)
        if waiting >= GATHER_PAIRS:
            verify()
            listed, waiting = [], 0
    if waiting:
        verify()
    return found, candidates


def compared_rows(
    members: Members, old: np.ndarray, reference_rows: int, references_only: bool
) -> tuple[Members, int]:
    """Return the rows that the columns are compared with, and how many columns precede them.

    The columns are the first rows of ``members``; ``old``, (columns,) bool, are reference rows.
    They precede the rows where none of them is one of these, else they are the first of them: 0.
    """
    if reference_rows and old.all():
        return members.where(members.row >= reference_rows), len(old)
    if references_only and not old.any():
        return members.where(members.row < reference_rows), len(old)
    return members, 0


def crowded_forests(
    features: Features,
    rows: np.ndarray,
    columns: np.ndarray,
    i: np.ndarray,
    j: np.ndarray,
    threshold: float,
    reference_rows: int,
) -> list[Edges]:
    """Return the forests of a crowded tile's pairs: places i and j of global rows and columns.

    One of pairs of two others, and one of each kind of pairs with a reference row.
    """
    close = np.zeros((len(rows), len(columns)), bool)
    close[i, j] = True
    old_rows, old_columns = rows < reference_rows, columns < reference_rows
    kinds = ((~old_rows, ~old_columns), (old_rows, ~old_columns), (~old_rows, old_columns))
    forests = []
    for left, right in kinds:
        if left.any() and right.any():
            part = rows[left], columns[right], close[np.ix_(left, right)]
            forests.append(crowded_forest(features, *part, threshold))
    return forests


def crowded_forest(
    features: Features, rows: np.ndarray, columns: np.ndarray, close: np.ndarray, threshold: float
) -> Edges:
    """Return the forest of a crowded tile's pairs, by a table of cosines.

    ``close``, (m, n) bool, are the candidate pairs of the global rows and columns.
    """
    left, right = np.flatnonzero(close.any(1)), np.flatnonzero(close.any(0))
    if not len(left):
        return join_edges([])
    if len(left) * len(right) < close.size:
        rows, columns = rows[left], columns[right]
        close = np.take(np.take(close, left, axis=0), right, axis=1)
    table = all_cosines(features.gather(rows), features.gather(columns))
    table[~close] = NO_PAIR
    table[table < np.float32(threshold)] = NO_PAIR
    cosine = table.copy()
    nodes = distinct(np.concatenate([rows, columns]))
    i, j = table_forest(
        table, np.searchsorted(nodes, rows), np.searchsorted(nodes, columns), len(nodes)
    )
    return make_edges(rows[i], columns[j], cosine[i, j])


def table_forest(
    table: np.ndarray, left: np.ndarray, right: np.ndarray, nodes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return a maximum spanning forest of a table's pairs, as places (i, j).

    Borůvka's method: in each round every component takes its best entry, which is the best of its
    rows' and columns' best ones. ``left`` and ``right`` are the node of each row and column; one
    node may be both. Overwrites ``table``, (m, n) float32; `NO_PAIR` is no pair.
    """
    turned = scratch("turned", table.T.shape, table.dtype)
    turned[:] = table.T
    label = np.arange(nodes)  # compared below as the narrower type, in half the time
    small = np.int32 if nodes < 1 << 31 else np.int64
    rows, columns = np.arange(len(left)), np.arange(len(right))
    chosen = [(np.empty(0, np.int64),) * 2]
    while True:
        i = np.concatenate([turned.argmax(1), rows])
        j = np.concatenate([columns, table.argmax(1)])
        order = np.argsort(-table[i, j], kind="stable")
        order = order[: np.count_nonzero(table[i, j] > NO_PAIR)]
        if not len(order):
            break
        i, j = i[order], j[order]
        u, v = label[left[i]], label[right[j]]
        best = best_edge(u, v, np.arange(len(i)), nodes)
        picks = distinct(best[best < len(i)])
        chosen.append((i[picks], j[picks]))
        link_smaller(label, u[picks], v[picks])
        own, other = label[left].astype(small), label[right].astype(small)
        table[own[:, None] == other] = NO_PAIR
        turned[other[:, None] == own] = NO_PAIR
    i, j = (np.concatenate(side) for side in zip(*chosen, strict=True))
    return i, j
