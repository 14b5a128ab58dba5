"""The model of a join: how rows become codes, and which lists they visit; fitted to samples.

Directions, hubs and the visit radius τ are fitted to one sample, centroids to another: centroids
lie nearer to the rows that they were trained on than to others, so τ is calibrated on rows that had
no part in that.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from snipdedup.errors import DamagedError, InputError
from snipdedup.features.cosine import (
    bad_rows,
    indexed_cosines,
    integer_rows,
    same_bits,
    unit_rows,
)
from snipdedup.features.formats import load_npz
from snipdedup.features.hashing import row_hashes
from snipdedup.features.scan import BLOCK
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.join.calibration import (
    Target,
    calibrate_limit,
    calibrate_tau,
    close_pairs,
    paired_products,
)
from snipdedup.join.forest import Edges, make_edges
from snipdedup.join.hubs import ABSORBED, Hubs, find_hubs, no_hubs, sample_rows
from snipdedup.join.lists import CoarseLists, train_centroids
from snipdedup.join.projection import (
    WIDTHS,
    Codes,
    EncoderProjection,
    Projection,
    encode_rows,
    join_codes,
    main_directions,
    project,
)
from snipdedup.join.tiles import Limits
from snipdedup.parallel import library_threads, ordered_map
from snipdedup.storage import atomic
from snipdedup.storage.external_sort import among, distinct

SINGLE_LIST_ROWS = 1 << 16  # up to here, comparing all codes is cheaper than making lists
DIRECTION_ROWS = 1 << 13  # rows to find the main directions on
# Rows by whose pairs the width of codes is chosen, and their share of all rows in between. Of 2e9
# rows one pair among 8,192 rows would stand for 31 candidates a row: too few rows see nothing.
CHOICE_ROWS, CHOICE_SHARE = (1 << 13, 1 << 17), 1 / 128
# What a wide code's coordinate costs a row, in nanoseconds: to project a row on one direction more,
# and to write and read it for each list; and what a pair costs that narrow codes leave to wide
# ones, and one that is verified. Measured with two cores on 1,000,000 rows.
PROJECT_NS, STORE_NS, WIDE_PAIR_NS, PAIR_NS = 0.01, 2.0, 10.0, 300.0
CALIBRATION_ROWS = 1 << 15, 1 << 17  # the least and the most among whose pairs τ is calibrated
CALIBRATION_SHARE = 1 / 64  # of all rows, in between
CALIBRATION_PAIRS = 1 << 16
LISTS_A_ROOT = 1.0  # lists for each root of the rows
ROWS_A_CENTROID = 48  # rows that train each centroid


@dataclass(frozen=True)
class Model:
    """What all tasks of a join share."""

    narrow: Projection  # its codes rule out most pairs, and have lists
    wide: Projection | None  # its codes rule out most of the others
    lists: CoarseLists
    hubs: Hubs
    threshold: float
    calibration_pairs: int

    @property
    def limits(self) -> Limits:
        """Products of two codes from which their rows may be a pair."""
        wide = 0.0 if self.wide is None else self.wide.limit(self.threshold)
        return Limits(self.narrow.limit(self.threshold), wide)

    @property
    def widths(self) -> tuple[int, int]:
        """Coordinates of a narrow and a wide code; 0 where there are no wide ones."""
        return self.narrow.width, 0 if self.wide is None else self.wide.width

    @property
    def sharpest(self) -> Projection:
        """The wide codes' projection, or that of the narrow ones where there are no others."""
        return self.narrow if self.wide is None else self.wide

    def save(self, path: Path) -> None:
        """Write the model as one ``.npz``."""
        wide = {} if self.wide is None else self.wide.arrays()
        numbers = self.lists.tau, self.lists.one_sided_tau, self.threshold, self.calibration_pairs
        atomic.save_npz(
            path,
            lasting=True,  # all codes depend on it
            **self.narrow.arrays(),
            **{f"wide_{name}": array for name, array in wide.items()},
            centroids=self.lists.centroids,
            hub_row=self.hubs.row,
            hub_raw=self.hubs.raw,
            hub_codes=self.hubs.codes,
            numbers=np.array(numbers),
        )

    @classmethod
    def load(cls, path: Path) -> Model:
        """Read a model.

        Raises DamagedError if it is damaged or its codes are made by other arithmetic. It is not
        fitted anew: codes that are there may be those of an earlier run's model.
        """
        try:
            file = load_npz(path)
            of = EncoderProjection if "encoder" in file else Projection
            narrow = of.from_arrays(file)
            parts = {name[5:]: file[name] for name in file if name.startswith("wide_")}
            wide = Projection.from_arrays(parts) if parts else None
            tau, one_sided_tau, threshold, pairs = (float(number) for number in file["numbers"])
            hubs = Hubs(
                file["hub_row"], file["hub_raw"], file["hub_codes"], threshold, wide or narrow
            )
            lists = CoarseLists(file["centroids"], tau, one_sided_tau)
        except (InputError, LookupError, TypeError, ValueError) as error:
            raise DamagedError(f"{path}: damaged ({error}); run again, it begins anew") from error
        return cls(narrow, wide, lists, hubs, threshold, int(pairs))


def is_readable(path: Path) -> bool:
    """Tell whether a file holds a model that this version can use."""
    try:
        Model.load(path)
    except DamagedError:
        return False
    return True


def fit_model(
    features: Features,
    threshold: float,
    recall: float,
    seed: int,
    threads: int,
    encoder: Path | None = None,
    total: int | None = None,
    with_hubs: bool = True,
) -> Model:
    """Fit directions, hubs and τ to a sample of distinct rows, and centroids to other rows.

    With an encoder, codes are those of its descriptors. They bound no cosine, and hubs need a
    bound, so there are none. The width of codes is chosen for a set of ``total`` rows, if given.
    """
    rows, sample = sample_distinct(features, calibration_rows(features.rows), seed, threads)
    with library_threads(1, torch_too=False):  # float arithmetic depends on their number
        narrow, wide = choose_projections(sample, threshold, seed, total or features.rows, threads)
    sharpest = wide or narrow
    hubs = no_hubs(sharpest, features.dim, threshold)
    if encoder is None and with_hubs:
        first = encode_rows(sharpest, sample[: sample_rows(features.rows)], threads)
        hubs = find_hubs(
            rows, sample, first.values, sharpest,
            threshold=threshold, total=features.rows, threads=threads,
        )  # fmt: skip
    nlist = min(list_count(features.rows), max(1, features.rows // 8))
    if features.rows <= SINGLE_LIST_ROWS and not len(hubs.row):
        nlist = 1
    if nlist == 1 and encoder is None:
        one = CoarseLists(narrow.encode(sample[:1])[0], 0.0, 0.0)
        return Model(narrow, wide, one, hubs, threshold, 0)
    codes = encode_rows(narrow, sample, threads)
    sharp = codes if wide is None else encode_rows(wide, sample, threads)
    # of a small set the sample is all of it: some rows then leave it, for the centroids
    wanted = training_rows(features.rows, nlist)
    kept = max(1, len(rows) - max(0, wanted - (features.rows - len(rows))))
    rows, raw, near = rows[:kept], sample[:kept], codes.where(slice(kept))
    sharp = near if wide is None else sharp.where(slice(kept))
    pairs = true_pairs(near, narrow.limit(threshold), sharp, raw, hubs, threads)
    target = Target(threshold, recall, min(1.0, kept / features.rows), threads)
    if encoder is not None:
        learned = EncoderProjection.of(encoder, seed, "cpu")
        limit = calibrate_limit(learned, raw, pairs, target)
        narrow, wide = dataclasses.replace(learned, lowest=limit), None
        near = encode_rows(narrow, raw, threads)
        hubs = no_hubs(narrow, features.dim, threshold)
    lists = CoarseLists(near.values[:1], 0.0, 0.0)
    if nlist > 1:
        trained = training_codes(features, narrow, rows, wanted, seed, threads)
        nlist = min(nlist, max(1, len(trained)))
    if nlist > 1:
        centroids = train_centroids(trained, nlist, seed, threads)
        pair_distance = narrow.distance(threshold)
        lists = CoarseLists(
            centroids, *calibrate_tau(near.values, centroids, pairs, target, pair_distance)
        )
    return Model(narrow, wide, lists, hubs, threshold, len(pairs.a))


def list_count(rows: int) -> int:
    """Return how many coarse lists a set of ``rows`` rows gets.

    Assigning costs rows × lists and joining rows × rows / lists × lists visited, so both together
    are smallest at some multiple of the square root of the rows. Visits cost besides, and grow with
    the lists.
    """
    return round(LISTS_A_ROOT * rows**0.5)


def calibration_rows(rows: int) -> int:
    """Return how many of a set's rows are sampled to find directions and hubs and calibrate τ."""
    return min(rows, int(np.clip(CALIBRATION_SHARE * rows, *CALIBRATION_ROWS)))


def training_rows(rows: int, lists: int) -> int:
    """Return how many other rows of a set train the centroids of so many lists."""
    return min(ROWS_A_CENTROID * lists, rows // 2) if lists > 1 else 0


def true_pairs(
    narrow: Codes, limit: float, sharp: Codes, raw: np.ndarray, hubs: Hubs, threads: int
) -> Edges:
    """Return pairs of a sample, as places in it, but those of two rows that hubs absorb.

    ``narrow`` codes with the ``limit`` of their products, ``sharp`` ones of the hubs' projection,
    and ``raw``, (n, d), are of the sample.
    """
    wide = sharp, hubs.projection.limit(hubs.threshold)
    a, b = close_pairs(narrow, limit, threads, None if sharp is narrow else wide)
    every = max(1, len(a) // CALIBRATION_PAIRS)
    a, b = a[::every], b[::every]
    absorbed = hubs.place(*sharp, raw).zone == ABSORBED
    apart = ~(absorbed[a] & absorbed[b])
    a, b = a[apart], b[apart]
    return make_edges(a, b, indexed_cosines(raw, raw, a, b)).at(hubs.threshold)


def choose_projections(
    sample: np.ndarray, threshold: float, seed: int, rows: int, threads: int
) -> tuple[Projection, Projection | None]:
    """Return the projection of narrow codes, and that of wide ones where these cost less than none.

    Wide codes leave fewer pairs to verify. How many candidate pairs a row would get in the whole
    set is extrapolated from the sample.
    """
    blocks = [sample[slice(*span)] for span in plan_blocks(min(len(sample), DIRECTION_ROWS), BLOCK)]
    unit = np.concatenate(list(ordered_map(unit_rows, blocks, threads)))
    main = main_directions(unit, WIDTHS[-1] - 1, threads)
    whole = np.concatenate([part for part, _ in ordered_map(integer_rows, blocks, threads)])
    count = min(len(sample), int(np.clip(CHOICE_SHARE * rows, *CHOICE_ROWS)))
    more = sample[DIRECTION_ROWS:count]

    def projected(width: int) -> tuple[Projection, Codes]:
        projection, codes = project(main, whole, width, seed, threads)
        return projection, join_codes([codes, encode_rows(projection, more, threads)])

    narrow, codes = projected(WIDTHS[0])
    a, b = close_pairs(codes, narrow.limit(threshold), threads)
    pairs_a_row = rows / count**2  # for each pair of the sample
    best, lowest = None, len(a) * pairs_a_row * PAIR_NS
    for width in WIDTHS[1:]:
        wide, codes = projected(width)
        products = paired_products(codes.values, a, b, threads) + codes.falls[a] + codes.falls[b]
        left = np.count_nonzero(products >= wide.limit(threshold))
        cost = width * (len(main) * PROJECT_NS + STORE_NS)
        cost += (len(a) * WIDE_PAIR_NS + left * PAIR_NS) * pairs_a_row
        if cost < lowest:
            best, lowest = wide, cost
    return narrow, best


def sample_distinct(
    features: Features, count: int, seed: int, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return about ``count`` distinct rows that can be compared, in random order, (n,) int64.

    And their features, (n, d); one row of ones where no row can be compared.
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

    Only the codes of rows are held, so that many centroids need little memory.
    """
    rng = np.random.default_rng([seed, 1])
    rows = draw_rows(features.rows, count, rng, taken)

    def encode(span: tuple[int, int]) -> np.ndarray:
        block = features.gather_ascending(rows[slice(*span)])
        return encode_rows(projection, block[~bad_rows(block)], 1).values

    parts = ordered_map(encode, plan_blocks(len(rows), BLOCK), threads)
    codes = np.concatenate([np.empty((0, projection.width), np.int8), *parts])
    return codes[distinct_places(codes, row_hashes(codes), np.arange(len(codes)))]


def draw_rows(
    rows: int, count: int, rng: np.random.Generator, taken: np.ndarray | None = None
) -> np.ndarray:
    """Return about ``count`` of all rows but those taken, ascending; all of them if so few."""
    taken = np.empty(0, np.int64) if taken is None else np.sort(taken)
    if rows <= count + len(taken):
        drawn = np.arange(rows)
        return drawn[~among(taken, drawn)]
    drawn = distinct(rng.integers(0, rows, 2 * (count + len(taken))))
    return np.sort(rng.permutation(drawn[~among(taken, drawn)])[:count])


def distinct_places(rows: np.ndarray, hashes: np.ndarray, use: np.ndarray) -> np.ndarray:
    """Return the places in ``use`` of rows that equal none of an earlier place bit for bit.

    Rows of one hash are compared; different ones are both returned.
    """
    keep, left = np.ones(len(use), bool), np.arange(len(use))
    while len(left):  # more than one round only if different rows share a hash
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
