"""Coarse lists of codes: which lists a row visits so that pairs meet.

A row lives in the list of its nearest centroid. It also visits list j if its distance to the
bisector of its own centroid c₁ and c_j, (‖x−c_j‖² − ‖x−c₁‖²) / (2‖c_j − c₁‖), is at most τ. Two
rows of different lists lie on two sides of the bisector of their centroids, so the sum of their
distances to it is at most their own distance: with τ half the largest distance of a pair, every
pair meets in at least one list. A smaller τ, calibrated on a sample, misses a known share.

All arithmetic is on int8 codes with integer products, so a row's lists never depend on which rows
it is computed with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from snipdedup.features.shards import plan_blocks
from snipdedup.join.forest import Edges, components, forest_places
from snipdedup.join.kernels import all_close, hit_places, pick_kernel
from snipdedup.parallel import ordered_map

ROUNDS = 8  # of k-means
ASSIGN_BLOCK = 2048  # codes assigned at a time: their distances stay in the cache
TABLE_LISTS = 1 << 12  # of up to so many lists, the distances of all centroids are kept
PAIR_BLOCK = 1024  # codes of a sample compared at a time
TILE_PAIRS = 1 << 13  # pairs of a tile of the sample that are kept
CUTS = (1, 2 / 3, 1 / 3)  # shares of 1 - threshold at which the result may be cut later
SOME = 8  # groups whose differences may speak for all
# With 95 % confidence a sample falls short of its share of what is rare by so many at the most, if
# it holds up to so many of it, and by no more than it holds if these are more (Clopper and Pearson,
# 1934).
ENOUGH = 6
DRAWN_ROWS = 1 << 16  # rows of a sample that are moved, at the most


@dataclass(frozen=True)
class Lists:
    """Centroids, and how far from a bisector a row still visits.

    Attributes
    ----------
    centroids : (nlist, w) int8
    tau : float
        In units of codes; where both rows of a pair visit.
    alone : float
        The same where one of them does not, so that the other must come.
    """

    centroids: np.ndarray
    tau: float
    alone: float

    @property
    def nlist(self) -> int:
        """Number of lists."""
        return len(self.centroids)

    @cached_property
    def widest(self) -> np.ndarray:
        """Distance of each centroid from the one furthest away, (nlist,) float32."""
        if self.nlist <= TABLE_LISTS:
            return self._table.max(1)
        spans = plan_blocks(self.nlist, ASSIGN_BLOCK)
        return np.concatenate([self._apart(start, stop).max(1) for start, stop in spans])

    def apart(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return the distances of centroids a from centroids b, (n,) float32."""
        if self.nlist <= TABLE_LISTS:
            return np.take(self._table.ravel(), a * self.nlist + b)  # quicker than by two indices
        parts = [np.empty(0, np.float32)]
        for start, stop in plan_blocks(len(a), ASSIGN_BLOCK):
            away = self.centroids[a[start:stop]].astype(np.float32) - self.centroids[b[start:stop]]
            parts.append(np.sqrt(np.einsum("ij,ij->i", away, away)))
        return np.concatenate(parts)

    @cached_property
    def _table(self) -> np.ndarray:
        return self._apart(0, self.nlist)

    def _apart(self, start: int, stop: int) -> np.ndarray:
        some = self.centroids[start:stop]
        gaps = squares(some)[:, None] - nearness(some, self.centroids).numpy()
        return np.sqrt(gaps.clip(0).astype(np.float32))


class Asked(NamedTuple):
    """What a calibration on a sample is to achieve.

    Attributes
    ----------
    threshold : float
        Cosine from which two rows are a pair.
    recall : float
        Share of the rows of groups to be joined with the others of theirs.
    sampled : float
        Which share of the set the sample is.
    threads : int
    """

    threshold: float
    recall: float
    sampled: float
    threads: int

    @property
    def cautious(self) -> float:
        """The recall to aim at: half of what may be lost is for what a sample cannot tell."""
        return 1 - (1 - self.recall) / 2

    def few(self, groups: float) -> bool:
        """Tell whether so many groups are too few to speak for all."""
        return groups * (1 - self.recall) < 2 * ENOUGH

    def sure(self, groups: float) -> float:
        """Return which share of so many groups to join, so that the recall is kept for all groups.

        With 95 % confidence, where there are enough groups; all of them where there are not.
        """
        most = groups * (1 - self.recall)  # k missed: at most the larger of k + ENOUGH and 2 k
        return 1 - max(0.0, min(most - ENOUGH, most / 2)) / max(1.0, groups)


class Visits(NamedTuple):
    """Which rows of a block are in which list.

    Attributes
    ----------
    row, list_ : (v,) int32
        A row of the block and a list it lives in or visits.
    home : (v,) bool
        True where it lives there; once for each row.
    """

    row: np.ndarray
    list_: np.ndarray
    home: np.ndarray


def train_centroids(codes: np.ndarray, nlist: int, seed: int, threads: int) -> np.ndarray:
    """Return spherical k-means centroids of codes, (nlist, w) int8.

    Lloyd's iterations on integers: sums of codes are exact, so the result is the same for any
    number of threads. An empty list takes a random code.
    """
    rng = np.random.default_rng(seed)
    centroids = codes[np.sort(rng.choice(len(codes), nlist, replace=False))]
    norm = float(np.sqrt(np.mean(np.einsum("ij,ij->i", codes, codes, dtype=np.int64))))
    for _ in range(ROUNDS):
        home = nearest(codes, centroids, threads)[0]
        order = np.argsort(home, kind="stable")
        starts = np.searchsorted(home[order], np.arange(nlist))
        used = np.flatnonzero(np.diff(np.append(starts, len(home))))
        sums = np.add.reduceat(codes[order], starts[used], axis=0, dtype=np.int64)
        length = np.sqrt(np.einsum("ij,ij->i", sums, sums).astype(float)).clip(1)
        centroids = codes[rng.choice(len(codes), nlist)]
        centroids[used] = np.rint(sums * (norm / length)[:, None]).clip(-127, 127)
    return centroids


def nearest(
    codes: np.ndarray, centroids: np.ndarray, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return each code's nearest centroid (ties: the first) and ‖x−c‖² − ‖x‖², int64."""

    def find(span: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        near = nearness(codes[slice(*span)], centroids).numpy()
        home = near.argmax(1)
        return home, -near[np.arange(len(home)), home]

    parts = list(ordered_map(find, plan_blocks(len(codes), ASSIGN_BLOCK), threads))
    home, best = (np.concatenate(side) for side in zip(*parts, strict=True))
    return home, best.astype(np.int64)


def nearness(codes: np.ndarray, centroids: np.ndarray) -> Any:
    """Return 2 x·c − ‖c‖², ‖x‖² − ‖x−c‖², for each code and centroid.

    A (n, nlist) tensor of int32, or of whole float32; it stands until the thread's next call.
    """
    import torch

    kernel = pick_kernel("cpu")
    products = kernel.multiply(torch.from_numpy(codes), kernel.prepare(torch.from_numpy(centroids)))
    size = torch.from_numpy(squares(centroids)).to(products.dtype)
    return torch.add(-size, products, alpha=2, out=products)


def squares(codes: np.ndarray) -> np.ndarray:
    """Return the squared norm of each code, (n,) int32."""
    return np.einsum("ij,ij->i", codes, codes, dtype=np.int32)


def pair_products(codes: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the product of codes a with codes b, (n,) int64."""
    spans = plan_blocks(len(a), ASSIGN_BLOCK)
    parts = [row_products(codes[a[low:high]], codes[b[low:high]]) for low, high in spans]
    return np.concatenate([np.empty(0, np.int64), *parts])


def row_products(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the product of each row of codes with the same row of others, (n,) int64."""
    return np.einsum("ij,ij->i", x, y, dtype=np.int32).astype(np.int64)


def assign(codes: np.ndarray, lists: Lists, far: np.ndarray | None = None) -> Visits:
    """Return the lists that each code lives in or visits, ordered by row.

    ``far``, (n,) float32, is how far each code visits, `Lists.tau` if not given.
    """
    if lists.nlist == 1:
        all_ = np.arange(len(codes), dtype=np.int32)
        return Visits(all_, np.zeros_like(all_), np.ones(len(all_), bool))
    far = np.full(len(codes), lists.tau, np.float32) if far is None else far
    widest = lists.widest  # now: it takes the memory of what stands until the next product
    parts = []
    for start, stop in plan_blocks(len(codes), ASSIGN_BLOCK):
        near = nearness(codes[start:stop], lists.centroids)
        table = near.numpy()
        home = table.argmax(1)
        best = table[np.arange(len(home)), home]
        reach = 2 * far[start:stop]  # first as if all centroids were as far as the furthest
        close = np.flatnonzero(all_close(near, best - reach.astype(np.float64) * widest[home]))
        row = close // lists.nlist
        list_ = close - row * lists.nlist
        own = np.take(home, row)
        gap = np.take(best, row) - np.take(table.ravel(), close)
        visits = np.flatnonzero(gap <= np.take(reach, row) * lists.apart(own, list_))
        row, list_, own = (np.take(side, visits) for side in (row, list_, own))
        parts.append((row + start, list_, list_ == own))
    row, list_, home = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Visits(row.astype(np.int32), list_.astype(np.int32), home)


def calibrate_tau(
    codes: np.ndarray,
    centroids: np.ndarray,
    pairs: Edges,
    asked: Asked,
    reach: float,
) -> tuple[float, float]:
    """Return the τ at which the wanted share of rows is joined with the others of their groups.

    Two of them: where both rows of a pair visit, and where only one of the two does.

    What counts is not each pair: a group stays whole by any of its spanning forests. So the pairs
    of a sample are thinned to the forest that asks for the least τ, at the threshold and at some
    above it, since the result may be cut there later. A pair of two rows is in a sample far less
    often than a part of a large group, and counts for as much more.

    Of the sample's groups fewer may be missed than of all, since it may hold the easier ones. Where
    it has too few to tell, rows of it are moved besides as pairs lie: τ brings the wanted share of
    them together with where they were.

    Parameters
    ----------
    codes : (n, w) int8
        A sample of distinct rows.
    centroids : (nlist, w) int8
    pairs : Edges
        True pairs, as places in the sample.
    asked : Asked
    reach : float
        Largest distance of two codes whose rows are a pair.
    """
    if asked.recall >= 1:
        return reach / 2, reach
    need = needed_taus(codes, centroids, pairs.a, pairs.b, asked.threads)
    cuts = [1 - part * (1 - asked.threshold) for part in CUTS]
    told = []
    for places in (easiest(pairs, need.min(1), cut) for cut in cuts):
        forest = pairs.where(places)
        weight = edge_weights(forest, asked.sampled)
        told.append((need[places], weight, asked.sure(counted(weight, asked.sampled))))
        if len(told) == 1 and asked.few(counted(weight, asked.sampled)):
            drawn = drawn_taus(codes, centroids, forest, weight, asked, reach)
            told.append((drawn, np.ones(len(drawn)), asked.cautious))
    both, one = 0.0, 0.0
    for taus, weight, share in told:
        if len(taus):
            both = max(both, weighted_quantile(taus.min(1), weight, share))
            one = max(one, weighted_quantile(taus.ravel(), np.repeat(weight, 2), share))
    return min(reach / 2, both), min(reach, one)


def easiest(pairs: Edges, need: np.ndarray, threshold: float) -> np.ndarray:
    """Return the places of those pairs at a threshold whose forest asks for the least τ."""
    places = np.flatnonzero(pairs.similarity >= np.float32(threshold))
    cost = pairs.where(places)._replace(similarity=-need[places].astype(np.float32))
    return places[forest_places(cost)]


def edge_weights(forest: Edges, sampled: float) -> np.ndarray:
    """Return for how many edges of the whole set's forest each edge of a sample's stands, (n,).

    Up to a factor: two rows that pair with each other only are both in a sample with the square of
    its share, rows of a large group are in it with their share.
    """
    nodes, labels = components(forest)
    label = labels[np.searchsorted(nodes, forest.a)]
    edges = np.bincount(label, minlength=1)[label]
    return np.maximum(1, 1 / (sampled * edges))


def counted(weight: np.ndarray, sampled: float) -> float:
    """Return how many groups of two rows would be seen, had a sample's edges been in such ones.

    As many as it has groups of few rows; a large group counts for more.
    """
    return float(weight.sum() * sampled)


def weighted_quantile(values: np.ndarray, weight: np.ndarray, share: float) -> float:
    """Return the smallest value up to which the values have ``share`` of the weight."""
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weight[order]) / weight.sum()
    place = min(int(np.searchsorted(reached, share)), len(values) - 1)
    return float(values[order[place]])


def drawn_taus(
    codes: np.ndarray,
    centroids: np.ndarray,
    pairs: Edges,
    weight: np.ndarray,
    asked: Asked,
    reach: float,
) -> np.ndarray:
    """Return the needed τ of codes and what they become when moved, (n, 2) float64."""
    near = moved_codes(codes, pairs, weight, asked, reach)
    places = np.arange(len(near))
    both = np.concatenate([codes[: len(near)], near])
    return needed_taus(both, centroids, places, places + len(near), asked.threads)


def moved_codes(
    codes: np.ndarray, pairs: Edges, weight: np.ndarray, asked: Asked, reach: float
) -> np.ndarray:
    """Return what codes of a sample become when moved as pairs lie, (n, w) int8.

    With hardly any pairs to learn from, codes are moved towards their nearest neighbours by the
    largest distance of a pair, which crosses borders more often than real pairs do.
    """
    count = min(len(codes), DRAWN_ROWS)
    if counted(weight, asked.sampled) < SOME:
        other = nearest_other(codes, count, asked.threads)
        return draw_together(codes[:count], codes[other], reach)
    pairs, times = drawn_pairs(pairs, weight, count, asked)
    step = codes[pairs.b].astype(np.float32) - codes[pairs.a]
    step *= np.minimum(times, reach / np.linalg.norm(step, axis=1).clip(1e-9)).clip(1)[:, None]
    return np.rint(codes[:count] + step).clip(-127, 127).astype(np.int8)


def drawn_pairs(
    pairs: Edges, weight: np.ndarray, count: int, asked: Asked
) -> tuple[Edges, np.ndarray]:
    """Return ``count`` of a sample's pairs, each as often as its weight says, and factors.

    A rare kind of pair may be missing in a sample, or be in it less often than among all. So many
    pairs as the sample leaves open come first, with the factors, (count,), by which they have to
    grow to be as long as two rows at the threshold are apart; the factor of the others is 1.
    """
    far = math.ceil(count * min(1.0, ENOUGH / counted(weight, asked.sampled)))
    share = np.cumsum(weight)
    steps = [(np.arange(part) + 0.5) / max(1, part) for part in (far, count - far)]
    pairs = pairs.where(np.searchsorted(share, np.concatenate(steps) * share[-1]))
    times = np.sqrt((1 - asked.threshold) / (1 - pairs.similarity.astype(float)).clip(1e-9)).clip(1)
    times[far:] = 1
    return pairs, times


def draw_together(x: np.ndarray, y: np.ndarray, most: float) -> np.ndarray:
    """Return codes on the way from x to y, at most a length from x."""
    way = y.astype(np.float64) - x
    length = np.sqrt(np.einsum("ij,ij->i", way, way)).clip(1e-9)
    return np.rint(x + way * np.minimum(1, most / length)[:, None]).astype(np.int8)


def nearest_other(codes: np.ndarray, count: int, threads: int) -> np.ndarray:
    """Return for each of the first codes the place of the other code nearest to it, (count,)."""

    def find(span: tuple[int, int]) -> np.ndarray:
        near = nearness(codes[slice(*span)], codes).numpy()
        rows = np.arange(len(near))
        near[rows, rows + span[0]] = near.min()
        return near.argmax(1)

    parts = ordered_map(find, plan_blocks(count, PAIR_BLOCK), threads)
    return np.concatenate([np.empty(0, np.int64), *parts])


def sample_pairs(codes: np.ndarray, limit: float, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs (a < b) of codes whose product reaches ``limit``.

    Of a tile in which very many do, some: a sample of mostly alike rows must not fill the memory.
    """
    import torch

    kernel = pick_kernel("cpu")

    def find(span: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        columns = kernel.prepare(torch.from_numpy(codes[slice(*span)]))
        found = [(np.empty(0, np.int64),) * 2]
        for row in range(0, span[1], PAIR_BLOCK):
            block = torch.from_numpy(codes[row : row + PAIR_BLOCK])
            i, j = hit_places(kernel.multiply(block, columns), np.full(len(block), limit))
            every = 1 + len(i) // TILE_PAIRS
            i, j = i[::every], j[::every]
            once = i + row < j + span[0]
            found.append((i[once] + row, j[once] + span[0]))
        a, b = (np.concatenate(side) for side in zip(*found, strict=True))
        return a, b

    parts = [(np.empty(0, np.int64),) * 2]
    parts += ordered_map(find, plan_blocks(len(codes), PAIR_BLOCK), threads)
    a, b = (np.concatenate(side) for side in zip(*parts, strict=True))
    return a, b


def needed_taus(
    codes: np.ndarray, centroids: np.ndarray, a: np.ndarray, b: np.ndarray, threads: int
) -> np.ndarray:
    """Return the τ from which code a visits code b's list, and b that of a, (n, 2) float64.

    0 where both live in one list.
    """
    home, best = nearest(codes, centroids, threads)

    def one_way(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        own, other = centroids[home[x]], centroids[home[y]]
        gap = squares(other) - 2 * row_products(other, codes[x]) - best[x]
        distance = np.sqrt(squares(own) + squares(other) - 2 * row_products(own, other))
        return np.where(home[y] == home[x], 0.0, gap / (2 * distance.clip(1e-9)))

    return np.stack([one_way(a, b), one_way(b, a)], axis=1)
