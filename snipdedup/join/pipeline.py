"""The set against itself, list by list: every row is a query and a row to be found.

Tasks meet only in files. ``encode`` turns a range of rows into int8 codes sorted by coarse list;
``join`` multiplies the codes that share a list, and verifies on the raw rows what the product does
not rule out. Here is the order of the tasks; a runner says who does them.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from snipdedup import progress
from snipdedup.errors import SnipError
from snipdedup.features.scan import BLOCK, SORT_ROWS, Scan
from snipdedup.features.shards import Features
from snipdedup.join.encoding import absorbed_edges, task_rows
from snipdedup.join.external_forest import ForestFile
from snipdedup.join.fitting import (
    SINGLE_LIST_ROWS,
    calibration_rows,
    list_count,
    training_rows,
)
from snipdedup.join.forest import Edges
from snipdedup.join.kernels import pick_kernel
from snipdedup.join.projection import WIDTHS
from snipdedup.join.tasks import Tasks, fits
from snipdedup.join.tiles import COLUMN_TILE, ROW_TILE
from snipdedup.join.verify import GATHER_PAIRS
from snipdedup.parallel import Stage, pick_device
from snipdedup.runners.base import Runner, run_once
from snipdedup.storage.external_sort import row_kind

PARTITION_BYTES = 1 << 24  # the least that a thread loads of the codes
VISIT_BYTES = 64  # held for each row of a list while a partition is brought together, codes apart
TILE_BYTES = 16  # of each product of a tile: int32, float32 and masks
HELD_BYTES = 130_000_000  # by what libraries allocate once they are used, and do not give back
TRAINING_CODES = 4  # times the codes of the rows that train centroids: gathered, distinct, sorted
SORT_BYTES = 60  # of each row whose hashes are sorted
GROUP_BYTES, GROUPS_BYTES = 200, 450_000_000  # deciding and writing: for a row, and at the most
USUAL_VISITS = 4  # lists that a row of a large set lives in or visits
DISTANCE_BYTES = 9  # of each row of a block and list: a distance, what is compared, a mask
VALUE_BYTES = 11  # of each value of a block: its square, as an integer of two lengths, a digit
RUNS_A_WORKER = 8  # of lists, so that all workers end at about the same time


def join(
    tasks: Tasks, runner: Runner, *, memory: int, stage: Stage
) -> tuple[Scan, Edges, dict[str, Any]]:
    """Find the near-duplicates of a set.

    Pairs among the first ``frozen`` rows are not looked for, nor, with ``across``, pairs among the
    others; absorbed rows may still bring some.

    Returns
    -------
    scan : Scan
        Bad rows, exact copies, checksums.
    forest : Edges
        Maximum spanning forest of the pairs found among distinct rows, each proved by its cosine;
        with ``frozen`` two of them, see `forest.spanning_forest`.
    notes : dict
        What was chosen and how much was compared, for the manifest.

    Raises
    ------
    slurm.ShareDone
        If this is not the process that merges what all have found.
    """
    with stage("fit"):
        run_once(runner, functools.partial(tasks.fit, runner.here), tasks.fitted)
        model = tasks.model
    with stage("encode"):
        encode_all(tasks, runner)
        run_once(runner, functools.partial(tasks.scan, runner.here), tasks.scanned)
        seen = tasks.load_scan()
    with stage("join"):
        forest, notes = join_all(tasks, runner, seen, memory)
    lists = {
        "kernel": pick_kernel(pick_device(tasks.device)).name,
        "width": model.projection.width,
        "nlist": model.lists.nlist,
        "tau": model.lists.tau / model.projection.scale,
        "masses": len(model.hubs.row),
    }
    calibrated = {"calibration_pairs": model.calibration_pairs}
    return seen, forest, {**lists, **calibrated, **notes}


def needed_memory(features: Features, threads: int, frozen: int = 0) -> int:
    """Return the least memory that a run with these rows needs, in bytes, libraries apart.

    One stage comes after the other. Fitting holds a sample; encoding, for each thread, a task's
    codes and a block's distances to centroids; joining, for each thread, the rows of a block of
    proofs, of two tiles, and their products. Listing copies costs a byte a row, forest and groups
    four (eight above 2^32 rows, twice that for two forests), and a block of edges or groups.
    """
    rows, raw = features.rows, features.dim * features.dtype.itemsize
    roots = rows * np.dtype(row_kind(rows)).itemsize * (2 if frozen else 1)
    stages = (
        fitting_bytes(rows, raw),
        threads * max(encode_bytes(rows, features.dim), join_bytes(features)),
        rows + min(rows, SORT_ROWS) * SORT_BYTES,
        roots + min(GROUP_BYTES * rows, GROUPS_BYTES),
    )
    return HELD_BYTES + max(stages)


def fitting_bytes(rows: int, raw: int) -> int:
    """Return what fitting holds: its sample twice, ``raw`` bytes a row, codes of it and others."""
    lists = 1 if rows <= SINGLE_LIST_ROWS else list_count(rows)
    codes = calibration_rows(rows) * 12 + training_rows(rows, lists) * TRAINING_CODES
    return calibration_rows(rows) * 2 * raw + codes * WIDTHS[-1]


def encode_bytes(rows: int, dim: int) -> int:
    """Return what an encode task holds: codes of rows and visits; a block's values, distances."""
    lists = 1 if rows <= SINGLE_LIST_ROWS else list_count(rows)
    width = WIDTHS[-1]
    task = min(rows, task_rows(rows)) * (2 * width + USUAL_VISITS * (width + 40))
    return task + BLOCK * (lists * DISTANCE_BYTES + dim * VALUE_BYTES)


def join_bytes(features: Features) -> int:
    """Return what a thread holds that joins: a block of proofs, two tiles, a small partition."""
    raw = features.dim * (features.dtype.itemsize + 4)
    tile = ROW_TILE * COLUMN_TILE * TILE_BYTES + 2 * (ROW_TILE + COLUMN_TILE) * raw
    return 2 * GATHER_PAIRS * raw + tile + PARTITION_BYTES


def encode_all(tasks: Tasks, runner: Runner) -> None:
    """Run the encode tasks that are not done yet."""
    numbers = range(len(tasks.spans))
    with progress.bar(tasks.features.rows, "encoding", "rows") as bar:
        for number in runner.each(tasks.encode, numbers, tasks.encoded):
            begin, end = tasks.spans[number]
            bar.update(end - begin)


def join_all(tasks: Tasks, runner: Runner, seen: Scan, memory: int) -> tuple[Edges, dict[str, Any]]:
    """Run the join tasks that are not done yet; return the forest of all edges and some counts.

    Many tasks run side by side, each on one thread; few (a small set's single list) run one
    after another on all threads.
    """
    features, model, visits = tasks.features, tasks.model, tasks.visits()
    spare = (memory - HELD_BYTES) // runner.here - join_bytes(features) + PARTITION_BYTES
    bound = max(PARTITION_BYTES, spare) // (VISIT_BYTES + 2 * model.projection.width)
    most = min(bound, max(1, int(visits.sum()) // (RUNS_A_WORKER * runner.workers)))
    replan = bound if runner.world_size == 1 else None  # else other processes may join by it
    run_once(runner, functools.partial(tasks.plan, visits, most, replan), tasks.planned)
    runs = tasks.runs()
    if not fits(runs, visits, bound):
        raise SnipError(
            f"{tasks.planned}: planned for more memory than this process has; give all processes "
            "the same --max_memory, or remove this file while none of them runs"
        )
    within = 1 if len(runs) >= 2 * runner.workers else runner.here
    with progress.bar(int(visits.sum()), "joining", "visits") as bar:
        join_run = functools.partial(tasks.join, threads=within)
        work = visits * tasks.homes()  # the most first, so that all workers end at about one time
        heavy = sorted(runs, key=lambda run: -int(work[run.low : run.high].sum()))
        for run in runner.each(join_run, heavy, tasks.joined, within, last=True):
            bar.update(int(visits[run.low : run.high].sum()))
    builder, proposed = ForestFile(tasks.work / "forest", features.rows, tasks.frozen), 0
    for edges in absorbed_edges(tasks.folders, model.hubs, seen, tasks.skip):
        builder.add(edges)
    for run in runs:
        edges, count = tasks.found(run)
        builder.add(edges)
        proposed += count
    return builder.forest(), {"visits": int(visits.sum()), "candidates": proposed}
