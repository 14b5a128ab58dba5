"""Method ``adc`` of the chain: pairs by the index, verified on raw rows where they are given."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from snipdedup import config, progress
from snipdedup.adc import two_sided
from snipdedup.adc.threshold import (
    MUTUAL,
    SYMMETRIC,
    best_scores,
    calibrate,
    calibration_sample,
    default_margin,
    passes,
    true_duplicates,
)
from snipdedup.deduplication.search_result import SearchResult
from snipdedup.errors import SnipError, UsageError
from snipdedup.features.scan import scan
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.index.build import build
from snipdedup.index.folder import Index, Space
from snipdedup.index.search import (
    QUERY_ROWS,
    Classes,
    Queries,
    Searcher,
    code_queries,
    feature_queries,
    query_space,
)
from snipdedup.join.forest import Edges, ForestBuilder, join_edges, make_edges, spanning_forest
from snipdedup.join.verify import verify_pairs
from snipdedup.parallel import Stage, cores, ordered_map
from snipdedup.storage import atomic
from snipdedup.storage.manifest import MANIFEST, read_manifest

MOST_NEIGHBOURS = 1024  # k is doubled up to here while all neighbours of a row pass


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
    return Hits(*unique_pairs(x, y), np.unique(x), cut)


def unique_pairs(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each pair of different rows once: the smaller rows, and the others."""
    pairs = np.stack([np.minimum(x, y), np.maximum(x, y)])
    a, b = np.unique(pairs[:, x != y], axis=1)
    return a, b


class Adc:
    """What method ``adc`` found.

    Attributes
    ----------
    rows : int
    rule : str
        ``mutual``, ``difference``, ``ratio`` or ``symmetric``.
    margin : float
    crowd : float
        Margin of the own difference, where more than k neighbours pass the mutual rule.
    calibration : dict
        How the margin was come by: ``source`` (``given``, ``sample`` or ``default``) and, of a
        sample, its size, its true duplicates, and the precision and recall reached.
    cut : int
        Rows whose passing neighbours were more than `MOST_NEIGHBOURS`, and were cut there.
    """

    def __init__(
        self, index: Index, features: Features | None, space: Space, options: config.Dedup
    ) -> None:
        self.rows, self.classes = index.rows, Classes.of(index.lists())
        self.searcher = Searcher(index, self.classes.lists, options.nprobe)
        self.shared = self.classes.shared(index.rows)
        self.k, self.threads = options.k, cores(options.threads)
        self.rule = SYMMETRIC if features is None else options.rule
        self.asked = None if features is None else partial(feature_queries, index, space, features)
        self.source = self.asked() if self.asked else code_queries(index, self.classes.lists)
        self.views: two_sided.Views | None = None  # of the mutual rule
        self.margin = self.crowd = 0.0
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
        find = self.found if self.views is None else self.judged
        spans = plan_blocks(self.source.total, QUERY_ROWS)
        with progress.bar(self.source.total, "matching", "rows") as bar:
            for span, found in zip(spans, ordered_map(find, spans, self.threads), strict=True):
                flags[found.rows] = True
                self.cut += found.cut
                if len(found.a):
                    yield found.a, found.b
                bar.update(span[1] - span[0])
        self._flags = flags

    def found(self, span: tuple[int, int]) -> Hits:
        """Search for some rows."""
        most = MOST_NEIGHBOURS if self.rule == SYMMETRIC else self.k
        rule = Rule(self.rule, self.margin, self.k, most)
        return hits(self.searcher, self.classes, self.source.load(span), rule)

    def judged(self, span: tuple[int, int]) -> Hits:
        """Judge what an earlier search said of some rows and of their neighbours.

        Where all k neighbours pass there may be more: these rows are searched for again, and what
        comes then is judged by the row's own difference.
        """
        views, rows = cast(two_sided.Views, self.views), np.arange(*span)
        pairs = two_sided.judge(views, rows, self.margin)
        passed = np.bincount(pairs.at, minlength=len(rows))
        near = views.ids[span[0] : span[1], 1 : 1 + self.k]
        count = np.count_nonzero(near >= 0, axis=1)  # one place may be the row's own class
        full = (count >= self.k - 1) & (passed == count) & (passed > 0)
        hit, y = self.classes.rows(near[pairs.at, pairs.column], self.k)
        x = rows[pairs.at[hit]]
        cut = 0
        if full.any():
            queries = cast(Any, self.asked)(rows[full]).load((0, int(full.sum())))
            rule = Rule("difference", self.crowd, 2 * self.k, self.k)
            more = hits(self.searcher, self.classes, queries, rule)
            x, y, cut = np.append(x, more.a), np.append(y, more.b), more.cut
        return Hits(*unique_pairs(x, y), np.unique(rows[pairs.at]), cut)


def adc_candidates(
    index: Index, features: Features | None, options: config.Dedup, work: Path
) -> Adc:
    """Set up method ``adc``: load the index, and find the margin.

    Parameters
    ----------
    index : Index
    features : Features or None
        The rows that were indexed. Without them the margin is the default one, and nothing that
        is found is verified.
    options : settings.Dedup
    work : Path
        Folder for what the mutual rule keeps of its search.

    Returns
    -------
    Adc
        Pairs are not known yet: `Adc.pairs` finds them.

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
    adc = Adc(index, features, space, options)
    if adc.rule == MUTUAL:
        source, threads = adc.source, adc.threads
        adc.views = two_sided.record(adc.searcher, adc.classes, source, adc.k, work, threads)
    encoded = bool(index.manifest["request"]["as_stored"]) or space.encoder is not None
    settle_margin(adc, features, options, partial(usual_margin, index.code_size, encoded, options))
    return adc


def usual_margin(code_size: int, encoded: bool, options: config.Dedup, rule: str) -> float:
    """Return the margin of a rule for rows that cannot be sampled."""
    wanted = {"precision": options.precision, "threshold": options.threshold}
    return default_margin(rule, code_size, encoded=encoded, **wanted)


def settle_margin(
    adc: Adc, features: Features | None, options: config.Dedup, usual: Callable[[str], float]
) -> None:
    """Take the margin given, or calibrate it on a sample, or take the usual one of the rule."""
    adc.crowd = usual("difference")
    if options.margin is not None:
        adc.margin, adc.calibration = options.margin, {"source": "given"}
        return
    if features is not None:
        sample = calibration_sample(features.rows, options)
        truth = true_duplicates(features, sample, options.threshold, adc.threads)
        if truth.any():
            adc.margin, adc.calibration = calibrate(
                sample_scores(adc, sample), truth, options.precision
            )
            if adc.views is not None:
                own = two_sided.own_differences(adc.views, adc.shared, sample)
                adc.crowd = calibrate(own, truth, options.precision)[0]
            return
    adc.margin, adc.calibration = usual(adc.rule), {"source": "default"}


def sample_scores(adc: Adc, sample: np.ndarray) -> np.ndarray:
    """Return the best score of each sampled row, (n,) float32."""
    if adc.views is not None:
        return two_sided.best_scores(adc.views, adc.shared, sample, adc.threads)
    queries = cast(Any, adc.asked)(sample)
    return best_scores(adc.searcher, adc.shared, queries, adc.rule, adc.threads)


def search_adc(
    features: Features | None, options: config.Dedup, work: Path, stage: Stage
) -> SearchResult:
    """Find pairs by the adaptive threshold on the ADC distance.

    Parameters
    ----------
    features : Features or None
        Without them pairs stay unverified, and an index must be given.
    options : settings.Dedup
    work : Path
        Where an index is built if none is given.
    stage : function of str
        Times a stage.
    """
    with stage("index"):
        index = open_or_build(features, options, work)
    if features is None:
        return unverified(index, options, work, stage)
    threads = cores(options.threads)
    with stage("read"):
        seen = scan(
            features,
            chunk_rows=options.chunk_rows,
            threads=threads,
            keep_bad=options.bad_rows == "keep",
        )
    with stage("search"):
        adc = adc_candidates(index, features, options, work)
        builder = ForestBuilder()
        skip = seen.skipped(features.rows)
        first = np.arange(features.rows)
        first[seen.copies] = seen.firsts
        for pair in adc.pairs():
            a, b = first[pair[0]], first[pair[1]]
            open_ = (a != b) & ~skip[a] & ~skip[b]
            for edges in verify_pairs(features, a[open_], b[open_], options.threshold, threads):
                builder.add(edges)
    flags = adc.flags
    found = SearchResult.of(features, options.threshold, seen, builder.forest(), describe(adc))
    return dataclasses.replace(found, flags=flags)


def check_given(features: Features | None, options: config.Dedup) -> None:
    """Refuse an index or encoder that cannot be used, before any work.

    Raises
    ------
    SnipError
        If it is not there, or is of other features.
    """
    if options.index is not None:
        index = Index(options.index)
        if features is not None:
            query_space(index, features, options.encoder)
    elif options.encoder is not None:
        from snipdedup.encoder.network import Encoder

        encoder = Encoder.load(options.encoder, device="cpu")
        if features is not None:
            encoder.check_width(features, options.encoder)


def open_or_build(features: Features | None, options: config.Dedup, work: Path) -> Index:
    """Open the index given, or build one of the features."""
    if options.index is not None or features is None:
        return Index(str(options.index))
    asked = config.Index(
        features=options.features,
        out=str(work / "index"),
        encoder=options.encoder,
        threads=options.threads,
        seed=options.seed or 0,
        bad_rows=options.bad_rows,
    )
    drop_damaged(work / "index")
    return build(features, work / "index", asked)


def drop_damaged(folder: Path) -> None:
    """Remove an index that a stopped run finished, if it is not any more as it was written."""
    if not (folder / MANIFEST).is_file():
        return
    try:
        outputs = read_manifest(folder, "index")["outputs"]
        whole = all(
            atomic.sha256(folder / name) == held["sha256"] for name, held in outputs.items()
        )
    except (SnipError, OSError, LookupError, TypeError):
        whole = False
    if not whole:
        shutil.rmtree(folder)


def unverified(index: Index, options: config.Dedup, work: Path, stage: Stage) -> SearchResult:
    """Group what passes in an index whose rows are not at hand."""
    with stage("search"):
        adc = adc_candidates(index, None, options, work)
        pairs, builder = [], ForestBuilder()
        for a, b in adc.pairs():
            edges = make_edges(a, b, np.zeros(len(a), np.float32))
            pairs.append(edges)
            builder.add(spanning_forest(edges))
    nothing = np.empty(0, np.int64)
    return SearchResult(
        names=[str(shard["name"]) for shard in index.manifest["shards"]],
        offsets=index.offsets,
        threshold=options.threshold,
        forest=builder.forest(),
        copies=nothing,
        originals=nothing,
        bad=index.bad_rows(),
        pairs=unique_edges(join_edges(pairs)),
        flags=adc.flags,
        notes=describe(adc),
    )


def unique_edges(edges: Edges) -> Edges:
    """Return edges without repeats, ordered by (a, b)."""
    edges = edges.where(np.lexsort((edges.b, edges.a)))
    new = np.ones(len(edges.a), bool)
    new[1:] = (np.diff(edges.a) != 0) | (np.diff(edges.b) != 0)
    return edges.where(new)


def describe(adc: Adc) -> dict[str, Any]:
    """Return the method's figures for the manifest."""
    return {
        "rule": adc.rule,
        "margin": float(adc.margin),
        "calibration": adc.calibration,
        "flagged": int(adc.flags.sum()),
        "cut_rows": adc.cut,
    }
