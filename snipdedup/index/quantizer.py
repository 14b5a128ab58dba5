"""Quantisers: coarse centroids and PQ codebooks, trained the same way whatever the threads.

A block of rows is always computed at full size and at the same place, padded with zeros, because
matrix products change in their last bits with shape. So a row's code does not depend on which
other rows are at hand: shards may be encoded apart, or added later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np

from snipdedup.errors import InputError, SnipError
from snipdedup.features.cosine import bad_rows
from snipdedup.features.hashing import row_hashes
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.parallel import ALIGNED_ROWS, in_aligned_blocks, library_threads, ordered_map
from snipdedup.storage import atomic

ITERATIONS = 8  # of the coarse k-means; more hardly move the lists (findings of many peers)
POINTS_A_CODEWORD = 256  # more training points do not improve a codebook (faiss' own limit)
LEAST_POINTS = 39  # training points a list below which faiss warns, and lists get arbitrary
LISTS_A_ROOT = 4  # nlist is about this many times the square root of the rows
MOST_LISTS = 1 << 16  # chosen by itself, at two billion rows
GRAPH_LISTS = 1 << 14  # from here on lists are found by a graph, several times faster than all
GRAPH_LINKS, GRAPH_BUILD, GRAPH_SEARCH = 32, 80, 64  # HNSW's M, efConstruction, efSearch
POINTS_A_LIST, LEAST_SAMPLE = 64, 1 << 16
OVERDRAW = 2  # rows drawn per row wanted, since half may be copies

Vectors = Callable[[np.ndarray], np.ndarray]


class Quantiser:
    """A trained faiss IVFPQ without rows.

    Attributes
    ----------
    ivfpq : faiss.IndexIVFPQ
    centroids : (nlist, dim) float32
    graph : bool
        Lists are found by an HNSW graph: nearly always the nearest ones.
    nlist, dim, m, nbits, code_size : int
        ``code_size`` is in bytes.
    """

    def __init__(self, ivfpq: Any) -> None:
        import faiss

        self.ivfpq = ivfpq
        self.nlist, self.dim = int(ivfpq.nlist), int(ivfpq.d)
        self.m, self.nbits = int(ivfpq.pq.M), int(ivfpq.pq.nbits)
        self.code_size = int(ivfpq.code_size)
        self.centroids = ivfpq.quantizer.reconstruct_n(0, self.nlist)
        self.coarse: Any = faiss.downcast_index(ivfpq.quantizer)
        self.graph = isinstance(self.coarse, faiss.IndexHNSWFlat)

    def assign(self, x: np.ndarray, nprobe: int) -> tuple[np.ndarray, np.ndarray]:
        """Return squared distances and numbers of the nearest lists, (n, nprobe) each."""
        nprobe = min(nprobe, self.nlist)
        if not self.graph:
            return self.coarse.search(x, nprobe)
        import faiss

        wide = cast(Any, faiss).SearchParametersHNSW()  # of which faiss ships no type
        wide.efSearch = max(self.coarse.hnsw.efSearch, 2 * nprobe)
        return self.coarse.search(x, nprobe, params=wide)

    def encode(self, x: np.ndarray, lists: np.ndarray) -> np.ndarray:
        """Return the codes of vectors in their lists, (n, code_size) uint8."""
        import faiss

        x, lists = np.ascontiguousarray(x, np.float32), np.ascontiguousarray(lists, np.int64)
        codes = np.zeros((len(x), self.code_size), np.uint8)
        self.ivfpq.encode_vectors(
            len(x), faiss.swig_ptr(x), faiss.swig_ptr(lists), faiss.swig_ptr(codes)
        )
        return codes

    def decode(self, lists: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Return q(y) of stored rows, (n, dim) float32."""
        vectors = self.ivfpq.pq.decode(np.ascontiguousarray(codes))
        if self.ivfpq.by_residual:
            vectors += self.centroids[lists]
        return vectors


def default_nlist(rows: int, points: int) -> int:
    """Return how many lists suit ``rows``, with ``points`` to train on: a power of two."""
    nlist = min(2 ** round(math.log2(LISTS_A_ROOT * math.sqrt(rows))), MOST_LISTS)
    while nlist > 1 and nlist * LEAST_POINTS > points:
        nlist //= 2
    return nlist


def default_m(dim: int, most: int) -> int:
    """Return the most sub-quantisers, up to ``most``, that divide the width."""
    return max(m for m in range(1, min(most, dim) + 1) if dim % m == 0)


def check_m(m: int, dim: int) -> None:
    """Refuse a number of sub-quantisers that does not divide the width."""
    if dim % m:
        possible = [n for n in range(1, min(dim, 256) + 1) if dim % n == 0]
        raise SnipError(
            f"--m {m} must divide the width {dim} of the vectors; possible here: "
            f"{', '.join(map(str, possible))}"
        )


def draw_sample(
    features: Features, vectors: Vectors, wanted: int, seed: int, threads: int = 1
) -> np.ndarray:
    """Return vectors of a random sample of distinct rows, at most ``wanted``, in row order.

    Rows that are equal bit for bit count once: copies would pull centroids to themselves.
    """
    rng = np.random.default_rng(seed)
    count = min(features.rows, OVERDRAW * wanted)
    rows = np.sort(rng.choice(features.rows, count, replace=False, shuffle=False))
    seen, kept = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for start, stop in plan_blocks(count, 8 * ALIGNED_ROWS):
        block = features.gather(rows[start:stop])
        good = ~bad_rows(block)
        seen.append(row_hashes(block[good]))
        kept.append(rows[start:stop][good])
    _, first = np.unique(np.concatenate(seen), return_index=True)
    distinct = np.concatenate(kept)[np.sort(first)]
    if not len(distinct):
        raise InputError(
            "no row to train quantisers on: all sampled rows are NaN, infinity or zero"
        )
    if len(distinct) > wanted:
        distinct = np.sort(rng.choice(distinct, wanted, replace=False))

    def convert(span: tuple[int, int]) -> np.ndarray:
        rows = features.gather(distinct[slice(*span)])
        return in_aligned_blocks(lambda block: (vectors(block),), rows, span[0])[0]

    spans = plan_blocks(len(distinct), 8 * ALIGNED_ROWS)
    return np.concatenate(list(ordered_map(convert, spans, threads)))


def train(
    sample: np.ndarray,
    *,
    nlist: int,
    m: int,
    nbits: int,
    seed: int,
    threads: int,
    centroids: np.ndarray | None = None,
) -> Quantiser:
    """Train coarse centroids and residual codebooks.

    Parameters
    ----------
    sample : (n, dim) float32
    nlist, m, nbits : int
        Coarse lists; sub-quantisers; bits of each.
    seed, threads : int
        The result depends on the seed, not on the threads.
    centroids : (nlist, dim) float32, optional
        Of an earlier training on the same sample with the same seed, which need not be repeated.

    Returns
    -------
    Quantiser
    """
    import faiss

    check_m(m, sample.shape[1])
    if centroids is None:
        centroids = kmeans(sample, nlist, seed=seed, threads=threads)
    coarse = coarse_index(centroids)
    rng = np.random.default_rng(seed)
    most = POINTS_A_CODEWORD << nbits
    if len(sample) > most:
        sample = sample[np.sort(rng.choice(len(sample), most, replace=False))]
    residuals = sample - centroids[assign_all(coarse, sample, threads)]
    ivfpq = faiss.IndexIVFPQ(coarse, sample.shape[1], nlist, m, nbits)
    faiss.copy_array_to_vector(
        train_codebooks(residuals, m, nbits, seed, threads).ravel(), ivfpq.pq.centroids
    )
    ivfpq.is_trained = True
    return Quantiser(ivfpq)


def coarse_index(centroids: np.ndarray) -> Any:
    """Return what finds the nearest centroids: all compared, or a graph where they are many.

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


def kmeans(x: np.ndarray, k: int, *, seed: int, threads: int) -> np.ndarray:
    """Return ``k`` centroids of ``x`` by Lloyd's iterations, (k, dim) float32.

    faiss' own training runs on one thread when it has to be repeatable; here blocks are assigned
    side by side, and sums are taken in row order.
    """
    import torch

    rng = np.random.default_rng(seed)
    centroids = x[rng.choice(len(x), k, replace=len(x) < k)]
    for _ in range(ITERATIONS):
        labels = assign_all(coarse_index(centroids), x, threads)
        sums = torch.zeros((k, x.shape[1]), dtype=torch.float64)
        with library_threads(1):
            for start, stop in plan_blocks(len(x), 8 * ALIGNED_ROWS):
                part = torch.from_numpy(x[start:stop]).double()
                sums.index_add_(0, torch.from_numpy(labels[start:stop]), part)
        counts = np.bincount(labels, minlength=k)
        centroids = (sums.numpy() / np.maximum(counts, 1)[:, None]).astype(np.float32)
        split_empty(centroids, counts, rng)
    return centroids


def split_empty(centroids: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> None:
    """Give each empty list half of a large one: two centroids on both sides of its own."""
    empty = np.flatnonzero(counts == 0)
    if not len(empty):
        return
    donors = rng.choice(len(counts), len(empty), p=counts / counts.sum())
    centroids[empty] = centroids[donors] * np.float32(1 - 1 / 1024)
    centroids[donors] *= np.float32(1 + 1 / 1024)


def assign_all(coarse: Any, x: np.ndarray, threads: int) -> np.ndarray:
    """Return the nearest centroid of each row, (n,) int64."""

    def nearest(span: tuple[int, int]) -> np.ndarray:
        block = x[slice(*span)]
        return in_aligned_blocks(lambda b: (coarse.search(b, 1)[1][:, 0],), block, span[0])[0]

    return np.concatenate(list(ordered_map(nearest, plan_blocks(len(x), ALIGNED_ROWS), threads)))


def train_codebooks(
    residuals: np.ndarray, m: int, nbits: int, seed: int, threads: int
) -> np.ndarray:
    """Return the codewords of each sub-quantiser, (m, 2**nbits, dim / m) float32."""
    import faiss

    words, width = 1 << nbits, residuals.shape[1] // m
    if len(residuals) < words:  # faiss wants a point a word; tiny sets repeat theirs
        residuals = np.resize(residuals, (words, residuals.shape[1]))

    def one(sub: int) -> np.ndarray:
        part = np.ascontiguousarray(residuals[:, sub * width : (sub + 1) * width])
        search = faiss.IndexFlatL2(width)
        clustering = faiss.Clustering(width, words)
        clustering.seed = seed & 0x7FFFFFFF
        clustering.min_points_per_centroid = 1  # no warnings from C++; tiny sets are meant
        clustering.train(part, search)
        return faiss.vector_to_array(clustering.centroids).reshape(words, width)

    return np.stack(list(ordered_map(one, range(m), threads)))


def write_quantiser(path: Path, quantiser: Quantiser) -> None:
    """Write a quantiser as an empty IVFPQ that plain faiss reads."""
    import faiss

    with atomic.replacing(path) as part:  # faiss' own writer does not tell a full disk from a fault
        part.write_bytes(faiss.serialize_index(quantiser.ivfpq).data)


def read_quantiser(path: Path) -> Quantiser:
    """Read the trained quantisers of a faiss IVFPQ file, ours or any other; its rows are dropped.

    Raises
    ------
    SnipError
        If the file is no faiss index, or of another kind than a trained L2 IVFPQ.
    """
    import faiss

    if not path.is_file():
        raise SnipError(f"no such file: {path}")
    # Mapped, the codes of a large index are never read. Windows has no such lists.
    mapped = faiss.IO_FLAG_MMAP if hasattr(faiss, "OnDiskInvertedLists") else 0
    try:
        with no_larger_than(path.stat().st_size):
            ivfpq: Any = faiss.read_index(str(path), mapped | faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
    except (RuntimeError, MemoryError) as error:
        reason = str(error).strip().splitlines()[-1][:200]
        raise SnipError(f"{path}: not an index that faiss can read: {reason}") from error
    check_kind(path, ivfpq)
    empty: Any = faiss.ArrayInvertedLists(ivfpq.nlist, ivfpq.code_size)
    empty.this.disown()  # the index frees them
    ivfpq.replace_invlists(empty, True)
    ivfpq.ntotal = 0
    return Quantiser(ivfpq)


@contextmanager
def no_larger_than(size: int) -> Iterator[None]:
    """Let faiss believe no file that says of an array that it is larger than the file."""
    import faiss

    if not hasattr(faiss, "set_deserialization_vector_byte_limit"):  # older than 1.15
        yield
        return
    before = faiss.get_deserialization_vector_byte_limit()
    faiss.set_deserialization_vector_byte_limit(size)
    try:
        yield
    finally:
        faiss.set_deserialization_vector_byte_limit(before)


def check_kind(path: Path, index: Any) -> None:
    """Refuse what is not a trained IVFPQ with squared L2 distances."""
    import faiss

    expected = f"{path}: expected a trained faiss IndexIVFPQ with L2 distances, found "
    if isinstance(index, faiss.IndexPreTransform):
        raise SnipError(
            expected + "one behind a transform (IndexPreTransform, OPQ for example); apply the "
            "transform to the features, and give the inner index"
        )
    if type(index) is not faiss.IndexIVFPQ:
        raise SnipError(expected + type(index).__name__)
    if index.metric_type != faiss.METRIC_L2:
        raise SnipError(expected + "another metric")
    if not index.is_trained or not index.quantizer.ntotal == index.nlist:
        raise SnipError(expected + "an untrained one")
    if not 4 <= index.pq.nbits <= 8:
        raise SnipError(expected + f"{index.pq.nbits} bits a sub-quantiser; 4 to 8 are supported")
