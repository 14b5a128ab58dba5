"""Tiles: products of the codes of two blocks of rows, and the pairs they do not rule out.

Most tiles hold few close pairs, which are listed and verified later. Where very many are close
(thousands of copies of one picture), listing them would cost the square of their number: such a
crowded tile gives a spanning forest of its pairs instead, verified at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from snipdedup.features.cosine import (
    PROPOSAL_ERROR,
    directions,
    indexed_cosines,
    plain_norms,
    row_sums,
)
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.join.forest import Edges, best_edge, join_edges, link_smaller, make_edges
from snipdedup.join.kernels import MOST_RUNS, RUN, Kernel, all_close, pick_kernel, product_hits
from snipdedup.parallel import scratch

ROW_TILE, COLUMN_TILE = 1024, 2048
CROWDED = 1 / 64  # share of a tile's pairs from which they are not listed
EXACT_COLUMNS = 1 << 10  # int8 products of so many values are below 2^24: exact in float32
PLAIN_COLUMNS = 1 << 8  # of float64 products held at a time
MOST_ERROR = 2e-3  # of quick products in a crowded tile: more would leave too many pairs unsure


class CodedRows(NamedTuple):
    """Rows with their codes."""

    row: np.ndarray  # (n,) int64: global rows
    codes: np.ndarray  # (n, w) int8
    corrections: np.ndarray  # (n,) float64: by how much each row's limit falls

    def where(self, places: Any) -> CodedRows:
        """Return the rows that a slice, mask or index array selects."""
        return CodedRows(*(column[places] for column in self))


class TilePairs(NamedTuple):
    """What a column of tiles leaves."""

    a: np.ndarray  # (n,) int64: candidate pairs that remain to be verified
    b: np.ndarray
    edges: Edges  # forests of crowded tiles, verified
    candidates: int  # pairs that the codes could not rule out


class Wanted(NamedTuple):
    """Which pairs of a tile's rows and columns are looked for, each pair once."""

    start: int  # where the tile's rows begin among the columns, if rows are columns too
    overlaps: bool  # whether they are: then none pairs with itself or a later column
    old_rows: np.ndarray  # (m,) bool: rows that are reference rows
    old_columns: np.ndarray  # (n,) bool: columns that are; two reference rows do not pair
    references_only: bool  # then two others do not pair either

    def pairs(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Return which pairs of rows i with columns j are looked for."""
        once: np.ndarray = (j < i + self.start) | (not self.overlaps)
        if self.references_only:
            return once & (self.old_rows[i] != self.old_columns[j])
        return once & ~(self.old_rows[i] & self.old_columns[j])


def compare_tiles(
    features: Features,
    members: CodedRows,
    columns: int,
    *,
    limit: float,
    threshold: float,
    device: str = "cpu",
    reference_rows: int = 0,
    references_only: bool = False,
) -> TilePairs:
    """Compare the first ``columns`` rows, at most `COLUMN_TILE`, with themselves and all others.

    Parameters
    ----------
    limit : float
        Product from which two codes may be a pair, before corrections.
    device : str
        Where products are computed: ``cpu`` or ``cuda``.
    reference_rows : int
        Global rows below are not compared with one another.
    references_only : bool
        Nor are the others.
    """
    import torch

    kernel = pick_kernel(device)
    right, first = members.where(slice(columns)), 0
    old = right.row < reference_rows
    if reference_rows and old.all():
        members, first = members.where(members.row >= reference_rows), columns  # none is a column
    if references_only and not old.any():
        members, first = members.where(members.row < reference_rows), columns
    prepared = prepare_columns(kernel, right.codes)
    lowest = limit - right.corrections.max(initial=0)
    listed: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0, np.int64),) * 2]
    forests, count = [], 0
    for start in range(0, len(members.row), ROW_TILE):
        left = members.where(slice(start, start + ROW_TILE))
        overlaps = first + start < columns
        used = min(columns, start + ROW_TILE) if overlaps else columns  # no later column is wanted
        some = prepared if used == columns else prepare_columns(kernel, right.codes[:used])
        products = kernel.multiply(torch.from_numpy(left.codes).to(device), some)
        old_rows, old_columns = left.row < reference_rows, old[:used]
        wanted = Wanted(start, overlaps, old_rows, old_columns, references_only)
        i, j, close = close_places(products, lowest - left.corrections, used, wanted)
        if close is None:
            listed.append((left.row[i], right.row[j]))
            count += len(i)
            continue
        count += int(np.count_nonzero(close))
        # a forest of pairs of two others, and of each kind of pairs with a reference row
        kinds = ((~old_rows, ~old_columns), (old_rows, ~old_columns), (~old_rows, old_columns))
        for i, j in (map(np.flatnonzero, kind) for kind in kinds):
            if len(i) and len(j):
                part = left.row[i], right.row[j], close[np.ix_(i, j)]
                forests.append(crowded_forest(features, *part, threshold))
    a, b = (np.concatenate(side) for side in zip(*listed, strict=True))
    return TilePairs(a, b, join_edges(forests), count)


def close_places(
    products: Any, limits: np.ndarray, columns: int, wanted: Wanted
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return the rows and columns of a tile's pairs; of a crowded tile none, but a mask of them.

    Products, an (m, n) tensor, are of no row after so many columns.
    """
    many = CROWDED * ROW_TILE * COLUMN_TILE
    hits = product_hits(products, limits, MOST_RUNS)
    if hits is not None and hits.total <= many:
        i, j = hits.places()
        i, j = i[j < columns], j[j < columns]
        use = wanted.pairs(i, j)
        return i[use], j[use], None
    close = all_close(products, limits)[:, :columns]
    close &= wanted.pairs(np.arange(len(close))[:, None], np.arange(columns))
    if np.count_nonzero(close) > many:
        return np.empty(0, np.int64), np.empty(0, np.int64), close
    i, j = np.nonzero(close)
    return i, j, None


def prepare_columns(kernel: Kernel, codes: np.ndarray) -> Any:
    """Return codes as a kernel's columns, with zeros after them so that all runs are whole."""
    import torch

    whole = np.zeros((-(-len(codes) // RUN) * RUN, codes.shape[1]), np.int8)
    whole[: len(codes)] = codes
    return kernel.prepare(torch.from_numpy(whole).to(kernel.device))


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
    unit_x, unit_y = unit_tensor(x, "rows"), unit_tensor(y, "columns")
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


def unit_tensor(rows: np.ndarray, use: str) -> Any:
    """Return rows scaled to norm 1 as a float32 tensor, in memory that is used again."""
    import torch

    found = directions(rows, torch.from_numpy(scratch(use, rows.shape, np.float32)))
    return found.values * found.factor[:, None]


def plain_cosines(x: Any, y: Any, table: np.ndarray) -> float:
    """Write the products of unit rows to ``table``; return by how much they may be wrong.

    Rows become integers of norm 2^25, whose products are exact in float64.
    """
    left = x.mul(2.0**25).round_().double()
    for start, stop in plan_blocks(len(y), PLAIN_COLUMNS):
        right = y[start:stop].mul(2.0**25).round_().double()
        table[:, start:stop] = (left @ right.T).mul_(2.0**-50).numpy()
    return PROPOSAL_ERROR


def centred_cosines(x: Any, y: Any, table: np.ndarray) -> float:
    """Write the cosines of unit rows that are near one another to ``table``, by int8 products.

    x·y = 1 - (‖a‖² + ‖b‖²) / 2 + a·b, where a and b are what is left of x and y without the mean
    of y. Where rows are near, these are short, and int8 holds them well: it is wrong by some 1e-5,
    at several times the speed of float32. Returns by how much a cosine may be wrong at most (Cauchy
    and Schwarz); infinity, and an untouched table, where that is more than `MOST_ERROR`.
    """
    centre = row_sums(y.clone().T) / len(y)
    a, b = (short_codes(side - centre) for side in (x, y))
    error = float(a.lost.max() * b.norm.max() + a.norm.max() * b.lost.max())
    error += float(a.lost.max() * b.lost.max()) + PROPOSAL_ERROR
    if error > MOST_ERROR:
        return float("inf")
    code_products(a.codes, b.codes, table)
    table *= a.scale[:, None]
    table *= b.scale
    table += 1 - a.norm[:, None] ** 2 / 2
    table -= b.norm**2 / 2
    return error


def code_products(x: Any, y: Any, table: np.ndarray) -> None:
    """Write the exact products of int8 codes of any width to ``table``, rounded to float32."""
    import torch

    kernel, out = pick_kernel("cpu"), torch.from_numpy(table)
    if x.shape[1] <= EXACT_COLUMNS:
        out.copy_(kernel.multiply(x, kernel.prepare(y)))
        return
    total = torch.zeros(table.shape, dtype=torch.int64)
    for left, right in zip(x.split(EXACT_COLUMNS, 1), y.split(EXACT_COLUMNS, 1), strict=True):
        total += kernel.multiply(left.contiguous(), kernel.prepare(right)).to(torch.int64)
    out.copy_(total)


class ShortCodes(NamedTuple):
    """Rows as int8, each with its own scale."""

    codes: Any  # (n, d) int8 tensor
    scale: np.ndarray  # (n,) float32: what a unit of a code is worth
    norm: np.ndarray  # (n,) float32: norm of the row
    lost: np.ndarray  # (n,) float32: norm of what its code does not hold


def short_codes(rows: Any) -> ShortCodes:
    """Round float32 rows to int8; overwrites them."""
    import torch

    norm = plain_norms(rows)
    scale = torch.maximum(rows.amax(1), -rows.amin(1)).clamp_(min=1e-30) / 127
    rows /= scale[:, None]
    codes = rows.round().to(torch.int8)
    lost = plain_norms(rows.sub_(codes)) * scale
    return ShortCodes(codes, *(side.numpy() for side in (scale, norm, lost)))


def table_forest(
    table: np.ndarray, left: np.ndarray, right: np.ndarray, nodes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return a maximum spanning forest of a table's positive entries, as places (i, j).

    Borůvka's method: in each round every component takes its best entry, which is the best of its
    rows' and columns' best ones. ``left`` and ``right`` are the node of each row and column; one
    node may be both. Overwrites ``table``, (m, n) int32 or float32.
    """
    import torch

    turned = scratch("turned", table.T.shape, table.dtype)
    torch.from_numpy(turned).copy_(torch.from_numpy(table).T)  # several times faster than numpy
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
