"""Rates of this machine: the code of a run, timed on a small sample of its rows, in seconds.

What counts is the processor's time, so that other work on the machine does not.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snipdedup.evaluation.costs import TREE, Rates
from snipdedup.features.hashing import row_hashes
from snipdedup.features.scan import Seen, find_copies
from snipdedup.features.shards import Features, open_features, plan_blocks
from snipdedup.groups.members import keep_rank
from snipdedup.groups.star import Compare, group_star
from snipdedup.join.calibration import sample_pairs
from snipdedup.join.encoding import encode_task, task_rows
from snipdedup.join.forest import make_edges, spanning_forest
from snipdedup.join.lists import ROUNDS, Lists, assign_lists, nearest_centroids
from snipdedup.join.model import (
    CROWDED_DEGREE,
    Model,
    calibration_rows,
    fit,
    list_count,
    training_rows,
)
from snipdedup.join.projection import encode_rows
from snipdedup.join.tasks import Partition, load_partition
from snipdedup.join.tiles import (
    COLUMN_TILE,
    ROW_TILE,
    CodedRows,
    compare_tiles,
    crowded_forest,
)
from snipdedup.join.verify import GATHER_PAIRS, listed_cosines, verify_pairs
from snipdedup.parallel import library_threads, ordered_map
from snipdedup.storage import atomic
from snipdedup.storage.external_sort import Sorter, pack

TASKS = 2  # encode tasks that are run
POOL = TASKS << 15  # rows they encode
PAIR_ROWS = 1 << 15  # rows whose pairs are counted
MOST_LISTS = 1 << 12  # more lists are extrapolated
APART = 4  # the two numbers of lists that are timed differ by this factor
FEW = 4096  # rows of a set that is no sample of anything
HASHES = 1 << 20
EDGES = 1 << 17
PROOFS = 2 * GATHER_PAIRS
NARROW = 256  # columns of the narrower tile that is timed
ENOUGH_PAIRS = 30  # pairs in the sample for their number to mean something
USUAL_DUPLICATES = 0.3  # where nothing is known
SHARED, DECAY = 0.7, 0.75  # of CLIP features: a shared direction's length, spectrum
NOISE = (0.05, 0.3)  # length of the noise on a copy: cosines of .999 to .957
CHUNK = 8192  # rows read at a time
CROWD_FILLED = 0.4  # share of a crowded tile's pairs that are close
INTERPRETED = 0.8  # of what threads could do, when one at a time runs Python
GROUP_SIZES = np.array([2, 2, 2, 2, 2, 2, 2, 3, 3, 4])
IMPORTS, BELIEVED = 2.0, 20.0  # seconds: usual, and the most that a command takes to be under way
USUAL_BASE = 2e8  # bytes
LOADED = time.monotonic()


class Imagined(Features):
    """Rows that there are not: random directions like CLIP's.

    Pairs are as rare as in a sample of so many rows, which holds each pair of the set with
    probability (sample / rows)²; both rows of a pair come in one block.
    """

    def __init__(self, rows: int, dim: int, duplicates: float, seed: int) -> None:
        self.rows, self.dim, self.dtype = rows, dim, np.dtype(np.float16)
        self.duplicates, self.seed, self.sample = duplicates, seed, rows

    def gather_ascending(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Return as many random rows as are asked for, others for other rows."""
        pairs = TREE * self.duplicates * self.sample * len(rows) / self.rows
        seeds = [self.seed, int(rows[0]) if len(rows) else 0]
        pairs = int(pairs + np.random.default_rng(seeds).random())
        found = imagined_rows(len(rows), self.dim, min(pairs, len(rows) // 3), seeds)
        if out is None:
            return found
        out[: len(rows)] = found
        return out[: len(rows)]


def imagined_rows(count: int, dim: int, pairs: int, seed: Any) -> np.ndarray:
    """Return random rows, (count, dim) float16; ``pairs`` of them are noisy copies of others."""
    rng = np.random.default_rng(seed)
    spread = np.arange(1, dim + 1, dtype=np.float32) ** (-DECAY / 2)
    spread *= ((1 - SHARED**2) / np.sum(spread**2)) ** 0.5
    centre = np.random.default_rng(0).standard_normal(dim, np.float32)  # the same in all blocks
    centre *= SHARED / np.linalg.norm(centre)
    rows = np.empty((count, dim), np.float16)
    for start, stop in plan_blocks(count, 1 << 13):
        block = rng.standard_normal((stop - start, dim), np.float32) * spread + centre
        rows[start:stop] = block / np.linalg.norm(block, axis=1, keepdims=True)
    copy, of = rng.permutation(count)[: 2 * pairs].reshape(2, -1)
    noise = rng.standard_normal((pairs, dim), np.float32)
    noise *= rng.uniform(*NOISE, (pairs, 1)) / np.linalg.norm(noise, axis=1, keepdims=True)
    rows[copy] = rows[of] + noise
    return rows


class Found(NamedTuple):
    """What the sample says of pairs: shares of all pairs of rows, and of the rows that go."""

    false_pairs: float
    crowded_pairs: float
    duplicates: float | None


def probe(
    features: Features | None,
    *,
    rows: int,
    dim: int,
    duplicates: float | None,
    threshold: float,
    recall: float,
    seed: int,
    threads: int,
) -> tuple[Rates, float]:
    """Measure rates for a set of ``rows`` rows; return them and the share of rows that go.

    Parameters
    ----------
    features : Features, optional
        The set itself or one like it, of which a sample is read; without it rows are imagined.
    duplicates : float, optional
        Share of the rows that go; estimated from the sample where it can be.
    """
    import faiss
    import torch

    del faiss, torch  # what a run imports first
    start, base = process_age(), anonymous_memory()
    usual = USUAL_DUPLICATES if duplicates is None else duplicates
    features = None if features is not None and features.rows < FEW else features
    source = features or Imagined(max(rows, FEW), dim, usual, seed)
    with tempfile.TemporaryDirectory(prefix="snip-plan-") as folder:
        pool = make_pool(source, Path(folder) / "pool.npy", seed)
        fitted = fit_models(source, list_count(rows), threshold, recall, seed)
        model = fitted[-1][0]
        codes = encode_rows(model.projection, pool.read(0, pool.rows), threads)
        found = look_at_pairs(pool, codes, model, source.rows, threads)
        encoded = time_encoding(pool, [model for model, _ in fitted], Path(folder), threads)
        with library_threads(1):
            timed = {
                **encoded,
                **time_fit(fitted, codes, source.rows),
                **time_copies(Path(folder)),
                **time_tiles(pool, codes, model),
                **time_proofs(pool),
                **time_groups(pool, threshold),
                **time_writing(Path(folder)),
            }
    rates = Rates(
        dim=dim,
        itemsize=source.dtype.itemsize,
        width=model.projection.width,
        start=start,
        base=base,
        false_pairs=found.false_pairs,
        crowded_pairs=found.crowded_pairs if features is not None else 0.0,
        **timed,
    )
    if features is None or duplicates is not None or found.duplicates is None:
        return rates, usual
    return rates, found.duplicates


def make_pool(source: Features, path: Path, seed: int) -> Features:
    """Write a sample of rows to a file, and open it."""
    rng = np.random.default_rng([seed, 1])
    if isinstance(source, Imagined):
        rows = imagined_rows(POOL, source.dim, round(source.duplicates * POOL / 2), seed)
    else:
        count = min(POOL, source.rows)
        rows = source.gather(np.sort(rng.choice(source.rows, count, replace=False)))
    atomic.save_npy(path, rows)
    return open_features(path)


def seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """Return the shortest time of a few calls, of the processor in all threads together."""
    spent = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        spent.append(time.process_time() - start)
    return min(spent)


def fit_models(
    source: Features, most: int, threshold: float, recall: float, seed: int
) -> list[tuple[Model, float]]:
    """Fit models of two numbers of lists, the larger that of the set; return them with seconds."""
    most = min(most, MOST_LISTS)
    fitted = []
    for nlist in (max(2, most // APART), most):
        if isinstance(source, Imagined):
            source.sample = calibration_rows(source.rows)
        start = time.process_time()
        model = fit(source, threshold, recall, seed, 1, nlist=nlist)
        fitted.append((model, time.process_time() - start))
    return fitted


def look_at_pairs(
    pool: Features, codes: np.ndarray, model: Model, rows: int, threads: int
) -> Found:
    """Count pairs in the sample: what codes propose in vain, large groups', copies, true ones.

    A sample of n of N rows holds each pair with probability (n / N)².
    """
    raw = pool.read(0, min(PAIR_ROWS, pool.rows))
    first = np.sort(np.unique(row_hashes(raw), return_index=True)[1])
    a, b = sample_pairs(codes[first], model.limit, threads)
    degree = np.bincount(np.concatenate([a, b]), minlength=len(first))
    large = np.maximum(degree[a], degree[b]) >= CROWDED_DEGREE
    i, j = first[a[~large]], first[b[~large]]
    true = int((listed_cosines(raw, raw, i, j) >= np.float32(model.threshold)).sum())
    held = true + len(raw) - len(first)
    share = (true / TREE + len(raw) - len(first)) * rows / len(raw) ** 2
    return Found(
        (len(i) - true) / (len(first) ** 2 / 2),
        large.sum() / (len(first) ** 2 / 2),
        min(share, 0.9) if held >= ENOUGH_PAIRS else None,
    )


def time_fit(fitted: list[tuple[Model, float]], codes: np.ndarray, rows: int) -> dict[str, float]:
    """Time fitting: k-means by rows and lists, the rest by the rows of the sample."""
    model = fitted[-1][0]
    part = codes[: 1 << 13]
    one = seconds(lambda: nearest_centroids(part, model.lists.centroids, 1))
    each = one / len(part) / model.lists.nlist
    trained = [training_rows(rows, model.lists.nlist) for model, _ in fitted]
    rest = [
        spent - ROUNDS * count * model.lists.nlist * each
        for (model, spent), count in zip(fitted, trained, strict=True)
    ]
    more = trained[-1] - trained[0]
    per_row = max(0.0, (rest[-1] - rest[0]) / more) if more else 0.0
    read = calibration_rows(rows) + trained[-1]
    return {"nearest": each, "fit_row": per_row, "fit": max(0.0, rest[-1] - per_row * read)}


def time_encoding(
    pool: Features, models: list[Model], folder: Path, threads: int
) -> dict[str, Any]:
    """Time encode tasks with each model and with one list, and bringing lists together again."""
    alone = models[-1]
    single = Lists(alone.lists.centroids[:1], 0.0, 0.0)
    plain = Model(alone.projection, single, alone.hubs, alone.threshold, 0)
    spans = plan_blocks(pool.rows, task_rows(pool.rows))

    def run(model: Model, name: str, beside: int) -> float:
        def task(number: int) -> None:
            at, (begin, end) = folder / name / str(number), spans[number]
            encode_task(pool, model, at, begin, end, chunk_rows=CHUNK)

        return seconds(lambda: list(ordered_map(task, range(len(spans)), beside)))

    base = run(plain, "plain", 1) / pool.rows
    spent = run(alone, "last", 1)
    together = run(alone, "last", min(threads, len(spans)))
    run(models[0], "first", 1)
    visits = [count_visits(folder / name, len(spans)) / pool.rows for name in ("first", "last")]
    block = np.load(folder / "last" / "0" / "codes.npy")[: 1 << 13]
    with library_threads(1):  # as a task has them: threads that wait for others burn time too
        lists = seconds(lambda: assign_lists(block, alone.lists)) / len(block) / alone.lists.nlist
    more = spent / pool.rows - base - lists * alone.lists.nlist
    folders = [folder / "last" / str(number) for number in range(len(spans))]
    return {
        "row": base,
        "row_list": lists,
        "row_visit": max(0.0, more / max(1.0, visits[-1] - 1)),
        "gain": gain_of(spent, together),
        "lists": tuple(float(model.lists.nlist) for model in models),
        "visits": tuple(visits),
        **time_loading(folders, alone),
    }


def gain_of(alone: float, together: float) -> float:
    """Return what one more thread adds to the speed of one: all share caches and the memory."""
    return float(np.clip(alone / together, 0.2, 1)) * INTERPRETED


def count_visits(folder: Path, tasks: int) -> int:
    """Return the rows that encode tasks wrote."""
    return sum(
        len(np.load(folder / str(number) / "rows.npy", mmap_mode="r")) for number in range(tasks)
    )


def time_loading(folders: list[Path], model: Model) -> dict[str, float]:
    """Time bringing lists together, by visits and by tasks' folders; see how unlike lists are."""
    homes = np.sum([np.load(folder / "homes.npy") for folder in folders], axis=0)
    visits = np.diff(np.sum([np.load(folder / "starts.npy") for folder in folders], axis=0))
    skip = np.zeros(POOL, bool)
    width, nlist = model.projection.width, model.lists.nlist

    def load(low: int, high: int) -> Any:
        return load_partition(folders, Partition(low, high), skip, width)

    opened = seconds(lambda: load(0, 1)) / len(folders)
    whole = seconds(lambda: load(0, nlist))
    size = sum(path.stat().st_size for folder in folders for path in folder.glob("*"))
    fixed = 8 * int(homes.sum()) + 16 * len(folders) * (nlist + 1)
    by_chance = homes.mean() * visits.mean() + homes.mean()  # few rows a list: counts scatter
    return {
        "opened": opened,
        "visit": max(0.0, whole - opened * len(folders)) / visits.sum(),
        "visit_bytes": (size - fixed) / visits.sum(),
        "uneven": max(1.0, float((homes * visits).mean() / by_chance)),
    }


def time_copies(folder: Path) -> dict[str, float]:
    """Time looking for exact copies where there are none, and sorting records in files."""
    hashes = np.random.default_rng(0).integers(0, 2**64, HASHES, np.uint64)
    seen, rows = Seen([], np.empty(0, np.int64), hashes), Imagined(HASHES, 8, 0.0, 0)
    kind = np.dtype([("hash", "<u8"), ("row", "<u4")])
    records = pack(kind, hashes, np.arange(HASHES))

    def sort() -> None:
        sorter = Sorter(folder / "sorted", kind, lambda r: r["hash"], held=HASHES // 8)
        for start, stop in plan_blocks(HASHES, HASHES // 16):
            sorter.add(records[start:stop])
        for part in sorter.ascending():
            part["hash"].argsort()

    return {
        "copy": seconds(lambda: find_copies(rows, [seen])) / HASHES,
        "spill": seconds(sort) / HASHES,
    }


def time_tiles(pool: Features, codes: np.ndarray, model: Model) -> dict[str, float]:
    """Time tiles of wide and of narrow columns: by products, and by tiles."""
    first = np.unique(row_hashes(pool.read(0, min(PAIR_ROWS, pool.rows))), return_index=True)[1]
    first = np.sort(first)[: 8 * ROW_TILE]
    members = CodedRows(first, codes[first], np.zeros(len(first)))
    how: dict[str, Any] = {"limit": model.limit, "threshold": model.threshold}

    def multiply(columns: int) -> float:
        return seconds(lambda: compare_tiles(pool, members, columns, **how))

    columns = min(COLUMN_TILE, len(first))
    wide, narrow = multiply(columns), multiply(NARROW)
    tiles = -(-len(first) // ROW_TILE)
    product = max(wide - narrow, 0.0) / (len(first) * (columns - NARROW))
    left, right = np.arange(ROW_TILE), np.arange(COLUMN_TILE) + ROW_TILE

    def crowd() -> Any:
        return crowded_forest(pool, left, right, np.ones((ROW_TILE, COLUMN_TILE), bool), -1.0)

    return {
        "product": product,
        "tile": max(0.0, narrow - product * len(first) * NARROW) / tiles,
        "crowd": seconds(crowd) / (ROW_TILE * COLUMN_TILE * CROWD_FILLED),
    }


def time_proofs(pool: Features) -> dict[str, float]:
    """Time proofs of pairs, each in full, and the forest of many edges."""
    rng = np.random.default_rng(0)
    a = np.sort(rng.integers(0, pool.rows - 1, PROOFS))
    b = (a + 1 + rng.integers(0, pool.rows - 1, PROOFS)) % pool.rows
    ends = rng.integers(0, 2 * EDGES, (2, EDGES))
    a_end, b_end = ends[:, ends[0] != ends[1]]
    edges = make_edges(a_end, b_end, rng.random(len(a_end)))
    return {
        "prove": seconds(lambda: list(verify_pairs(pool, a, b, -1.0, 1))) / PROOFS,
        "edge": seconds(lambda: spanning_forest(edges)) / len(edges.a),
    }


def time_groups(pool: Features, threshold: float) -> dict[str, float]:
    """Time the star rule on groups of two to four rows."""
    rows = np.random.default_rng(0).permutation(pool.rows)
    size = np.resize(GROUP_SIZES, len(rows) // 2)
    first = np.cumsum(size) - size
    first, size = first[first + size <= len(rows)], size[first + size <= len(rows)]
    at = np.repeat(first, size - 1)
    other = np.arange(len(at)) - np.repeat(np.cumsum(size - 1) - (size - 1), size - 1) + at + 1
    forest = make_edges(rows[at], rows[other], np.full(len(at), np.float32(0.99)))
    forest = spanning_forest(forest)

    def star() -> Any:
        return group_star(
            forest,
            lambda asked: keep_rank(asked, "first", 0),
            Compare(pool.gather, threshold),
            lambda done: None,
        )

    return {"member": seconds(star) / int(size.sum())}


def time_writing(folder: Path) -> dict[str, float]:
    """Time the tables of OUT, and see how large they get."""
    import pyarrow as pa

    rng = np.random.default_rng(0)
    row = np.cumsum(rng.integers(1, 4, EDGES))
    other = row + rng.integers(0, row[-1], EDGES)
    similarity = rng.uniform(0.95, 1, EDGES).astype(np.float32)
    forest = pa.table({"a": row, "b": other, "similarity": similarity})
    name = pa.array(["img_emb_0000.npy"]).take(pa.array(np.zeros(EDGES, np.int64)))
    groups = pa.table(
        {
            "row": other, "shard": name, "shard_row": other, "key": pa.nulls(EDGES, pa.string()),
            "group": row, "representative": row, "similarity": similarity,
            "is_dup": similarity > 0.98,
        }
    )  # fmt: skip
    sizes: list[int] = []

    def write() -> None:
        sizes.clear()
        for path, table in ((folder / "forest", forest), (folder / "groups", groups)):
            atomic.save_parquet(path, table)
            atomic.sha256(path)
            sizes.append(path.stat().st_size)

    return {
        "written": seconds(write) / EDGES,
        "edge_bytes": sizes[0] / EDGES,
        "member_bytes": sizes[1] / EDGES,
    }


def process_age() -> float:
    """Return the seconds since this process began; since the module was loaded if it cannot say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
        age = up - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        age = time.monotonic() - LOADED
    return age if 0 < age < BELIEVED else IMPORTS


def anonymous_memory() -> float:
    """Return the anonymous resident bytes of this process; a usual figure where none is told."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return USUAL_BASE
