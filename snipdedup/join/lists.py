"""Coarse lists of codes: which lists a row visits so that pairs meet.

A row lives in the list of its nearest centroid. It also visits list j if its distance to the
bisector of its own centroid c₁ and c_j, (‖x−c_j‖² − ‖x−c₁‖²) / (2‖c_j − c₁‖), is at most τ, its
visit radius. Two rows of different lists lie on two sides of the bisector of their centroids, so
the sum of their distances to it is at most their own distance: with τ half the largest distance of
a pair, every pair meets in at least one list. A smaller τ, calibrated on a sample, misses a known
share (`calibration`).

All arithmetic is on int8 codes with integer products, so a row's lists never depend on which rows
it is computed with.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from snipdedup.features.shards import plan_blocks
from snipdedup.join.kernels import all_close, pick_kernel
from snipdedup.parallel import ordered_map

ROUNDS = 8  # of k-means
ASSIGN_BLOCK = 2048  # codes assigned at a time: their distances stay in the cache
TABLE_LISTS = 1 << 12  # of up to so many lists, the distances of all centroids are kept


@dataclass(frozen=True)
class CoarseLists:
    """Centroids, and the visit radius in units of codes."""

    centroids: np.ndarray  # (nlist, w) int8
    tau: float  # where both rows of a pair visit
    one_sided_tau: float  # where one of the two stays in its list, so that the other must come

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
        return np.concatenate([self._distances_from(start, stop).max(1) for start, stop in spans])

    def distances(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
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
        return self._distances_from(0, self.nlist)

    def _distances_from(self, start: int, stop: int) -> np.ndarray:
        some = self.centroids[start:stop]
        gaps = squared_norms(some)[:, None] - nearness(some, self.centroids).numpy()
        return np.sqrt(gaps.clip(0).astype(np.float32))


class Visits(NamedTuple):
    """Which rows of a block are in which list."""

    row: np.ndarray  # (v,) int32: a row of the block
    list_: np.ndarray  # (v,) int32: a list that it lives in or visits
    home: np.ndarray  # (v,) bool: True where it lives there, once for each row


def train_centroids(codes: np.ndarray, nlist: int, seed: int, threads: int) -> np.ndarray:
    """Return spherical k-means centroids of codes, (nlist, w) int8.

    Lloyd's iterations on integers: sums of codes are exact, so the result is the same for any
    number of threads. An empty list takes a random code.
    """
    rng = np.random.default_rng(seed)
    centroids = codes[np.sort(rng.choice(len(codes), nlist, replace=False))]
    norm = float(np.sqrt(np.mean(np.einsum("ij,ij->i", codes, codes, dtype=np.int64))))
    for _ in range(ROUNDS):
        home = home_lists(codes, centroids, threads)[0]
        order = np.argsort(home, kind="stable")
        starts = np.searchsorted(home[order], np.arange(nlist))
        used = np.flatnonzero(np.diff(np.append(starts, len(home))))
        sums = np.add.reduceat(codes[order], starts[used], axis=0, dtype=np.int64)
        length = np.sqrt(np.einsum("ij,ij->i", sums, sums).astype(float)).clip(1)
        centroids = codes[rng.choice(len(codes), nlist)]
        centroids[used] = np.rint(sums * (norm / length)[:, None]).clip(-127, 127)
    return centroids


def home_lists(
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
    """Return 2 x·c − ‖c‖² = ‖x‖² − ‖x−c‖² for each code and centroid.

    A (n, nlist) tensor of int32, or of whole float32; it stands until the thread's next call.
    """
    import torch

    kernel = pick_kernel("cpu")
    products = kernel.multiply(torch.from_numpy(codes), kernel.prepare(torch.from_numpy(centroids)))
    size = torch.from_numpy(squared_norms(centroids)).to(products.dtype)
    return torch.add(-size, products, alpha=2, out=products)


def squared_norms(codes: np.ndarray) -> np.ndarray:
    """Return the squared norm of each code, (n,) int32."""
    return np.einsum("ij,ij->i", codes, codes, dtype=np.int32)


def assign_lists(codes: np.ndarray, lists: CoarseLists, radius: np.ndarray | None = None) -> Visits:
    """Return the lists that each code lives in or visits, ordered by row.

    ``radius``, (n,) float32, is the visit radius of each code, `CoarseLists.tau` if not given.
    """
    if lists.nlist == 1:
        all_ = np.arange(len(codes), dtype=np.int32)
        return Visits(all_, np.zeros_like(all_), np.ones(len(all_), bool))
    radius = np.full(len(codes), lists.tau, np.float32) if radius is None else radius
    widest = lists.widest  # now: it takes the memory of what stands until the next product
    parts = []
    for start, stop in plan_blocks(len(codes), ASSIGN_BLOCK):
        near = nearness(codes[start:stop], lists.centroids)
        table = near.numpy()
        home = table.argmax(1)
        best = table[np.arange(len(home)), home]
        twice = 2 * radius[start:stop]
        # first as if all centroids were as far as the furthest, then by their own distances
        close = np.flatnonzero(all_close(near, best - twice.astype(np.float64) * widest[home]))
        row = close // lists.nlist
        list_ = close - row * lists.nlist
        own = np.take(home, row)
        gap = np.take(best, row) - np.take(table.ravel(), close)
        visits = np.flatnonzero(gap <= np.take(twice, row) * lists.distances(own, list_))
        row, list_, own = (np.take(side, visits) for side in (row, list_, own))
        parts.append((row + start, list_, list_ == own))
    row, list_, home = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Visits(row.astype(np.int32), list_.astype(np.int32), home)
