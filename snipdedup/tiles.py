"""Tiles: products of the codes of two blocks of rows, and the pairs they do not rule out.

Most tiles hold few close pairs, which are listed and proved later. Where very many are close
(thousands of copies of one picture), listing them would cost the square of their number: such a
tile gives a spanning forest of its pairs instead, proved at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from snipdedup.cosine import PROPOSAL_ERROR, unit_rows
from snipdedup.forest import Edges, best_edge, join_edges, link_smaller, make_edges
from snipdedup.kernels import pick_kernel, product_hits
from snipdedup.shards import Features
from snipdedup.verify import proved_cosines

ROW_TILE, COLUMN_TILE = 1024, 2048
CROWDED = 1 / 64  # share of a tile's pairs from which they are not listed


class Codes(NamedTuple):
    """Rows with their codes.

    Attributes
    ----------
    row : (n,) int64
        Global rows.
    codes : (n, w) int8
    slack : (n,) float64
        By how much each row's limit falls.
    """

    row: np.ndarray
    codes: np.ndarray
    slack: np.ndarray

    def part(self, start: int, stop: int) -> Codes:
        """Return some of the rows."""
        return Codes(self.row[start:stop], self.codes[start:stop], self.slack[start:stop])


class TilePairs(NamedTuple):
    """What a column of tiles leaves.

    Attributes
    ----------
    a, b : (n,) int64
        Pairs that remain to be proved.
    edges : Edges
        Forests of crowded tiles, proved.
    proposed : int
        Pairs that the codes could not rule out.
    """

    a: np.ndarray
    b: np.ndarray
    edges: Edges
    proposed: int


def compare(
    features: Features,
    members: Codes,
    columns: int,
    *,
    limit: float,
    threshold: float,
    device: str = "cpu",
) -> TilePairs:
    """Compare the first ``columns`` rows with one another and with all rows after them.

    Parameters
    ----------
    features : Features
    members : Codes
    columns : int
        At most `COLUMN_TILE`.
    limit : float
        Product from which two codes without slack may be a pair.
    threshold : float
        Cosine from which two rows are a pair.
    device : str
        Where products are computed: ``cpu`` or ``cuda``.
    """
    import torch

    kernel = pick_kernel(device, members.codes.shape[1])
    right = members.part(0, columns)
    prepared = kernel.prepare(torch.from_numpy(right.codes).to(device))
    lowest = limit - kernel.rounding * abs(limit) - right.slack.max(initial=0)
    listed, forests, count = [(np.empty(0, np.int64),) * 2], [], 0
    for start in range(0, len(members.row), ROW_TILE):
        left = members.part(start, start + ROW_TILE)
        products = kernel.multiply(torch.from_numpy(left.codes).to(device), prepared)
        tile = Tile(left, right, products, lowest - left.slack, start)
        hits = tile.crowd()
        if hits:
            forests.append(crowded(features, tile, threshold))
        else:
            i, j = tile.hits()
            hits = len(i)
            listed.append((left.row[i], right.row[j]))
        count += hits
    a, b = (np.concatenate(side) for side in zip(*listed, strict=True))
    return TilePairs(a, b, join_edges(forests), count)


class Tile:
    """The products of some rows (left) with the columns (right), and each row's limit.

    ``start`` is the left rows' place among the members, of which the columns are the first: pairs
    of a row with itself or with a later column are left out, so that each pair comes once.
    """

    def __init__(
        self, left: Codes, right: Codes, products: Any, limits: np.ndarray, start: int
    ) -> None:
        self.left, self.right, self.start = left, right, start
        self.products, self.limits = products, limits

    def crowd(self) -> int:
        """Return how many places reach their limit where they are too many to list, else 0."""
        rows = np.flatnonzero(self.products.amax(1).cpu().numpy() >= self.limits)
        if len(rows) <= CROWDED * ROW_TILE:
            return 0
        close = self.products.cpu().numpy()[rows] >= self.limits[rows, None]
        if self.start < len(self.right.row):  # each pair once
            close &= np.arange(close.shape[1]) < rows[:, None] + self.start
        hits = int(np.count_nonzero(close))
        return hits if hits > CROWDED * ROW_TILE * COLUMN_TILE else 0

    def hits(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the places (i, j) that reach their limit."""
        i, j = product_hits(self.products, self.limits)
        if self.start < len(self.right.row):
            once = j < i + self.start
            i, j = i[once], j[once]
        return i, j


def crowded(features: Features, tile: Tile, threshold: float) -> Edges:
    """Return the forest of a crowded tile's pairs, by one product of the raw rows.

    What lies too close to the threshold for float32 is decided one by one.
    """
    import torch

    close = tile.products.cpu().numpy() >= tile.limits[:, None]
    left, right = np.flatnonzero(close.any(1)), np.flatnonzero(close.any(0))
    x, y = features.gather(tile.left.row[left]), features.gather(tile.right.row[right])
    table = (torch.from_numpy(unit_rows(x)) @ torch.from_numpy(unit_rows(y)).T).numpy()
    wanted = table >= np.float32(threshold - PROPOSAL_ERROR)
    if tile.start < len(tile.right.row):
        wanted &= right < left[:, None] + tile.start
    i, j = np.nonzero(wanted & (table <= np.float32(threshold + PROPOSAL_ERROR)))
    wanted[i, j] = proved_cosines(x, y, i, j) >= np.float32(threshold)
    table += np.float32(2)  # positive, whatever the threshold
    table *= wanted
    rows, columns = tile.left.row[left], tile.right.row[right]
    nodes = np.unique(np.concatenate([rows, columns]))
    i, j = table_forest(
        table, np.searchsorted(nodes, rows), np.searchsorted(nodes, columns), len(nodes)
    )
    return make_edges(rows[i], columns[j], proved_cosines(x, y, i, j))


def table_forest(
    table: np.ndarray, left: np.ndarray, right: np.ndarray, nodes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return a maximum spanning forest of a table's positive entries, as places (i, j).

    Borůvka's method: in each round every component takes its best entry, which is the best of its
    rows' and columns' best ones. Spoils ``table``.

    Parameters
    ----------
    table : (m, n) int32 or float32
    left, right : (m,), (n,) int64
        Node of each row and column; one node may be both.
    nodes : int
    """
    turned = np.ascontiguousarray(table.T)
    label = np.arange(nodes)
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
        table *= label[left][:, None] != label[right]
        turned *= label[right][:, None] != label[left]
    i, j = (np.concatenate(side) for side in zip(*chosen, strict=True))
    return i, j
