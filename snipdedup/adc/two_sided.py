"""The two-sided rule: pairs scored by what one search found for each of the two rows.

Each row is a query once. With e(x, z) = (‖x‖² − ‖x − z‖²) / 2 the distances of two rows to one
code z give e(x, z) − e(y, z) = (x − y)·z: what x − y is along z, exactly, though neither row is
kept. So of two rows that are near the same codes and lists, much of x − y is known, and how large
that is says more than their own two codes do (docs/internals/codes.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snipdedup import native, progress
from snipdedup.features.shards import plan_blocks
from snipdedup.index.search import QUERY_ROWS, LoadedIndex
from snipdedup.parallel import ordered_map
from snipdedup.storage import atomic

UNSEEN = 3  # a difference counts so often where the other row does not name this one
RIDGE = 1e-3  # of a code's squared length: directions that codes share more closely say nothing
SLACK = 1e-9  # of squared distances in float64
COMMON, COMMON_LISTS = 16, 8  # nearest codes and lists that are compared; more cost time only
NAMES, SOLVE_BYTES = 1 << 22, 1 << 23  # looked up together; of codes solved for together


class Views(NamedTuple):
    """What the search found for each row: ids (n, 1 + k + nprobe), and e(x, z) of each, float32.

    An id is a class: the row's own, its k nearest; then lists visited, counted on from the
    classes. -1 where there is none, and for the own class among the nearest.
    """

    ids: np.ndarray
    e: np.ndarray
    loaded: LoadedIndex
    k: int

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        """Return the codes or centroids of ``ids``, (n, w, dim) float32; zeros for -1."""
        lists, quantiser = self.loaded.classes.lists, self.loaded.index.quantiser
        if quantiser.nbits == 8:
            return native.decode(
                ids, lists.codes, lists.starts, quantiser.centroids, quantiser.words,
                quantiser.residual,
            )  # fmt: skip
        flat, count = ids.ravel(), len(lists.ids)
        places = np.clip(flat, 0, max(count - 1, 0))
        vectors = quantiser.decode(lists.list_at(places), lists.codes[places])
        coarse = np.flatnonzero(flat >= count)
        vectors[coarse] = quantiser.centroids[flat[coarse] - count]
        vectors[flat < 0] = 0
        return vectors.reshape(*ids.shape, -1)


def record_views(loaded: LoadedIndex, k: int, folder: Path, threads: int) -> Views:
    """Search for all rows, and keep what is found in ``folder``: 168 bytes a row by default."""
    searcher, codes = loaded.searcher, len(loaded.classes.lists.ids)
    smallest = np.min_scalar_type(-codes - loaded.index.nlist)
    shape = loaded.count, 1 + k + searcher.nprobe
    paths = folder / "views_ids.npy", folder / "views_e.npy"

    def view(span: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        queries, place = loaded.queries(span), loaded.class_of[slice(*span), None]
        Dq, Iq = searcher.probe(queries.x, queries.first)
        D, I = searcher.places(queries.x, Dq, Iq, k)
        I[place == I] = -1
        Iq = np.where(Iq < 0, -1, Iq + codes)
        ids = np.concatenate([place, I, Iq], axis=1)
        ids[queries.rows < 0] = -1
        norm = np.einsum("ij,ij->i", queries.x, queries.x)[:, None]
        e = (norm - np.concatenate([queries.own[:, None], D, Dq], axis=1)) / 2
        return ids.astype(smallest), np.where(ids < 0, 0, e).astype(np.float32)

    spans = plan_blocks(loaded.count, QUERY_ROWS)
    with (
        atomic.writing_npy(paths[0], smallest, shape) as ids_file,
        atomic.writing_npy(paths[1], np.dtype(np.float32), shape) as e_file,
        progress.bar(loaded.count, "searching", "rows") as bar,
    ):
        for span, (ids, e) in zip(spans, ordered_map(view, spans, threads), strict=True):
            ids_file.write(ids.tobytes())
            e_file.write(e.tobytes())
            bar.update(span[1] - span[0])
    ids, e = (np.load(path, mmap_mode="r") for path in paths)
    return Views(ids, e, loaded, k)


class NamedPairs(NamedTuple):
    """Rows, by place in their block, and neighbours, by place among the row's k, (p,) each.

    ``score`` estimates ‖x − y‖², y the smallest row of the neighbour's class.
    """

    at: np.ndarray
    column: np.ndarray
    score: np.ndarray


def passing_pairs(views: Views, rows: np.ndarray, margin: float) -> NamedPairs:
    """Return the neighbours of ``rows``, (b,) int64, whose scores are at most the margin."""
    mean = mean_differences(views, rows)
    chosen = mean <= margin  # a score is never below its mean
    pairs = score_pairs(views, rows, mean, chosen, margin=margin)
    return NamedPairs(*(part[pairs.score <= margin] for part in pairs))


def best_view_scores(
    views: Views, rows: np.ndarray, threads: int, common: float = 1.0
) -> np.ndarray:
    """Return the best score of each of ``rows``, (n,) float64; infinity where it has none.

    Not rounded: a margin is one of these, and `passing_pairs` compares scores with it. Rows that
    share their code with another have 0. ``common`` as in `score_pairs`.
    """

    def best(span: tuple[int, int]) -> np.ndarray:
        part = rows[slice(*span)]
        mean, lowest = mean_differences(views, part), np.full(len(part), np.inf)
        pairs = score_pairs(views, part, mean, np.isfinite(mean), common)
        np.minimum.at(lowest, pairs.at, pairs.score)
        return np.where(views.loaded.shared[part], 0, lowest)

    return np.concatenate(list(ordered_map(best, plan_blocks(len(rows), QUERY_ROWS), threads)))


def score_pairs(
    views: Views, rows: np.ndarray, mean: np.ndarray, chosen: np.ndarray,
    common: float = 1.0, margin: float = np.inf,
) -> NamedPairs:  # fmt: skip
    """Return the scores of chosen neighbours of rows, in row order.

    The mean of a pair's two differences, (x − y)·(q(x) − q(y)), is ‖x − y‖² but for the codes'
    errors, which cancel where they are alike. To it is added what `common_lengths` knows of it,
    with a weight of ``common``: 0 leaves the mean alone. Scores above the margin need not be whole.
    """
    at, column = np.nonzero(chosen)
    score = mean[at, column]
    if common:
        limits = (margin - score) / common + SLACK  # rounding must not let a cut one pass
        neighbours = views.ids[rows[at], 1 + column]
        score = score + common * common_lengths(views, rows[at], neighbours, limits)
    return NamedPairs(at, column, score)


def mean_differences(views: Views, rows: np.ndarray) -> np.ndarray:
    """Return the mean of both rows' differences for the k nearest, infinity where there is none.

    Where the other row does not name this one's class, this row's difference counts `UNSEEN`
    times: it is farther away than k others.
    """
    ids, e, near = views.ids[rows], views.e[rows], slice(1, 1 + views.k)
    known = (ids[:, near] >= 0) & (ids[:, :1] >= 0)
    mine = (e[:, :1] - e[:, near]).astype(np.float64)  # half a difference
    other = views.loaded.classes.lists.rows(np.maximum(ids[:, near], 0).ravel())
    asks, back = np.repeat(ids[:, 0], views.k), np.full(len(other), np.nan)
    for start, stop in plan_blocks(len(other), max(1, NAMES // views.k)):
        y = other[start:stop]
        hit, column = np.nonzero(views.ids[y][:, near] == asks[start:stop, None])
        back[start + hit] = views.e[y[hit], 0] - views.e[y[hit], 1 + column]
    back = back.reshape(mine.shape)
    mean = np.where(np.isnan(back), 2 * UNSEEN * np.maximum(mine, 0), mine + back)
    return np.where(known, mean, np.inf)


def own_differences(views: Views, rows: np.ndarray) -> np.ndarray:
    """Return each row's smallest difference, as `threshold.best_scores` does, (n,) float32."""
    ids, e = views.ids[rows, : 1 + views.k], views.e[rows, : 1 + views.k]
    mine = np.where((ids[:, 1:] >= 0) & (ids[:, :1] >= 0), 2 * (e[:, :1] - e[:, 1:]), np.inf)
    return np.where(views.loaded.shared[rows], 0, mine.min(axis=1)).astype(np.float32)


def common_lengths(
    views: Views, rows: np.ndarray, classes: np.ndarray, limits: np.ndarray
) -> np.ndarray:
    """Return ‖x − y‖² as far as common codes tell, scaled up, (p,) float64.

    x is one of ``rows``, ascending, y the smallest row of a class. A = vᵀ (Q Qᵀ)⁻¹ v, with v the
    projections on the r common codes Q, is the squared length of x − y within their span, r of d
    dimensions. A d / r would be the whole if all dimensions were alike; they are not, and √(d / r)
    does better on all that was tried. A length above its limit may come out smaller, but above the
    limit.
    """
    near, lists = 1 + min(views.k, COMMON), np.arange(1 + views.k, views.ids.shape[1])
    used: Any = np.append(np.arange(near), lists[:COMMON_LISTS])
    width = len(used)
    if used[-1] == width - 1:
        used = slice(width)  # takes no copy
    lengths, other = np.empty(len(rows)), views.loaded.classes.lists.rows(classes)
    most = max(1, SOLVE_BYTES // (4 * views.loaded.index.dim * width))
    for start, stop in plan_blocks(len(rows), most):
        x, place = np.unique(rows[start:stop], return_inverse=True)
        names, y = views.ids[x][:, used], other[start:stop]
        lengths[start:stop] = native.common_lengths(
            (names, views.e[x][:, used]), views.vectors(names), place,
            (views.ids[y][:, used], views.e[y][:, used]), RIDGE, limits[start:stop],
        )  # fmt: skip
    return lengths
