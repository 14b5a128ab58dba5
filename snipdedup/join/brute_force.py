"""Brute force in bounded memory: every pair of rows is compared. The truth for every test."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from snipdedup import progress
from snipdedup.features.cosine import PROPOSAL_ERROR, all_cosines, indexed_cosines, unit_rows
from snipdedup.features.shards import Features
from snipdedup.join.forest import Edges, make_edges, spanning_forest
from snipdedup.parallel import ordered_map

TILE = 2048  # rows of a tile's sides
DENSE = 1 / 64  # share of a tile's pairs from which its cosines are computed all at once


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
    reference_rows: int = 0,
    references_only: bool = False,
) -> Iterator[Edges]:
    """Yield the spanning forest of each tile's pairs, from all pairs of ``rows``.

    Parameters
    ----------
    rows : (n,) int64
        The rows to compare, ascending: distinct ones that can be compared.
    memory : int
        Bytes for two panels of rows; with fewer, the features are read more often.
    reference_rows : int
        Rows below are not compared with one another; see `forest.spanning_forest`.
    references_only : bool
        Nor are the others compared with one another.
    """
    size = panel_rows(features, memory)
    starts = range(0, len(rows), size)
    references = int(np.searchsorted(rows, reference_rows))
    plans = {
        (i, j): tile_plan(len(rows), size, i, j, references, references_only)
        for i in starts
        for j in range(i, len(rows), size)
    }
    with progress.bar(sum(map(len, plans.values())), "comparing", "tiles") as bar:
        for i in starts:
            if not any(plans[i, j] for j in range(i, len(rows), size)):
                continue
            left = load_panel(features, rows[i : i + size])
            for j in range(i, len(rows), size):
                if not plans[i, j]:
                    continue
                right = left if j == i else load_panel(features, rows[j : j + size])
                compare = partial(tile_forest, left, right, threshold, reference_rows)
                for edges in ordered_map(compare, plans[i, j], threads):
                    bar.update(1)
                    yield edges.where(edges.a < reference_rows) if references_only else edges


def panel_rows(features: Features, memory: int) -> int:
    """Return how many rows a panel may hold, in whole tiles."""
    row_bytes = features.dim * (features.dtype.itemsize + 4)
    return max(TILE, memory // (2 * row_bytes) // TILE * TILE)


def tile_plan(
    rows: int, size: int, i: int, j: int, references: int = 0, references_only: bool = False
) -> list[tuple[int, int]]:
    """Return the tiles (left start, right start) of panels at places i and j, each pair once.

    Tiles of two reference rows (places below ``references``) are left out; with
    ``references_only`` those of two others too.
    """
    left = [
        a for a in range(0, min(size, rows - i), TILE) if not references_only or i + a < references
    ]
    right = [b for b in range(0, min(size, rows - j), TILE) if min(j + b + TILE, rows) > references]
    return [(a, b) for a in left for b in right if i != j or b >= a]


def load_panel(features: Features, rows: np.ndarray) -> Panel:
    """Read rows, (n,) int64, as a panel."""
    raw = features.gather(rows)
    return Panel(rows, raw, unit_rows(raw))


def tile_forest(
    left: Panel, right: Panel, threshold: float, reference_rows: int, tile: tuple[int, int]
) -> Edges:
    """Return the spanning forest of a tile's pairs, without those of two reference rows."""
    edges = tile_pairs(left, right, *tile, threshold)
    return spanning_forest(edges.where(edges.b >= reference_rows), reference_rows)


def tile_pairs(left: Panel, right: Panel, i: int, j: int, threshold: float) -> Edges:
    """Return all pairs between `TILE` rows of two panels, from places i and j on."""
    x, y = left.unit[i : i + TILE], right.unit[j : j + TILE]
    product = x @ y.T
    limit = np.float32(threshold) - np.float32(PROPOSAL_ERROR)
    a, b = np.divmod(np.flatnonzero(product.ravel() >= limit), len(y))
    if left is right and i == j:
        a, b = a[a < b], b[a < b]
    if len(a) > DENSE * product.size:
        cosine = all_cosines(left.raw[i : i + TILE], right.raw[j : j + TILE])[a, b]
    else:
        cosine = indexed_cosines(left.raw, right.raw, i + a, j + b)
    return make_edges(left.rows[i + a], right.rows[j + b], cosine).at(threshold)
