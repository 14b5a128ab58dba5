"""Quantisers of an IVFPQ: coarse centroids and PQ codebooks, the same whatever the threads.

A block of rows is always computed at full size and at the same place, padded with zeros, because
matrix products change in their last bits with shape. So a row's code does not depend on which
other rows are at hand: shards may be encoded apart, or added later.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np

from snipdedup.errors import SnipError
from snipdedup.index.kmeans import coarse_index, kmeans, nearest_centroids
from snipdedup.parallel import ordered_map
from snipdedup.storage import atomic

ITERATIONS = 8  # of the coarse k-means; more hardly move the lists
POINTS_A_CODEWORD = 256  # more training points do not improve a codebook (faiss' own limit)
LEAST_POINTS = 39  # training points a list below which faiss warns, and lists get arbitrary
LISTS_A_ROOT = 4  # nlist is about this many times the square root of the rows
MOST_LISTS = 1 << 16  # chosen by itself, at two billion rows
MOST_M, NBITS = 16, 8  # of a PQ, by default: sub-quantisers at the most, bits of each
POINTS_A_LIST, LEAST_SAMPLE = 64, 1 << 16  # rows to train on


class Quantiser:
    """A trained faiss IVFPQ without rows; ``code_size`` is in bytes.

    Where ``coarse`` is an HNSW graph of the centroids, lists are nearly always the nearest ones.
    """

    def __init__(self, ivfpq: Any) -> None:
        import faiss

        self.ivfpq = ivfpq
        self.nlist, self.dim = int(ivfpq.nlist), int(ivfpq.d)
        self.m, self.nbits = int(ivfpq.pq.M), int(ivfpq.pq.nbits)
        self.code_size = int(ivfpq.code_size)
        self.centroids = ivfpq.quantizer.reconstruct_n(0, self.nlist)
        words = faiss.vector_to_array(ivfpq.pq.centroids)
        self.words = words.reshape(self.m, 1 << self.nbits, self.dim // self.m)
        self.residual = bool(ivfpq.by_residual)
        self.coarse: Any = faiss.downcast_index(ivfpq.quantizer)

    def assign(self, x: np.ndarray, nprobe: int) -> tuple[np.ndarray, np.ndarray]:
        """Return squared distances and numbers of the nearest lists, (n, nprobe) each."""
        import faiss

        nprobe = min(nprobe, self.nlist)
        if not isinstance(self.coarse, faiss.IndexHNSWFlat):
            return self.coarse.search(x, nprobe)
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

    def own_code(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return each vector's list and code, and its squared distance to that code, (n,) each."""
        lists = self.assign(x, 1)[1][:, 0]
        codes = self.encode(x, lists)
        off = x - self.decode(lists, codes)
        return lists, codes, np.einsum("ij,ij->i", off, off)


def default_nlist(rows: int, points: int) -> int:
    """Return how many lists suit ``rows``, with ``points`` to train on: a power of two."""
    nlist = min(2 ** round(math.log2(LISTS_A_ROOT * math.sqrt(rows))), MOST_LISTS)
    while nlist > 1 and nlist * LEAST_POINTS > points:
        nlist //= 2
    return nlist


def default_sample(rows: int, nlist: int | None) -> int:
    """Return how many rows of a set suit the training of ``nlist`` lists, or of the usual ones."""
    return max(POINTS_A_LIST * (nlist or default_nlist(rows, rows)), LEAST_SAMPLE)


def default_m(dim: int) -> int:
    """Return the most sub-quantisers, up to `MOST_M`, that divide the width."""
    return max(m for m in range(1, min(MOST_M, dim) + 1) if dim % m == 0)


def check_nlist(nlist: int, rows: int) -> None:
    """Refuse more lists than there are rows."""
    if nlist > rows:
        raise SnipError(
            f"--nlist {nlist}: there are only {rows:,} rows; give fewer lists, or leave it away to "
            "have them chosen"
        )


def train_quantiser(
    sample: np.ndarray, *, nlist: int, m: int, nbits: int, seed: int, threads: int,
    centroids: np.ndarray | None = None,
) -> Quantiser:  # fmt: skip
    """Train coarse centroids and residual codebooks on a sample, (n, dim) float32.

    ``centroids``, (nlist, dim), are those of an earlier training on the same sample with the same
    seed, which need not be repeated.
    """
    import faiss

    if centroids is None:
        centroids = kmeans(sample, nlist, iterations=ITERATIONS, seed=seed, threads=threads)
    coarse = coarse_index(centroids)
    rng = np.random.default_rng(seed)
    most = POINTS_A_CODEWORD << nbits
    if len(sample) > most:
        sample = sample[np.sort(rng.choice(len(sample), most, replace=False))]
    residuals = sample - centroids[nearest_centroids(coarse, sample, threads)]
    ivfpq = faiss.IndexIVFPQ(coarse, sample.shape[1], nlist, m, nbits)
    codebooks = train_codebooks(residuals, m, nbits, seed, threads)
    faiss.copy_array_to_vector(codebooks.ravel(), ivfpq.pq.centroids)
    ivfpq.is_trained = True
    return Quantiser(ivfpq)


def train_codebooks(
    residuals: np.ndarray, m: int, nbits: int, seed: int, threads: int
) -> np.ndarray:
    """Return the codewords of each sub-quantiser, (m, 2**nbits, dim / m) float32."""
    import faiss

    words, width = 1 << nbits, residuals.shape[1] // m
    if len(residuals) < words:  # faiss wants a point a word; tiny sets repeat theirs
        residuals = np.resize(residuals, (words, residuals.shape[1]))

    def train_one(sub: int) -> np.ndarray:
        part = np.ascontiguousarray(residuals[:, sub * width : (sub + 1) * width])
        clustering = faiss.Clustering(width, words)
        clustering.seed = seed & 0x7FFFFFFF
        clustering.min_points_per_centroid = 1  # no warnings from C++; tiny sets are meant
        clustering.train(part, faiss.IndexFlatL2(width))
        return faiss.vector_to_array(clustering.centroids).reshape(words, width)

    return np.stack(list(ordered_map(train_one, range(m), threads)))


def write_quantiser(path: Path, quantiser: Quantiser) -> None:
    """Write a quantiser as an empty IVFPQ that plain faiss reads."""
    import faiss

    with atomic.replacing(path) as part:  # faiss' own writer does not tell a full disk from a fault
        part.write_bytes(faiss.serialize_index(quantiser.ivfpq).data)


def read_quantiser(path: Path) -> Quantiser:
    """Read the quantisers of a trained faiss IVFPQ file, ours or any other, without its rows."""
    import faiss

    if not path.is_file():
        raise SnipError(f"no such file: {path}")
    flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE  # mapped: codes stay unread
    try:
        with no_larger_than(path.stat().st_size):
            index: Any = faiss.read_index(str(path), flags)
    except (RuntimeError, MemoryError) as error:
        reason = str(error).strip().splitlines()[-1][:200]
        raise SnipError(f"{path}: not an index that faiss can read: {reason}") from error
    found = ""
    if type(index) is not faiss.IndexIVFPQ:
        found = type(index).__name__
    elif index.metric_type != faiss.METRIC_L2:
        found = "another metric"
    elif not index.is_trained or index.quantizer.ntotal != index.nlist:
        found = "an untrained one"
    elif not 4 <= index.pq.nbits <= 8:
        found = f"{index.pq.nbits} bits"
    elif faiss.vector_to_array(index.pq.centroids).size != index.d << index.pq.nbits or (
        index.d % index.pq.M
    ):
        found = "sub-quantisers of another size"
    if found:
        raise SnipError(
            f"{path}: expected a trained faiss IndexIVFPQ with L2 distances and 4 to 8 bits a "
            f"sub-quantiser, without a transform before it, found {found}"
        )
    empty: Any = faiss.ArrayInvertedLists(index.nlist, index.code_size)
    empty.this.disown()  # the index frees them
    index.replace_invlists(empty, True)
    index.ntotal = 0
    return Quantiser(index)


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
