"""Calibration on pairs of a sample: the visit radius τ, and the limit of an encoder's codes.

What counts is not each pair: a group stays whole by any of its spanning forests. So the pairs of a
sample are thinned to the forest that asks for the least, at the threshold and at some thresholds
above it, since the result may be cut there later. Two rows that pair with each other only are both
in a sample far less often than rows of a large group, so their edge counts for as much more.

Of the sample's groups fewer may be missed than of all, since it may hold the easier ones. Where it
has too few to tell, rows of it are moved besides as pairs lie, and the wanted share of them must
meet where they were.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from snipdedup import native
from snipdedup.features.cosine import unit_rows
from snipdedup.features.shards import plan_blocks
from snipdedup.join.forest import Edges, components, forest_places
from snipdedup.join.lists import ASSIGN_BLOCK, home_lists, nearness, squared_norms
from snipdedup.join.projection import Codes, Projection, encode_rows
from snipdedup.parallel import ordered_map

PAIR_BLOCK = 1024  # codes of a sample compared at a time
TILE_PAIRS = 1 << 14  # pairs of a tile of the sample that are kept
CUTS = (1, 2 / 3, 1 / 3)  # shares of 1 - threshold at which the result may be cut later
SOME = 8  # groups whose differences may stand for all
# With 95 % confidence a sample falls short of its share of what is rare by so many at the most, if
# it holds up to so many of it, and by no more than it holds if these are more (Clopper and Pearson,
# 1934).
ENOUGH = 6
DRAWN_ROWS = 1 << 16  # rows of a sample that are moved, at the most


class Target(NamedTuple):
    """What a calibration on a sample is to achieve."""

    threshold: float  # cosine from which two rows are a pair
    recall: float  # share of the rows of groups to be joined with the others of theirs
    sample_share: float  # which share of the set the sample is
    threads: int

    @property
    def cautious_recall(self) -> float:
        """The recall to aim at: half of what may be lost is for what a sample cannot tell."""
        return 1 - (1 - self.recall) / 2

    def is_few(self, groups: float) -> bool:
        """Tell whether so many groups of a sample are too few to stand for all."""
        return groups * (1 - self.recall) < 2 * ENOUGH

    def share_to_join(self, groups: float) -> float:
        """Return which share of a sample's groups to join, so that all groups reach the recall.

        With 95 % confidence, where there are enough groups; all of them where there are not.
        """
        most = groups * (1 - self.recall)  # k missed: at most the larger of k + ENOUGH and 2 k
        return 1 - max(0.0, min(most - ENOUGH, most / 2)) / max(1.0, groups)


def calibrate_tau(
    codes: np.ndarray, centroids: np.ndarray, pairs: Edges, target: Target, pair_distance: float
) -> tuple[float, float]:
    """Return τ where both rows of a pair visit, and where only one of the two does.

    ``codes`` are of a sample of distinct rows, ``pairs`` its true pairs, as places in it;
    ``pair_distance`` is the largest distance of two codes whose rows are a pair.
    """
    if target.recall >= 1:
        return pair_distance / 2, pair_distance
    need = needed_taus(codes, centroids, pairs.a, pairs.b, target.threads)
    wanted = []  # needed τ of some edges or moved rows, weights, share of the weight to join
    for cut in CUTS:
        threshold = 1 - cut * (1 - target.threshold)
        places, weight = easiest_forest(pairs, need.min(1), threshold, target.sample_share)
        groups = count_groups(weight, target.sample_share)
        wanted.append((need[places], weight, target.share_to_join(groups)))
        if len(wanted) == 1 and target.is_few(groups):
            near = moved_codes(codes, pairs.where(places), weight, target, pair_distance)
            a = np.arange(len(near))
            both = np.concatenate([codes[: len(near)], near])
            drawn = needed_taus(both, centroids, a, a + len(near), target.threads)
            wanted.append((drawn, np.ones(len(drawn)), target.cautious_recall))
    two_sided, one_sided = 0.0, 0.0
    for taus, weight, share in wanted:
        if len(taus):
            two_sided = max(two_sided, weighted_quantile(taus.min(1), weight, share))
            one_way = weighted_quantile(taus.ravel(), np.repeat(weight, 2), share)
            one_sided = max(one_sided, one_way)
    return min(pair_distance / 2, two_sided), min(pair_distance, one_sided)


def calibrate_limit(
    projection: Projection, sample: np.ndarray, pairs: Edges, target: Target
) -> float:
    """Return the product of two codes that joins the wanted share of rows with their groups.

    ``sample``, (n, d), are distinct rows, ``pairs`` the true pairs among them, as places.
    """
    if not len(pairs.a) or target.recall >= 1:  # nothing to learn from: nothing is ruled out
        return -(projection.norm**2)
    codes = encode_rows(projection, sample, target.threads).values
    product = paired_products(codes, pairs.a, pairs.b, target.threads)
    places, weight = easiest_forest(pairs, -product, target.threshold, target.sample_share)
    groups = count_groups(weight, target.sample_share)
    limit = -weighted_quantile(-product[places], weight, target.share_to_join(groups))
    if target.is_few(groups):
        unit = unit_rows(sample)
        drawn, times = drawn_pairs(pairs.where(places), weight, len(unit), target)
        step = (unit[drawn.b] - unit[drawn.a]) * times[:, None]
        moved = encode_rows(projection, unit + step, target.threads).values
        product = row_products(codes, moved)
        limit = min(limit, float(np.quantile(product, 1 - target.cautious_recall, method="lower")))
    return limit


def easiest_forest(
    pairs: Edges, need: np.ndarray, threshold: float, sample_share: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs at a threshold whose forest asks for the least ``need``, and their weights.

    As places among the pairs; see `edge_weights`.
    """
    places = np.flatnonzero(pairs.similarity >= np.float32(threshold))
    cost = pairs.where(places)._replace(similarity=-need[places].astype(np.float32))
    places = places[forest_places(cost)]
    return places, edge_weights(pairs.where(places), sample_share)


def edge_weights(forest: Edges, sample_share: float) -> np.ndarray:
    """Return for how many edges of the set's forest each edge of a sample's stands, but a factor.

    Two rows that pair with each other only are both in a sample with the square of its share, rows
    of a large group with its share.
    """
    nodes, labels = components(forest)
    label = labels[np.searchsorted(nodes, forest.a)]
    edges = np.bincount(label, minlength=1)[label]
    return np.maximum(1, 1 / (sample_share * edges))


def count_groups(weight: np.ndarray, sample_share: float) -> float:
    """Return how many groups of two rows would be seen, had a sample's edges been in such ones.

    As many as it has groups of few rows; a large group counts for more.
    """
    return float(weight.sum() * sample_share)


def weighted_quantile(values: np.ndarray, weight: np.ndarray, share: float) -> float:
    """Return the smallest value up to which the values have ``share`` of the weight."""
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weight[order]) / weight.sum()
    place = min(int(np.searchsorted(reached, share)), len(values) - 1)
    return float(values[order[place]])


def moved_codes(
    codes: np.ndarray, pairs: Edges, weight: np.ndarray, target: Target, pair_distance: float
) -> np.ndarray:
    """Return the first codes of a sample moved as pairs lie, (n, w) int8.

    With hardly any pairs to learn from, codes are moved towards their nearest neighbours by the
    largest distance of a pair, which crosses borders more often than real pairs do.
    """
    count = min(len(codes), DRAWN_ROWS)
    if count_groups(weight, target.sample_share) < SOME:
        step = codes[nearest_other(codes, count, target.threads)].astype(np.float64) - codes[:count]
        length = np.sqrt(np.einsum("ij,ij->i", step, step)).clip(1e-9)
        step *= np.minimum(1, pair_distance / length)[:, None]
        return np.rint(codes[:count] + step).astype(np.int8)
    pairs, times = drawn_pairs(pairs, weight, count, target)
    step = codes[pairs.b].astype(np.float32) - codes[pairs.a]
    most = pair_distance / np.linalg.norm(step, axis=1).clip(1e-9)
    step *= np.minimum(times, most).clip(1)[:, None]
    return np.rint(codes[:count] + step).clip(-127, 127).astype(np.int8)


def drawn_pairs(
    pairs: Edges, weight: np.ndarray, count: int, target: Target
) -> tuple[Edges, np.ndarray]:
    """Return ``count`` of a sample's pairs, each as often as its weight says, and factors.

    A rare kind of pair may be missing in a sample, or be in it less often than among all. So many
    pairs as the sample leaves open come first, with the factors, (count,), by which they have to
    grow to be as long as two rows at the threshold are apart; the factor of the others is 1.
    """
    groups = count_groups(weight, target.sample_share)
    far = math.ceil(count * min(1.0, ENOUGH / groups))
    share = np.cumsum(weight)
    steps = [(np.arange(part) + 0.5) / max(1, part) for part in (far, count - far)]
    pairs = pairs.where(np.searchsorted(share, np.concatenate(steps) * share[-1]))
    away = (1 - pairs.similarity.astype(float)).clip(1e-9)
    times = np.sqrt((1 - target.threshold) / away).clip(1)
    times[far:] = 1
    return pairs, times


def nearest_other(codes: np.ndarray, count: int, threads: int) -> np.ndarray:
    """Return for each of the first codes the place of the other code nearest to it, (count,)."""
    columns = native.columns(codes)

    def find(span: tuple[int, int]) -> np.ndarray:
        near = nearness(codes[slice(*span)], codes, columns)
        rows = np.arange(len(near))
        near[rows, rows + span[0]] = near.min()
        return near.argmax(1)

    parts = ordered_map(find, plan_blocks(count, PAIR_BLOCK), threads)
    return np.concatenate([np.empty(0, np.int64), *parts])


def close_pairs(
    codes: Codes, limit: float, threads: int, wide: tuple[Codes, float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs (a < b) of codes whose product reaches ``limit``.

    ``wide`` are wider codes of the same rows, whose product must reach a limit too. Of a tile in
    which very many do, some: a sample of mostly alike rows must not fill the memory.
    """
    spans = plan_blocks(len(codes.values), PAIR_BLOCK)
    columns = [native.columns(*codes.where(slice(*span))) for span in spans]

    def find(place: int) -> tuple[np.ndarray, np.ndarray]:
        start, stop = spans[place]
        rows, falls = codes.where(slice(start, stop))
        found = [(np.empty(0, np.int64),) * 2]
        for other, (first, _) in enumerate(spans[: place + 1]):
            both = None
            if wide is not None:
                x, y = (wide[0].where(slice(*spans[side])) for side in (place, other))
                both = x.values, wide[1] - x.falls, *y
            i, j = native.hits(rows, columns[other], limit - falls, both, first=start - first)
            every = 1 + len(i) // TILE_PAIRS
            found.append((j[::every].astype(np.int64) + first, i[::every].astype(np.int64) + start))
        a, b = (np.concatenate(side) for side in zip(*found, strict=True))
        return a, b

    parts = [(np.empty(0, np.int64),) * 2]
    parts += ordered_map(find, range(len(spans)), threads)
    a, b = (np.concatenate(side) for side in zip(*parts, strict=True))
    return a, b


def needed_taus(
    codes: np.ndarray, centroids: np.ndarray, a: np.ndarray, b: np.ndarray, threads: int
) -> np.ndarray:
    """Return the τ from which code a visits code b's list, and b that of a, (n, 2) float64.

    0 where both live in one list.
    """
    home, best = home_lists(codes, centroids, threads)

    def one_way(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        own, other = centroids[home[x]], centroids[home[y]]
        gap = squared_norms(other) - 2 * row_products(other, codes[x]) - best[x]
        distance = np.sqrt(squared_norms(own) + squared_norms(other) - 2 * row_products(own, other))
        return np.where(home[y] == home[x], 0.0, gap / (2 * distance.clip(1e-9)))

    return np.stack([one_way(a, b), one_way(b, a)], axis=1)


def paired_products(codes: np.ndarray, a: np.ndarray, b: np.ndarray, threads: int) -> np.ndarray:
    """Return the product of codes a with codes b, (n,) int64."""

    def multiply(span: tuple[int, int]) -> np.ndarray:
        return row_products(codes[a[slice(*span)]], codes[b[slice(*span)]])

    parts = ordered_map(multiply, plan_blocks(len(a), ASSIGN_BLOCK), threads)
    return np.concatenate([np.empty(0, np.int64), *parts])


def row_products(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the product of each row of codes with the same row of others, (n,) int64."""
    return native.code_dots(x, y).astype(np.int64)
