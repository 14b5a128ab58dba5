"""k-means, the package's only one on float vectors, and the sample of rows that it learns from.

Every result depends on rows and seed alone: blocks are assigned side by side, each by one thread,
and sums are taken in row order. (faiss' own training runs on one thread to be repeatable.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from snipdedup.errors import InputError
from snipdedup.features.cosine import bad_rows, unit_rows64
from snipdedup.features.hashing import row_hashes
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.parallel import ALIGNED_ROWS, in_aligned_blocks, library_threads, ordered_map
from snipdedup.statistics import sample_rows

GRAPH_LISTS = 1 << 14  # from here on lists are found by a graph, several times faster than all
GRAPH_LINKS, GRAPH_BUILD, GRAPH_SEARCH = 32, 80, 64  # HNSW's M, efConstruction, efSearch
OVERDRAW = 2  # rows drawn per row wanted, since half may be copies
BLOCK_ROWS = 8 * ALIGNED_ROWS  # rows read, or added up, at a time

Vectors = Callable[[np.ndarray], np.ndarray]  # (n, d) rows to (n, dim) float32


def draw_sample(
    features: Features, vectors: Vectors, wanted: int, seed: int, threads: int = 1
) -> np.ndarray:
    """Return vectors of a random sample of distinct rows, at most ``wanted``, in row order.

    Rows that are equal bit for bit count once: copies would pull centroids to themselves.
    """
    rng = np.random.default_rng(seed)
    rows = sample_rows(features.rows, OVERDRAW * wanted, rng)
    hashes, good_rows = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for start, stop in plan_blocks(len(rows), BLOCK_ROWS):
        block = features.gather(rows[start:stop])
        good = ~bad_rows(block)
        hashes.append(row_hashes(block[good]))
        good_rows.append(rows[start:stop][good])
    _, first = np.unique(np.concatenate(hashes), return_index=True)
    distinct = np.concatenate(good_rows)[np.sort(first)]
    if not len(distinct):
        raise InputError("no row to train on: all sampled rows are NaN, infinity or zero")
    if len(distinct) > wanted:
        distinct = np.sort(rng.choice(distinct, wanted, replace=False))

    def convert(span: tuple[int, int]) -> np.ndarray:
        rows = features.gather(distinct[slice(*span)])
        return in_aligned_blocks(lambda block: (vectors(block),), rows, span[0])[0]

    spans = plan_blocks(len(distinct), BLOCK_ROWS)
    return np.concatenate(list(ordered_map(convert, spans, threads)))


def kmeans(
    x: np.ndarray, k: int, *, iterations: int, seed: int, threads: int, spherical: bool = False
) -> np.ndarray:
    """Return ``k`` centroids of ``x`` by Lloyd's iterations, (k, dim) float32.

    ``spherical``: of unit rows, and scaled to norm 1 after each iteration.
    """
    import torch

    rng = np.random.default_rng(seed)
    centroids = x[rng.choice(len(x), k, replace=len(x) < k)]
    for _ in range(iterations):
        labels = nearest_centroids(coarse_index(centroids), x, threads)
        sums = torch.zeros((k, x.shape[1]), dtype=torch.float64)
        with library_threads(1):
            for start, stop in plan_blocks(len(x), BLOCK_ROWS):
                part = torch.from_numpy(x[start:stop]).double()
                sums.index_add_(0, torch.from_numpy(labels[start:stop]), part)
        counts = np.bincount(labels, minlength=k)
        if spherical:
            centroids = unit_rows64(sums.numpy()).astype(np.float32)
            empty = np.flatnonzero(~centroids.any(axis=1))
            centroids[empty] = x[rng.choice(len(x), len(empty))]
        else:
            centroids = (sums.numpy() / np.maximum(counts, 1)[:, None]).astype(np.float32)
            empty = np.flatnonzero(counts == 0)  # each gets half of a large list
            donors = rng.choice(k, len(empty), p=counts / len(x))
            centroids[empty] = centroids[donors] * np.float32(1 - 1 / 1024)
            centroids[donors] *= np.float32(1 + 1 / 1024)
    return centroids


def coarse_index(centroids: np.ndarray) -> Any:
    """Return the faiss index of centroids: all compared, or an HNSW graph where they are many.

    The graph is built by one thread: the order in which it grows decides its links.
    """
    import faiss

    if len(centroids) < GRAPH_LISTS:
        coarse: Any = faiss.IndexFlatL2(centroids.shape[1])
        coarse.add(centroids)
        return coarse
    coarse = faiss.IndexHNSWFlat(centroids.shape[1], GRAPH_LINKS)
    coarse.hnsw.efConstruction, coarse.hnsw.efSearch = GRAPH_BUILD, GRAPH_SEARCH
    with library_threads(1):
        coarse.add(centroids)
    return coarse


def nearest_centroids(coarse: Any, x: np.ndarray, threads: int) -> np.ndarray:
    """Return the nearest centroid of each row by Euclidean distance, (n,) int64."""

    def search(span: tuple[int, int]) -> np.ndarray:
        block = x[slice(*span)]
        return in_aligned_blocks(lambda b: (coarse.search(b, 1)[1][:, 0],), block, span[0])[0]

    return np.concatenate(list(ordered_map(search, plan_blocks(len(x), ALIGNED_ROWS), threads)))
