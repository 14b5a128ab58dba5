"""Fitting a join's model to two samples: directions, hubs and τ to one, centroids to the other.

τ says how far from a border rows are still compared across it. Centroids lie nearer to the rows
that they were trained on than to others, so τ is calibrated on rows that had no part in that.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from snipdedup.features.cosine import bad_rows, directions, indexed_cosines, same_bits
from snipdedup.features.hashing import row_hashes
from snipdedup.features.scan import BLOCK
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.join.forest import Edges, make_edges
from snipdedup.join.hubs import ABSORBED, Hubs, find_hubs, no_hubs
from snipdedup.join.learned import Learned, encode_blocks, learn_codes
from snipdedup.join.lists import (
    Asked,
    Lists,
    calibrate_tau,
    pair_products,
    sample_pairs,
    train_centroids,
)
from snipdedup.join.model import Model
from snipdedup.join.projection import WIDTHS, Projection, main_directions, project
from snipdedup.parallel import library_threads, ordered_map

SINGLE_LIST_ROWS = 1 << 16  # up to here, comparing all codes is cheaper than making lists
DIRECTION_ROWS = 1 << 13  # rows to find the main directions on
# Rows by whose pairs the width of codes is chosen, and their share of all rows in between. Of 2e9
# rows one pair among 8,192 rows would stand for 31 proposals a row: too few rows see nothing.
CHOICE_ROWS, CHOICE_SHARE = (1 << 13, 1 << 17), 1 / 128
# What a coordinate more of all codes costs a row, and a pair to prove, in products of two int8
# values: measured with two cores on 1,000,000 rows.
CODE_PRODUCTS = 1 << 12  # to project a row on one more direction, write that and read it again
VISITING = 1.7  # times the rows of a list: half of those at home, and the visitors
PROPOSAL_PRODUCTS = 1 << 20
CALIBRATION_ROWS = 1 << 15, 1 << 19  # the least and the most among whose pairs τ is calibrated
CALIBRATION_SHARE = 1 / 64  # of all rows, in between
CALIBRATION_PAIRS = 1 << 16
CROWDED_DEGREE = 8  # pairs of a row of the sample that count
LISTS_A_ROOT = 0.6  # lists for each root of the rows
ROWS_A_CENTROID = 48  # rows that train each centroid


def load_or_fit(
    features: Features,
    threshold: float,
    recall: float,
    seed: int,
    path: Path,
    threads: int,
    encoder: Path | None = None,
    kept: Path | None = None,
    masses: bool = True,
) -> Model:
    """Fit the model, or take the one that a stopped run left, or what an earlier run ``kept``.

    Codes and lists of an earlier run suit any rows of one width. Its hubs are rows of its own set,
    so they are left out.
    """
    if not path.is_file():
        if kept is None:
            model = fit(features, threshold, recall, seed, threads, encoder, masses=masses)
        else:
            model = Model.load(kept)
            hubs = no_hubs(model.projection, features.dim, model.threshold)
            model = dataclasses.replace(model, hubs=hubs)
        model.save(path)
    return Model.load(path)


def fit(
    features: Features,
    threshold: float,
    recall: float,
    seed: int,
    threads: int,
    encoder: Path | None = None,
    total: int | None = None,
    masses: bool = True,
) -> Model:
    """Fit directions, hubs and τ to a sample of distinct rows, and centroids to other rows.

    With an encoder, codes are those of its descriptors, and masses are not looked for: what is near
    enough to a hub, only a bound could tell. Without ``masses`` they are not looked for either.
    """
    rows, sample = sample_distinct(features, calibration_rows(features.rows), seed, threads)
    with library_threads(1):  # float arithmetic, whose last bits depend on the threads
        projection = choose_projection(sample, threshold, seed, total or features.rows, threads)
    codes = encode_blocks(projection, sample, threads)
    hubs = no_hubs(projection, features.dim, threshold)
    if encoder is None and masses:
        hubs = find_hubs(
            rows, sample, codes, projection,
            threshold=threshold, total=features.rows, threads=threads,
        )  # fmt: skip
    nlist = min(list_count(features.rows), max(1, len(codes) // 8))
    if features.rows <= SINGLE_LIST_ROWS and not len(hubs.row):
        nlist = 1
    if nlist == 1 and encoder is None:
        return Model(projection, Lists(codes[:1], 0.0, 0.0), hubs, threshold, 0)
    # of a small set the sample is all of it: some rows then leave it, for the centroids
    wanted = training_rows(features.rows, nlist)
    kept = max(1, len(rows) - max(0, wanted - (features.rows - len(rows))))
    rows, raw, near = rows[:kept], sample[:kept], codes[:kept]
    pairs = true_pairs(near, raw, projection, hubs, threshold, threads)
    asked = Asked(threshold, recall, min(1.0, len(near) / features.rows), threads)
    if encoder is not None:
        projection = learn_codes(Learned.of(encoder, seed, "cpu"), raw, pairs, asked)
        near = encode_blocks(projection, raw, threads)
        hubs = no_hubs(projection, features.dim, threshold)
    lists = Lists(near[:1], 0.0, 0.0)
    if nlist > 1:
        trained = training_codes(features, projection, rows, wanted, seed, threads)
        nlist = min(nlist, max(1, len(trained)))
    if nlist > 1:
        centroids = train_centroids(trained, nlist, seed, threads)
        reach = projection.distance(threshold)
        lists = Lists(centroids, *calibrate_tau(near, centroids, pairs, asked, reach))
    return Model(projection, lists, hubs, threshold, len(pairs.a))


def calibration_rows(rows: int) -> int:
    """Return how many of a set's rows are sampled to find directions and hubs and calibrate τ."""
    return min(rows, int(np.clip(CALIBRATION_SHARE * rows, *CALIBRATION_ROWS)))


def training_rows(rows: int, lists: int) -> int:
    """Return how many other rows of a set train the centroids of so many lists."""
    return min(ROWS_A_CENTROID * lists, rows // 2) if lists > 1 else 0


def true_pairs(
    codes: np.ndarray,
    raw: np.ndarray,
    projection: Projection,
    hubs: Hubs,
    threshold: float,
    threads: int,
) -> Edges:
    """Return pairs of a sample, as places in it, but those that meet at the hub of a mass."""
    a, b = sample_pairs(codes, projection.limit(threshold), threads)
    every = max(1, len(a) // CALIBRATION_PAIRS)
    a, b = a[::every], b[::every]
    absorbed = hubs.place(codes, np.zeros(len(codes)), raw).reach == ABSORBED
    apart = ~(absorbed[a] & absorbed[b])
    a, b = a[apart], b[apart]

    def prove(span: tuple[int, int]) -> np.ndarray:
        return indexed_cosines(raw, raw, a[slice(*span)], b[slice(*span)])

    cosines = ordered_map(prove, plan_blocks(len(a), BLOCK), threads)
    return make_edges(a, b, np.concatenate([np.empty(0, np.float32), *cosines])).at(threshold)


def list_count(rows: int) -> int:
    """Return how many coarse lists a set of ``rows`` rows gets.

    Assigning costs rows × lists and joining rows × rows / lists × lists visited, so both together
    are smallest at some multiple of the square root of the rows. Visits cost besides, and grow with
    the lists.
    """
    return round(LISTS_A_ROOT * rows**0.5)


def choose_projection(
    sample: np.ndarray, threshold: float, seed: int, rows: int, threads: int
) -> Projection:
    """Return the projection that costs least: narrow codes are cheap, wide ones leave fewer pairs.

    From the narrowest on, until a wider one saves less than it costs. How many pairs a row would
    get in the whole set is extrapolated from the sample. Rows of large groups count as others do:
    their tiles are crowded at any width.
    """
    part = directions(sample[:DIRECTION_ROWS])
    main = main_directions(part.unit(), WIDTHS[-1] - 1, threads)
    if rows <= SINGLE_LIST_ROWS:  # products are few
        return project(main, part, WIDTHS[-1], seed)[0]
    count = min(len(sample), int(np.clip(CHOICE_SHARE * rows, *CHOICE_ROWS)))
    more = sample[DIRECTION_ROWS:count]

    def projected(width: int) -> tuple[Projection, np.ndarray]:
        projection, codes = project(main, part, width, seed)
        return projection, np.concatenate([codes, encode_blocks(projection, more, threads)])

    nlist = list_count(rows)
    coordinate = CODE_PRODUCTS + nlist + VISITING * rows / nlist
    best, codes = projected(WIDTHS[0])
    a, b = sample_pairs(codes, best.limit(threshold), threads)  # wider ones rule out more of them

    def cost(projection: Projection, codes: np.ndarray) -> float:
        found = proposals(codes, a, b, projection.limit(threshold)) * rows / count**2
        return projection.width * coordinate + found * PROPOSAL_PRODUCTS

    lowest = cost(best, codes)
    for width in WIDTHS[1:]:
        wider, codes = projected(width)
        its_cost = cost(wider, codes)
        if its_cost >= lowest:
            break
        best, lowest = wider, its_cost
    return best


def proposals(codes: np.ndarray, a: np.ndarray, b: np.ndarray, limit: float) -> float:
    """Return how many of some pairs of codes reach a limit; each code counts up to a degree."""
    found = pair_products(codes, a, b) >= limit
    degree = np.bincount(np.concatenate([a[found], b[found]]), minlength=1)
    return float(np.minimum(degree, CROWDED_DEGREE).sum() / 2)


def sample_distinct(
    features: Features, count: int, seed: int, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return about ``count`` distinct rows that can be compared, in random order.

    Returns
    -------
    rows : (n,) int64
        Global rows.
    sample : (n, d)
        Their features; one row of ones where no row can be compared.
    """
    rng = np.random.default_rng(seed)
    rows = draw_rows(features.rows, count, rng)
    sample = np.empty((len(rows), features.dim), features.dtype)
    hashes, bad = np.empty(len(rows), np.uint64), np.empty(len(rows), bool)

    def read(span: tuple[int, int]) -> None:
        part = slice(*span)
        features.gather_ascending(rows[part], sample[part])
        hashes[part], bad[part] = row_hashes(sample[part]), bad_rows(sample[part])

    for _ in ordered_map(read, plan_blocks(len(rows), BLOCK), threads):
        pass
    use = np.flatnonzero(~bad)
    use = use[distinct_places(sample, hashes, use)]
    if not len(use):
        return rows[:1], np.ones((1, features.dim), features.dtype)
    use = rng.permutation(use)
    return rows[use], sample[use]


def training_codes(
    features: Features,
    projection: Projection,
    taken: np.ndarray,
    count: int,
    seed: int,
    threads: int,
) -> np.ndarray:
    """Return codes of about ``count`` rows, none of them among those ``taken``; each code once.

    Rows are let go as soon as they are codes, so that many centroids need little memory.
    """
    rng = np.random.default_rng([seed, 1])
    rows = draw_rows(features.rows, count, rng, taken)

    def encode(span: tuple[int, int]) -> np.ndarray:
        block = features.gather_ascending(rows[slice(*span)])
        return encode_blocks(projection, block[~bad_rows(block)], 1)

    parts = ordered_map(encode, plan_blocks(len(rows), BLOCK), threads)
    codes = np.concatenate([np.empty((0, projection.width), np.int8), *parts])
    return codes[distinct_places(codes, row_hashes(codes), np.arange(len(codes)))]


def draw_rows(
    rows: int, count: int, rng: np.random.Generator, taken: np.ndarray | None = None
) -> np.ndarray:
    """Return about ``count`` of all rows but those taken, ascending; all of them if so few."""
    taken = np.empty(0, np.int64) if taken is None else taken
    if rows <= count + len(taken):
        return np.setdiff1d(np.arange(rows), taken)
    drawn = np.setdiff1d(rng.integers(0, rows, 2 * (count + len(taken))), taken)
    return np.sort(rng.permutation(drawn)[:count])


def distinct_places(rows: np.ndarray, hashes: np.ndarray, use: np.ndarray) -> np.ndarray:
    """Return the places in ``use`` of rows that equal none of an earlier place bit for bit.

    Rows of one hash are compared; where they differ, both stay.
    """
    keep, left = np.ones(len(use), bool), np.arange(len(use))
    while len(left):  # more than one round only where different rows share a hash
        _, first, same = np.unique(hashes[use[left]], return_index=True, return_inverse=True)
        first = left[first[same]]
        later = first != left
        left, first = left[later], first[later]
        equal = np.zeros(len(left), bool)
        for start, stop in plan_blocks(len(left), BLOCK):
            part = slice(start, stop)
            equal[part] = same_bits(rows[use[left[part]]], rows[use[first[part]]])
        keep[left[equal]] = False
        left = left[~equal]
    return np.flatnonzero(keep)
