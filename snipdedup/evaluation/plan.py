"""The room of ``snip plan`` and of ``snip dedup --dry_run``: time, memory and disk of a run."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from snipdedup.config import Plan, parse_bytes
from snipdedup.errors import SnipError, UsageError
from snipdedup.evaluation.costs import Cost, Job, Rates, estimate
from snipdedup.evaluation.probe import probe
from snipdedup.features.shards import Features, open_features
from snipdedup.parallel import cores
from snipdedup.storage import atomic, out_folder

UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
SPANS = ((86_400, "d"), (3600, "h"), (60, "min"))


def run(options: Plan) -> str:
    """Run ``snip plan`` and return what to print."""
    features = None
    if options.features is not None:
        features = open_features(
            options.features, parts=options.parts, array=options.array, column=options.column
        )
    rows = int(options.rows or 0) or (features.rows if features else 0)
    dim = features.dim if features else options.dim
    rates, duplicates = known_rates(options, features, rows, dim)
    memory = parse_bytes(options.memory) if options.memory else machine_memory()
    job = Job(
        rows=rows,
        dim=dim,
        itemsize=features.dtype.itemsize if features else rates.itemsize,
        duplicates=duplicates,
        cores=cores(options.cores),
        nodes=options.nodes,
        memory=memory,
        bound=parse_bytes(options.max_memory) if options.max_memory else memory // 4,
        disk_speed=parse_bytes(options.disk_speed) if options.disk_speed else 0.0,
    )
    space = parse_bytes(options.disk) if options.disk else None
    return laid_out(job, rates, space, as_json=options.json)


def plan_features(
    features: Features,
    out: Path | None,
    *,
    threshold: float,
    recall: float,
    seed: int,
    threads: int,
    max_memory: str | None,
) -> str:
    """Return the plan of a join of these rows on this machine, as text.

    Parameters
    ----------
    features : Features
    out : Path, optional
        Where the result would go: its disk must have room.
    threshold, recall, seed, threads, max_memory
        As `snipdedup.config.Dedup` has them.
    """
    rates, duplicates = probe(
        features,
        rows=features.rows,
        dim=features.dim,
        duplicates=None,
        threshold=threshold,
        recall=recall,
        seed=seed,
        threads=cores(threads),
    )
    memory = machine_memory()
    job = Job(
        rows=features.rows,
        dim=features.dim,
        itemsize=features.dtype.itemsize,
        duplicates=duplicates,
        cores=cores(threads),
        nodes=1,
        memory=memory,
        bound=parse_bytes(max_memory) if max_memory else memory // 4,
    )
    return laid_out(job, rates, None if out is None else free_space(out), as_json=False)


def known_rates(
    options: Plan, features: Features | None, rows: int, dim: int
) -> tuple[Rates, float]:
    """Return rates and the share of rows that go: measured now, or read from a file."""
    path = None if options.rates is None else Path(options.rates).expanduser()
    if path is not None and not options.probe:
        rates, duplicates = load_rates(path)
        if rates.dim != dim:
            raise SnipError(
                f"{path}: rates of rows {rates.dim} wide, and --dim is {dim}; measure anew with "
                "--probe"
            )
    else:
        if path is not None:
            out_folder.refuse_output_file(path, [] if features is None else features.inputs())
        rates, duplicates = probe(
            features,
            rows=rows,
            dim=dim,
            duplicates=options.duplicates,
            threshold=options.threshold,
            recall=options.recall,
            seed=options.seed,
            threads=cores(0),
        )
        if path is not None:
            body = {"kind": "rates", "duplicates": duplicates, **dataclasses.asdict(rates)}
            atomic.save_json(path, body)
    return rates, duplicates if options.duplicates is None else options.duplicates


def load_rates(path: Path) -> tuple[Rates, float]:
    """Read the rates of an earlier probe.

    Raises
    ------
    SnipError
        If the file is not what a probe writes; says what is wrong.
    """
    found = atomic.load_json(path)
    names = {field.name: field.type for field in dataclasses.fields(Rates)}
    lacking = [name for name in ("duplicates", *names) if name not in found] if found else ["all"]
    if not isinstance(found, dict) or lacking:
        raise SnipError(
            f"{path}: not what snip plan --probe --rates FILE writes: no {', '.join(lacking[:3])}; "
            "measure anew with --probe"
        )
    values: dict[str, Any] = {}
    for name, kind in names.items():
        value = found[name]
        numbers = value if isinstance(value, list) and "tuple" in str(kind) else [value]
        if not all(type(number) in (int, float) and number >= 0 for number in numbers):
            raise SnipError(f"{path}: {name} is {value!r}, expected numbers of 0 or more")
        values[name] = tuple(numbers) if isinstance(value, list) else value
    return Rates(**values), float(found["duplicates"])


def machine_memory() -> int:
    """Return the bytes of RAM of this machine."""
    if not hasattr(os, "sysconf"):
        raise UsageError("say with --memory how much memory the machine has")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_space(out: Path) -> int:
    """Return the free bytes of the disk on which a folder lies, or will lie."""
    place = out.expanduser().absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def laid_out(job: Job, rates: Rates, space: int | None, *, as_json: bool) -> str:
    """Return a plan as text or JSON, with whether it fits."""
    cost = estimate(job, rates)
    wants = lacks(job, cost, space)
    if as_json:
        return json.dumps(
            {
                "job": dataclasses.asdict(job),
                "seconds": cost.seconds,
                "compute": cost.compute,
                "memory": cost.memory,
                "disk": cost.disk,
                "out": cost.out,
                "fits": not wants,
                "stages": {stage.name: dataclasses.asdict(stage) for stage in cost.stages},
                "counts": cost.counts._asdict(),
                "rates": dataclasses.asdict(rates),
            },
            indent=2,
        )
    return "\n".join([*table(job, cost), "", *(wants or ["it fits"])])


def table(job: Job, cost: Cost) -> list[str]:
    """Return the lines of a plan."""
    machines = f"{job.nodes} machines of " if job.nodes > 1 else ""
    number = cost.counts
    lines = [
        f"{job.rows:,} rows × {job.dim}, {job.duplicates:.0%} of them go; {machines}{job.cores} "
        f"cores, {amount(job.memory)}",
        "",
        "stage         time     memory  over the disk",
    ]
    for stage in cost.stages:
        lines.append(
            f"{stage.name:8}{span(stage.seconds):>10}{amount(stage.memory):>11}"
            f"{amount(stage.moved):>15}"
        )
    return [
        *lines,
        f"{'all':8}{span(cost.seconds):>10}{amount(cost.memory):>11}",
        "",
        f"lists {number.lists:,}, each row in {number.visits / job.rows:.1f} of them; "
        f"{number.tasks:,} tasks of encode, {number.partitions:,} partitions",
        f"disk {amount(cost.disk)} at the peak, {amount(cost.out)} in the end, metadata apart",
    ]


def lacks(job: Job, cost: Cost, space: int | None) -> list[str]:
    """Return what does not fit, one line each."""
    lines = []
    most = max(cost.stages, key=lambda stage: stage.memory)
    if cost.memory > job.memory:
        lines.append(
            f"memory: {most.name} needs {amount(cost.memory)}, found {amount(job.memory)}: take a "
            "larger machine, or fewer rows at a time with --reference"
        )
    if space is not None and cost.disk > space:
        lines.append(
            f"disk: {amount(cost.disk)} at the peak, free are {amount(space)}: put OUT elsewhere"
        )
    return lines


def amount(size: float) -> str:
    """Return bytes as a person reads them."""
    for unit, name in UNITS:
        if size >= unit:
            return (
                f"{size / unit:.3g} {name}" if size < 1000 * unit else f"{size / unit:,.0f} {name}"
            )
    return f"{size:.0f} bytes"


def span(seconds: float) -> str:
    """Return a time as a person reads it."""
    for unit, name in SPANS:
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s"
