"""Brute force in bounded memory: every pair of rows is looked at. The truth for every test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from snipdedup import progress
from snipdedup.features.cosine import (
    PROPOSAL_ERROR,
    indexed_cosines,
    unit_rows,
    unit_rows64,
    unsettled,
)
from snipdedup.features.shards import Features
from snipdedup.join.forest import Edges, make_edges, spanning_forest
from snipdedup.parallel import ordered_map

TILE = 2048  # rows of a tile's sides
DENSE = 1 / 64  # share of a tile from which its cosines are computed all at once


class Panel(NamedTuple):
    """Rows held in memory: their numbers, as stored, and as float32 unit rows."""

    rows: np.ndarray
    raw: np.ndarray
    unit: np.ndarray


def exact_edges(
    features: Features,
    rows: np.ndarray,
    threshold: float,
    *,
    threads: int,
    memory: int,
    frozen: int = 0,
    across: bool = False,
) -> Iterator[Edges]:
    """Yield the spanning forest of each tile's pairs, from all pairs of ``rows``.

    Parameters
    ----------
    features : Features
    rows : (n,) int64
        The rows to compare, ascending: distinct ones that can be compared.
    threshold : float
        Cosine from which two rows are a pair.
    threads : int
    memory : int
        Bytes for two panels of rows; a smaller bound reads the features more often.
    frozen : int
        Pairs of two rows below this are left out, and those of two others have a forest of their
        own, see `forest.spanning_forest`.
    across : bool
        Leave out pairs of two others, too.
    """
    size = panel_rows(features, memory)
    starts = range(0, len(rows), size)
    early = int(np.searchsorted(rows, frozen))
    plans = {
        (i, j): tile_plan(len(rows), size, i, j, early, across)
        for i in starts
        for j in starts
        if j >= i
    }
    tiles = sum(map(len, plans.values()))
    with progress.bar(tiles, "comparing", "tiles") as bar:
        for i in starts:
            if not any(plans[i, j] for j in range(i, len(rows), size)):
                continue
            left = load_panel(features, rows[i : i + size])
            for j in range(i, len(rows), size):
                plan = plans[i, j]
                if not plan:
                    continue
                right = left if j == i else load_panel(features, rows[j : j + size])

                def compare(
                    tile: tuple[int, int], left: Panel = left, right: Panel = right
                ) -> Edges:
                    edges = tile_pairs(left, right, *tile, threshold)
                    if frozen:
                        edges = edges.where(edges.b >= frozen)
                    if across:
                        edges = edges.where(edges.a < frozen)
                    return spanning_forest(edges, frozen)

                for edges in ordered_map(compare, plan, threads):
                    bar.update(1)
                    yield edges


def panel_rows(features: Features, memory: int) -> int:
    """Return how many rows a panel may hold, in whole tiles."""
    row_bytes = features.dim * (features.dtype.itemsize + 4)
    return max(TILE, memory // (2 * row_bytes) // TILE * TILE)


def tile_plan(
    rows: int, size: int, i: int, j: int, early: int = 0, across: bool = False
) -> list[tuple[int, int]]:
    """Return the tiles (left start, right start) of panels at rows i and j, each pair once.

    Tiles of two rows below ``early`` are left out; with ``across`` those of two others, too.
    """
    left = [a for a in range(0, min(size, rows - i), TILE) if not across or i + a < early]
    right = [b for b in range(0, min(size, rows - j), TILE) if min(j + b + TILE, rows) > early]
    return [(a, b) for a in left for b in right if i != j or b >= a]


def load_panel(features: Features, rows: np.ndarray) -> Panel:
    """Read a panel."""
    raw = features.gather(rows)
    return Panel(rows, raw, unit_rows(raw))


def tile_pairs(left: Panel, right: Panel, i: int, j: int, threshold: float) -> Edges:
    """Return all pairs between ``TILE`` rows of two panels, by float64 cosine."""
    import torch

    x, y = left.unit[i : i + TILE], right.unit[j : j + TILE]
    product = (torch.from_numpy(x) @ torch.from_numpy(y).T).numpy()
    limit = np.float32(threshold)
    found = np.flatnonzero(product.ravel() >= limit - np.float32(PROPOSAL_ERROR))
    a, b = np.divmod(found, len(y))
    if left is right and i == j:
        a, b = a[a < b], b[a < b]
    if len(a) > DENSE * product.size:
        dense = unit_rows64(left.raw[i : i + TILE]) @ unit_rows64(right.raw[j : j + TILE]).T
        quick = dense[a, b]
        cosine = np.minimum(quick.astype(np.float32), np.float32(1))
        again = np.flatnonzero(unsettled(quick, left.raw.shape[1]))
        cosine[again] = indexed_cosines(left.raw, right.raw, i + a[again], j + b[again])
    else:
        cosine = indexed_cosines(left.raw, right.raw, i + a, j + b)
    edges = make_edges(left.rows[i + a], right.rows[j + b], cosine)
    return edges.at(threshold)
