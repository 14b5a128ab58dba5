"""Exact nearest neighbours by brute force: all rows are streamed past the queries."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from snipdedup import progress
from snipdedup.features.cosine import PROPOSAL_ERROR, bad_rows, pair_cosine, unit_rows
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.parallel import ordered_map

BLOCK_ROWS = 4096  # rows compared with all queries at a time; fixed, as it sets last bits
SPARE = 16  # more candidates than asked for, since float32 may swap the last of them
VERIFY_PAIRS = 4096  # pairs whose cosines are computed at a time


def nearest(
    queries: np.ndarray, features: Features, k: int, threads: int, *,
    own: np.ndarray | None = None, skip: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Return the ``k`` rows with the highest cosines, ties by row number.

    float32 products propose k + `SPARE` rows; `pair_cosine` decides among them. Of rows that are
    equally near within 1e-5, more than `SPARE` beyond the first k, any may be named.

    ``queries``, (q, d), are rows as stored that can be compared. ``own``, (q,) int64 ascending, are
    the rows of ``features`` that they are: none is its own neighbour. Rows of ``skip``, (rows,)
    bool, are nobody's neighbour; rows that cannot be compared never are. Returns cosines, the
    highest first, D (q, k) float32, and rows, I (q, k) int64; -infinity and -1 where there are
    fewer rows.
    """

    def load(span: tuple[int, int]) -> np.ndarray:
        block = features.read(*span)
        out = bad_rows(block) if skip is None else bad_rows(block) | skip[slice(*span)]
        unit = unit_rows(block)
        unit[out] = np.nan
        return unit

    near, I = nearest_vectors(unit_rows(queries), load, features.rows, k + SPARE, threads, own)
    likely = (I >= 0) & (near <= near[:, k - 1 : k] + 4 * PROPOSAL_ERROR)  # twice the cosine's
    query, place = np.nonzero(likely)
    cosine = np.full(I.shape, -np.inf, np.float32)
    for start, stop in plan_blocks(len(query), VERIFY_PAIRS):
        q, p = query[start:stop], place[start:stop]
        x, y = queries[q], features.gather(I[q, p])
        common = np.result_type(x, y)
        cosine[q, p] = pair_cosine(x.astype(common), y.astype(common))
    order = np.lexsort((I, -cosine))[:, :k]
    D, I = np.take_along_axis(cosine, order, axis=1), np.take_along_axis(I, order, axis=1)
    I[np.isneginf(D)] = -1
    return D, I


def nearest_vectors(
    queries: np.ndarray, load: Callable[[tuple[int, int]], np.ndarray], rows: int, k: int,
    threads: int, own: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Return the ``k`` nearest vectors of ``rows`` by Euclidean distance, by float32 products.

    ``load((start, stop))`` returns these vectors, (stop - start, dim) float32; vectors of NaN are
    left out. ``own`` is as in `nearest`. Returns squared distances, ascending, D (q, k) float32,
    and numbers, I (q, k) int64; infinity and -1 where there are fewer vectors.
    """
    import torch

    x = torch.from_numpy(queries)

    def search(span: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        y = torch.from_numpy(load(span))
        half = y.square().sum(dim=1) / 2
        near = x @ y.T - half  # falls as the distance grows
        near[:, half.isnan()] = -torch.inf
        if own is not None:
            low, high = np.searchsorted(own, span)
            near[np.arange(low, high), own[low:high] - span[0]] = -torch.inf
        best, at = near.topk(min(k, near.shape[1]), dim=1)
        return best.numpy(), at.numpy() + span[0]

    best, I = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
    spans = plan_blocks(rows, BLOCK_ROWS)
    for more, found in progress.track(
        ordered_map(search, spans, threads), "comparing", "blocks", len(spans)
    ):
        both, places = np.concatenate([best, more], axis=1), np.concatenate([I, found], axis=1)
        order = np.argsort(-both, axis=1, kind="stable")[:, :k]
        best, I = np.take_along_axis(both, order, axis=1), np.take_along_axis(places, order, axis=1)
    I[np.isneginf(best)] = -1
    return np.square(queries).sum(axis=1)[:, None] - 2 * best, I
