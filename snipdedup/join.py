"""The set against itself, list by list: every row is a query and a row to be found.

Tasks meet only in files. ``encode`` turns a range of rows into int8 codes sorted by coarse list;
``join`` multiplies the codes that share a list, and verifies on the raw rows what the product does
not rule out. Each task leaves one folder or file that is complete or absent, so a stopped run goes
on where it was and the result does not depend on who ran what.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snipdedup import progress, store
from snipdedup.compute import Stage, in_order, library_threads
from snipdedup.cosine import bad_rows, pair_cosine
from snipdedup.forest import Edges, ForestBuilder
from snipdedup.lists import Lists, assign, calibrate_tau, train_centroids
from snipdedup.projection import WIDTH, Projection, fit_projection
from snipdedup.scan import BLOCK, Scan, Seen, finish_scan, read_range, row_hashes
from snipdedup.shards import Features, Piece, plan_blocks
from snipdedup.tiles import COLUMN_TILE, Codes, TilePairs, compare
from snipdedup.verify import VERIFY_PAIRS, verify_pairs

TASK_ROWS = 1 << 18  # rows of an encode task
SINGLE_LIST_ROWS = 1 << 16  # up to here, comparing all codes is cheaper than making lists
SAMPLE_ROWS = 1 << 15  # rows to fit directions and calibrate on
ROWS_A_CENTROID = 48  # rows of the sample for each centroid


@dataclass(frozen=True)
class Model:
    """What all tasks of a join share: how rows become codes, and which lists they visit."""

    projection: Projection
    lists: Lists
    limit: float
    calibration_pairs: int

    def save(self, path: Path) -> None:
        """Write the model as one ``.npz``."""
        store.save_npz(
            path,
            **self.projection.arrays(),
            centroids=self.lists.centroids,
            numbers=np.array([self.lists.tau, self.limit, self.calibration_pairs]),
        )

    @classmethod
    def load(cls, path: Path) -> Model:
        """Read a model."""
        with np.load(path, allow_pickle=False) as file:
            projection = Projection(file["matrix"], file["residual"], float(file["scale"]))
            tau, limit, pairs = file["numbers"]
            return cls(projection, Lists(file["centroids"], float(tau)), float(limit), int(pairs))


class Partition(NamedTuple):
    """The rows of a run of lists, sorted by list, rows at home before visitors.

    Attributes
    ----------
    row : (v,) int64
        Global rows.
    codes : (v, w) int8
    slack : (v,) float64
        By how much each row's limit falls.
    starts, homes : (lists + 1,), (lists,) int64
        Where each list begins, and how many of its rows live there.
    """

    row: np.ndarray
    codes: np.ndarray
    slack: np.ndarray
    starts: np.ndarray
    homes: np.ndarray

    def span(self, number: int, column: int) -> tuple[int, int, int]:
        """Return where a list's columns from ``column`` on begin, where its rows end, and where
        a tile of columns ends: columns are rows at home.
        """
        begin, end = int(self.starts[number]), int(self.starts[number + 1])
        last = min(begin + column + COLUMN_TILE, begin + int(self.homes[number]))
        return begin + column, end, last


def join(
    features: Features,
    *,
    threshold: float,
    recall: float,
    seed: int,
    keep_bad: bool,
    chunk_rows: int,
    threads: int,
    memory: int,
    work: Path,
    stage: Stage,
) -> tuple[Scan, Edges, dict[str, Any]]:
    """Find the near-duplicates of a set.

    Returns
    -------
    scan : Scan
        Bad rows, exact copies, checksums.
    forest : Edges
        Maximum spanning forest of the pairs found among distinct rows, each proved by its cosine.
    notes : dict
        What was chosen and how much was compared, for the manifest.
    """
    with stage("fit"):
        model = load_or_fit(features, threshold, recall, seed, work / "model.npz")
    with stage("encode"):
        parts = encode_all(features, model, work, chunk_rows=chunk_rows, threads=threads)
        seen = finish_scan(features, parts, keep_bad)
        skip = seen.skipped(features.rows)
    with stage("join"):
        forest, notes = join_all(
            features, model, work, skip, threshold=threshold, threads=threads, memory=memory
        )
    lists = {"nlist": model.lists.nlist, "tau": model.lists.tau / model.projection.scale}
    calibrated = {"calibration_pairs": model.calibration_pairs}
    return seen, forest, {**lists, **calibrated, **notes}


def list_count(rows: int) -> int:
    """Return how many coarse lists a set of ``rows`` rows gets.

    Assigning costs rows × lists and joining rows × rows / lists × lists visited, at about the
    same price, so both are smallest near the square root of the rows.
    """
    return 1 if rows <= SINGLE_LIST_ROWS else round(rows**0.5)


def load_or_fit(
    features: Features, threshold: float, recall: float, seed: int, path: Path
) -> Model:
    """Fit the model, or take the one that a stopped run left."""
    if not path.is_file():
        fit(features, threshold, recall, seed).save(path)
    return Model.load(path)


def fit(features: Features, threshold: float, recall: float, seed: int) -> Model:
    """Fit directions, centroids and τ to a sample of distinct rows."""
    nlist = list_count(features.rows)
    sample = sample_distinct(features, max(SAMPLE_ROWS, ROWS_A_CENTROID * nlist), seed)
    with library_threads(1):  # float arithmetic whose last bits depend on the threads
        projection = fit_projection(sample[:SAMPLE_ROWS], seed)
        codes = np.concatenate([
            projection.encode(sample[start:stop])[0]
            for start, stop in plan_blocks(len(sample), TASK_ROWS)
        ])  # fmt: skip
    limit = projection.limit(threshold)
    nlist = min(nlist, max(1, len(codes) // 8))
    if nlist == 1:
        return Model(projection, Lists(codes[:1], 0.0), limit, 0)
    centroids = train_centroids(codes, nlist, seed)

    def verified(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        parts = [
            pair_cosine(sample[a[s:e]], sample[b[s:e]]) >= np.float32(threshold)
            for s, e in plan_blocks(len(a), VERIFY_PAIRS)
        ]
        return np.concatenate([np.zeros(0, bool), *parts])

    safe = projection.distance(threshold) / 2 + WIDTH**0.5
    tau, pairs = calibrate_tau(codes[:SAMPLE_ROWS], centroids, limit, recall, safe, verified)
    return Model(projection, Lists(centroids, tau), limit, pairs)


def sample_distinct(features: Features, count: int, seed: int) -> np.ndarray:
    """Return about ``count`` distinct rows that can be compared, in random order."""
    rng = np.random.default_rng(seed)
    rows = np.unique(rng.integers(0, features.rows, 2 * count))
    rows = np.arange(features.rows) if features.rows <= count else rng.permutation(rows)[:count]
    sample = features.gather(np.sort(rows))
    sample = sample[~bad_rows(sample)]
    sample = sample[np.unique(row_hashes(sample), return_index=True)[1]]
    return rng.permutation(sample) if len(sample) else np.ones((1, features.dim), features.dtype)


def encode_all(
    features: Features, model: Model, work: Path, *, chunk_rows: int, threads: int
) -> list[Seen]:
    """Run the encode tasks that are not done yet; return what all of them saw."""
    tasks = plan_blocks(features.rows, TASK_ROWS)
    with progress.bar(features.rows, "encoding", "rows") as bar:
        for number, (begin, end) in enumerate(tasks):
            folder = encode_folder(work, number)
            if (folder / "done.json").is_file():
                bar.update(end - begin)
                continue
            encode_task(
                features, model, folder, begin, end,
                chunk_rows=chunk_rows, threads=threads, done=bar.update,
            )  # fmt: skip
    return [load_seen(encode_folder(work, number)) for number in range(len(tasks))]


def encode_folder(work: Path, number: int) -> Path:
    """Return the folder of an encode task."""
    return work / "encode" / f"{number:06d}"


def encode_task(
    features: Features,
    model: Model,
    folder: Path,
    begin: int,
    end: int,
    *,
    chunk_rows: int,
    threads: int,
    done: Callable[[int], None],
) -> None:
    """Encode rows ``begin`` to ``end`` and write them sorted by list, rows at home first."""
    codes = np.empty((end - begin, WIDTH), np.int8)
    excess = np.empty(end - begin, np.float32)

    def encode(first: int, rows: np.ndarray, bad: np.ndarray) -> None:
        del bad  # zeros; left out when lists are joined
        at = slice(first - begin, first - begin + len(rows))
        codes[at], excess[at] = model.projection.encode(rows)

    # Small chunks give every thread work and stay in its cache.
    chunk = min(chunk_rows, max(1, (end - begin) // (4 * threads)))
    seen = read_range(
        features, begin, end, chunk_rows=chunk, threads=threads, done=done, visit=encode
    )
    blocks = plan_blocks(end - begin, BLOCK)
    visits = list(in_order(lambda s: assign(codes[s[0] : s[1]], model.lists), blocks, threads))
    row = np.concatenate([v.row + start for v, (start, _) in zip(visits, blocks, strict=True)])
    list_ = np.concatenate([v.list_ for v in visits])
    home = np.concatenate([v.home for v in visits])
    order = np.lexsort((~home, list_))
    row, list_, home = row[order], list_[order], home[order]
    edges = np.arange(model.lists.nlist + 1)
    store.save_npy(folder / "codes.npy", codes[row])
    store.save_npy(folder / "rows.npy", row + np.int64(begin))
    store.save_npy(folder / "slack.npy", model.projection.slack(excess)[row])
    store.save_npy(folder / "starts.npy", np.searchsorted(list_, edges))
    store.save_npy(folder / "homes.npy", np.bincount(list_[home], minlength=len(edges) - 1))
    store.save_npy(folder / "hashes.npy", seen.hashes)
    store.save_npy(folder / "bad.npy", seen.bad)
    crcs = [[p.shard, p.start, p.stop, crc, size] for p, crc, size in seen.crcs]
    store.save_json(folder / "done.json", {"rows": [begin, end], "crcs": crcs})


def load_seen(folder: Path) -> Seen:
    """Read back what an encode task saw."""
    done = store.load_json(folder / "done.json")
    crcs = [(Piece(*entry[:3]), entry[3], entry[4]) for entry in done["crcs"]]
    return Seen(crcs, np.load(folder / "bad.npy"), np.load(folder / "hashes.npy"))


def join_all(
    features: Features,
    model: Model,
    work: Path,
    skip: np.ndarray,
    *,
    threshold: float,
    threads: int,
    memory: int,
) -> tuple[Edges, dict[str, Any]]:
    """Run the join tasks that are not done yet; return the forest of all and some counts."""
    folders = sorted((work / "encode").iterdir())
    starts = [np.load(folder / "starts.npy") for folder in folders]
    visits = np.diff(np.sum(starts, axis=0))
    tasks = plan_partitions(visits, memory // (8 * WIDTH))
    builder, counts = ForestBuilder(), {"visits": int(visits.sum()), "candidates": 0}
    with progress.bar(int(visits.sum()), "joining", "visits") as bar:
        for number, (low, high) in enumerate(tasks):
            path = work / "join" / f"{number:06d}.npz"
            if not path.is_file():
                partition = load_partition(folders, starts, low, high, skip)
                forest, candidates = join_task(
                    features, model, partition, threshold=threshold, threads=threads
                )
                store.save_npz(path, **forest._asdict(), candidates=np.array(candidates))
            with np.load(path, allow_pickle=False) as file:
                builder.add(Edges(file["a"], file["b"], file["similarity"]))
                counts["candidates"] += int(file["candidates"])
            bar.update(int(visits[low:high].sum()))
    return builder.forest(), counts


def plan_partitions(visits: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Cut lists into runs (first, end) of at most ``most`` visits, or one list."""
    runs, first, total = [], 0, 0
    for number, count in enumerate(visits):
        if number > first and total + count > most:
            runs.append((first, number))
            first, total = number, 0
        total += int(count)
    return [*runs, (first, len(visits))]


def load_partition(
    folders: list[Path], starts: list[np.ndarray], low: int, high: int, skip: np.ndarray
) -> Partition:
    """Bring the rows of lists ``low`` to ``high`` together from all encode tasks."""
    rows, codes, slacks, lists, at_home = [], [], [], [], []
    for folder, start in zip(folders, starts, strict=True):
        part = slice(int(start[low]), int(start[high]))
        homes = np.load(folder / "homes.npy", mmap_mode="r")[low:high]
        sizes = np.diff(start[low : high + 1])
        row = np.load(folder / "rows.npy", mmap_mode="r")[part]
        use = ~skip[row]
        rows.append(row[use])
        codes.append(np.load(folder / "codes.npy", mmap_mode="r")[part][use])
        slacks.append(np.load(folder / "slack.npy", mmap_mode="r")[part][use])
        lists.append(np.repeat(np.arange(high - low), sizes)[use])
        place = np.arange(len(row)) - np.repeat(start[low:high] - start[low], sizes)
        at_home.append((place < np.repeat(homes, sizes))[use])
    list_, home = np.concatenate(lists), np.concatenate(at_home)
    order = np.lexsort((~home, list_))
    return Partition(
        np.concatenate(rows)[order],
        np.concatenate(codes)[order],
        np.concatenate(slacks)[order].astype(np.float64),
        np.searchsorted(list_[order], np.arange(high - low + 1)),
        np.bincount(list_[home], minlength=high - low),
    )


def join_task(
    features: Features, model: Model, partition: Partition, *, threshold: float, threads: int
) -> tuple[Edges, int]:
    """Find and verify the pairs of a partition; return their forest and the candidates' number."""
    columns = [
        (number, column)
        for number, homes in enumerate(partition.homes)
        for column in range(0, int(homes), COLUMN_TILE)
    ]

    def propose(place: tuple[int, int]) -> TilePairs:
        begin, end, last = partition.span(*place)
        members = Codes(
            partition.row[begin:end], partition.codes[begin:end], partition.slack[begin:end]
        )
        return compare(features, members, last - begin, model.limit, threshold)

    builder, candidates = ForestBuilder(), 0
    open_ = [(np.empty(0, np.int64),) * 2]
    for found in in_order(propose, columns, threads):
        candidates += found.proposed
        builder.add(found.edges)
        open_.append((found.a, found.b))
    a, b = (np.concatenate(side) for side in zip(*open_, strict=True))
    for edges in verify_pairs(features, a, b, threshold, threads):
        builder.add(edges)
    return builder.forest(), candidates
