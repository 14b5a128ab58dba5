"""SemDeDup's rule: k-means first, then rows that are too near an earlier row of their cluster.

Abbas et al., 2023 (arXiv 2303.09540): spherical k-means; the rows of a cluster are ordered by how
near they are to its centroid (``hard``: the farthest first, ``easy``: the nearest first) or at
random; a row is removed if its highest cosine with any earlier row, kept or not, is above
1 - epsilon. The highest cosine is found once for all rows, so any epsilon is a look at one column.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from snipdedup import progress
from snipdedup.features.cosine import PROPOSAL_ERROR, all_cosines, unit_rows, unit_rows64
from snipdedup.features.scan import Scan
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.groups.keep import keep_rank
from snipdedup.groups.members import Best, Copies, group_starts
from snipdedup.index.kmeans import draw_sample, kmeans
from snipdedup.parallel import Stage, ordered_map

CLUSTER_ROWS = 8700  # the paper's mean: 440 million rows in 50,000 clusters
POINTS_A_CENTROID = 256
ITERATIONS = 20
BLOCK = 8192  # rows assigned together, aligned to global rows
TILE = 2048  # rows of a cluster compared at once


def search_semdedup(
    features: Features,
    seen: Scan,
    *,
    clusters: int,
    keep: str,
    seed: int,
    threads: int,
    stage: Stage,
) -> Best:
    """Find for each row its highest cosine with an earlier row of its cluster.

    Bad rows of the scan are in no cluster, exact copies are compared once. ``clusters`` 0 stands
    for one for `CLUSTER_ROWS` rows; ``keep`` is ``hard``, ``easy`` or ``random``.
    """
    with stage("cluster"):
        clusters = clusters or max(1, round(features.rows / CLUSTER_ROWS))
        sample = draw_sample(features, unit_rows, clusters * POINTS_A_CENTROID, seed, threads)
        clusters = min(clusters, len(sample))
        how = {"iterations": ITERATIONS, "seed": seed, "threads": threads}
        centroids = kmeans(sample, clusters, spherical=True, **how)
        cluster, nearness = assign_clusters(features, centroids, threads)
        cluster[seen.bad] = -1
    with stage("compare"):
        rank = nearness if keep == "hard" else -nearness
        if keep == "random":
            rank = keep_rank(np.arange(features.rows), "random", seed)
        order = np.lexsort((rank, cluster))  # ties go by row: the sort is stable
        order = order[cluster[order] >= 0]
        place, distinct = np.full(features.rows, features.rows), np.ones(features.rows, bool)
        place[order] = np.arange(len(order))
        copies = Copies(seen.copies, seen.firsts, lambda rows: place[rows])
        distinct[copies.row] = False
        order = order[distinct[order]]
        match, similarity = best_earlier(features, order, cluster[order], threads)
        match[copies.row], similarity[copies.row] = copies.row_keeper, 1
    return Best(cluster, nearness.astype(np.float32), match, similarity, centroids)


def assign_clusters(
    features: Features, centroids: np.ndarray, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return each row's nearest centroid and the cosine with it, (rows,) int32 and float64."""
    import torch

    exact = centroids.astype(np.float64)

    def find(span: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        rows = features.read(*span)
        unit = unit_rows64(rows)
        table = (torch.from_numpy(unit_rows(rows)) @ torch.from_numpy(centroids).T).numpy()
        label = table.argmax(1)
        best = table[np.arange(len(table)), label]
        close = np.flatnonzero((table >= best[:, None] - 2 * PROPOSAL_ERROR).sum(1) > 1)
        label[close] = (unit[close] @ exact.T).argmax(1)
        return label.astype(np.int32), np.einsum("ij,ij->i", unit, exact[label])

    spans = plan_blocks(features.rows, BLOCK)
    found = progress.track(ordered_map(find, spans, threads), "clustering", "blocks", len(spans))
    label, nearness = (np.concatenate(column) for column in zip(*found, strict=True))
    return label, nearness


def best_earlier(
    features: Features, order: np.ndarray, cluster: np.ndarray, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return each row's nearest earlier row of its cluster, and their cosine.

    ``order`` and ``cluster``, (n,), are distinct rows, cluster by cluster, each in its order; and
    their clusters. Where there is none, the match (rows,) int64 is -1 and the cosine (rows,)
    float32 is NaN; of several equally near rows the first in the order is the match.
    """
    match = np.full(features.rows, -1)
    similarity = np.full(features.rows, np.nan, np.float32)
    tasks = [
        (begin, low, min(low + TILE, end))
        for begin, end in pairwise(group_starts(cluster).tolist())
        for low in range(begin, end, TILE)
    ]

    def find(task: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
        return nearest_earlier(features, order, *task)

    with progress.bar(len(order), "comparing", "rows") as bar:
        for (_, low, high), found in zip(tasks, ordered_map(find, tasks, threads), strict=True):
            match[order[low:high]], similarity[order[low:high]] = found
            bar.update(high - low)
    return match, similarity


def nearest_earlier(
    features: Features, order: np.ndarray, begin: int, low: int, high: int
) -> tuple[np.ndarray, np.ndarray]:
    """Compare the rows at places ``low`` to ``high`` of a cluster with all before them.

    The cluster starts at place ``begin``. Two tiles of rows are in memory at a time.
    """
    raw = features.gather(order[low:high])
    match, best = np.full(high - low, -1), np.full(high - low, -2, np.float32)
    for start in range(begin, high, TILE):
        stop = min(start + TILE, high)
        table = all_cosines(raw, raw if start == low else features.gather(order[start:stop]))
        if start == low:
            table[np.triu_indices(len(raw))] = -2  # nothing to compare: not an earlier row
        place = table.argmax(1)  # the first of equal ones
        cosine = table[np.arange(len(table)), place]
        better = cosine > best
        best[better], match[better] = cosine[better], order[start:stop][place[better]]
    return match, np.where(match < 0, np.float32(np.nan), np.minimum(best, np.float32(1)))
