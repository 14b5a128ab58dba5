"""What descriptors and codes keep: recall of true neighbours, ranks of a row's own partner.

Truth is brute force: all rows stream past the queries, and exact cosines settle the order of the
nearest. Whatever is judged is given as a function from rows to vectors, so that features, PCA and
any encoder are measured by the same lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from snipdedup.features.cosine import pair_cosine, unit_rows
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.index.quantizer import Quantiser
from snipdedup.parallel import ordered_map

BLOCK_ROWS = 4096  # rows compared with all queries at a time
COMPARED_ROWS = 256  # whose neighbours are compared at a time, k x k each
SPARE = 16  # more candidates than asked for, since float32 may swap the last of them
SAME = 1e-6  # similarities closer than this are one: copies differ in their last bits

Vectors = Callable[[np.ndarray], np.ndarray]


class Neighbours(NamedTuple):
    """The ``k`` rows nearest to each query, the query itself left out.

    Attributes
    ----------
    queries : (q,) int64
        Global rows, ascending.
    I : (q, k) int64
        Global rows, the nearest first; -1 where there are fewer.
    """

    queries: np.ndarray
    I: np.ndarray


def true_neighbours(features: Features, queries: np.ndarray, k: int, threads: int) -> Neighbours:
    """Return the rows with the highest cosines, ties by row number.

    Parameters
    ----------
    features : Features
        Streamed once.
    queries : (q,) int64
        Global rows, ascending.
    """
    I = flat_neighbours(features, queries, k + SPARE, unit_rows, threads).I
    raw = features.gather(queries)
    for start, stop in plan_blocks(len(queries), 256):
        part = I[start:stop]
        wanted = features.gather(np.maximum(part, 0).ravel())
        cosine = pair_cosine(np.repeat(raw[start:stop], part.shape[1], axis=0), wanted)
        cosine = np.where(part < 0, -np.inf, cosine.reshape(part.shape))
        I[start:stop] = np.take_along_axis(part, np.lexsort((part, -cosine)), axis=1)
    return Neighbours(queries, I[:, :k])


def flat_neighbours(
    features: Features, queries: np.ndarray, k: int, vectors: Vectors, threads: int
) -> Neighbours:
    """Return the rows whose vectors have the largest dot products, by brute force, streamed.

    Parameters
    ----------
    features : Features
    queries : (q,) int64
        Global rows, ascending.
    k : int
    vectors : function of (n, d) rows returning (n, dim) float32 of length 1
    threads : int
    """
    x = vectors(features.gather(queries))
    return nearest(
        lambda span: vectors(features.read(*span)), features.rows, x, queries, k, threads
    )


def nearest(
    load: Callable[[tuple[int, int]], np.ndarray],
    rows: int,
    x: np.ndarray,
    queries: np.ndarray,
    k: int,
    threads: int,
) -> Neighbours:
    """Return the nearest of ``rows`` vectors, read span by span, to ``x``, the queries' vectors."""
    import torch

    asked = torch.from_numpy(x)

    def within(span: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        y = torch.from_numpy(load(span))
        near = asked @ y.T - y.square().sum(dim=1) / 2  # falls as the distance grows
        low, high = np.searchsorted(queries, span)
        near[np.arange(low, high), queries[low:high] - span[0]] = -torch.inf
        best, at = near.topk(min(k, near.shape[1]), dim=1)
        return best.numpy(), at.numpy() + span[0]

    kept, I = np.full((len(x), k), -np.inf, np.float32), np.full((len(x), k), -1)
    for best, at in ordered_map(within, plan_blocks(rows, BLOCK_ROWS), threads):
        both, found = np.concatenate([kept, best], axis=1), np.concatenate([I, at], axis=1)
        order = np.argsort(-both, axis=1, kind="stable")[:, :k]
        kept, I = np.take_along_axis(both, order, axis=1), np.take_along_axis(found, order, axis=1)
    I[np.isinf(kept)] = -1
    return Neighbours(queries, I)


def recall(found: Neighbours, truth: Neighbours, k: int) -> float:
    """Return the share of the ``k`` truly nearest rows that are among the first ``k`` found."""
    hits = 0
    mine, right = found.I[:, :k], truth.I[:, :k]
    for start, stop in plan_blocks(len(mine), COMPARED_ROWS):
        same = right[start:stop, :, None] == mine[start:stop, None, :]
        hits += int((same.any(axis=2) & (right[start:stop] >= 0)).sum())
    of = int((right >= 0).sum())
    return hits / of if of else 1.0


class Codes:
    """An IVFPQ of all rows in memory: what an index of that code size would find.

    Attributes
    ----------
    quantiser : Quantiser
    """

    def __init__(self, quantiser: Quantiser) -> None:
        self.quantiser = quantiser
        quantiser.ivfpq.use_precomputed_table = 0
        quantiser.ivfpq.precompute_table()  # without it, many lists take minutes

    def add(self, x: np.ndarray) -> None:
        """Take vectors of the rows that come next, (n, dim) float32."""
        self.quantiser.ivfpq.add(np.ascontiguousarray(x))

    def search(self, x: np.ndarray, k: int, nprobe: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ADC distances D and rows I of the ``k`` nearest codes, (n, k) each."""
        self.quantiser.ivfpq.nprobe = min(nprobe, self.quantiser.nlist)
        D, I = self.quantiser.ivfpq.search(np.ascontiguousarray(x), k)
        return D, I

    def neighbours(self, x: np.ndarray, queries: np.ndarray, k: int, nprobe: int) -> Neighbours:
        """Return the nearest codes of other rows."""
        return Neighbours(queries, others(self.search(x, k + 1, nprobe)[1], queries))

    def every(self, x: np.ndarray, queries: np.ndarray, k: int, threads: int) -> Neighbours:
        """Return the nearest codes of other rows, all lists visited: decoded, as that is faster."""
        ivfpq = self.quantiser.ivfpq
        ivfpq.make_direct_map()

        def decode(span: tuple[int, int]) -> np.ndarray:
            return ivfpq.reconstruct_n(span[0], span[1] - span[0])

        return nearest(decode, ivfpq.ntotal, x, queries, k, threads)

    def own_errors(self, x: np.ndarray) -> np.ndarray:
        """Return ‖x − q(x)‖² of vectors, (n,) float32."""
        lists = self.quantiser.assign(x, 1)[1][:, 0]
        off = x - self.quantiser.decode(lists, self.quantiser.encode(x, lists))
        return np.einsum("ij,ij->i", off, off)


def others(I: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Return ``I`` without each query's own row, or without the last where that is not there."""
    own = queries[:, None] == I
    drop = np.where(own.any(axis=1), own.argmax(axis=1), I.shape[1] - 1)
    keep = np.ones(I.shape, bool)
    keep[np.arange(len(I)), drop] = False
    return I[keep].reshape(len(I), I.shape[1] - 1)


def encoded(features: Features, vectors: Vectors, threads: int) -> Iterator[np.ndarray]:
    """Yield the vectors of all rows, in order."""
    return ordered_map(
        lambda span: vectors(features.read(*span)),
        plan_blocks(features.rows, BLOCK_ROWS),
        threads,
    )


def partner_ranks(similarity: np.ndarray, wanted: np.ndarray, item: np.ndarray) -> np.ndarray:
    """Return how many columns of other items are nearer than the best of one's own, (n,) float64.

    A tie counts half: descriptors that are all alike find nothing. Copies of one picture are one
    item, as no descriptor can tell them apart.

    Parameters
    ----------
    similarity : (n, m) float32
    wanted : (n,) int64
        Item that each row looks for.
    item : (m,) int64
        Item of each column; every wanted one is there.
    """
    own = wanted[:, None] == item
    best = np.where(own, similarity, -np.inf).max(axis=1)[:, None]
    above = (~own & (similarity > best + SAME)).sum(axis=1)
    ties = (~own & (np.abs(similarity - best) <= SAME)).sum(axis=1)
    return above + ties / 2


def average_precision(score: np.ndarray, truth: np.ndarray) -> float:
    """Return the area under precision by recall, rows of one score taken together.

    Parameters
    ----------
    score : (n,) float
        Higher is surer.
    truth : (n,) bool
    """
    order = np.argsort(-score, kind="stable")
    score, right = score[order], np.cumsum(truth[order])
    ends = np.append(score[1:] != score[:-1], True)
    reached = right[ends]
    gained = np.diff(reached, prepend=0)
    precision = reached / (np.flatnonzero(ends) + 1)
    return float((precision * gained).sum() / max(int(right[-1]), 1))


def sample_rows(rows: int, wanted: int, rng: np.random.Generator) -> np.ndarray:
    """Return random rows, ascending int64, all where there are no more."""
    return np.sort(rng.choice(rows, min(wanted, rows), replace=False, shuffle=False))


def opq(sample: np.ndarray, m: int, rounds: int) -> Any:
    """Return the rotation that product quantisation of ``sample`` likes best, (dim, dim) float32.

    Optimized Product Quantization, Ge et al., 2013, by faiss.
    """
    import faiss

    dim = sample.shape[1]
    matrix = faiss.OPQMatrix(dim, m)
    codebooks = faiss.ProductQuantizer(dim, m, 8)
    codebooks.cp.min_points_per_centroid = 1  # no warnings from C++; small sets are meant
    matrix.niter, matrix.niter_pq_0, matrix.pq = rounds, 2 * rounds, codebooks
    matrix.train(np.ascontiguousarray(sample))
    return faiss.vector_to_array(matrix.A).reshape(dim, dim)
