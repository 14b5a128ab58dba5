"""The set against itself, list by list: every row is a query and a row to be found.

Tasks meet only in files. ``encode`` turns a range of rows into int8 codes sorted by coarse list;
``join`` multiplies the codes that share a list, and verifies on the raw rows what the product does
not rule out. Each task leaves one folder or file that is complete or absent, so a stopped run goes
on where it was and the result does not depend on who ran what.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snipdedup.errors import InputError, SnipError
from snipdedup.ground import progress, store
from snipdedup.ground.compute import Stage, in_order, library_threads
from snipdedup.ground.cosine import Directions, bad_rows
from snipdedup.ground.formats import load_npz
from snipdedup.ground.scan import BLOCK, Scan, Seen, finish_scan, read_range, row_hashes
from snipdedup.ground.shards import Features, Piece, plan_blocks
from snipdedup.search.forest import Edges, ForestBuilder, make_edges
from snipdedup.search.kernels import pick_kernel
from snipdedup.search.lists import (
    Lists,
    Visits,
    assign,
    calibrate_tau,
    sample_pairs,
    train_centroids,
)
from snipdedup.search.masses import ABSORBED, BESIDE, Hubs, Placed, find_hubs
from snipdedup.search.projection import WIDTHS, Projection, fit_projections, has_bfloat16
from snipdedup.search.tiles import COLUMN_TILE, ROW_TILE, Codes, TilePairs, compare
from snipdedup.search.verify import GATHER_PAIRS, proved_cosines, verify_pairs

SINGLE_LIST_ROWS = 1 << 16  # up to here, comparing all codes is cheaper than making lists
DIRECTION_ROWS = 1 << 13  # rows to find the main directions on
CALIBRATION_ROWS = 1 << 15  # rows among whose pairs τ is calibrated
CALIBRATION_PAIRS = 1 << 15
ROW_BYTES = 100  # held for each row at the peak: sorting hashes, merging forests, groups
PARTITION_BYTES = 1 << 24  # the least that a thread loads of the codes
VISIT_BYTES = 64  # held for each row of a list while a partition is brought together, codes apart
TILE_BYTES = 16  # of each product of a tile: int32, float32 and masks
PROPOSALS_A_ROW = 2.0  # more pairs than this to prove for each row are dearer than wider codes
CROWDED_DEGREE = 8  # pairs of a row of the sample that count
ROWS_A_CENTROID = 48  # rows of the sample for each centroid


@dataclass(frozen=True)
class Model:
    """What all tasks of a join share: how rows become codes, and which lists they visit."""

    projection: Projection
    lists: Lists
    hubs: Hubs
    threshold: float
    calibration_pairs: int

    @property
    def limit(self) -> float:
        """Product of two codes from which their rows may be a pair."""
        return self.projection.limit(self.threshold)

    def save(self, path: Path) -> None:
        """Write the model as one ``.npz``."""
        store.save_npz(
            path,
            **self.projection.arrays(),
            centroids=self.lists.centroids,
            hub_row=self.hubs.row,
            hub_raw=self.hubs.raw,
            hub_codes=self.hubs.codes,
            numbers=np.array(
                [self.lists.tau, self.lists.alone, self.threshold, self.calibration_pairs]
            ),
        )

    @classmethod
    def load(cls, path: Path) -> Model:
        """Read a model."""
        try:
            file = load_npz(path)
            projection = Projection(file["matrix"], file["residual"], float(file["scale"]))
            tau, alone, threshold, pairs = (float(number) for number in file["numbers"])
            hubs = Hubs(file["hub_row"], file["hub_raw"], file["hub_codes"], threshold, projection)
            lists = Lists(file["centroids"], tau, alone)
        except (InputError, LookupError, TypeError, ValueError) as error:
            # not fitted anew: codes that are there may be those of an earlier run's model
            raise SnipError(f"{path}: damaged ({error}); start anew with --overwrite") from error
        return cls(projection, lists, hubs, threshold, int(pairs))


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
    device: str,
    work: Path,
    stage: Stage,
    frozen: int = 0,
) -> tuple[Scan, Edges, dict[str, Any]]:
    """Find the near-duplicates of a set.

    Pairs among the first ``frozen`` rows are not looked for; absorbed rows may still bring some.

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
        model = load_or_fit(features, threshold, recall, seed, work / "model.npz", threads)
    with stage("encode"):
        parts = encode_all(
            features, model, work, chunk_rows=chunk_rows, threads=threads, frozen=frozen
        )
        seen = finish_scan(features, parts, keep_bad)
        skip = seen.skipped(features.rows, frozen)
    with stage("join"):
        absorbed = absorbed_edges(encode_folders(work, features.rows), model.hubs, seen, skip)
        forest, notes = join_all(
            features,
            model,
            work,
            skip,
            absorbed,
            threshold=threshold,
            threads=threads,
            memory=memory,
            device=device,
            frozen=frozen,
        )
    lists = {
        "kernel": pick_kernel(device, model.projection.width).name,
        "bfloat16": has_bfloat16(),
        "width": model.projection.width,
        "nlist": model.lists.nlist,
        "tau": model.lists.tau / model.projection.scale,
        "masses": len(model.hubs.row),
    }
    calibrated = {"calibration_pairs": model.calibration_pairs}
    return seen, forest, {**lists, **calibrated, **notes}


def needed_memory(features: Features, threads: int) -> int:
    """Return the least memory that a join of these rows needs, in bytes, libraries apart.

    Every row costs some bytes (its hash while copies are sought, its share of the forest and of
    groups), every thread the rows of a block of proofs, of two tiles, and their products.
    """
    raw = features.dim * (features.dtype.itemsize + 4)
    tile = ROW_TILE * COLUMN_TILE * TILE_BYTES + 2 * (ROW_TILE + COLUMN_TILE) * raw
    thread = 2 * GATHER_PAIRS * raw + tile + PARTITION_BYTES
    return ROW_BYTES * features.rows + threads * thread


def list_count(rows: int) -> int:
    """Return how many coarse lists a set of ``rows`` rows gets.

    Assigning costs rows × lists and joining rows × rows / lists × lists visited, at about the
    same price, so both are smallest near the square root of the rows.
    """
    return round(rows**0.5)


def load_or_fit(
    features: Features, threshold: float, recall: float, seed: int, path: Path, threads: int
) -> Model:
    """Fit the model, or take the one that a stopped run left."""
    if not path.is_file():
        fit(features, threshold, recall, seed, threads).save(path)
    return Model.load(path)


def fit(features: Features, threshold: float, recall: float, seed: int, threads: int) -> Model:
    """Fit directions, centroids, hubs and τ to a sample of distinct rows."""
    nlist = list_count(features.rows)
    rows, sample = sample_distinct(features, max(CALIBRATION_ROWS, ROWS_A_CENTROID * nlist), seed)
    with library_threads(1):  # float arithmetic, whose last bits depend on the threads
        projection, pairs = choose_projection(sample, threshold, seed, features.rows, threads)
    codes = encode_sample(projection, sample, threads)
    hubs = find_hubs(
        rows, sample, codes, projection, threshold=threshold, total=features.rows, threads=threads
    )
    if features.rows <= SINGLE_LIST_ROWS and not len(hubs.row):
        nlist = 1
    nlist = min(nlist, max(1, len(codes) // 8))
    if nlist == 1:
        return Model(projection, Lists(codes[:1], 0.0, 0.0), hubs, threshold, 0)
    centroids = train_centroids(codes, nlist, seed, threads)
    a, b = (side[:: max(1, len(side) // CALIBRATION_PAIRS)] for side in pairs)
    true = proved_cosines(sample, sample, a, b) >= np.float32(threshold)
    near = codes[:CALIBRATION_ROWS]
    absorbed = hubs.place(near, np.zeros(len(near)), sample[: len(near)]).reach == ABSORBED
    true &= ~(absorbed[a] & absorbed[b])  # met at their hub
    tau, alone = calibrate_tau(
        near,
        centroids,
        (a[true], b[true]),
        recall=recall,
        reach=projection.distance(threshold),
        threads=threads,
    )
    return Model(projection, Lists(centroids, tau, alone), hubs, threshold, int(true.sum()))


def choose_projection(
    sample: np.ndarray, threshold: float, seed: int, rows: int, threads: int
) -> tuple[Projection, tuple[np.ndarray, np.ndarray]]:
    """Return the narrowest projection that does not propose too many pairs, and those it does.

    How many pairs a row would get in the whole set is extrapolated from the sample. Rows of large
    groups count as others do: their tiles are crowded at any width.
    """
    part, widths = sample[:CALIBRATION_ROWS], list(WIDTHS)
    if rows <= SINGLE_LIST_ROWS:
        part, widths = sample[:0], list(WIDTHS[-1:])
    found = []
    for projection in fit_projections(sample[:DIRECTION_ROWS], widths, seed):
        codes = encode_sample(projection, part, threads)
        a, b = sample_pairs(codes, projection.limit(threshold), threads)
        degree = np.minimum(np.bincount(np.concatenate([a, b]), minlength=1), CROWDED_DEGREE)
        found.append((projection, (a, b), degree.sum() / 2 * rows / max(1, len(part)) ** 2))
        if found[-1][2] <= PROPOSALS_A_ROW:  # wider codes could not save more than that
            break
    narrow, wide = found[0], found[-1]
    return narrow[:2] if narrow[2] - wide[2] <= PROPOSALS_A_ROW else wide[:2]


def encode_sample(projection: Projection, sample: np.ndarray, threads: int) -> np.ndarray:
    """Return the codes of a sample."""
    blocks = [sample[start:stop] for start, stop in plan_blocks(len(sample), BLOCK)]
    codes = [codes for codes, _ in in_order(projection.encode, blocks, threads)]
    return np.concatenate([np.empty((0, projection.width), np.int8), *codes])


def sample_distinct(features: Features, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return about ``count`` distinct rows that can be compared, in random order.

    Returns
    -------
    rows : (n,) int64
        Global rows.
    sample : (n, d)
        Their features; one row of ones where no row can be compared.
    """
    rng = np.random.default_rng(seed)
    rows = np.unique(rng.integers(0, features.rows, 2 * count))
    rows = np.arange(features.rows) if features.rows <= count else rng.permutation(rows)[:count]
    rows = np.sort(rows)
    sample = features.gather(rows)
    use = np.flatnonzero(~bad_rows(sample))
    use = use[np.unique(row_hashes(sample[use]), return_index=True)[1]]
    if not len(use):
        return rows[:1], np.ones((1, features.dim), features.dtype)
    use = rng.permutation(use)
    return rows[use], sample[use]


def task_rows(rows: int) -> int:
    """Return the rows of an encode task: many tasks for small sets, few files for large ones."""
    return 1 << 15 if rows < 1 << 25 else 1 << 18


def encode_folders(work: Path, rows: int) -> list[Path]:
    """Return the folder of each encode task."""
    tasks = len(plan_blocks(rows, task_rows(rows)))
    return [work / "encode" / f"{number:06d}" for number in range(tasks)]


def encode_all(
    features: Features,
    model: Model,
    work: Path,
    *,
    chunk_rows: int,
    threads: int,
    frozen: int,
) -> list[Seen]:
    """Run the encode tasks that are not done yet; return what all of them saw."""
    spans = plan_blocks(features.rows, task_rows(features.rows))
    folders = encode_folders(work, features.rows)
    with progress.bar(features.rows, "encoding", "rows") as bar:

        def run(task: tuple[Path, tuple[int, int]]) -> int:
            folder, (begin, end) = task
            if not store.is_sealed(folder / "done.json", folder):
                encode_task(
                    features, model, folder, begin, end, chunk_rows=chunk_rows, frozen=frozen
                )
            return end - begin

        for count in in_order(run, zip(folders, spans, strict=True), threads):
            bar.update(count)
    return [load_seen(folder) for folder in folders]


def encode_task(
    features: Features,
    model: Model,
    folder: Path,
    begin: int,
    end: int,
    *,
    chunk_rows: int,
    frozen: int,
) -> None:
    """Encode rows ``begin`` to ``end`` and write them sorted by list, rows at home first.

    Where more than half of the rows are frozen, they stay at home and the others come to them.
    """
    still = frozen if frozen > features.rows // 2 else 0
    codes = np.empty((end - begin, model.projection.width), np.int8)
    slack = np.empty(end - begin, np.float32)
    visits: list[Visits] = []
    absorbed: list[Placed] = []

    def encode(first: int, raw: np.ndarray, rows: Directions) -> None:
        at = slice(first - begin, first - begin + len(raw))
        codes[at], excess = model.projection.encode_directions(rows)
        slack[at] = model.projection.slack(excess)
        placed = model.hubs.place(codes[at], slack[at], raw)
        far = how_far(placed, model.lists, max(0, still - first), still > 0)
        found = assign(codes[at], model.lists, far)
        visits.append(found._replace(row=found.row + np.int32(first - begin)))
        absorbed.append(placed._replace(row=placed.row + first))

    seen = read_range(features, begin, end, chunk_rows=chunk_rows, visit=encode)
    row, list_, home = (np.concatenate(column) for column in zip(*visits, strict=True))
    order = sort_small(2 * list_ + ~home, 2 * model.lists.nlist)
    row, list_, home = row[order], list_[order], home[order]
    edges = np.arange(model.lists.nlist + 1)
    store.save_npy(folder / "codes.npy", np.take(codes, row, axis=0))
    store.save_npy(folder / "rows.npy", row + np.int64(begin))
    store.save_npy(folder / "slack.npy", slack[row])
    store.save_npy(folder / "starts.npy", np.searchsorted(list_, edges))
    store.save_npy(folder / "homes.npy", np.bincount(list_[home], minlength=len(edges) - 1))
    store.save_npz(
        folder / "absorbed.npz",
        row=np.concatenate([placed.row for placed in absorbed]),
        hub=np.concatenate([placed.hub for placed in absorbed]),
        similarity=np.concatenate([placed.similarity for placed in absorbed]),
    )
    store.save_npy(folder / "hashes.npy", seen.load_hashes())
    store.save_npy(folder / "bad.npy", seen.bad)
    crcs = [[p.shard, p.start, p.stop, crc, size] for p, crc, size in seen.crcs]
    names = (
        "codes.npy", "rows.npy", "slack.npy", "starts.npy", "homes.npy", "absorbed.npz",
        "hashes.npy", "bad.npy",
    )  # fmt: skip
    store.seal(folder / "done.json", [folder / name for name in names], {"crcs": crcs})


def how_far(placed: Placed, lists: Lists, still: int, others_come: bool) -> np.ndarray:
    """Return how far from borders each row of a block visits, (n,) float32.

    Absorbed rows stay at home, and so do the first ``still`` rows; who may pair with a row that
    stays at home must come to it.
    """
    usual = lists.alone if others_come else lists.tau
    far = np.full(len(placed.reach), usual, np.float32)
    far[:still] = 0
    far[placed.reach == BESIDE] = lists.alone
    far[placed.reach == ABSORBED] = 0
    return far


def sort_small(keys: np.ndarray, count: int) -> np.ndarray:
    """Return the stable order of keys below ``count``; numpy sorts 16-bit keys by radix."""
    return np.argsort(keys.astype(np.uint16 if count <= 1 << 16 else np.uint32), kind="stable")


def load_seen(folder: Path) -> Seen:
    """Read back what an encode task saw."""
    done = store.load_json(folder / "done.json")
    crcs = [(Piece(*entry[:3]), entry[3], entry[4]) for entry in done["crcs"]]
    return Seen(crcs, np.load(folder / "bad.npy"), folder / "hashes.npy")


def absorbed_edges(
    folders: list[Path], hubs: Hubs, seen: Scan, skip: np.ndarray
) -> Iterator[Edges]:
    """Yield the edges that join the absorbed rows of each encode task with their hubs.

    A hub that turned out to be a copy stands for the row that it copies, as all copies do.
    """
    rows = hubs.row.copy()
    found = np.flatnonzero(np.isin(rows, seen.copies))
    rows[found] = seen.firsts[np.searchsorted(seen.copies, rows[found])]
    for folder in folders:
        with np.load(folder / "absorbed.npz", allow_pickle=False) as file:
            row, hub, similarity = file["row"], rows[file["hub"]], file["similarity"]
        use = ~skip[row] & (row != hub)
        yield make_edges(row[use], hub[use], similarity[use])


def join_all(
    features: Features,
    model: Model,
    work: Path,
    skip: np.ndarray,
    known: Iterable[Edges],
    *,
    threshold: float,
    threads: int,
    memory: int,
    device: str,
    frozen: int,
) -> tuple[Edges, dict[str, Any]]:
    """Run the join tasks that are not done yet; return the forest of all edges and some counts.

    Many tasks run side by side, each on one thread; few (a small set's single list) run one
    after another on all threads.
    """
    folders = encode_folders(work, features.rows)
    starts = [np.load(folder / "starts.npy") for folder in folders]
    visits = np.diff(np.sum(starts, axis=0))
    spare = (memory - needed_memory(features, threads)) // threads + PARTITION_BYTES
    most = min(
        spare // (VISIT_BYTES + 2 * model.projection.width),
        max(1, int(visits.sum()) // (8 * threads)),
    )
    tasks = plan_partitions(visits, most)
    beside, within = (threads, 1) if len(tasks) >= 2 * threads else (1, threads)

    def run(task: tuple[int, int]) -> tuple[Edges, int, int]:
        low, high = task
        # named by its lists: another run may cut them by other threads or memory
        path = work / "join" / f"{low:06d}-{high:06d}.npz"
        found = load_joined(path)
        if found is None:
            partition = load_partition(folders, starts, low, high, skip, model.projection.width)
            forest, proposed = join_task(
                features,
                model,
                partition,
                threshold=threshold,
                threads=within,
                device=device,
                frozen=frozen,
            )
            store.save_npz(path, **forest._asdict(), proposed=np.array(proposed))
            found = forest, proposed
        return *found, int(visits[low:high].sum())

    builder, proposed = ForestBuilder(), 0
    for edges in known:
        builder.add(edges)
    with progress.bar(int(visits.sum()), "joining", "visits") as bar:
        for edges, count, done in in_order(run, tasks, beside):
            builder.add(edges)
            proposed += count
            bar.update(done)
    return builder.forest(), {"visits": int(visits.sum()), "candidates": proposed}


def load_joined(path: Path) -> tuple[Edges, int] | None:
    """Read back what a join task found; None where there is nothing, or it is damaged."""
    try:
        file = load_npz(path, [*Edges._fields, "proposed"])
        return Edges(*(file[name] for name in Edges._fields)), int(file["proposed"])
    except InputError:
        return None


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
    folders: list[Path],
    starts: list[np.ndarray],
    low: int,
    high: int,
    skip: np.ndarray,
    width: int,
) -> Partition:
    """Bring the rows of lists ``low`` to ``high`` together from all encode tasks."""
    parts = [
        load_part(folder, start[low : high + 1], low, skip)
        for folder, start in zip(folders, starts, strict=True)
    ]
    row, slack, key, _ = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = sort_small(key, 2 * (high - low))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    codes, done = np.empty((len(row), width), np.int8), 0
    for folder, start, (_, _, _, use) in zip(folders, starts, parts, strict=True):
        stored = np.load(folder / "codes.npy", mmap_mode="r").view(np.ndarray)
        codes[place[done : done + len(use)]] = np.take(stored, use + start[low], axis=0)
        done += len(use)
    key = key[order]
    return Partition(
        row[order],
        codes,
        slack[order].astype(np.float64),
        np.searchsorted(key, 2 * np.arange(high - low + 1)),
        np.bincount(key[key % 2 == 0] // 2, minlength=high - low),
    )


def load_part(
    folder: Path, starts: np.ndarray, low: int, skip: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Read what an encode task has for a run of lists.

    Returns
    -------
    row, slack : (v,) int64, float32
        Global rows that take part, and by how much each one's limit falls.
    key : (v,) int32
        Twice the list, counted from the first; one more for a visitor.
    use : (v,) int64
        Which of the task's rows these are.
    """
    part = slice(int(starts[0]), int(starts[-1]))
    row = np.load(folder / "rows.npy", mmap_mode="r")[part]
    homes = np.load(folder / "homes.npy", mmap_mode="r")[low : low + len(starts) - 1]
    sizes = np.diff(starts)
    key = np.repeat(2 * np.arange(len(sizes), dtype=np.int32), sizes)
    place = np.arange(len(row)) - np.repeat(starts[:-1] - starts[0], sizes)
    key += place >= np.repeat(homes, sizes)
    use = np.flatnonzero(~skip[row])
    return row[use], np.load(folder / "slack.npy", mmap_mode="r")[part][use], key[use], use


def join_task(
    features: Features,
    model: Model,
    partition: Partition,
    *,
    threshold: float,
    threads: int,
    device: str,
    frozen: int,
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
        return compare(
            features,
            members,
            last - begin,
            limit=model.limit,
            threshold=threshold,
            device=device,
            frozen=frozen,
        )

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
