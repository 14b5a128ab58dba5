"""The candidate pairs of an index: rows with the neighbours that pass the adaptive threshold.

`candidate_pairs` loads the codes, calibrates the margin of the rule on a sample, and searches
block by block. Nothing is verified here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snipdedup import progress
from snipdedup.adc import two_sided
from snipdedup.adc.threshold import (
    SYMMETRIC,
    TWO_SIDED,
    best_scores,
    calibrate,
    default_margin,
    scores,
    true_duplicates,
)
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.index.folder import Index, PlainRows
from snipdedup.index.search import QUERY_ROWS, LoadedIndex, Queries
from snipdedup.join.forest import order_by
from snipdedup.parallel import ordered_map
from snipdedup.statistics import sample_rows

MOST_NEIGHBOURS = 1024  # k is doubled up to here while all neighbours of a row pass


class Rule(NamedTuple):
    """``two_sided``, ``difference``, ``ratio`` or ``symmetric``, and the largest passing score.

    ``own_margin`` is for the difference of one row alone, where more than k neighbours pass the
    two-sided rule. ``calibration`` has the margin's ``source`` (``given``, ``sample`` or
    ``default``) and, of a sample, what `threshold.calibrate` returns.
    """

    name: str
    margin: float
    own_margin: float
    calibration: dict[str, Any]


class Candidates(NamedTuple):
    """Pairs of rows ``a`` < ``b``, each once; ``flagged`` are the rows with a passing neighbour.

    ``cut`` counts rows that had more than `MOST_NEIGHBOURS` of them.
    """

    a: np.ndarray
    b: np.ndarray
    flagged: np.ndarray
    cut: int


def candidate_pairs(
    index: Index, features: Features | None, *, rule: str, margin: float | None, precision: float,
    threshold: float, calibration_rows: int, seed: int, k: int, nprobe: int,
    encoder: str | None, work: Path, threads: int,
) -> tuple[Rule, Iterator[Candidates]]:  # fmt: skip
    """Return the rule with its margin, and the candidate pairs block by block.

    A pair is unique in its block and may come again in another. Rows that share a code come
    as pairs with the smallest of them; as neighbours of others, the k smallest come (1024
    without features, where no pair is verified and one code is as good as another).

    The settings are those of ``snip dedup``. Without features, the rows that were indexed, codes
    are compared with codes (``symmetric``). ``work`` is for what the two-sided rule keeps of its
    search.
    """
    loaded, views = LoadedIndex(index, features, nprobe, encoder), None
    if features is not None and rule == TWO_SIDED:
        views = two_sided.record_views(loaded, k, work, threads)
    usual = partial(
        default_margin, code_size=index.code_size, precision=precision, threshold=threshold,
        encoded=index.as_stored or not isinstance(loaded.encoder, PlainRows),
    )  # fmt: skip
    name = SYMMETRIC if features is None else rule
    found = Rule(name, usual(name), usual("difference"), {"source": "default"})
    if margin is not None:
        found = found._replace(margin=margin, calibration={"source": "given"})
    elif features is not None:
        sample = sample_rows(features.rows, calibration_rows, np.random.default_rng(seed))
        truth = true_duplicates(features, sample, threshold, threads)
        if truth.any():
            if views is None:
                best = best_scores(loaded, sample, name, threads)
            else:
                best = two_sided.best_view_scores(views, sample, threads)
                own = two_sided.own_differences(views, sample)
                found = found._replace(own_margin=calibrate(own, truth, precision)[0])
            reached, calibration = calibrate(best, truth, precision)
            found = found._replace(margin=reached, calibration=calibration)
    return found, search_candidates(loaded, views, found, k, threads)


def search_candidates(
    loaded: LoadedIndex, views: two_sided.Views | None, rule: Rule, k: int, threads: int
) -> Iterator[Candidates]:
    """Yield the candidate pairs: rows that share a code first, then rows and their neighbours."""
    for first, row in loaded.classes.links():
        yield Candidates(first, row, np.append(first, row), 0)
    members = MOST_NEIGHBOURS if rule.name == SYMMETRIC else k
    full = [np.empty(0, np.int64)]

    def search(span: tuple[int, int]) -> tuple[Candidates, np.ndarray]:
        if views is not None:
            return judge_views(views, rule, np.arange(*span))
        queries = loaded.queries(span)
        return passing_neighbours(loaded, queries, rule.name, rule.margin, k, members), full[0]

    def search_again(span: tuple[int, int]) -> Candidates:
        queries = loaded.queries(span, again)
        return passing_neighbours(loaded, queries, "difference", rule.own_margin, 2 * k, k)

    spans = plan_blocks(loaded.count, QUERY_ROWS)
    with progress.bar(loaded.count, "matching", "rows") as bar:
        for span, (found, more) in zip(spans, ordered_map(search, spans, threads), strict=True):
            full.append(more)
            yield found
            bar.update(span[1] - span[0])
    again = np.concatenate(full)
    yield from ordered_map(search_again, plan_blocks(len(again), QUERY_ROWS), threads)


def passing_neighbours(
    loaded: LoadedIndex, queries: Queries, rule: str, margin: float, k: int, members: int
) -> Candidates:
    """Return all passing neighbours, up to ``members`` rows of one code.

    Where all k pass, more are asked for.
    """
    Dq, Iq = loaded.searcher.probe(queries.x, queries.first)
    found = [np.empty((2, 0), np.int64)]
    pending, cut = np.flatnonzero(queries.rows >= 0), 0
    while len(pending):
        D, I = loaded.searcher.places(queries.x[pending], Dq[pending], Iq[pending], k)
        passes = (scores(D, queries.own[pending], rule) <= margin) & (I >= 0)
        more = np.asarray(passes.all(axis=1))
        if k >= MOST_NEIGHBOURS:
            cut, more = int(more.sum()), np.zeros_like(more)
        at, column = np.nonzero(passes & ~more[:, None])
        hit, rows = loaded.classes.rows(I[at, column], members)
        found.append(np.stack([queries.rows[pending[at[hit]]], rows]))
        pending, k = pending[more], min(2 * k, MOST_NEIGHBOURS)
    x, y = np.concatenate(found, axis=1)
    return Candidates(*unique_pairs(x, y), np.unique(x[x != y]), cut)


def judge_views(
    views: two_sided.Views, rule: Rule, rows: np.ndarray
) -> tuple[Candidates, np.ndarray]:
    """Judge some rows and their neighbours by the two-sided rule.

    Where all k neighbours pass there may be more: these rows are returned too. They are searched
    for again, and what comes then is judged by the row's own difference.
    """
    pairs = two_sided.passing_pairs(views, rows, rule.margin)
    passed = np.bincount(pairs.at, minlength=len(rows))
    near = views.ids[rows, 1 : 1 + views.k]
    count = np.count_nonzero(near >= 0, axis=1)  # one place may be the row's own class
    full = (count >= views.k - 1) & (passed == count) & (passed > 0)
    hit, y = views.loaded.classes.rows(near[pairs.at, pairs.column], views.k)
    flagged = rows[passed > 0]
    return Candidates(*unique_pairs(rows[pairs.at[hit]], y), flagged, 0), rows[full]


def unique_pairs(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each pair of different rows once: the smaller rows, and the others."""
    a, b = np.minimum(x, y)[x != y], np.maximum(x, y)[x != y]
    order = order_by(a, b)
    a, b = a[order], b[order]
    new = np.ones(len(a), bool)
    new[1:] = (a[1:] != a[:-1]) | (b[1:] != b[:-1])
    return a[new], b[new]
