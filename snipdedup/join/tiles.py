"""Tiles: products of the codes of two blocks of rows, and the pairs they do not rule out.

Most tiles hold few close pairs, which are verified one by one. Where very many are close (thousands
of copies of one picture), that would cost the square of their number: such a crowded tile gives a
spanning forest of its pairs instead, by products of rows that are short where these are near.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from snipdedup import native
from snipdedup.features.cosine import PROPOSAL_ERROR, directions, indexed_cosines
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.join.forest import Edges, join_edges, make_edges
from snipdedup.join.kernels import TileColumns
from snipdedup.join.verify import GATHER_PAIRS, verify_places
from snipdedup.native.fallback import best_edge, link_smaller, row_sums
from snipdedup.parallel import scratch

ROW_TILE, COLUMN_TILE = 1024, 2048
CROWDED = 1 / 64  # share of a tile's pairs from which they are not verified one by one
PLAIN_COLUMNS = 1 << 8  # of float64 products held at a time
MOST_ERROR = 2e-3  # of quick products in a crowded tile: more would leave too many pairs unsure


class CodedRows(NamedTuple):
    """Rows with their codes: narrow ones that rule out most pairs, wide ones for the others."""

    row: np.ndarray  # (n,) int64: global rows
    narrow: np.ndarray  # (n, w) int8
    fall: np.ndarray  # (n,) float32: by how much each row's limit falls
    wide: np.ndarray  # (n, v) int8; v is 0 where narrow codes do
    wide_fall: np.ndarray  # (n,) float32

    def where(self, places: Any) -> CodedRows:
        """Return the rows that a slice, mask or index array selects."""
        return CodedRows(*(column[places] for column in self))


class Limits(NamedTuple):
    """Products from which two rows may be a pair, before their limits fall."""

    narrow: float
    wide: float


def compare_tiles(
    features: Features,
    members: CodedRows,
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
    ``references_only`` the others are not either.

    Returns
    -------
    edges : list of Edges
        Verified; where there are many, spanning forests of parts of them.
    candidates : int
        Pairs that the codes could not rule out.
    """
    right, first = members.where(slice(columns)), 0
    old = right.row < reference_rows
    if reference_rows and old.all():
        members, first = members.where(members.row >= reference_rows), columns  # none is a column
    if references_only and not old.any():
        members, first = members.where(members.row < reference_rows), columns
    wide = right.wide if right.wide.shape[1] else None
    tiles = TileColumns(right.narrow, wide, device, old)
    limit = limits.narrow - right.fall.max(initial=0)
    wide_limit = limits.wide - right.wide_fall.max(initial=0)
    rows = np.concatenate([right.row, members.row]) if first else members.row
    found: list[Edges] = []
    listed: list[tuple[np.ndarray, np.ndarray]] = []
    candidates, waiting = 0, 0
    for start in range(0, len(members.row), ROW_TILE):
        left = members.where(slice(start, start + ROW_TILE))
        i, j = tiles.hits(
            left.narrow, limit - left.fall, left.wide, wide_limit - left.wide_fall,
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
        if waiting >= GATHER_PAIRS or start + ROW_TILE >= len(members.row):
            a, b = (np.concatenate(side) for side in zip(*listed, strict=True))
            found.append(verify_places(features, rows, a, b, threshold, reference_rows))
            listed, waiting = [], 0
    if waiting:
        a, b = (np.concatenate(side) for side in zip(*listed, strict=True))
        found.append(verify_places(features, rows, a, b, threshold, reference_rows))
    return found, candidates


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
    """Return the forest of a crowded tile's pairs, by one product of the raw rows.

    Pairs too close to the threshold for that product are decided one by one. Of two edges within
    its error of each other it decides which is taken: it is made of exact products of integers and
    single operations, so that every processor takes the same. ``close``, (m, n) bool, are the
    candidate pairs of the global rows and columns.
    """
    left, right = np.flatnonzero(close.any(1)), np.flatnonzero(close.any(0))
    if not len(left):
        return join_edges([])
    if len(left) * len(right) < close.size:
        rows, columns = rows[left], columns[right]
        close = np.take(np.take(close, left, axis=0), right, axis=1)
    x, y = features.gather(rows), features.gather(columns)
    unit_x, unit_y = directions(x).unit(), directions(y).unit()
    table = scratch("table", close.shape, np.float32)
    for cosines in (centred_cosines, plain_cosines):
        error = cosines(unit_x, unit_y, table)
        if error > MOST_ERROR:
            continue
        table += np.float32(2)  # positive, whatever the threshold
        table *= close
        table *= table >= np.float32(threshold + 2 - error)
        unsure = (table > 0) & (table <= np.float32(threshold + 2 + error))
        if np.count_nonzero(unsure) <= CROWDED * table.size:
            break
    i, j = np.divmod(np.flatnonzero(unsure.ravel()), len(columns))
    table[i, j] *= indexed_cosines(x, y, i, j) >= np.float32(threshold)
    nodes = np.unique(np.concatenate([rows, columns]))
    i, j = table_forest(
        table, np.searchsorted(nodes, rows), np.searchsorted(nodes, columns), len(nodes)
    )
    return make_edges(rows[i], columns[j], indexed_cosines(x, y, i, j))


def plain_cosines(x: np.ndarray, y: np.ndarray, table: np.ndarray) -> float:
    """Write the products of unit rows to ``table``; return by how much they may be wrong.

    Rows become integers of norm 2^25, whose products are exact in float64.
    """
    left = np.rint(x * np.float32(2**25)).astype(np.float64)
    for start, stop in plan_blocks(len(y), PLAIN_COLUMNS):
        right = np.rint(y[start:stop] * np.float32(2**25)).astype(np.float64)
        table[:, start:stop] = (left @ right.T) * 2.0**-50
    return PROPOSAL_ERROR


def centred_cosines(x: np.ndarray, y: np.ndarray, table: np.ndarray) -> float:
    """Write the cosines of unit rows that are near one another to ``table``, by int8 products.

    x·y = 1 - (‖a‖² + ‖b‖²) / 2 + a·b, where a and b are what is left of x and y without the mean
    of y. Where rows are near, these are short, and int8 holds them well: it is wrong by some 1e-5,
    at several times the speed of float32. Returns by how much a cosine may be wrong at most (Cauchy
    and Schwarz); infinity, and an untouched table, where that is more than `MOST_ERROR`.
    """
    centre = row_sums(np.array(y.T, order="C")) / np.float32(len(y))
    a, b = (short_codes(side - centre) for side in (x, y))
    error = float(a.lost.max() * b.norm.max() + a.norm.max() * b.lost.max())
    error += float(a.lost.max() * b.lost.max()) + PROPOSAL_ERROR
    if error > MOST_ERROR:
        return float("inf")
    table[:] = native.products(a.codes, native.columns(b.codes))
    table *= a.scale[:, None]
    table *= b.scale
    table += 1 - a.norm[:, None] ** 2 / 2
    table -= b.norm**2 / 2
    return error


class ShortCodes(NamedTuple):
    """Rows as int8, each with its own scale."""

    codes: np.ndarray  # (n, d) int8
    scale: np.ndarray  # (n,) float32: what a unit of a code is worth
    norm: np.ndarray  # (n,) float32: norm of the row
    lost: np.ndarray  # (n,) float32: norm of what its code does not hold


def short_codes(rows: np.ndarray) -> ShortCodes:
    """Round float32 rows to int8; overwrites them."""
    norm = np.sqrt(row_sums(rows * rows))
    scale = np.maximum(rows.max(1), -rows.min(1)).clip(1e-30) / np.float32(127)
    rows /= scale[:, None]
    codes = np.rint(rows).astype(np.int8)
    rows -= codes
    lost = np.sqrt(row_sums(rows * rows)) * scale
    return ShortCodes(codes, scale, norm, lost)


def table_forest(
    table: np.ndarray, left: np.ndarray, right: np.ndarray, nodes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return a maximum spanning forest of a table's positive entries, as places (i, j).

    Borůvka's method: in each round every component takes its best entry, which is the best of its
    rows' and columns' best ones. ``left`` and ``right`` are the node of each row and column; one
    node may be both. Overwrites ``table``, (m, n) int32 or float32.
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
        order = order[: np.count_nonzero(table[i, j] > 0)]
        if not len(order):
            break
        i, j = i[order], j[order]
        u, v = label[left[i]], label[right[j]]
        best = best_edge(u, v, np.arange(len(i)), nodes)
        picks = np.unique(best[best < len(i)])
        chosen.append((i[picks], j[picks]))
        link_smaller(label, u[picks], v[picks])
        own, other = label[left].astype(small), label[right].astype(small)
        table *= own[:, None] != other
        turned *= other[:, None] != own
    i, j = (np.concatenate(side) for side in zip(*chosen, strict=True))
    return i, j
