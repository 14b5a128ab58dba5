"""The set against itself, list by list: every row is a query and a row to be found.

Tasks meet only in files. ``encode`` turns a range of rows into int8 codes sorted by coarse list;
``join`` multiplies the codes that share a list, and verifies on the raw rows what the product does
not rule out. Each task leaves one folder or file that is complete or absent, so a stopped run goes
on where it was and the result does not depend on who ran what.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup.errors import InputError
from snipdedup.ground import progress, store
from snipdedup.ground.compute import Stage, in_order
from snipdedup.ground.formats import load_npz
from snipdedup.ground.scan import Scan, finish_scan
from snipdedup.ground.shards import Features
from snipdedup.search.encoding import absorbed_edges, encode_all, encode_folders
from snipdedup.search.fitting import load_or_fit
from snipdedup.search.forest import Edges, ForestBuilder
from snipdedup.search.kernels import pick_kernel
from snipdedup.search.model import Model
from snipdedup.search.partitions import Partition, load_partition, plan_partitions
from snipdedup.search.projection import has_bfloat16
from snipdedup.search.spanning import ForestFile
from snipdedup.search.tiles import COLUMN_TILE, ROW_TILE, Codes, TilePairs, compare
from snipdedup.search.verify import GATHER_PAIRS, verify_pairs

PARTITION_BYTES = 1 << 24  # the least that a thread loads of the codes
VISIT_BYTES = 64  # held for each row of a list while a partition is brought together, codes apart
TILE_BYTES = 16  # of each product of a tile: int32, float32 and masks
ROW_BYTES = 100  # held for each row at the peak: sorting hashes, merging forests, groups


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

    builder, proposed = ForestFile(work / "forest", features.rows), 0
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
