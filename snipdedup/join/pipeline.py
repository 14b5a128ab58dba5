"""The join of a set with itself: every row is a query and a row to be found.

Fit the model, encode rows into codes sorted by coarse list, join each partition of the lists,
collect the forest. Products of codes rule out nearly all pairs; the rest is verified on the raw
rows. Tasks meet in files only; a runner says who does them.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from snipdedup import native, progress
from snipdedup.errors import SnipError
from snipdedup.features.scan import Scan
from snipdedup.features.shards import Features
from snipdedup.join.encoding import absorbed_edges
from snipdedup.join.forest import Edges, ExternalForest
from snipdedup.join.kernels import kernel_name
from snipdedup.join.memory import most_visits
from snipdedup.join.tasks import JoinSettings, JoinTasks, Partition
from snipdedup.parallel import Stage, pick_device
from snipdedup.runners.local import Runner, run_once

PARTITIONS_A_WORKER = 8  # so that all workers end at about the same time


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
    `memory.needed_memory`; ``stage`` times a stage of the run.

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
                "the native kernels were not built, for lack of a compiler: numpy and torch compute, "
                "several times slower"
            )
    with stage("fit"):
        run_once(runner, functools.partial(tasks.fit, runner.here), tasks.model_file)
        model = tasks.model
    with stage("encode"):
        encode_all(tasks, runner)
        run_once(runner, functools.partial(tasks.scan, runner.here), tasks.scan_file)
        scan = tasks.load_scan()
    with stage("join"):
        partitions = plan_partitions(tasks, runner, memory)
        join_partitions(tasks, runner, partitions)
        forest, candidates = collect_forest(tasks, partitions, scan)
    notes = {
        "kernel": kernel_name(pick_device(settings.device)),
        "widths": list(model.widths),
        "nlist": model.lists.nlist,
        "tau": model.lists.tau / model.narrow.scale,
        "masses": len(model.hubs.row),
        "calibration_pairs": model.calibration_pairs,
        "visits": int(tasks.visits.sum()),
        "candidates": candidates,
    }
    return scan, forest, notes


def encode_all(tasks: JoinTasks, runner: Runner) -> None:
    """Run the encode tasks."""
    with progress.bar(tasks.features.rows, "encoding", "rows") as bar:
        for number in runner.each(tasks.encode, range(len(tasks.spans)), tasks.encode_file):
            begin, end = tasks.spans[number]
            bar.update(end - begin)


def plan_partitions(tasks: JoinTasks, runner: Runner, memory: int) -> list[Partition]:
    """Cut the lists into partitions that fit into memory; all processes take the same ones."""
    visits, width = int(tasks.visits.sum()), sum(tasks.model.widths)
    bound = most_visits(tasks.features, width, runner.here, memory)
    most = min(bound, max(1, visits // (PARTITIONS_A_WORKER * runner.workers)))
    replan = bound if runner.world_size == 1 else None  # else other processes may join by it
    run_once(runner, functools.partial(tasks.plan, most, replan), tasks.plan_file)
    if not tasks.fits(bound):
        raise SnipError(
            f"{tasks.plan_file}: planned for more memory than this process has; give all processes "
            "the same --max_memory, or remove this file while none of them runs"
        )
    return tasks.partitions()


def join_partitions(tasks: JoinTasks, runner: Runner, partitions: list[Partition]) -> None:
    """Run the join tasks, the largest first, so that all workers end at about the same time.

    Many tasks run side by side, each on one thread; few (a small set's single list) run one after
    another on all threads.
    """
    within = 1 if len(partitions) >= 2 * runner.workers else runner.here
    visits = tasks.visits
    products = visits * tasks.homes
    heavy = sorted(partitions, key=lambda part: -int(products[part.low : part.high].sum()))
    join_one = functools.partial(tasks.join, threads=within)
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
