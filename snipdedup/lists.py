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

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from snipdedup.kernels import pick_kernel, product_hits

ROUNDS = 8  # of k-means
ASSIGN_BLOCK = 4096  # codes assigned at a time
SAMPLE_PAIRS = 1 << 18  # pairs of the sample that are verified to calibrate with


@dataclass(frozen=True)
class Lists:
    """Centroids, and how far from a bisector a row still visits.

    Attributes
    ----------
    centroids : (nlist, w) int8
    tau : float
        In units of codes.
    """

    centroids: np.ndarray
    tau: float

    @property
    def nlist(self) -> int:
        """Number of lists."""
        return len(self.centroids)


@dataclass(frozen=True)
class Visits:
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


def train_centroids(codes: np.ndarray, nlist: int, seed: int) -> np.ndarray:
    """Return spherical k-means centroids of codes, (nlist, w) int8.

    Lloyd's iterations on integers: sums of codes are exact, so the result is the same for any
    number of threads. An empty list takes a random code.
    """
    rng = np.random.default_rng(seed)
    centroids = codes[np.sort(rng.choice(len(codes), nlist, replace=False))]
    norm = float(np.sqrt(np.mean(np.einsum("ij,ij->i", codes, codes, dtype=np.int64))))
    for _ in range(ROUNDS):
        home = nearest(codes, centroids)[0]
        order = np.argsort(home, kind="stable")
        starts = np.searchsorted(home[order], np.arange(nlist))
        used = np.flatnonzero(np.diff(np.append(starts, len(home))))
        sums = np.add.reduceat(codes[order], starts[used], axis=0, dtype=np.int64).astype(float)
        sums *= norm / np.linalg.norm(sums, axis=1, keepdims=True).clip(1)
        centroids = codes[rng.choice(len(codes), nlist)]
        centroids[used] = np.rint(sums).clip(-127, 127)
    return centroids


def nearest(codes: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each code's nearest centroid (ties: the first) and ‖x−c‖² − ‖x‖², int64."""
    homes, bests = [], []
    for start in range(0, len(codes), ASSIGN_BLOCK):
        gaps = centroid_gaps(codes[start : start + ASSIGN_BLOCK], centroids)
        home = gaps.argmin(1)
        homes.append(home)
        bests.append(gaps[np.arange(len(home)), home])
    return np.concatenate(homes), np.concatenate(bests).astype(np.int64)


def centroid_gaps(codes: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Return ‖c‖² − 2 x·c for each code and centroid: (n, nlist), int32 or float32, exact."""
    import torch

    kernel = pick_kernel("cpu", codes.shape[1], exact=True)
    columns = kernel.prepare(torch.from_numpy(centroids))
    products = kernel.multiply(torch.from_numpy(codes), columns)
    products *= -2
    products += torch.from_numpy(squares(centroids)).to(products.dtype)
    return np.asarray(products.numpy())


def squares(codes: np.ndarray) -> np.ndarray:
    """Return the squared norm of each code, (n,) int32."""
    return np.einsum("ij,ij->i", codes, codes, dtype=np.int32)


def assign(codes: np.ndarray, lists: Lists) -> Visits:
    """Return the lists that each code lives in or visits."""
    if lists.nlist == 1:
        row = np.arange(len(codes), dtype=np.int32)
        return Visits(row, np.zeros_like(row), np.ones(len(row), bool))
    spread = centroid_distances(lists.centroids)
    reach = 2 * lists.tau * spread.max(1)
    parts = []
    for start in range(0, len(codes), ASSIGN_BLOCK):
        gaps = centroid_gaps(codes[start : start + ASSIGN_BLOCK], lists.centroids)
        home = gaps.argmin(1)
        best = gaps[np.arange(len(home)), home]
        limit = np.floor(best + reach[home]).astype(gaps.dtype)
        near = np.flatnonzero((gaps <= limit[:, None]).ravel())
        row, other = np.divmod(near, lists.nlist)
        excess = gaps.ravel()[near] - best[row]
        visits = excess <= 2 * lists.tau * spread[home[row], other]
        visits |= other == home[row]
        row, other = row[visits], other[visits]
        parts.append((row + start, other, other == home[row]))
    row, other, is_home = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Visits(row.astype(np.int32), other.astype(np.int32), is_home)


def centroid_distances(centroids: np.ndarray) -> np.ndarray:
    """Return the distances between centroids, (nlist, nlist) float32."""
    gaps = centroid_gaps(centroids, centroids)
    return np.sqrt(np.maximum(gaps + squares(centroids)[:, None], 0)).astype(np.float32)


def calibrate_tau(
    codes: np.ndarray,
    centroids: np.ndarray,
    limit: float,
    recall: float,
    safe: float,
    verified: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> tuple[float, int]:
    """Return the τ at which the wanted share of a sample's pairs meets, and how many pairs.

    Each row counts once, its pairs sharing its weight, so that large groups do not speak for all.

    Parameters
    ----------
    codes : (n, w) int8
        A sample of distinct rows.
    centroids : (nlist, w) int8
    limit : float
        Product from which two codes may be a pair.
    recall : float
        Share of the pairs that must meet.
    safe : float
        The τ that loses none; returned where the sample holds too few pairs.
    verified : function of (a, b), each (m,) int64 places in the sample
        Tells which proposed pairs are true.
    """
    a, b = sample_pairs(codes, limit)
    every = -(-len(a) // SAMPLE_PAIRS) or 1
    a, b = a[::every], b[::every]
    true = verified(a, b)
    a, b = a[true], b[true]
    if len(a) < 10 / max(1 - recall, 1e-9) or recall >= 1:
        return safe, len(a)
    need = np.minimum(needed_tau(codes, centroids, a, b), needed_tau(codes, centroids, b, a))
    degree = np.bincount(np.concatenate([a, b]), minlength=len(codes))
    weight = 1 / degree[a] + 1 / degree[b]
    order = np.argsort(need, kind="stable")
    reached = np.cumsum(weight[order]) / weight.sum()
    return min(safe, float(need[order][np.searchsorted(reached, recall)])), len(a)


def sample_pairs(codes: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Return all pairs of codes whose product reaches ``limit``."""
    import torch

    kernel = pick_kernel("cpu", codes.shape[1], exact=True)
    found = []
    for start in range(0, len(codes), ASSIGN_BLOCK):
        columns = kernel.prepare(torch.from_numpy(codes[start : start + ASSIGN_BLOCK]))
        for row in range(0, start + 1, ASSIGN_BLOCK):
            block = torch.from_numpy(codes[row : row + ASSIGN_BLOCK])
            i, j = product_hits(kernel.multiply(block, columns), np.full(len(block), limit))
            found.append((i + row, j + start))
    a, b = (np.concatenate(side) for side in zip(*found, strict=True))
    return a[a < b], b[a < b]


def needed_tau(
    codes: np.ndarray, centroids: np.ndarray, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Return the τ from which row x visits row y's list, (n,) float64; 0 in the same list."""
    home, best = nearest(codes, centroids)
    other = home[y]
    gap = np.einsum("ij,ij->i", centroids[other], centroids[other], dtype=np.int64)
    gap -= 2 * np.einsum("ij,ij->i", codes[x], centroids[other], dtype=np.int64)
    apart = centroids[other].astype(np.int64) - centroids[home[x]]
    distance = np.sqrt(np.einsum("ij,ij->i", apart, apart)).clip(1e-9)
    need = (gap - best[x]) / (2 * distance)
    return np.where(other == home[x], 0.0, need)
