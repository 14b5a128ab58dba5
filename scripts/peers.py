"""Other ways to find near-duplicates, and the floor; each runs as a process of its own.

    python scripts/peers.py NAME --features FOLDER --settings JSON --out FILE.npz

FILE.npz gets what was found: pairs, and which rows go (where the method itself says so).
FILE.json beside it gets the time of each stage, and the seconds by which the whole process's time
is to be corrected: minus what serves the judging alone, plus what was extrapolated; of the floor,
the CPU seconds of a loop too.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snipdedup.features.shards import Features, open_features, plan_blocks
from snipdedup.progress import Clock

FAISS = re.compile(r"faiss-pq(\d+)-nprobe(\d+)")
FAISS_NAMES = tuple(f"faiss-pq{m}-nprobe{nprobe}" for m in (4, 16) for nprobe in (1, 4))
NAMES = ("brute", *FAISS_NAMES, "semdedup", "semhash")
BOUND_ERROR = 1e-4  # more than the error of squared distances between float32 projections


class Answer(NamedTuple):
    """What a method found.

    Attributes
    ----------
    a, b : (p,) int64
        Pairs of rows, a < b; they may hold false ones, which do not count.
    removed : (rows,) bool or None
        The rows that the method removes; None: all but the first of each component.
    correction : float
        Seconds to add to the process's wall time.
    cpu_seconds : float or None
        Of the floor: of a loop on one thread, as threads that wait for one another count as busy.
    """

    a: np.ndarray
    b: np.ndarray
    removed: np.ndarray | None
    correction: float
    cpu_seconds: float | None = None


def default_settings(name: str, rows: int, threshold: float, seed: int) -> dict[str, Any]:
    """Return all settings of a peer for a set of ``rows`` rows."""
    common = {"threshold": threshold, "seed": seed}
    faiss = FAISS.fullmatch(name)
    if faiss:
        nlist = max(64, round(1024 * rows / 1_000_000))
        return {
            **common, "projection": "PCA of unit rows", "dim": 128, "pca_rows": 65_536,
            "nlist": nlist, "points_a_centroid": 64, "m": int(faiss[1]), "nbits": 8,
            "nprobe": int(faiss[2]), "k": 16, "chunk_rows": 100_000,
            "pairs": "neighbours whose cosine on the raw rows reaches the threshold; proving them "
            "is not in the time", "removed": "all but the first row of each component",
        }  # fmt: skip
    if name == "semdedup":
        return {
            **common, "clusters": max(1, round(rows / 8700)), "iterations": 20,
            "points_a_centroid": 256, "tile": 2048,
            "removed": "rows whose best match among the earlier rows of their cluster reaches the "
            "threshold",
        }  # fmt: skip
    if name == "semhash":
        return {**common, "backend": "usearch", "records": "row numbers as text"}
    if name == "brute":
        return {**common, "queries": 2000, "tile": 1000, "block_rows": 8192}
    return {"width": 128, "block_rows": 2048, "loops": 3}


def floor(features: Features, given: dict[str, Any], clock: Clock) -> Answer:
    """Read, convert and multiply each row by a d × 128 matrix, ``loops`` times; keep nothing."""
    import torch

    size = given["block_rows"]
    matrix = torch.ones(features.dim, given["width"])
    converted, out = torch.empty(size, features.dim), torch.empty(size, given["width"])

    def loop() -> None:
        for _, block in features.blocks(size):
            rows = converted[: len(block)].copy_(torch.from_numpy(block))
            torch.mm(rows, matrix, out=out[: len(block)])

    for number in range(given["loops"]):
        with clock.stage(f"loop {number + 1}"):
            loop()
    torch.set_num_threads(1)
    start = time.process_time()
    loop()
    return no_answer(0.0)._replace(cpu_seconds=time.process_time() - start)


def brute(features: Features, given: dict[str, Any], clock: Clock) -> Answer:
    """Compare a sample of rows with all, in numpy; extrapolate to each pair of rows once."""
    count = min(given["queries"], features.rows)
    rng = np.random.default_rng(given["seed"])
    sample = np.sort(rng.choice(features.rows, count, replace=False))
    queries = unit(features.gather(sample))
    for start, stop in plan_blocks(features.rows, given["block_rows"]):
        with clock.stage("read"):
            rows = unit(features.read(start, stop))
        with clock.stage("compare"):
            for low, high in plan_blocks(count, given["tile"]):
                cosines = queries[low:high] @ rows.T
                np.flatnonzero(cosines >= np.float32(given["threshold"]))
    return no_answer(clock.seconds["compare"] * (features.rows / (2 * count) - 1))


def no_answer(correction: float) -> Answer:
    """Return an answer that holds a time alone."""
    return Answer(np.empty(0, np.int64), np.empty(0, np.int64), None, correction)


def faiss_ivfpq(features: Features, given: dict[str, Any], clock: Clock) -> Answer:
    """Project, train, add, search, chunk by chunk, all rows as queries."""
    import faiss

    rng = np.random.default_rng(given["seed"])
    with clock.stage("project"):
        projected = project(features, given, rng)
    rows, dim = projected.shape
    with clock.stage("train"):
        quantiser = faiss.IndexFlatL2(dim)
        index = faiss.IndexIVFPQ(quantiser, dim, given["nlist"], given["m"], given["nbits"])
        index.cp.max_points_per_centroid = given["points_a_centroid"]
        count = min(rows, given["nlist"] * given["points_a_centroid"])
        index.train(projected[np.sort(rng.choice(rows, count, replace=False))])
    chunks = plan_blocks(rows, given["chunk_rows"])
    with clock.stage("add"):
        for start, stop in chunks:
            index.add(projected[start:stop])
    with clock.stage("search"):
        index.nprobe = given["nprobe"]
        I = np.concatenate([index.search(projected[b:e], given["k"])[1] for b, e in chunks])
    with clock.stage("candidates"):
        pairs = possible_pairs(projected, I, given["threshold"])
    return Answer(*pairs, None, -clock.seconds["candidates"])


def project(features: Features, given: dict[str, Any], rng: np.random.Generator) -> np.ndarray:
    """Return unit rows on their principal directions, (rows, dim) float32, in memory."""
    import faiss

    count = min(features.rows, given["pca_rows"])
    sample = np.sort(rng.choice(features.rows, count, replace=False))
    pca = faiss.PCAMatrix(features.dim, min(given["dim"], features.dim))
    pca.train(fast_unit(features.gather(sample)))
    projected = np.empty((features.rows, pca.d_out), np.float32)
    for start, block in features.blocks(given["chunk_rows"]):
        projected[start : start + len(block)] = pca.apply(fast_unit(block))
    return projected


def possible_pairs(
    projected: np.ndarray, I: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs (row, neighbour) that projections do not rule out, each once, a < b.

    Orthonormal projections are never farther apart than the rows, so no true pair is lost.
    """
    limit = 2 - 2 * threshold + BOUND_ERROR
    kept = []
    for start, stop in plan_blocks(len(I), 16_384):
        row = np.repeat(np.arange(start, stop), I.shape[1])
        other = I[start:stop].ravel()
        row, other = row[other >= 0], other[other >= 0]
        difference = projected[row] - projected[other]
        near = np.einsum("ij,ij->i", difference, difference) <= limit
        low, high = np.minimum(row, other)[near], np.maximum(row, other)[near]
        kept.append((low * len(I) + high)[low < high])
    a, b = np.divmod(np.unique(np.concatenate(kept)), len(I))
    return a, b


def semdedup(features: Features, given: dict[str, Any], clock: Clock) -> Answer:
    """Cluster by spherical k-means; within a cluster a row goes if an earlier row matches it."""
    import faiss

    with clock.stage("read"):
        stored = features.read(0, features.rows)
    with clock.stage("cluster"):
        rng = np.random.default_rng(given["seed"])
        count = min(len(stored), given["clusters"] * given["points_a_centroid"])
        kmeans = faiss.Kmeans(
            features.dim, given["clusters"], niter=given["iterations"], spherical=True,
            max_points_per_centroid=given["points_a_centroid"], seed=given["seed"],
        )  # fmt: skip
        kmeans.train(fast_unit(stored[np.sort(rng.choice(len(stored), count, replace=False))]))
        cluster = np.concatenate(
            [
                kmeans.index.search(fast_unit(stored[start:stop]), 1)[1][:, 0]
                for start, stop in plan_blocks(len(stored), 100_000)
            ]
        )
    match = np.full(len(stored), -1)
    with clock.stage("compare"):
        order = np.argsort(cluster, kind="stable")
        for members in np.split(order, np.flatnonzero(np.diff(cluster[order])) + 1):
            best, place = best_earlier(fast_unit(stored[members]), given["tile"])
            goes = best >= np.float32(given["threshold"])
            match[members[goes]] = members[place[goes]]
    removed = match >= 0
    return Answer(match[removed], np.flatnonzero(removed), removed, 0.0)


def best_earlier(rows: np.ndarray, tile: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each unit row's highest cosine with an earlier row, -inf for the first, and where.

    Tile by tile, so that a cluster of any size fits memory.
    """
    import torch

    x = torch.from_numpy(rows)
    best = torch.full((len(x),), -torch.inf)
    place = torch.zeros(len(x), dtype=torch.int64)
    for start, stop in plan_blocks(len(x), tile):
        for low, high in plan_blocks(stop, tile):
            cosines = x[low:high] @ x[start:stop].T
            if low == start:
                earlier = torch.ones_like(cosines, dtype=torch.bool).triu(1)
                cosines = cosines.masked_fill(~earlier, -torch.inf)
            top, at = cosines.max(dim=0)
            better = top > best[start:stop]
            best[start:stop][better] = top[better]
            place[start:stop][better] = at[better] + low
    return best.numpy(), place.numpy()


def semhash(features: Features, given: dict[str, Any], clock: Clock) -> Answer:
    """De-duplicate by semhash, with all rows as float32 in memory; its records are row numbers."""
    with clock.stage("read"):
        rows = unit(features.read(0, features.rows))
    with clock.stage("index"):
        # importlib: the checks must pass where semhash is not installed
        tool = importlib.import_module("semhash").SemHash.from_embeddings(
            rows, [str(row) for row in range(len(rows))], model=None, ann_backend=given["backend"]
        )
    with clock.stage("deduplicate"):
        result = tool.self_deduplicate(threshold=given["threshold"])
    goes = np.array([int(found.record) for found in result.filtered], np.int64)
    stays = np.array([int(found.duplicate_of) for found in result.filtered], np.int64)
    removed = np.zeros(len(rows), bool)
    removed[goes] = True
    return Answer(np.minimum(goes, stays), np.maximum(goes, stays), removed, 0.0)


def unit(rows: np.ndarray) -> np.ndarray:
    """Return rows scaled to norm 1 as float32, by numpy alone; zero rows stay."""
    values = rows.astype(np.float32)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    values /= np.where(norms > 0, norms, 1)
    return values


def fast_unit(rows: np.ndarray) -> np.ndarray:
    """Return rows scaled to norm 1 as float32, by torch, which converts float16 faster."""
    import torch

    return np.asarray(torch.nn.functional.normalize(torch.from_numpy(rows).float()).numpy())


def peer(name: str) -> Callable[[Features, dict[str, Any], Clock], Answer]:
    """Return the function of a peer."""
    if FAISS.fullmatch(name):
        return faiss_ivfpq
    return {"floor": floor, "brute": brute, "semdedup": semdedup, "semhash": semhash}[name]


def main() -> None:
    """Run one peer and save what it found."""
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--features", required=True)
    parser.add_argument("--settings", type=json.loads, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    clock = Clock()
    answer = peer(options.name)(open_features(options.features), options.settings, clock)
    worked = time.perf_counter() - started
    if answer.removed is None:
        np.savez(options.out, a=answer.a, b=answer.b)
    else:
        np.savez(options.out, a=answer.a, b=answer.b, removed=answer.removed)
    saving = time.perf_counter() - started - worked
    body = {"stages": clock.seconds, "correction": answer.correction - saving}
    if answer.cpu_seconds is not None:
        body["cpu_seconds"] = answer.cpu_seconds
    options.out.with_suffix(".json").write_text(json.dumps(body), encoding="utf-8")


if __name__ == "__main__":
    main()
