"""Fitting a join's model to a sample of distinct rows: directions, centroids, hubs, τ."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from snipdedup.ground.compute import in_order, library_threads
from snipdedup.ground.cosine import bad_rows
from snipdedup.ground.scan import BLOCK, row_hashes
from snipdedup.ground.shards import Features, plan_blocks
from snipdedup.search.lists import Lists, calibrate_tau, sample_pairs, train_centroids
from snipdedup.search.masses import ABSORBED, find_hubs
from snipdedup.search.model import Model
from snipdedup.search.projection import WIDTHS, Projection, fit_projections
from snipdedup.search.verify import proved_cosines

SINGLE_LIST_ROWS = 1 << 16  # up to here, comparing all codes is cheaper than making lists
DIRECTION_ROWS = 1 << 13  # rows to find the main directions on
CALIBRATION_ROWS = 1 << 15  # rows among whose pairs τ is calibrated
CALIBRATION_PAIRS = 1 << 15
PROPOSALS_A_ROW = 2.0  # more pairs than this to prove for each row are dearer than wider codes
CROWDED_DEGREE = 8  # pairs of a row of the sample that count
ROWS_A_CENTROID = 48  # rows of the sample for each centroid


def load_or_fit(
    features: Features, threshold: float, recall: float, seed: int, path: Path, threads: int
) -> Model:
    """Fit the model, or take the one that a stopped run left."""
    if not path.is_file():
        fit(features, threshold, recall, seed, threads).save(path)
    return Model.load(path)


def fit(features: Features, threshold: float, recall: float, seed: int, threads: int) -> Model:
    """Fit directions, centroids, hubs and τ to a sample of distinct rows."""
    nlist = list_count(features.rows)
    rows, sample = sample_distinct(features, max(CALIBRATION_ROWS, ROWS_A_CENTROID * nlist), seed)
    with library_threads(1):  # float arithmetic, whose last bits depend on the threads
        projection, pairs = choose_projection(sample, threshold, seed, features.rows, threads)
    codes = encode_sample(projection, sample, threads)
    hubs = find_hubs(
        rows, sample, codes, projection, threshold=threshold, total=features.rows, threads=threads
    )
    if features.rows <= SINGLE_LIST_ROWS and not len(hubs.row):
        nlist = 1
    nlist = min(nlist, max(1, len(codes) // 8))
    if nlist == 1:
        return Model(projection, Lists(codes[:1], 0.0, 0.0), hubs, threshold, 0)
    centroids = train_centroids(codes, nlist, seed, threads)
    a, b = (side[:: max(1, len(side) // CALIBRATION_PAIRS)] for side in pairs)
    true = proved_cosines(sample, sample, a, b) >= np.float32(threshold)
    near = codes[:CALIBRATION_ROWS]
    absorbed = hubs.place(near, np.zeros(len(near)), sample[: len(near)]).reach == ABSORBED
    true &= ~(absorbed[a] & absorbed[b])  # met at their hub
    tau, alone = calibrate_tau(
        near,
        centroids,
        (a[true], b[true]),
        recall=recall,
        reach=projection.distance(threshold),
        threads=threads,
    )
    return Model(projection, Lists(centroids, tau, alone), hubs, threshold, int(true.sum()))


def list_count(rows: int) -> int:
    """Return how many coarse lists a set of ``rows`` rows gets.

    Assigning costs rows × lists and joining rows × rows / lists × lists visited, at about the
    same price, so both are smallest near the square root of the rows.
    """
    return round(rows**0.5)


def choose_projection(
    sample: np.ndarray, threshold: float, seed: int, rows: int, threads: int
) -> tuple[Projection, tuple[np.ndarray, np.ndarray]]:
    """Return the narrowest projection that does not propose too many pairs, and those it does.

    How many pairs a row would get in the whole set is extrapolated from the sample. Rows of large
    groups count as others do: their tiles are crowded at any width.
    """
    part, widths = sample[:CALIBRATION_ROWS], list(WIDTHS)
    if rows <= SINGLE_LIST_ROWS:
        part, widths = sample[:0], list(WIDTHS[-1:])
    found = []
    for projection in fit_projections(sample[:DIRECTION_ROWS], widths, seed):
        codes = encode_sample(projection, part, threads)
        a, b = sample_pairs(codes, projection.limit(threshold), threads)
        degree = np.minimum(np.bincount(np.concatenate([a, b]), minlength=1), CROWDED_DEGREE)
        found.append((projection, (a, b), degree.sum() / 2 * rows / max(1, len(part)) ** 2))
        if found[-1][2] <= PROPOSALS_A_ROW:  # wider codes could not save more than that
            break
    narrow, wide = found[0], found[-1]
    return narrow[:2] if narrow[2] - wide[2] <= PROPOSALS_A_ROW else wide[:2]


def encode_sample(projection: Projection, sample: np.ndarray, threads: int) -> np.ndarray:
    """Return the codes of a sample."""
    blocks = [sample[start:stop] for start, stop in plan_blocks(len(sample), BLOCK)]
    codes = [codes for codes, _ in in_order(projection.encode, blocks, threads)]
    return np.concatenate([np.empty((0, projection.width), np.int8), *codes])


def sample_distinct(features: Features, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return about ``count`` distinct rows that can be compared, in random order.

    Returns
    -------
    rows : (n,) int64
        Global rows.
    sample : (n, d)
        Their features; one row of ones where no row can be compared.
    """
    rng = np.random.default_rng(seed)
    rows = np.unique(rng.integers(0, features.rows, 2 * count))
    rows = np.arange(features.rows) if features.rows <= count else rng.permutation(rows)[:count]
    rows = np.sort(rows)
    sample = features.gather(rows)
    use = np.flatnonzero(~bad_rows(sample))
    use = use[np.unique(row_hashes(sample[use]), return_index=True)[1]]
    if not len(use):
        return rows[:1], np.ones((1, features.dim), features.dtype)
    use = rng.permutation(use)
    return rows[use], sample[use]
