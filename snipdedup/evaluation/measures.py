"""What codes and descriptors keep: recall of neighbours, ranks of partners, precision."""

from __future__ import annotations

import numpy as np

from snipdedup.features.nearest import nearest_vectors
from snipdedup.features.shards import plan_blocks
from snipdedup.index.quantizer import Quantiser

COMPARED_ROWS = 256  # whose neighbours are compared at a time, k x k each
SAME = 1e-6  # similarities closer than this are one: copies differ in their last bits


class IndexedRows:
    """An IVFPQ of all rows in memory: what an index of that code size would find."""

    def __init__(self, quantiser: Quantiser) -> None:
        self.quantiser, self.ivfpq = quantiser, quantiser.ivfpq
        self.ivfpq.use_precomputed_table = 0
        self.ivfpq.precompute_table()  # without it, many lists take minutes

    def add(self, x: np.ndarray) -> None:
        """Take vectors of the rows that come next, (n, dim) float32."""
        self.ivfpq.add(np.ascontiguousarray(x))

    def search(self, x: np.ndarray, k: int, nprobe: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ADC distances D and rows I of the ``k`` nearest codes, (n, k) each."""
        self.ivfpq.nprobe = min(nprobe, self.quantiser.nlist)
        return self.ivfpq.search(np.ascontiguousarray(x), k)

    def nearest(self, x: np.ndarray, queries: np.ndarray, k: int, nprobe: int) -> np.ndarray:
        """Return the rows with the nearest codes, (q, k), without the queries' own rows."""
        return drop_own(self.search(x, k + 1, nprobe)[1], queries)

    def nearest_of_all(
        self, x: np.ndarray, queries: np.ndarray, k: int, threads: int
    ) -> np.ndarray:
        """Return what `nearest` does, all lists visited: codes are decoded, as that is faster."""
        self.ivfpq.make_direct_map()

        def decode(span: tuple[int, int]) -> np.ndarray:
            return self.ivfpq.reconstruct_n(span[0], span[1] - span[0])

        return nearest_vectors(x, decode, self.ivfpq.ntotal, k, threads, own=queries)[1]


def drop_own(I: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Return ``I`` without each query's own row, or without the last where that is not there."""
    own = queries[:, None] == I
    own[~own.any(axis=1), -1] = True
    return I[~own].reshape(len(I), I.shape[1] - 1)


def recall(found: np.ndarray, truth: np.ndarray, k: int) -> float:
    """Return the share of the ``k`` truly nearest rows, (q, k), that are among the first found.

    -1 stands where there is no such row.
    """
    hits, truth, found = 0, truth[:, :k], found[:, :k]
    for start, stop in plan_blocks(len(found), COMPARED_ROWS):
        same = truth[start:stop, :, None] == found[start:stop, None, :]
        hits += int((same.any(axis=2) & (truth[start:stop] >= 0)).sum())
    wanted = int((truth >= 0).sum())
    return hits / wanted if wanted else 1.0


def partner_ranks(similarity: np.ndarray, wanted: np.ndarray, item: np.ndarray) -> np.ndarray:
    """Return how many columns of other items are nearer than the best of one's own, (n,) float64.

    A tie counts half: descriptors that are all alike find nothing. Copies of one picture are one
    item, as no descriptor can tell them apart. ``wanted`` (n,) are the items that the rows of
    ``similarity`` (n, m) look for, ``item`` (m,) those of its columns.
    """
    own = wanted[:, None] == item
    best = np.where(own, similarity, -np.inf).max(axis=1)[:, None]
    above = (~own & (similarity > best + SAME)).sum(axis=1)
    ties = (~own & (np.abs(similarity - best) <= SAME)).sum(axis=1)
    return above + ties / 2


def average_precision(score: np.ndarray, truth: np.ndarray) -> float:
    """Return the area under precision by recall; a higher score is surer, equal ones are one."""
    order = np.argsort(-score, kind="stable")
    score, right = score[order], np.cumsum(truth[order])
    ends = np.append(score[1:] != score[:-1], True)
    gained = np.diff(right[ends], prepend=0)
    precision = right[ends] / (np.flatnonzero(ends) + 1)
    return float((precision * gained).sum() / max(int(right[-1]), 1))


def sample_rows(rows: int, wanted: int, rng: np.random.Generator) -> np.ndarray:
    """Return random rows, ascending int64, all where there are no more."""
    return np.sort(rng.choice(rows, min(wanted, rows), replace=False, shuffle=False))
