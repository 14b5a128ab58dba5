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

from snipdedup import native
from snipdedup.features.shards import plan_blocks
from snipdedup.parallel import ordered_map

ROUNDS = 8  # of k-means
TABLE_LISTS = 1 << 11  # of up to so many lists, the distances of all centroids are kept
ASSIGN_BLOCK = 2048  # codes assigned at a time: their distances stay in the cache


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
    def columns(self) -> Any:
        """The centroids, ready for products."""
        return native.columns(self.centroids)

    @cached_property
    def widest(self) -> np.ndarray:
        """Distance of each centroid from the one furthest away, (nlist,) float32."""
        parts = []
        for start, stop in plan_blocks(self.nlist, ASSIGN_BLOCK):
            some = self.centroids[start:stop]
            gaps = squared_norms(some) - nearness(some, self.centroids, self.columns).min(1)
            parts.append(np.sqrt(gaps.clip(0).astype(np.float32)))
        return np.concatenate(parts)

    @cached_property
    def distances(self) -> np.ndarray | None:
        """Distances of all centroids, (nlist, nlist) float32; None where there are many."""
        if self.nlist > TABLE_LISTS:
            return None
        near = nearness(self.centroids, self.centroids, self.columns)
        return np.sqrt((squared_norms(self.centroids)[:, None] - near).astype(np.float32))


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
    columns = native.columns(centroids)

    def find(span: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        return native.assign(codes[slice(*span)], columns)[:2]

    parts = list(ordered_map(find, plan_blocks(len(codes), ASSIGN_BLOCK), threads))
    home, best = (np.concatenate(side).astype(np.int64) for side in zip(*parts, strict=True))
    return home, -best


def nearness(codes: np.ndarray, centroids: np.ndarray, columns: Any) -> np.ndarray:
    """Return 2 x·c − ‖c‖² = ‖x‖² − ‖x−c‖² for each code and centroid, (n, nlist) int32."""
    return 2 * native.products(codes, columns) - squared_norms(centroids)


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
    home, _, row, list_ = native.assign(codes, lists.columns, lists.widest, lists.distances, radius)
    return Visits(row, list_, list_ == home[row])
