"""The nearest codes: for many rows with all codes in memory, for one vector with codes on disk."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from snipdedup.errors import SnipError
from snipdedup.features.cosine import bad_rows
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.index.folder import (
    WALK_ROWS,
    CodeLists,
    Index,
    PlainRows,
    ShardCodes,
    agreed_encoder,
    held_encoder,
    load_encoder,
    pack_rows,
    unpack_rows,
)
from snipdedup.parallel import ALIGNED_ROWS, in_aligned_blocks

if TYPE_CHECKING:
    from snipdedup.encoder.network import Encoder

QUERY_ROWS = 4 * ALIGNED_ROWS  # rows searched by one thread at a time
PROBE_ROWS = 4 * ALIGNED_ROWS  # rows whose lists are found together; small blocks are slower
MOST_MAPPED = 128  # shards that stay mapped
DECODE_ROWS = 1 << 15  # codes turned into vectors at a time


class Classes(NamedTuple):
    """Rows grouped by list and code; each class is one entry of a search.

    Hundreds of copies would else fill all k places. Rows of a class are duplicates by definition:
    no code tells them apart, and each is linked to the first of them.

    ``lists`` has one entry a class, with its smallest row; ``members`` (n, width) all rows, packed,
    class by class, ascending in each; ``begins`` where each class begins there, then n.
    """

    lists: CodeLists
    members: np.ndarray
    begins: np.ndarray

    @classmethod
    def of(cls, lists: CodeLists) -> Classes:
        """Group the entries of lists by list and code."""
        kept, members, counts = [np.empty(0, np.int64)], [lists.ids[:0]], [np.zeros(1, np.int64)]
        for low, high in lists.spans():
            of = lists.list_at(np.arange(low, high))[:, None].view(np.uint8)
            both = np.concatenate([lists.codes[low:high], of], axis=1)
            same = np.unique(both.view(f"V{both.shape[1]}"), return_index=True, return_inverse=True)
            first = same[1][same[2].ravel()]  # the first place with the same list and code
            members.append(lists.ids[low + np.argsort(first, kind="stable")])
            places, count = np.unique(first, return_counts=True)
            kept.append(places + low)
            counts.append(count)
        entries = np.concatenate(kept)
        starts = np.searchsorted(entries, lists.starts)
        one_each = CodeLists(lists.codes[entries], lists.ids[entries], starts)
        return cls(one_each, np.concatenate(members), np.cumsum(np.concatenate(counts)))

    def rows(self, classes: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Return up to ``most`` rows of each class: (place in ``classes``, row), int64 each."""
        begin = self.begins[classes]
        counts = np.minimum(self.begins[classes + 1] - begin, most)
        at = np.repeat(np.arange(len(classes)), counts)
        within = np.arange(len(at)) - np.repeat(np.cumsum(counts) - counts, counts)
        return at, unpack_rows(self.members[begin[at] + within])

    def of_rows(self, rows: int) -> np.ndarray:
        """Return the class of each of ``rows`` rows, (rows,) int; -1 for rows in no list."""
        entries = len(self.lists.ids)
        own = np.full(rows, -1, np.min_scalar_type(-1 - entries))
        own[self.lists.rows(slice(None))] = np.arange(entries)
        for first, row in self.links():
            own[row] = own[first]
        return own

    def links(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield blocks of (smallest row, row) over all rows that are not the smallest."""
        for low, high in plan_blocks(len(self.begins) - 1, WALK_ROWS):
            counts = np.diff(self.begins[low : high + 1])
            first = np.repeat(self.lists.rows(slice(low, high)), counts)
            row = unpack_rows(self.members[self.begins[low] : self.begins[high]])
            if (first != row).any():
                yield first[first != row], row[first != row]


class Searcher:
    """kNN over lists in memory, in no more memory than they take.

    faiss keeps an int64 id a code. Its lists on disk do not need theirs in memory, and a search
    that stores pairs (list, place) never reads them: so they are pointed at our codes, with no
    ids behind, and places become row numbers here.
    """

    def __init__(self, index: Index, lists: CodeLists, nprobe: int) -> None:
        import faiss

        self.quantiser, self.lists = index.quantiser, lists
        self.nprobe = min(nprobe, index.nlist)
        self.ivfpq = cast(Any, faiss.clone_index(index.quantiser.ivfpq))
        self.ivfpq.nprobe, self.ivfpq.ntotal = self.nprobe, len(lists.ids)
        if self.ivfpq.by_residual:
            self.ivfpq.use_precomputed_table = 0
            self.ivfpq.precompute_table()
        sizes = np.diff(lists.starts)
        table = np.stack([sizes, sizes, lists.starts[:-1] * index.code_size], 1).astype(np.uint64)
        invlists: Any = faiss.OnDiskInvertedLists()
        invlists.nlist, invlists.code_size = len(sizes), index.code_size
        invlists.read_only, invlists.prefetch_nthread = True, 0
        invlists.lists.resize(len(sizes))
        faiss.memcpy(invlists.lists.data(), faiss.swig_ptr(table), table.nbytes)
        invlists.totsize, invlists.ptr = lists.codes.nbytes, faiss.swig_ptr(lists.codes)
        self.invlists = invlists
        self.ivfpq.replace_invlists(self.invlists, False)
        # Before the lists go, the pointer is taken away: faiss would unmap what it did not map.
        weakref.finalize(self, setattr, self.invlists, "ptr", None)

    def probe(self, x: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Return distances and numbers of the lists to visit, (n, nprobe) each.

        ``first`` is the place of ``x[0]`` among all queries: it fixes the blocks.
        """
        assign = partial(self.quantiser.assign, nprobe=self.nprobe)
        Dq, Iq = in_aligned_blocks(assign, x, first, PROBE_ROWS)
        return Dq, Iq

    def places(
        self, x: np.ndarray, Dq: np.ndarray, Iq: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return D and I, (n, k): the nearest entries to vectors in the lists that `probe` gave.

        D are squared distances to the codes, ascending; I are places in ``lists``; infinity and -1
        where there is none.
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


class Queries(NamedTuple):
    """Rows that are searched for together; ``first`` is the place of the first among all.

    ``rows`` (n,) are global, -1 for bad ones, which ask nothing; ``x`` (n, dim) their vectors,
    ``own`` (n,) the squared distance of each to its own code.
    """

    first: int
    rows: np.ndarray
    x: np.ndarray
    own: np.ndarray


class LoadedIndex:
    """All codes of an index in memory, searched for rows of features, or without them for codes.

    ``count`` queries can be asked: the rows in order, or the distinct codes in that of their lists.
    ``shared`` (rows,) bool: which rows share their code with another; ``class_of`` (rows,): the
    class of each row of features, -1 for rows in no list.
    """

    def __init__(
        self, index: Index, features: Features | None, nprobe: int, encoder: str | None = None
    ) -> None:
        self.index, self.features = index, features
        self.encoder = index.encoder
        if features is not None:
            self.encoder = query_encoder(index, features, encoder)
        self.classes = Classes.of(index.lists())
        self.searcher = Searcher(index, self.classes.lists, nprobe)
        self.count = len(self.classes.lists.ids) if features is None else features.rows
        self.class_of = self.classes.of_rows(index.rows) if features else np.empty(0, np.int64)
        several = np.append(np.diff(self.classes.begins) > 1, False)  # the last for class -1
        self.shared = several[self.class_of]

    def queries(self, span: tuple[int, int], sample: np.ndarray | None = None) -> Queries:
        """Return the queries of a span of all, or of a sample of row numbers (ascending)."""
        lists, quantiser = self.classes.lists, self.index.quantiser
        if self.features is None:
            x = quantiser.decode(lists.list_at(np.arange(*span)), lists.codes[slice(*span)])
            return Queries(span[0], lists.rows(slice(*span)), x, np.zeros(len(x), np.float32))
        if sample is None:
            rows, block = np.arange(*span), self.features.read(*span)
        else:
            rows, block = sample[slice(*span)], self.features.gather(sample[slice(*span)])
        bad = bad_rows(block) | (self.class_of[rows] < 0)
        block[bad] = 0
        x = in_aligned_blocks(lambda b: (self.encoder.encode(b),), block, span[0])[0]
        places = np.maximum(self.class_of[rows], 0)
        off = x - quantiser.decode(lists.list_at(places), lists.codes[places])
        return Queries(span[0], np.where(bad, -1, rows), x, np.einsum("ij,ij->i", off, off))


def query_encoder(index: Index, features: Features, encoder: str | None) -> Encoder | PlainRows:
    """Return what makes queries of these features; refuse others than those indexed."""
    index.refuse_other_rows(features)
    found, held = index.encoder, held_encoder(index.folder)
    folder = agreed_encoder(encoder, held, f"{index.folder} was built")
    if held is None and folder is not None and features.dim != found.dim_in:
        found = load_encoder(folder, index.dim)
    if features.dim != found.dim_in or found.dim != index.dim:
        raise SnipError(
            f"{index.folder} was built from rows {found.dim_in} wide, FEATURES are {features.dim} "
            "wide; if it holds descriptors, name their encoder with --encoder"
        )
    return found


class MappedLists:
    """The lists of an index, mapped shard by shard: only the visited lists are read.

    A wrong shard is refused when this is made. For many queries `Searcher` is faster.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self.mapped: dict[int, ShardCodes] = {}
        for number in range(len(index.files)):
            self.shard(number)

    def shard(self, number: int) -> ShardCodes:
        """Return the codes of a shard; where there are very many, most are mapped when asked for.

        A mapped shard holds four open files, and a process may often have no more than 1024.
        """
        if number in self.mapped:
            return self.mapped[number]
        shard = self.index.shard(number, mapped=True)
        if len(self.mapped) < MOST_MAPPED:
            self.mapped[number] = shard
        return shard

    def visit(self, lists: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return row, list and code of the entries of some lists, shard by shard, (n, ...) each."""
        rows, of = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        codes = [np.empty((0, self.index.code_size), np.uint8)]
        for number, first in enumerate(self.index.offsets[:-1].tolist()):
            shard = self.shard(number)
            ends = np.cumsum(shard.sizes, dtype=np.int64)
            for list_ in lists.tolist():
                span = slice(ends[list_] - int(shard.sizes[list_]), ends[list_])
                rows.append(unpack_rows(shard.ids[span]) + first)
                of.append(np.full(len(rows[-1]), list_))
                codes.append(np.asarray(shard.codes[span]))
        return np.concatenate(rows), np.concatenate(of), np.concatenate(codes)

    def vector_of(self, row: int) -> np.ndarray:
        """Return q(x) of a stored row, (dim,) float32; the row numbers of one shard are read."""
        number = int(np.searchsorted(self.index.offsets, row, side="right")) - 1
        shard = self.shard(number)
        wanted = pack_rows(np.array([row - self.index.offsets[number]]), shard.ids.shape[1])
        place = np.flatnonzero((shard.ids == wanted).all(axis=1))
        if not len(place):
            raise SnipError(
                f"row {row} is in no list of {self.index.folder}: it was NaN, infinite or zero "
                "when the index was built"
            )
        lists = np.searchsorted(np.cumsum(shard.sizes, dtype=np.int64), place, side="right")
        return self.index.quantiser.decode(lists, np.array(shard.codes[place]))[0]

    def nearest(self, x: np.ndarray, *, nprobe: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return up to ``k`` nearest entries of the ``nprobe`` lists nearest to a vector, (dim,).

        D, (n,) float32, are squared distances to the codes, ascending; I, (n,) int64, their rows,
        ascending where distances are equal.
        """
        x = np.ascontiguousarray(x, np.float32)
        lists = self.index.quantiser.assign(x[None], nprobe)[1][0]
        rows, of, codes = self.visit(lists[lists >= 0])
        D = np.empty(len(rows), np.float32)
        for low, high in plan_blocks(len(D), DECODE_ROWS):
            off = self.index.quantiser.decode(of[low:high], codes[low:high]) - x
            D[low:high] = np.einsum("ij,ij->i", off, off)
        order = np.lexsort((rows, D))[:k]
        return D[order], rows[order]
