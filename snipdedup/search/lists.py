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

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from snipdedup.ground.compute import in_order, scratch
from snipdedup.ground.shards import plan_blocks
from snipdedup.search.kernels import close_rows, pick_kernel

ROUNDS = 8  # of k-means
ASSIGN_BLOCK = 2048  # codes assigned at a time
TABLE_LISTS = 1 << 12  # of up to so many lists, the distances of all centroids are kept
PAIR_BLOCK = 1024  # codes of a sample compared at a time
TILE_PAIRS = 1 << 13  # pairs of a tile of the sample that are kept
SOME = 100  # pairs whose distances speak for all
ENOUGH = 10  # pairs that must be missed in the sample for their share to mean something


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

    def apart(self, homes: np.ndarray) -> np.ndarray:
        """Return the distances of some lists' centroids from all, (n, nlist) float32.

        A row at home in list 1 visits list j if ‖x−c_j‖² − ‖x−c₁‖² is at most 2τ times that.
        """
        if self.nlist <= TABLE_LISTS:
            return np.take(self._table, homes, axis=0)
        distinct, back = np.unique(homes, return_inverse=True)
        return np.take(self._apart(self.centroids[distinct]), back, axis=0)

    @cached_property
    def _table(self) -> np.ndarray:
        return self._apart(self.centroids)

    def _apart(self, centroids: np.ndarray) -> np.ndarray:
        gaps = centroid_gaps(centroids, self.centroids, "apart") + squares(centroids)[:, None]
        return np.sqrt(np.maximum(gaps, 0)).astype(np.float32)


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
        sums = np.add.reduceat(codes[order], starts[used], axis=0, dtype=np.int64).astype(float)
        sums *= norm / np.linalg.norm(sums, axis=1, keepdims=True).clip(1)
        centroids = codes[rng.choice(len(codes), nlist)]
        centroids[used] = np.rint(sums).clip(-127, 127)
    return centroids


def nearest(
    codes: np.ndarray, centroids: np.ndarray, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return each code's nearest centroid (ties: the first) and ‖x−c‖² − ‖x‖², int64."""

    def find(span: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        gaps = centroid_gaps(codes[slice(*span)], centroids)
        home = gaps.argmin(1)
        return home, gaps[np.arange(len(home)), home]

    parts = list(in_order(find, plan_blocks(len(codes), ASSIGN_BLOCK), threads))
    home, best = (np.concatenate(side) for side in zip(*parts, strict=True))
    return home, best.astype(np.int64)


def centroid_gaps(codes: np.ndarray, centroids: np.ndarray, use: str = "gaps") -> np.ndarray:
    """Return ‖c‖² − 2 x·c for each code and centroid: (n, nlist) float32, exact below 2^24.

    What is returned stands until the thread's next call with the same ``use``.
    """
    import torch

    kernel = pick_kernel("cpu", codes.shape[1], exact=True)
    columns = kernel.prepare(torch.from_numpy(centroids))
    products = kernel.multiply(torch.from_numpy(codes), columns)
    gaps = scratch(use, tuple(products.shape), np.float32)
    size = torch.from_numpy(squares(centroids)).float()
    torch.sub(size, products, alpha=2, out=torch.from_numpy(gaps))
    return gaps


def squares(codes: np.ndarray) -> np.ndarray:
    """Return the squared norm of each code, (n,) int32."""
    return np.einsum("ij,ij->i", codes, codes, dtype=np.int32)


def assign(codes: np.ndarray, lists: Lists, far: np.ndarray | None = None) -> Visits:
    """Return the lists that each code lives in or visits, ordered by row.

    ``far``, (n,) float32, is how far each code visits, `Lists.tau` if not given.
    """
    if lists.nlist == 1:
        row = np.arange(len(codes), dtype=np.int32)
        return Visits(row, np.zeros_like(row), np.ones(len(row), bool))
    parts = []
    for start in range(0, len(codes), ASSIGN_BLOCK):
        gaps = centroid_gaps(codes[start : start + ASSIGN_BLOCK], lists.centroids)
        home = gaps.argmin(1)
        best = gaps[np.arange(len(home)), home]
        limit = lists.apart(home)
        reach = np.float32(lists.tau) if far is None else far[start : start + ASSIGN_BLOCK, None]
        limit *= 2 * reach
        limit += best[:, None]
        near = np.flatnonzero((gaps <= limit).ravel())
        row, list_ = np.divmod(near.astype(np.int32), np.int32(lists.nlist))
        parts.append((row + np.int32(start), list_, list_ == home[row]))
    return Visits(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def calibrate_tau(
    codes: np.ndarray,
    centroids: np.ndarray,
    pairs: tuple[np.ndarray, np.ndarray],
    *,
    recall: float,
    reach: float,
    threads: int,
) -> tuple[float, float]:
    """Return the τ at which the wanted share of a sample's pairs meets.

    Two of them: where both rows of a pair visit, and where only one of the two does.

    Each row counts once, its pairs sharing its weight, so that large groups do not speak for all.
    Too few pairs to tell are replaced by other rows of the sample, drawn together to the distances
    of the pairs that there are; or, where there are hardly any, nearest neighbours to the largest
    distance of a pair. These cross borders more often than real pairs do.

    Parameters
    ----------
    codes : (n, w) int8
        A sample of distinct rows.
    centroids : (nlist, w) int8
    pairs : a, b, each (m,) int64
        True pairs, as places in the sample.
    recall : float
        Share of the pairs that must meet.
    reach : float
        Largest distance of two codes whose rows are a pair.
    """
    if recall >= 1:
        return reach / 2, reach
    a, b = pairs
    if len(a) < ENOUGH / (1 - recall):
        toward, lengths = codes[nearest_other(codes, threads)], np.full(1, reach)
        if len(a) >= SOME:
            away = codes[a].astype(np.float32) - codes[b]
            toward, lengths = np.roll(codes, 1, axis=0), np.sqrt((away * away).sum(1))
        near = draw_together(codes, toward, lengths)
        a = np.arange(len(codes))
        codes, b = np.concatenate([codes, near]), a + len(codes)
    home, best = nearest(codes, centroids, threads)
    there = needed_tau(codes, centroids, home, best, a, b)
    back = needed_tau(codes, centroids, home, best, b, a)
    degree = np.bincount(np.concatenate([a, b]), minlength=len(codes))
    weight = 1 / degree[a] + 1 / degree[b]
    both = weighted_quantile(np.minimum(there, back), weight, recall)
    one = weighted_quantile(np.append(there, back), np.append(weight, weight), recall)
    return min(reach / 2, both), min(reach, one)


def weighted_quantile(values: np.ndarray, weight: np.ndarray, share: float) -> float:
    """Return the smallest value up to which the values have ``share`` of the weight."""
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weight[order]) / weight.sum()
    place = min(int(np.searchsorted(reached, share)), len(values) - 1)
    return float(values[order[place]])


def draw_together(x: np.ndarray, y: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return codes on the way from x to y, at most the given lengths, in turn, from x."""
    way = y.astype(np.float64) - x
    length = np.sqrt(np.einsum("ij,ij->i", way, way)).clip(1e-9)
    return np.rint(x + way * np.minimum(1, np.resize(lengths, len(x)) / length)[:, None]).astype(
        np.int8
    )


def nearest_other(codes: np.ndarray, threads: int) -> np.ndarray:
    """Return for each code the place of the other code nearest to it, (n,) int64."""

    def find(span: tuple[int, int]) -> np.ndarray:
        gaps = centroid_gaps(codes[slice(*span)], codes)
        rows = np.arange(len(gaps))
        gaps[rows, rows + span[0]] = gaps.max()
        return gaps.argmin(1)

    return np.concatenate(list(in_order(find, plan_blocks(len(codes), PAIR_BLOCK), threads)))


def sample_pairs(codes: np.ndarray, limit: float, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs (a < b) of codes whose product reaches ``limit``.

    Of a tile in which very many do, some: a sample of mostly alike rows must not fill the memory.
    """
    import torch

    kernel = pick_kernel("cpu", codes.shape[1], exact=True)

    def find(span: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        columns = kernel.prepare(torch.from_numpy(codes[slice(*span)]))
        found = [(np.empty(0, np.int64),) * 2]
        for row in range(0, span[1], PAIR_BLOCK):
            block = torch.from_numpy(codes[row : row + PAIR_BLOCK])
            near, close = close_rows(kernel.multiply(block, columns), np.full(len(block), limit))
            every = 1 + np.count_nonzero(close) // TILE_PAIRS
            i, j = np.nonzero(close[::every])
            i = near[::every][i]
            once = i + row < j + span[0]
            found.append((i[once] + row, j[once] + span[0]))
        a, b = (np.concatenate(side) for side in zip(*found, strict=True))
        return a, b

    parts = [(np.empty(0, np.int64),) * 2]
    parts += in_order(find, plan_blocks(len(codes), PAIR_BLOCK), threads)
    a, b = (np.concatenate(side) for side in zip(*parts, strict=True))
    return a, b


def needed_tau(
    codes: np.ndarray,
    centroids: np.ndarray,
    home: np.ndarray,
    best: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
) -> np.ndarray:
    """Return the τ from which code x visits code y's list, (n,) float64; 0 in the same list.

    ``home`` and ``best`` are what `nearest` says of all codes.
    """
    other = centroids[home[y]].astype(np.float32)
    gap = (other * (other - 2 * codes[x].astype(np.float32))).sum(1) - best[x]
    apart = other - centroids[home[x]]
    distance = np.sqrt((apart * apart).sum(1)).clip(1e-9)
    return np.where(home[y] == home[x], 0.0, gap / (2 * distance)).astype(np.float64)
