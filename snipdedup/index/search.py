"""kNN over the lists of an index in memory, for many rows, in no more memory than they take."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import numpy as np

from snipdedup.errors import SnipError
from snipdedup.features.cosine import bad_rows
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.index.codes import Lists
from snipdedup.index.folder import ENCODER, Index, Space, same_encoder
from snipdedup.parallel import ALIGNED_ROWS, in_aligned_blocks, ordered_map

QUERY_ROWS = 4 * ALIGNED_ROWS  # rows searched by one thread at a time


class Searcher:
    """kNN over lists in memory, in no more memory than they take.

    faiss keeps an int64 id a code. Its lists on disk do not need theirs in memory, and a search
    that stores pairs (list, place) never reads them: so they are pointed at our codes, with no
    ids behind, and places become row numbers here.
    """

    def __init__(self, index: Index, lists: Lists, nprobe: int) -> None:
        import faiss

        self.quantiser, self.lists = index.quantiser, lists
        self.nprobe = min(nprobe, index.nlist)
        self.ivfpq = cast(Any, faiss.clone_index(index.quantiser.ivfpq))
        self.ivfpq.nprobe = self.nprobe
        self.ivfpq.ntotal = len(lists.ids)
        if self.ivfpq.by_residual:
            self.ivfpq.use_precomputed_table = 0
            self.ivfpq.precompute_table()
        self.invlists = borrowed_lists(lists, index.code_size)
        self.ivfpq.replace_invlists(self.invlists, False)
        weakref.finalize(self, give_back, self.invlists)

    def probe(self, x: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Return distances and numbers of the lists to visit, (n, nprobe) each.

        ``first`` is the place of ``x[0]`` among all queries: it fixes the blocks.
        """
        Dq, Iq = in_aligned_blocks(
            lambda block: self.quantiser.assign(block, self.nprobe), x, first
        )
        return Dq, Iq

    def places(
        self, x: np.ndarray, Dq: np.ndarray, Iq: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the nearest entries in the lists to visit.

        Parameters
        ----------
        x : (n, dim) float32
            Vectors as `Space.vectors` makes them.
        Dq, Iq : (n, nprobe) float32, int64
            From `probe`.
        k : int

        Returns
        -------
        D : (n, k) float32
            Squared distances to the codes, ascending; infinity where there is none.
        I : (n, k) int64
            Places in `lists`; -1 where there is none.
        """
        import faiss

        x, Dq, Iq = (np.ascontiguousarray(array) for array in (x, Dq, Iq))
        D, I = np.empty((len(x), k), np.float32), np.empty((len(x), k), np.int64)
        pointers = [faiss.swig_ptr(array) for array in (Iq, Dq, D, I)]
        self.ivfpq.search_preassigned_c(len(x), faiss.swig_ptr(x), k, *pointers, True)
        found = I >= 0
        pairs = I[found]
        I[found] = self.lists.starts[pairs >> 32] + (pairs & 0xFFFFFFFF)
        D[~found] = np.inf
        return D, I

    def search(
        self, x: np.ndarray, Dq: np.ndarray, Iq: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return D and I as `places` does, with global rows for I."""
        D, I = self.places(x, Dq, Iq, k)
        found = I >= 0
        I[found] = self.lists.rows(I[found])
        return D, I


def borrowed_lists(lists: Lists, code_size: int) -> Any:
    """Return faiss inverted lists whose codes are ``lists.codes`` itself."""
    import faiss

    sizes = np.diff(lists.starts)
    if not hasattr(faiss, "OnDiskInvertedLists"):  # Windows: copied, with ids that are not read
        return copied_lists(lists, code_size)
    invlists: Any = faiss.OnDiskInvertedLists()
    invlists.nlist, invlists.code_size = len(sizes), code_size
    invlists.read_only, invlists.prefetch_nthread = True, 0
    table = np.stack([sizes, sizes, lists.starts[:-1] * code_size], axis=1).astype(np.uint64)
    invlists.lists.resize(len(sizes))
    faiss.memcpy(invlists.lists.data(), faiss.swig_ptr(table), table.nbytes)
    invlists.totsize = lists.codes.nbytes
    invlists.ptr = faiss.swig_ptr(lists.codes)
    return invlists


def give_back(invlists: Any) -> None:
    """Take the pointer away before the lists go: faiss would unmap what it did not map."""
    if hasattr(invlists, "ptr"):
        invlists.ptr = None


def copied_lists(lists: Lists, code_size: int) -> Any:
    """Return plain faiss inverted lists: 8 bytes a row more."""
    import faiss

    invlists: Any = faiss.ArrayInvertedLists(len(lists.starts) - 1, code_size)
    for number in range(len(lists.starts) - 1):
        codes = lists.codes[lists.starts[number] : lists.starts[number + 1]]
        if len(codes):
            ids = np.arange(len(codes), dtype=np.int64)
            invlists.add_entries(number, len(codes), faiss.swig_ptr(ids), faiss.swig_ptr(codes))
    return invlists


def self_adc(index: Index, x: np.ndarray, first: int = 0) -> np.ndarray:
    """Return ‖x − q(x)‖² of vectors, (n,) float32; ``first`` as in `Searcher.probe`."""

    def errors(block: np.ndarray) -> tuple[np.ndarray]:
        lists = index.quantiser.assign(block, 1)[1][:, 0]
        off = block - index.quantiser.decode(lists, index.quantiser.encode(block, lists))
        return (np.einsum("ij,ij->i", off, off),)

    return in_aligned_blocks(errors, x, first)[0]


class Queries(NamedTuple):
    """Rows that are searched for together.

    Attributes
    ----------
    first : int
        Place of the first among all queries.
    rows : (n,) int64
        Global rows; -1 for bad ones, which ask nothing.
    x : (n, dim) float32
    own : (n,) float32
        `self_adc`.
    """

    first: int
    rows: np.ndarray
    x: np.ndarray
    own: np.ndarray


class Source(NamedTuple):
    """Where queries come from: ``total`` of them, read by spans."""

    total: int
    load: Callable[[tuple[int, int]], Queries]


def feature_queries(
    index: Index, space: Space, features: Features, sample: np.ndarray | None = None
) -> Source:
    """Return rows of features as queries: all, or a sample of row numbers."""

    def load(span: tuple[int, int]) -> Queries:
        if sample is None:
            rows, block = np.arange(*span), features.read(*span)
        else:
            rows, block = sample[slice(*span)], features.gather(sample[slice(*span)])
        bad = bad_rows(block)
        block[bad] = 0
        x = in_aligned_blocks(lambda b: (space.vectors(b),), block, span[0])[0]
        return Queries(span[0], np.where(bad, -1, rows), x, self_adc(index, x, span[0]))

    return Source(features.rows if sample is None else len(sample), load)


def code_queries(index: Index, lists: Lists) -> Source:
    """Return stored rows as queries, in the order of their lists: q(x) for x."""

    def load(span: tuple[int, int]) -> Queries:
        x = index.decode(lists, *span)
        return Queries(span[0], lists.rows(slice(*span)), x, np.zeros(len(x), np.float32))

    return Source(len(lists.ids), load)


def neighbours(
    searcher: Searcher, source: Source, *, k: int, threads: int
) -> Iterator[tuple[Queries, np.ndarray, np.ndarray]]:
    """Yield (queries, D, I) in order, `QUERY_ROWS` queries at a time; see `Searcher.search`."""

    def find(span: tuple[int, int]) -> tuple[Queries, np.ndarray, np.ndarray]:
        queries = source.load(span)
        return queries, *searcher.search(queries.x, *searcher.probe(queries.x, queries.first), k)

    return ordered_map(find, plan_blocks(source.total, QUERY_ROWS), threads)


def query_space(index: Index, features: Features, encoder: str | None) -> Space:
    """Return how these features become queries; refuse others than those indexed."""
    indexed = [shard["rows"] for shard in index.manifest["shards"]]
    given = [shard.rows for shard in features.shards]
    if indexed != given:
        raise SnipError(
            f"{index.folder} holds {sum(indexed):,} rows of {len(indexed)} shards, FEATURES are "
            f"{sum(given):,} rows of {len(given)}; give the features that were indexed, or add "
            "new shards with: snip index --append"
        )
    space = index.space
    held = index.folder / ENCODER
    if space.encoder is not None and encoder is not None and not same_encoder(encoder, held):
        raise SnipError(
            f"--encoder {encoder} is not the one that {index.folder} was built with ({held}); "
            "leave --encoder away"
        )
    if space.encoder is None and encoder is not None and features.dim != space.dim_in:
        space = Space.encoded(encoder).of_width(index.dim)
    if features.dim != space.dim_in or space.dim != index.dim:
        raise SnipError(
            f"{index.folder} was built from rows {space.dim_in} wide, FEATURES are {features.dim} "
            "wide; if it holds descriptors, name their encoder with --encoder"
        )
    return space
