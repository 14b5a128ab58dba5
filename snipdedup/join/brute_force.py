"""Brute force in bounded memory: every pair of rows is looked at. The truth for every test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from snipdedup import progress
from snipdedup.features.cosine import (
    PROPOSAL_ERROR,
    bad_rows,
    pair_cosine,
    unit_rows,
    unit_rows64,
    unsettled,
)
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.join.forest import Edges, make_edges, spanning_forest
from snipdedup.parallel import ordered_map

TILE = 2048  # rows of a tile's sides
STREAM_ROWS = 4096  # rows that a sample is compared with at once
VERIFY_PAIRS = 8192  # pairs whose rows are laid side by side at a time
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
        cosine[again] = listed_cosines(left.raw, right.raw, i + a[again], j + b[again])
    else:
        cosine = listed_cosines(left.raw, right.raw, i + a, j + b)
    edges = make_edges(left.rows[i + a], right.rows[j + b], cosine)
    return edges.at(threshold)


def listed_cosines(x: np.ndarray, y: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Return the cosines of rows i of x with rows j of y, (n,) float32."""
    parts = [np.empty(0, np.float32)]
    for start, stop in plan_blocks(len(i), VERIFY_PAIRS):
        parts.append(pair_cosine(x[i[start:stop]], y[j[start:stop]]))
    return np.concatenate(parts)


def nearest_rows(
    features: Features,
    sample: np.ndarray,
    skip: np.ndarray,
    *,
    threads: int,
    among: Features | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each sampled row the nearest other row, and their cosine, by brute force.

    All rows are streamed past the sample. The nearest is proposed in float32, so of rows within
    1e-5 of one another any may be named; its cosine is exact.

    Parameters
    ----------
    features : Features
    sample : (n,) int64
        Ascending rows that can be compared.
    skip : (rows,) bool
        Rows that do not count.
    threads : int
    among : Features, optional
        Look here for the nearest row, of which ``skip`` speaks then.

    Returns
    -------
    nearest : (n,) int64
        -1 where there is no other.
    cosine : (n,) float32
        NaN where there is no other.
    """
    import torch

    raw, where = features.gather(sample), among or features
    x = torch.from_numpy(unit_rows(raw))

    def search(span: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        block = where.read(*span)
        cosine = x @ torch.from_numpy(unit_rows(block)).T
        out = np.asarray(skip[slice(*span)]) | bad_rows(block)
        cosine[:, torch.from_numpy(out)] = -torch.inf
        if among is None:
            low, high = np.searchsorted(sample, span)
            cosine[np.arange(low, high), sample[low:high] - span[0]] = -torch.inf  # the row itself
        best, at = cosine.max(dim=1)
        return best.numpy(), at.numpy() + span[0]

    best, nearest = np.full(len(sample), -np.inf, np.float32), np.full(len(sample), -1)
    spans = plan_blocks(where.rows, STREAM_ROWS)
    for cosine, row in progress.track(
        ordered_map(search, spans, threads), "probing", "blocks", len(spans)
    ):
        better = cosine > best
        best[better], nearest[better] = cosine[better], row[better]
    exact = np.full(len(sample), np.nan, np.float32)
    some = np.flatnonzero(nearest >= 0)
    found_rows = where.gather(nearest[some])
    common = np.result_type(raw, found_rows)
    exact[some] = pair_cosine(raw[some].astype(common), found_rows.astype(common))
    return nearest, exact
