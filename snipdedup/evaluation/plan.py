"""``snip plan`` and ``snip dedup --dry_run``: time, memory and disk of a run, before it.

Memory and disk follow from the size of the set. Time is the number of operations of each stage
times the seconds that one takes: the important ones are measured on a small sample, in seconds of
the processor, so that other work on the machine does not count; the others are constants.

With N rows, L lists, v lists that a row visits and h = N / L rows that live in a list, encoding
compares N × L rows with centroids, and joining multiplies N × (v - 1/2) × h pairs of codes. L grows
as √N, so both grow as N^1.5; all else grows as N.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup.config import Plan, parse_bytes
from snipdedup.errors import SnipError, UsageError
from snipdedup.features.cosine import indexed_cosines
from snipdedup.features.hashing import row_hashes
from snipdedup.features.shards import Features, open_features
from snipdedup.join.calibration import sample_pairs
from snipdedup.join.encoding import encode_task, task_rows
from snipdedup.join.lists import ROUNDS, Lists, assign_lists
from snipdedup.join.memory import (
    HELD_BYTES,
    PARTITION_BYTES,
    VISIT_BYTES,
    join_bytes,
    needed_memory,
)
from snipdedup.join.model import (
    CROWDED_DEGREE,
    SINGLE_LIST_ROWS,
    Model,
    calibration_rows,
    fit,
    list_count,
    training_rows,
)
from snipdedup.join.pipeline import PARTITIONS_A_WORKER
from snipdedup.join.projection import encode_rows
from snipdedup.join.tiles import COLUMN_TILE, ROW_TILE, CodedRows, compare_tiles, crowded_forest
from snipdedup.join.verify import verify_pairs
from snipdedup.parallel import cores, library_threads
from snipdedup.storage import atomic, out_folder

# The sample.
SAMPLE_ROWS = SINGLE_LIST_ROWS + (1 << 13)  # enough to get lists
FEW_ROWS = 1 << 12  # smaller sets are replaced by random rows: they are no sample of anything
COPIES = 1 << 11  # noisy copies that the sample gets, to calibrate on
PAIR_ROWS = 1 << 15  # rows whose pairs are counted
TIMED_ROWS = 1 << 13
ENOUGH_PAIRS = 30  # in the sample, to estimate the share of rows that are removed
USUAL_DUPLICATES = 0.3
SHARED, DECAY = 0.7, 0.75  # of random rows like CLIP's: length of the common direction, spectrum
NOISE = (0.05, 0.3)  # length of the noise on copies: cosines of .999 to .957

# Seconds of the machine on which they were measured: an operation on a row, a pair or a file.
SORT_S = 0.056  # of a million integers: the speed of another machine relative to this one
START_S, COPY_S, VISIT_S, OPEN_S = 1.5, 9e-8, 5e-8, 6e-4
EDGE_S, GROUP_S, WRITE_S = 7e-7, 1.6e-6, 1e-6
GAIN = 0.75  # what one more core adds to the speed of one

# Of sets in general.
VISIT_GROWTH = 0.13  # visits of a row grow as the lists to this power
MET = 2.0  # a pair is proposed where either of its rows lives
PAIRS_A_DUPLICATE = 1.25  # pairs, and rows in groups, for each row that is removed
MEMBERS_A_DUPLICATE = 1.77
LIBRARY_BYTES = 1.6e8
EDGE_BYTES, MEMBER_BYTES, PAIR_BYTES, HASH_BYTES = 18, 20, 40, 8  # in OUT, and in its work folder
PAGE = 4096  # bytes that a disk reads for one row at the least

UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
SPANS = ((86_400, "d"), (3600, "h"), (60, "min"))


@dataclass(frozen=True)
class Rates:
    """What `probe` measures; times are seconds of one core.

    Attributes
    ----------
    dim, itemsize, width : int
        Columns and bytes of a value of the features; columns of a code.
    fit : float
        Fitting, for each row of the samples that the model is fitted to.
    row, row_list : float
        Encoding, for each row, and for each row and list.
    product, proof, crowd : float
        Joining, for each product of two codes, each pair that is proved alone, and each pair of a
        crowded tile.
    machine : float
        Time that this machine takes for what the constants of this module count.
    lists, visits, uneven : float
        A number of lists, and how many of them a row visits; how much more products there are
        than with lists of equal size.
    false_pairs, crowded_pairs : float
        Share of all pairs that codes propose though they are none, and of those in large groups.
    duplicates : float
        Share of the rows that are removed.
    """

    dim: int
    itemsize: int
    width: int
    fit: float
    row: float
    row_list: float
    product: float
    proof: float
    crowd: float
    machine: float
    lists: float
    visits: float
    uneven: float
    false_pairs: float
    crowded_pairs: float
    duplicates: float


@dataclass(frozen=True)
class RunPlan:
    """What a run will cost.

    Attributes
    ----------
    rows, dim, duplicates, cores, nodes, memory_available
        The set, the share of its rows that are removed, and the machines.
    seconds, compute : dict of str to float
        Wall time of each stage, and seconds of all cores together.
    memory, disk, out : float
        Peaks of memory of one machine and of OUT on disk, and what remains in OUT, in bytes.
    lists, visits, partitions
        Coarse lists, how many of them a row visits, and partitions that are joined.
    problems : list of str
        What does not fit.
    """

    rows: int
    dim: int
    duplicates: float
    cores: int
    nodes: int
    memory_available: float
    seconds: dict[str, float]
    compute: dict[str, float]
    memory: float
    disk: float
    out: float
    lists: int
    visits: float
    partitions: int
    problems: list[str]
    as_json: bool = False

    def __str__(self) -> str:
        if self.as_json:
            return json.dumps(dataclasses.asdict(self), indent=2)
        machines = f"{self.nodes} machines of " if self.nodes > 1 else ""
        total = {**self.seconds, "all": sum(self.seconds.values())}
        lines = [
            f"{self.rows:,} rows × {self.dim}, {self.duplicates:.0%} of them removed; {machines}"
            f"{self.cores} cores, {amount(self.memory_available)}",
            "",
            *(f"{name:8}{span(seconds):>10}" for name, seconds in total.items()),
            "",
            f"memory {amount(self.memory)} at the peak",
            f"disk {amount(self.disk)} at the peak, {amount(self.out)} at the end; metadata apart",
            f"lists {self.lists:,}, each row in {self.visits:.1f} of them; "
            f"{self.partitions:,} partitions",
            "",
            *(self.problems or ["it fits"]),
        ]
        return "\n".join(lines)


def run(options: Plan) -> RunPlan:
    """Run ``snip plan``."""
    features = None
    if options.features is not None:
        features = open_features(
            options.features, parts=options.parts, array=options.array, column=options.column
        )
    rows = int(options.rows or 0) or (features.rows if features else 0)
    dim = features.dim if features else options.dim
    path = None if options.rates is None else Path(options.rates).expanduser()
    if path is not None and not options.probe:
        rates = load_rates(path, dim)
    else:
        if path is not None:
            out_folder.refuse_output_file(path, [] if features is None else features.inputs())
        rates = probe(features, rows, dim, options.threshold, options.recall, options.seed)
        if path is not None:
            atomic.save_json(path, {"kind": "rates", **dataclasses.asdict(rates)})
    if options.duplicates is not None:
        rates = dataclasses.replace(rates, duplicates=options.duplicates)
    return estimate(
        rates,
        rows,
        cores=cores(options.cores),
        nodes=options.nodes,
        memory=parse_bytes(options.memory) if options.memory else machine_memory(),
        max_memory=parse_bytes(options.max_memory) if options.max_memory else None,
        disk=parse_bytes(options.disk) if options.disk else None,
        disk_speed=parse_bytes(options.disk_speed) if options.disk_speed else None,
        as_json=options.json,
    )


def plan_features(
    features: Features,
    out: Path | None,
    *,
    threshold: float,
    recall: float,
    seed: int,
    threads: int,
    max_memory: str | None,
) -> RunPlan:
    """Return the plan of a join of these rows on this machine, with OUT at ``out``."""
    rates = probe(features, features.rows, features.dim, threshold, recall, seed)
    return estimate(
        rates,
        features.rows,
        cores=cores(threads),
        memory=machine_memory(),
        max_memory=parse_bytes(max_memory) if max_memory else None,
        disk=None if out is None else free_space(out),
    )


def load_rates(path: Path, dim: int) -> Rates:
    """Read the rates of an earlier probe; refuse a file that is none, or of rows of other width."""
    found = atomic.load_json(path)
    names = [field.name for field in dataclasses.fields(Rates)]
    values: dict[str, Any] = {}
    if isinstance(found, dict):
        values = {name: found.get(name) for name in names}
    wrong = [name for name in names if type(values.get(name)) not in (int, float)]
    wrong = wrong or [name for name in names if not 0 <= values[name] < math.inf]
    if wrong:
        raise SnipError(
            f"{path}: expected what snip plan --probe --rates FILE writes; its {wrong[0]} is "
            f"{values.get(wrong[0])!r}; measure again with --probe"
        )
    if values["dim"] != dim:
        raise SnipError(
            f"{path}: measured on rows of width {values['dim']}, not {dim}; measure again with "
            "--probe"
        )
    return Rates(**values)


def estimate(
    rates: Rates,
    rows: int,
    *,
    cores: int,
    memory: int,
    nodes: int = 1,
    max_memory: int | None = None,
    disk: int | None = None,
    disk_speed: int | None = None,
    as_json: bool = False,
) -> RunPlan:
    """Return what a join of so many rows costs.

    Parameters
    ----------
    cores, memory : int
        Of each of ``nodes`` machines.
    max_memory, disk, disk_speed : int, optional
        Bytes that the run may hold, bytes free for OUT, bytes a second that a disk reads or writes.
    """
    raw, machine = rates.dim * rates.itemsize, rates.machine
    lists = 1 if rows <= SINGLE_LIST_ROWS else list_count(rows)
    visits = 1.0 if lists == 1 else max(1.0, rates.visits * (lists / rates.lists) ** VISIT_GROWTH)
    visited, trained = rows * visits, training_rows(rows, lists)
    removed = rates.duplicates * rows
    members = min(rows, MEMBERS_A_DUPLICATE * removed)
    all_pairs = rows * rows / 2
    listed = MET * (PAIRS_A_DUPLICATE * removed + rates.false_pairs * all_pairs)
    encode_tasks = math.ceil(rows / task_rows(rows))

    size = SizeOnly(rows, rates)
    needed = needed_memory(size, cores)
    bound = max_memory or max(memory // 4, needed)
    a_visit = VISIT_BYTES + 2 * rates.width
    spare = max(0.0, (bound - HELD_BYTES) / cores - join_bytes(size)) + PARTITION_BYTES
    most = max(1.0, min(spare / a_visit, visited / (PARTITIONS_A_WORKER * cores * nodes)))
    partitions = min(lists, math.ceil(visited / most))
    joining = HELD_BYTES + cores * (
        join_bytes(size) - PARTITION_BYTES + visited / partitions * a_visit
    )

    codes, out = visited * (rates.width + 12), rows + removed * EDGE_BYTES + members * MEMBER_BYTES
    work = codes + HASH_BYTES * rows + 16.0 * encode_tasks * (lists + 1) + PAIR_BYTES * removed
    compute = {
        "start": START_S * machine,
        "fit": rates.fit * (calibration_rows(rows) + trained)
        + ROUNDS * trained * lists * rates.row_list,
        "encode": rows * (rates.row + lists * rates.row_list + COPY_S * machine),
        "join": visited * VISIT_S * machine
        + partitions * encode_tasks * OPEN_S * machine
        + rates.uneven * rows / lists * (visited - rows / 2) * rates.product
        + listed * rates.proof
        + rates.crowded_pairs * all_pairs * rates.crowd
        + MET * removed * EDGE_S * machine,
        "group": members * GROUP_S * machine,
        "write": members * WRITE_S * machine,
    }
    moved = {  # bytes over the disk of a machine
        "encode": (rows * raw + codes) / nodes,
        "join": (codes + 2 * listed * max(PAGE, raw)) / nodes,
        "group": members * max(PAGE, raw),
        "write": out,
    }
    speed = 1 + (cores - 1) * GAIN
    faster = {"fit": speed, "encode": speed * nodes, "join": speed * nodes}
    waiting = {name: moved.get(name, 0) / disk_speed if disk_speed else 0.0 for name in compute}
    plan = RunPlan(
        rows=rows,
        dim=rates.dim,
        duplicates=rates.duplicates,
        cores=cores,
        nodes=nodes,
        memory_available=memory,
        seconds={n: max(compute[n] / faster.get(n, 1), waiting[n]) for n in compute},
        compute=compute,
        memory=LIBRARY_BYTES + max(needed, joining),
        disk=out + work,
        out=out,
        lists=lists,
        visits=visits,
        partitions=partitions,
        problems=[],
        as_json=as_json,
    )
    if max_memory is not None and max_memory < needed:
        plan.problems.append(f"--max_memory: the run needs at least {amount(needed)}")
    if plan.memory > memory:
        plan.problems.append(
            f"memory: the run needs {amount(plan.memory)}, found {amount(memory)}: take a larger "
            "machine, or fewer rows at a time with --reference"
        )
    if disk is not None and plan.disk > disk:
        plan.problems.append(
            f"disk: the run needs {amount(plan.disk)}, {amount(disk)} are free: take another disk"
        )
    return plan


class SizeOnly(Features):
    """Features of which only the size is known."""

    def __init__(self, rows: int, rates: Rates) -> None:
        self.rows, self.dim, self.dtype = rows, rates.dim, np.dtype(f"f{rates.itemsize}")


def probe(
    features: Features | None, rows: int, dim: int, threshold: float, recall: float, seed: int
) -> Rates:
    """Measure rates for a set of ``rows`` rows, in a few seconds.

    The sample comes from ``features``; without them, it is made of random rows.
    """
    few = features is None or features.rows < FEW_ROWS
    source_rows = rows if few or features is None else features.rows
    raw = draw_sample(None if few else features, rows, dim, seed)
    sample = open_features(raw)
    timed = min(len(raw), task_rows(len(raw)))
    numbers = np.random.default_rng(0).integers(0, 1 << 62, 1 << 20)
    with library_threads(1), tempfile.TemporaryDirectory(prefix="snip-plan-") as name:
        start, folder = time.process_time(), Path(name) / "encode"
        model = fit(sample, threshold, recall, seed, 1, total=rows)
        fitting = time.process_time() - start
        fitted = calibration_rows(len(raw)) + training_rows(len(raw), model.lists.nlist)

        def encode() -> None:
            encode_task(sample, model, folder, 0, timed, chunk_rows=TIMED_ROWS)

        encoding = seconds_of(encode) / timed
        codes = encode_rows(model.projection, raw[:PAIR_ROWS], 1)
        some, lists = codes[:TIMED_ROWS], Lists(codes[: 1 << 8], 0.0, 0.0)
        row_list = seconds_of(lambda: assign_lists(some, lists)) / len(some) / len(lists.centroids)
        homes = np.load(folder / "homes.npy")
        visits = np.diff(np.load(folder / "starts.npy"))
        by_chance = homes.mean() * (visits.mean() + 1)  # with few rows a list, their numbers vary
        pairs = count_pairs(raw[: len(codes)], codes, model, source_rows)
        product, proof, crowd = time_pairs(sample, codes, model)
        machine = seconds_of(lambda: np.sort(numbers)) / SORT_S
    return Rates(
        dim=dim,
        itemsize=raw.dtype.itemsize,
        width=model.projection.width,
        fit=fitting / fitted,
        row=max(0.0, encoding - row_list * model.lists.nlist),
        row_list=row_list,
        product=product,
        proof=proof,
        crowd=crowd,
        machine=machine,
        lists=model.lists.nlist,
        visits=float(visits.sum()) / timed,
        uneven=max(1.0, float((homes * visits).mean() / by_chance)),
        false_pairs=pairs[0],
        crowded_pairs=pairs[1],
        duplicates=USUAL_DUPLICATES if pairs[2] is None else pairs[2],
    )


def draw_sample(features: Features | None, rows: int, dim: int, seed: int) -> np.ndarray:
    """Return rows of a set in random order, (n, dim); random ones like CLIP's without features.

    If the run itself would see more pairs, because it fits its model to more rows, noisy copies of
    other rows take their place.
    """
    rng = np.random.default_rng([seed, 1])
    if features is not None:
        count = min(features.rows, SAMPLE_ROWS)
        drawn = np.sort(rng.choice(features.rows, count, replace=False))
        raw = features.gather_ascending(drawn)[rng.permutation(count)]
        if calibration_rows(features.rows) <= calibration_rows(SAMPLE_ROWS):
            return raw
    else:
        count = int(np.clip(rows, FEW_ROWS, SAMPLE_ROWS))
        spread = np.arange(1, dim + 1, dtype=np.float32) ** (-DECAY / 2)
        spread *= ((1 - SHARED**2) / np.sum(spread**2)) ** 0.5
        made = rng.standard_normal((count, dim), np.float32) * spread
        made[:, -1] += SHARED
        raw = (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float16)
    copies = min(COPIES, count // 8)
    of = raw[:copies].astype(np.float32)
    noise = rng.standard_normal((copies, dim), np.float32)
    noise *= rng.uniform(*NOISE, (copies, 1)) / np.linalg.norm(noise, axis=1, keepdims=True)
    raw[-copies:] = of + noise * np.linalg.norm(of, axis=1, keepdims=True)
    return raw


def time_pairs(sample: Features, codes: np.ndarray, model: Model) -> tuple[float, float, float]:
    """Time products of codes, proofs of pairs, and pairs of a crowded tile."""
    rows = np.arange(min(len(codes), TIMED_ROWS))
    members = CodedRows(rows, codes[: len(rows)], np.zeros(len(rows)))
    columns = min(COLUMN_TILE, len(rows))
    other = np.roll(rows, len(rows) // 2)
    left, right = rows[:ROW_TILE], rows[-columns:]
    close = np.ones((len(left), len(right)), bool)

    def multiply() -> Any:
        return compare_tiles(sample, members, columns, limit=model.limit, threshold=model.threshold)

    def prove() -> Any:
        return list(verify_pairs(sample, rows, other, -1.0, 1))

    def compare_all() -> Any:
        return crowded_forest(sample, left, right, close, -1.0)

    return (
        seconds_of(multiply) / (columns * (len(rows) - columns / 2)),
        seconds_of(prove) / len(rows),
        seconds_of(compare_all) / close.size,
    )


def count_pairs(
    raw: np.ndarray, codes: np.ndarray, model: Model, rows: int
) -> tuple[float, float, float | None]:
    """Return shares of all pairs: false candidates, those in large groups; and of duplicate rows.

    A sample of n of N rows has each pair of the set with probability (n / N)². With too few pairs
    in it, the share of duplicate rows is None.
    """
    first = np.sort(np.unique(row_hashes(raw), return_index=True)[1])
    a, b = sample_pairs(codes[first], model.limit, 1)
    degree = np.bincount(np.concatenate([a, b]), minlength=len(first))
    large = np.maximum(degree[a], degree[b]) >= CROWDED_DEGREE
    i, j = first[a[~large]], first[b[~large]]
    true = int((indexed_cosines(raw, raw, i, j) >= np.float32(model.threshold)).sum())
    copies, crowd = len(raw) - len(first), int((degree >= CROWDED_DEGREE).sum())
    share = (true / PAIRS_A_DUPLICATE + copies) * rows / len(raw) ** 2 + crowd / len(raw)
    all_pairs = len(first) ** 2 / 2
    return (
        (len(i) - true) / all_pairs,
        float(large.sum()) / all_pairs,
        min(share, 0.9) if true + copies + crowd >= ENOUGH_PAIRS else None,
    )


def seconds_of(work: Callable[[], Any], repeats: int = 3) -> float:
    """Return the shortest processor time of a few calls, in all threads together."""
    spent = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        spent.append(time.process_time() - start)
    return min(spent)


def machine_memory() -> int:
    """Return the bytes of RAM of this machine."""
    if not hasattr(os, "sysconf"):
        raise UsageError("give with --memory how much memory the machine has")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_space(out: Path) -> int:
    """Return the free bytes of the disk on which a folder lies, or will lie."""
    place = out.expanduser().absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def amount(size: float) -> str:
    """Return bytes as text: ``3.2 GB``."""
    unit, name = next(((unit, name) for unit, name in UNITS if size >= unit), (1, "bytes"))
    return f"{size / unit:.3g} {name}" if size < 1000 * unit else f"{size / unit:,.0f} {name}"


def span(seconds: float) -> str:
    """Return a time as text: ``1.5 min``."""
    unit, name = next(((unit, name) for unit, name in SPANS if seconds >= 1.5 * unit), (1, "s"))
    return f"{seconds / unit:.1f} {name}"
