"""Search the index, and decide by the adaptive ADC threshold which neighbours are duplicates.

A code is wrong by about as much for a row as for its near-duplicate, so the distance of x to
another row's code is judged by x's distance to its own: `passes` (arXiv:2303.12733). Row numbers
are compared, never places in a result: copies tie, and the first neighbour need not be the row.

Without features the rows themselves are unknown: q(x) stands for x. Its own error is then 0 by
construction, and what is compared with a constant is ‖q(x) − q(y)‖² (rule ``symmetric``).

Rows that share list and code are one entry of the search: hundreds of copies would else fill all k
places. They pass by definition (their difference is 0) and are linked to the first of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import numpy as np

from snipdedup import progress, settings
from snipdedup.compute import cores, in_order
from snipdedup.cosine import bad_rows, pair_cosine, unit_rows
from snipdedup.errors import SnipError, UsageError
from snipdedup.index import ENCODER, WALK_ROWS, Index, Lists, Space, same_encoder, unpack
from snipdedup.quantise import BLOCK, in_blocks
from snipdedup.shards import Features, plan_blocks

QUERY_ROWS = 4 * BLOCK  # rows searched by one thread at a time
TRUTH_ROWS = 4096  # rows compared with the calibration sample at a time; fixed, as it sets bits
MOST_NEIGHBOURS = 1024  # k is doubled up to here while all neighbours of a row pass
LEAST_ERROR = 1e-12  # a self distance below is taken for this: rows may equal their code
SYMMETRIC = "symmetric"  # the rule of an index without features

# Margins at precision .81, .91, .95 by rule and bytes a code, measured with
#   python scripts/calibrate_adc.py --features keyframes/img_emb --code_bytes 4 8 16 32
# on 58,977 CLIP ViT-B/32 features of key frames, a third of them duplicated at cosine .95, as 128
# principal components, IVF512, nprobe 4. What transfers is the code size: 512-d rows as they are
# want margins about a quarter smaller at 8 and 16 bytes, though their codes' mean error is two to
# three times as large. A set with fewer duplicates gets less precision from the same margin.
DEFAULT_THRESHOLD, DEFAULT_PRECISIONS = 0.95, (0.81, 0.91, 0.95)
DEFAULT_MARGINS = {
    "difference": {
        4: (0.0077, 0.0023, 0.0),  # at 4 bytes no margin reaches .95: shared codes only
        8: (0.0233, 0.0165, 0.0126),
        16: (0.0431, 0.0349, 0.0306),
        32: (0.0597, 0.0508, 0.0466),
    },
    "ratio": {
        4: (1.065, 1.007, 1.0),
        8: (1.278, 1.162, 1.108),
        16: (1.900, 1.606, 1.470),
        32: (5.192, 4.002, 3.418),
    },
    "symmetric": {
        4: (0.0198, 0.0113, 0.0076),
        8: (0.0488, 0.0382, 0.0327),
        16: (0.0735, 0.0609, 0.0546),
        32: (0.0748, 0.0640, 0.0584),
    },
}


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
        Dq, Iq = in_blocks(lambda block: self.quantiser.assign(block, self.nprobe), x, first)
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


def same_codes(lists: Lists) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first place, first) over all places: the first place with the same list and code.

    ``first`` is (n,) int64; in a list rows ascend, so it is also the smallest row.
    """
    for low, high in lists.spans():
        codes = lists.codes[low:high]
        words = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 8))).view(np.uint64)
        of = lists.list_of(low, high)
        order = np.lexsort((*words.T, of))
        words, of = words[order], of[order]
        starts = np.ones(high - low, bool)
        starts[1:] = (words[1:] != words[:-1]).any(axis=1) | (of[1:] != of[:-1])
        first = np.empty(high - low, np.int64)
        first[order] = order[starts][np.cumsum(starts) - 1]
        yield low, first + low


class Classes(NamedTuple):
    """Rows grouped by list and code; each class is one entry of a search.

    Attributes
    ----------
    lists : Lists
        One entry a class, with its smallest row.
    members : (n, width) uint8
        All rows, packed, class by class in the order of ``lists``, ascending in each.
    begins : (classes + 1,) int64
        Where each class begins in ``members``, then n.
    """

    lists: Lists
    members: np.ndarray
    begins: np.ndarray

    def rows(self, classes: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Return up to ``most`` rows of each class: (place in ``classes``, row), int64 each."""
        begin = self.begins[classes]
        counts = np.minimum(self.begins[classes + 1] - begin, most)
        at = np.repeat(np.arange(len(classes)), counts)
        within = np.arange(len(at)) - np.repeat(np.cumsum(counts) - counts, counts)
        return at, unpack(self.members[begin[at] + within])

    def links(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield blocks of (smallest row, row) over all rows that are not the smallest."""
        for low, high in plan_blocks(len(self.begins) - 1, WALK_ROWS):
            counts = np.diff(self.begins[low : high + 1])
            first = np.repeat(self.lists.rows(slice(low, high)), counts)
            row = unpack(self.members[self.begins[low] : self.begins[high]])
            if (first != row).any():
                yield first[first != row], row[first != row]

    def shared(self, rows: int) -> np.ndarray:
        """Return which of ``rows`` rows share their code with another, (rows,) bool."""
        shared = np.zeros(rows, bool)
        for first, row in self.links():
            shared[first] = shared[row] = True
        return shared


def classes_of(lists: Lists) -> Classes:
    """Group the entries of lists by list and code."""
    places, members, counts = [np.empty(0, np.int64)], [lists.ids[:0]], [np.zeros(1, np.int64)]
    for low, first in same_codes(lists):
        members.append(lists.ids[low + np.argsort(first, kind="stable")])
        place, count = np.unique(first, return_counts=True)
        places.append(place)
        counts.append(count)
    kept = np.concatenate(places)
    starts = np.searchsorted(kept, lists.starts)
    begins = np.cumsum(np.concatenate(counts))
    return Classes(
        Lists(lists.codes[kept], lists.ids[kept], starts), np.concatenate(members), begins
    )


def self_adc(index: Index, x: np.ndarray, first: int = 0) -> np.ndarray:
    """Return ‖x − q(x)‖² of vectors, (n,) float32; ``first`` as in `Searcher.probe`."""

    def errors(block: np.ndarray) -> tuple[np.ndarray]:
        lists = index.quantiser.assign(block, 1)[1][:, 0]
        off = block - index.quantiser.decode(lists, index.quantiser.encode(block, lists))
        return (np.einsum("ij,ij->i", off, off),)

    return in_blocks(errors, x, first)[0]


def scores(D: np.ndarray, own: np.ndarray, rule: str) -> np.ndarray:
    """Return what the rule compares with its margin.

    Parameters
    ----------
    D : (n, k) float32
        ADC distances of n rows to k neighbours.
    own : (n,) float32
        `self_adc` of the rows; zeros for ``symmetric``.
    rule : str
        ``difference``: D − own; ``ratio``: D / own; ``symmetric``: D.

    Returns
    -------
    (n, k) float32
    """
    if rule == "ratio":
        return D / np.maximum(own, LEAST_ERROR)[:, None]
    return D - own[:, None]


def passes(D: np.ndarray, own: np.ndarray, rule: str, margin: float) -> np.ndarray:
    """Return which neighbours are taken for duplicates, (n, k) bool; see `scores`."""
    return np.asarray(scores(D, own, rule) <= margin)


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
        x = in_blocks(lambda b: (space.vectors(b),), block, span[0])[0]
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

    return in_order(find, plan_blocks(source.total, QUERY_ROWS), threads)


class Hits(NamedTuple):
    """Passing neighbours of some queries: pairs ``a`` < ``b``, unique; ``rows`` that have any.

    ``cut`` counts queries that had more than `MOST_NEIGHBOURS` of them.
    """

    a: np.ndarray
    b: np.ndarray
    rows: np.ndarray
    cut: int


class Rule(NamedTuple):
    """How neighbours are asked for and judged: ``k`` at first, ``most`` rows of one code."""

    rule: str
    margin: float
    k: int
    most: int


def hits(searcher: Searcher, classes: Classes, queries: Queries, rule: Rule) -> Hits:
    """Return all passing neighbours: where all k pass, more are asked for."""
    Dq, Iq = searcher.probe(queries.x, queries.first)
    found = [np.empty((2, 0), np.int64)]
    pending, k = np.flatnonzero(queries.rows >= 0), rule.k
    cut = 0
    while len(pending):
        D, I = searcher.places(queries.x[pending], Dq[pending], Iq[pending], k)
        ok = passes(D, queries.own[pending], rule.rule, rule.margin) & (I >= 0)
        more = np.asarray(ok.all(axis=1))
        if k >= MOST_NEIGHBOURS:
            cut, more = int(more.sum()), np.zeros_like(more)
        at, column = np.nonzero(ok & ~more[:, None])
        hit, rows = classes.rows(I[at, column], rule.most)
        found.append(np.stack([queries.rows[pending[at[hit]]], rows]))
        pending, k = pending[more], min(2 * k, MOST_NEIGHBOURS)
    x, y = np.concatenate(found, axis=1)
    x, y = x[x != y], y[x != y]
    pairs = np.unique(np.stack([np.minimum(x, y), np.maximum(x, y)]), axis=1)
    return Hits(pairs[0], pairs[1], np.unique(x), cut)


class Adc:
    """What method ``adc`` found.

    Attributes
    ----------
    rows : int
    rule : str
        ``difference``, ``ratio`` or ``symmetric``.
    margin : float
    calibration : dict
        How the margin was come by: ``source`` (``given``, ``sample`` or ``default``) and, of a
        sample, its size, its true duplicates, and the precision and recall reached.
    cut : int
        Rows whose passing neighbours were more than `MOST_NEIGHBOURS`, and were cut there.
    """

    def __init__(
        self, index: Index, classes: Classes, source: Source, options: settings.Dedup
    ) -> None:
        self.rows, self.classes, self.source = index.rows, classes, source
        self.searcher = Searcher(index, classes.lists, options.nprobe)
        self.shared = classes.shared(index.rows)
        self.k, self.threads = options.k, cores(options.threads)
        self.rule, self.margin = options.rule, 0.0
        self.calibration: dict[str, Any] = {}
        self.cut = 0
        self._flags: np.ndarray | None = None

    @property
    def flags(self) -> np.ndarray:
        """Which rows have a passing neighbour with another number, (rows,) bool."""
        while self._flags is None:
            for _ in self.pairs():
                pass
        return self._flags

    def pairs(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield blocks (a, b) of int64 rows, a < b: each row with each passing neighbour.

        A pair is unique in its block and may come again in another. Rows that share a code come
        as pairs with the smallest of them; as neighbours of others, the k smallest come (1024
        without features, where no pair is verified and one code is as good as another).
        Searches anew each time; `flags` is known at its end.
        """
        yield from self.classes.links()
        flags, self.cut = self.shared.copy(), 0
        most = MOST_NEIGHBOURS if self.rule == SYMMETRIC else self.k
        rule = Rule(self.rule, self.margin, self.k, most)

        def find(span: tuple[int, int]) -> Hits:
            return hits(self.searcher, self.classes, self.source.load(span), rule)

        spans = plan_blocks(self.source.total, QUERY_ROWS)
        with progress.bar(self.source.total, "searching", "rows") as bar:
            for span, found in zip(spans, in_order(find, spans, self.threads), strict=True):
                flags[found.rows] = True
                self.cut += found.cut
                if len(found.a):
                    yield found.a, found.b
                bar.update(span[1] - span[0])
        self._flags = flags


def adc_candidates(index: Index, features: Features | None, options: settings.Dedup) -> Adc:
    """Set up method ``adc``: load the index, and find the margin.

    Parameters
    ----------
    index : Index
    features : Features or None
        The rows that were indexed. Without them the margin is the default one, and nothing that
        is found is verified.
    options : settings.Dedup

    Returns
    -------
    Adc
        Nothing is searched yet: `Adc.pairs` does.

    Raises
    ------
    SnipError
        If the features are not those of the index.
    UsageError
        If a rule that needs features is asked for without them.
    """
    if features is None and options.rule == "ratio":
        raise UsageError("--rule ratio needs FEATURES: without them a row is its own code")
    space = index.space if features is None else query_space(index, features, options.encoder)
    classes = classes_of(index.lists())
    source = (
        code_queries(index, classes.lists)
        if features is None
        else feature_queries(index, space, features)
    )
    adc = Adc(index, classes, source, options)
    if features is None:
        adc.rule = SYMMETRIC
    if options.margin is not None:
        adc.margin, adc.calibration = options.margin, {"source": "given"}
        return adc
    if features is not None:
        sample = calibration_sample(features.rows, options)
        truth = true_duplicates(features, sample, options.threshold, adc.threads)
        if truth.any():
            best = best_scores(adc, feature_queries(index, space, features, sample))
            adc.margin, adc.calibration = calibrate(best, truth, options.precision)
            return adc
    adc.margin = default_margin(
        adc.rule, index.code_size, precision=options.precision, threshold=options.threshold
    )
    adc.calibration = {"source": "default"}
    return adc


def default_margin(rule: str, code_size: int, *, precision: float, threshold: float) -> float:
    """Return the margin for an index whose rows cannot be sampled, from `DEFAULT_MARGINS`.

    Between the code sizes and precisions of the table it is interpolated, beyond them the nearest
    is taken. It grows with the squared distance that the threshold allows, 2 − 2t: a code's error
    cancels out in the rule, the distance of a pair does not.
    """
    table = DEFAULT_MARGINS[rule]
    sizes = np.log2(list(table))
    by_size = [np.interp(precision, DEFAULT_PRECISIONS, margins) for margins in table.values()]
    margin = float(np.interp(np.log2(code_size), sizes, by_size))
    scale = max(1 - threshold, 0) / (1 - DEFAULT_THRESHOLD)
    same = float(rule == "ratio")  # the score of an exact match
    return same + (margin - same) * scale


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
        from snipdedup.encoder import Encoder

        loaded = Encoder.load(encoder, device="cpu")
        space = Space(loaded, False, loaded.dim_in, loaded.dim)
    if features.dim != space.dim_in or space.dim != index.dim:
        raise SnipError(
            f"{index.folder} was built from rows {space.dim_in} wide, FEATURES are {features.dim} "
            "wide; if it holds descriptors, name their encoder with --encoder"
        )
    return space


def calibration_sample(rows: int, options: settings.Dedup) -> np.ndarray:
    """Return the rows that the margin is calibrated on, ascending int64."""
    rng = np.random.default_rng(options.seed or 0)
    count = min(rows, options.calibration_rows)
    return np.sort(rng.choice(rows, count, replace=False, shuffle=False))


def true_duplicates(
    features: Features, sample: np.ndarray, threshold: float, threads: int
) -> np.ndarray:
    """Return which sampled rows have another row at or above the threshold, (n,) bool.

    Brute force: the sample against all rows, streamed. The nearest row is proposed in float32
    and decided by `pair_cosine`.
    """
    import torch

    raw = features.gather(sample)
    x = torch.from_numpy(unit_rows(raw))

    def nearest(span: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        cosine = x @ torch.from_numpy(unit_rows(features.read(*span))).T
        low, high = np.searchsorted(sample, span)
        cosine[np.arange(low, high), sample[low:high] - span[0]] = -torch.inf  # the row itself
        best, at = cosine.max(dim=1)
        return best.numpy(), at.numpy() + span[0]

    best, at = np.full(len(sample), -np.inf, np.float32), sample.copy()
    spans = plan_blocks(features.rows, TRUTH_ROWS)
    found = in_order(nearest, spans, threads)
    for cosine, row in progress.track(found, "calibrating", "blocks", len(spans)):
        better = cosine > best
        best[better], at[better] = cosine[better], row[better]
    return (at != sample) & (pair_cosine(raw, features.gather(at)) >= np.float32(threshold))


def best_scores(adc: Adc, source: Source) -> np.ndarray:
    """Return each query's best score among other rows, (n,) float32; infinity for none.

    Rows that share a code with another have the score of an exact match.
    """
    same = np.float32(adc.rule == "ratio")
    parts = []
    # Two places are enough: rows that share a code are one entry, so the row itself takes one.
    for queries, D, I in neighbours(adc.searcher, source, k=2, threads=adc.threads):
        score = scores(D, queries.own, adc.rule)
        score[(I < 0) | (queries.rows[:, None] == I)] = np.inf
        best = score.min(axis=1)
        best[queries.rows < 0] = np.inf
        known = queries.rows >= 0
        best[known & adc.shared[queries.rows]] = same
        parts.append(best)
    return np.concatenate(parts)


def calibrate(
    best: np.ndarray, truth: np.ndarray, precision: float
) -> tuple[float, dict[str, Any]]:
    """Return the margin with the highest recall at a wanted precision, and how it did.

    Parameters
    ----------
    best : (n,) float32
        From `best_scores`.
    truth : (n,) bool
        Which of them are duplicates.
    precision : float
        Wanted share of right flags. Where no margin reaches it, the most precise one is taken.
    """
    order = np.argsort(best, kind="stable")
    score, right = best[order], np.cumsum(truth[order])
    flagged = np.arange(1, len(score) + 1)
    ends = np.append(score[1:] != score[:-1], True) & np.isfinite(score)
    if not ends.any():
        return 0.0, {
            "source": "sample",
            "rows": len(best),
            "duplicates": int(truth.sum()),
            "flagged": 0,
            "precision": None,
            "recall": 0.0,
            "reached": False,
        }
    reached = right / flagged
    good = np.flatnonzero(ends & (reached >= precision))
    at = int(good[-1]) if len(good) else int(np.argmax(np.where(ends, reached, -1)))
    return float(score[at]), {
        "source": "sample",
        "rows": len(best),
        "duplicates": int(truth.sum()),
        "flagged": int(flagged[at]),
        "precision": float(reached[at]),
        "recall": float(right[at] / truth.sum()),
        "reached": bool(len(good)),
    }
