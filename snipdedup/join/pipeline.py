"""The join of a set with itself: every row is a query and a row to be found.

Fit the model, encode rows into codes sorted by coarse list, join each partition of the lists,
collect the forest. Products of codes rule out nearly all pairs; the rest is verified on the raw
rows. Tasks meet in files only; a runner says who does them. `needed_memory` tells beforehand what a
join takes.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup import native, progress
from snipdedup.errors import SnipError
from snipdedup.features.scan import BLOCK, SORT_ROWS, Scan
from snipdedup.features.shards import Features
from snipdedup.join import encoding
from snipdedup.join.encoding import absorbed_edges
from snipdedup.join.forest import Edges, ExternalForest
from snipdedup.join.kernels import kernel_name
from snipdedup.join.model import SINGLE_LIST_ROWS, calibration_rows, list_count, training_rows
from snipdedup.join.projection import WIDTHS
from snipdedup.join.tasks import JoinSettings, JoinTasks, Partition
from snipdedup.join.tiles import COLUMN_TILE, ROW_TILE, code_record
from snipdedup.join.verify import GATHER_PAIRS
from snipdedup.parallel import Stage, most_open_files, pick_device
from snipdedup.runners.local import Runner, run_once
from snipdedup.storage.external_sort import row_kind

PARTITIONS_A_WORKER = 8  # so that all workers end at about the same time

# For the least memory that a join needs, in bytes; libraries are not counted.
CODE_BYTES = WIDTHS[0] + WIDTHS[-1]  # of a row, at the most
PARTITION_BYTES = 1 << 24  # the least that a thread loads of the codes
VISIT_BYTES = 80  # held for each row of a list while a partition is brought together, codes apart
TILE_BYTES = 16  # of each product of a tile: int32, float32 and masks
HELD_BYTES = 130_000_000  # that libraries allocate once they are used, and do not give back
TRAINING_CODES = 4  # times the codes of the rows that train centroids: gathered, distinct, sorted
SORT_BYTES = 60  # of each row whose hashes are sorted
GROUP_BYTES, GROUPS_BYTES = 200, 450_000_000  # deciding and writing: for a row, and at the most
USUAL_VISITS = 4  # lists that a row of a large set lives in or visits
DISTANCE_BYTES = 9  # of each row of a block and list: a distance, what is compared, a mask
VALUE_BYTES = 11  # of each value of a block: its square, as an integer of two lengths, a digit


def join(
    features: Features,
    settings: JoinSettings,
    work: Path,
    runner: Runner,
    *,
    memory: int,
    stage: Stage,
) -> tuple[Scan, Edges, dict[str, Any]]:
    """Find the near-duplicates of a set; a stopped run goes on with what is in ``work``.

    ``memory`` is how many bytes the tasks of this machine may hold together, at least
    `needed_memory`; ``stage`` times a stage of the run.

    Returns
    -------
    scan : Scan
        Bad rows, exact copies, checksums.
    forest : Edges
        Maximum spanning forest of the pairs found among distinct rows, each verified; beside
        reference rows two forests, see `forest.spanning_forest`.
    notes : dict
        What was chosen and how much was compared, for the manifest.

    Raises
    ------
    slurm.ShareDone
        If this is not the process that merges what all have found.
    """
    tasks = JoinTasks(features, settings, work)
    if native.used() == "numpy":
        import torch  # noqa: F401 - before threads begin: each is told how many torch may use

        if not native.is_built():
            progress.say(
                "the native kernels were not built, for lack of a compiler: numpy and torch "
                "compute, several times slower"
            )
    with stage("fit"):
        run_once(runner, functools.partial(tasks.fit, runner.here), tasks.model_file)
    with stage("encode"):
        encode_all(tasks, runner)
        run_once(runner, functools.partial(tasks.scan, runner.here), tasks.scan_file)
        scan = tasks.load_scan()
    with stage("join"):
        mapped = mapped_codes(features, tasks.model.widths, memory)
        partitions = plan_partitions(tasks, runner, memory, mapped)
        join_partitions(tasks, runner, partitions, mapped=mapped > 0)
        forest, candidates = collect_forest(tasks, partitions, scan)
    return scan, forest, {**describe(tasks), "candidates": candidates}


def describe(tasks: JoinTasks) -> dict[str, Any]:
    """Return what was chosen, and how many lists all rows visit, for the manifest."""
    model = tasks.model
    return {
        "kernel": kernel_name(pick_device(tasks.settings.device)),
        "widths": list(model.widths),
        "nlist": model.lists.nlist,
        "tau": model.lists.tau / model.narrow.scale,
        "masses": len(model.hubs.row),
        "calibration_pairs": model.calibration_pairs,
        "visits": int(tasks.visits.sum()),
    }


def encode_all(tasks: JoinTasks, runner: Runner) -> None:
    """Run the encode tasks."""
    with progress.bar(tasks.features.rows, "encoding", "rows") as bar:
        for number in runner.each(tasks.encode, range(len(tasks.spans)), tasks.encode_file):
            begin, end = tasks.spans[number]
            bar.update(end - begin)


def plan_partitions(tasks: JoinTasks, runner: Runner, memory: int, mapped: int) -> list[Partition]:
    """Cut the lists into partitions that fit into memory; all processes take the same ones.

    ``mapped`` is of `mapped_codes`.
    """
    visits, widths = int(tasks.visits.sum()), tasks.model.widths
    bound = most_visits(tasks.features, widths, runner.here, memory, mapped)
    most = min(bound, max(1, visits // (PARTITIONS_A_WORKER * runner.workers)))
    replan = bound if runner.world_size == 1 else None  # else other processes may join by it
    run_once(runner, functools.partial(tasks.plan, most, replan), tasks.plan_file)
    if not tasks.fits(bound):
        raise SnipError(
            f"{tasks.plan_file}: planned for more memory than this process has; give all processes "
            "the same --max_memory, or remove this file while none of them runs"
        )
    return tasks.partitions()


def join_partitions(
    tasks: JoinTasks, runner: Runner, partitions: list[Partition], *, mapped: bool
) -> None:
    """Run the join tasks, the largest first, so that all workers end at about the same time.

    Many tasks run side by side, each on one thread; few (a small set's single list) run one after
    another on all threads.
    """
    within = 1 if len(partitions) >= 2 * runner.workers else runner.here
    visits = tasks.visits
    products = visits * tasks.homes
    heavy = sorted(partitions, key=lambda part: -int(products[part.low : part.high].sum()))
    join_one = functools.partial(tasks.join, threads=within, mapped=mapped)
    with progress.bar(int(visits.sum()), "joining", "visits") as bar:
        for part in runner.each(join_one, heavy, tasks.join_file, within, last=True):
            bar.update(int(visits[part.low : part.high].sum()))


def collect_forest(tasks: JoinTasks, partitions: list[Partition], scan: Scan) -> tuple[Edges, int]:
    """Return the forest of all edges found, and the number of candidate pairs."""
    rows, references = tasks.features.rows, tasks.settings.reference_rows
    forest, candidates = ExternalForest(tasks.work / "forest", rows, references), 0
    for edges in absorbed_edges(tasks.folders, tasks.model.hubs, scan, tasks.skip):
        forest.add(edges)
    for part in partitions:
        joined = tasks.load_joined(part)
        if joined is None:
            path = tasks.join_file(part)
            raise SnipError(f"{path}: damaged while the run went on; start it again")
        forest.add(joined[0])
        candidates += joined[1]
    return forest.forest(), candidates


def needed_memory(features: Features, threads: int, reference_rows: int = 0) -> int:
    """Return the least memory that a run with these rows needs.

    One stage comes after the other. Fitting holds a sample; encoding, for each thread, a task's
    codes and a block's distances to centroids; joining, for each thread, what `join_bytes` counts.
    Listing copies takes a byte a row, forest and groups four (eight above 2^32 rows, twice that
    for two forests), and a block of edges or groups.
    """
    rows, raw = features.rows, features.dim * features.dtype.itemsize
    lists = 1 if rows <= SINGLE_LIST_ROWS else list_count(rows)
    sample, trained = calibration_rows(rows), training_rows(rows, lists)
    fit = sample * 2 * raw + (sample * 12 + trained * TRAINING_CODES) * CODE_BYTES
    task = min(rows, encoding.task_rows(rows)) * (CODE_BYTES + USUAL_VISITS * 60)
    encode = task + BLOCK * (lists * DISTANCE_BYTES + features.dim * VALUE_BYTES)
    forest = rows * np.dtype(row_kind(rows)).itemsize * (2 if reference_rows else 1)
    stages = (
        fit,
        threads * max(encode, join_bytes(features)),
        rows + min(rows, SORT_ROWS) * SORT_BYTES,
        forest + min(GROUP_BYTES * rows, GROUPS_BYTES),
    )
    return HELD_BYTES + max(stages)


def mapped_codes(features: Features, widths: tuple[int, int], memory: int) -> int:
    """Return how many bytes the codes of all rows take, if they may stay mapped, otherwise 0."""
    size = features.rows * code_record(widths).itemsize
    files = 2 * -(-features.rows // encoding.task_rows(features.rows))  # of codes and of lists
    return size if size <= memory // 2 and files <= most_open_files() // 2 else 0


def join_bytes(features: Features) -> int:
    """Return what a thread holds that joins: rows of a block of pairs, two tiles, a partition."""
    raw = features.dim * (features.dtype.itemsize + 4)
    tile = ROW_TILE * COLUMN_TILE * TILE_BYTES + 2 * (ROW_TILE + COLUMN_TILE) * raw
    return 2 * GATHER_PAIRS * raw + tile + PARTITION_BYTES


def most_visits(
    features: Features, widths: tuple[int, int], threads: int, memory: int, mapped: int
) -> int:
    """Return how many visits a partition may have, so that all threads keep a memory bound.

    Beside the codes that are ``mapped``; where none are, a partition holds its own.
    """
    spare = (memory - mapped - HELD_BYTES) // threads - join_bytes(features) + PARTITION_BYTES
    codes = 0 if mapped else code_record(widths).itemsize
    return max(PARTITION_BYTES, spare) // (VISIT_BYTES + codes)
