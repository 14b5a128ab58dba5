"""``snip plan`` and ``snip dedup --dry_run``: time, memory and disk of a run, before it.

Memory and disk follow from the size of the set. Time is the number of operations of each stage
times the seconds that one takes: the important ones are measured on a small sample, as processor
time, so that other work on the machine does not count; the others are constants.

With N rows, L lists, v lists that a row visits and h = N / L rows that live in a list, encoding
compares N × L rows with centroids, and joining multiplies N × (v - 1/2) × h pairs of codes. L grows
as √N, so both grow as N^1.5; all else grows as N.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snipdedup.commands import parse_bytes
from snipdedup.config import Plan
from snipdedup.errors import SnipError
from snipdedup.features.cosine import indexed_cosines
from snipdedup.features.hashing import row_hashes
from snipdedup.features.origin import usual_threshold
from snipdedup.features.shards import Features, open_features
from snipdedup.join import pipeline
from snipdedup.join.calibration import close_pairs
from snipdedup.join.encoding import encode_task, task_rows
from snipdedup.join.lists import ROUNDS, CoarseLists, assign_lists
from snipdedup.join.model import (
    SINGLE_LIST_ROWS,
    Model,
    calibration_rows,
    fit_model,
    list_count,
    training_rows,
)
from snipdedup.join.projection import Codes, encode_rows
from snipdedup.join.tiles import COLUMN_TILE, CodeStore, Members, code_record, compare_tiles
from snipdedup.join.verify import verify_pairs
from snipdedup.parallel import cores, library_threads, machine_memory
from snipdedup.storage import atomic, out_folder

# The sample.
SAMPLE_ROWS = SINGLE_LIST_ROWS + (1 << 13)  # enough to get lists
FEW_ROWS = 1 << 12  # smaller sets are replaced by random rows: they are no sample of anything
COPIES = 1 << 11  # noisy copies that the sample gets, to calibrate on
CROWDED_DEGREE = 8  # pairs of a row of the sample from which they are those of a large group
PAIR_ROWS, TIMED_ROWS = 1 << 15, 1 << 13  # rows whose pairs are counted; that are timed
ENOUGH_PAIRS, USUAL_DUPLICATES = 30, 0.3  # pairs to estimate the duplicates; the estimate without
SHARED, DECAY = 0.7, 0.75  # of random rows like CLIP's: length of the common direction, spectrum
NOISE = (0.05, 0.3)  # length of the noise on copies: cosines of .999 to .957

# Seconds of the machine on which they were measured: an operation on a row, a pair or a file.
SORT_S = 0.056  # of a million integers: the speed of another machine relative to this one
START_S, COPY_S, VISIT_S, OPEN_S = 1.5, 9e-8, 5e-8, 6e-4
EDGE_S, GROUP_S, WRITE_S = 7e-7, 1.6e-6, 1e-6
CROWD_PROOFS = 1 / 40  # proofs that a pair of a large group costs: a product of whole tiles
GAIN = 0.75  # what one more core adds to the speed of one

# Of sets in general.
VISIT_GROWTH = 0.13  # visits of a row grow as the lists to this power
MET = 2.0  # a pair is proposed where either of its rows lives
PAIRS_A_DUPLICATE, MEMBERS_A_DUPLICATE = 1.25, 1.77  # for each row that is removed, in groups
LIBRARY_BYTES = 1.6e8
EDGE_BYTES, MEMBER_BYTES, PAIR_BYTES, HASH_BYTES = 18, 24, 40, 8  # in OUT, and in its work folder
PAGE = 4096  # bytes that a disk reads for one row at the least

UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
SPANS = ((86_400, "d"), (3600, "h"), (60, "min"))


class Rates(NamedTuple):
    """What `probe` measures; times are seconds of one core."""

    dim: int
    itemsize: int
    width: int  # coordinates of a narrow code
    wide: int  # of a wide one; 0 where there are none
    fit: float  # for each row of the samples that the model is fitted to
    row: float  # encoding a row
    row_list: float  # comparing a row with a centroid
    product: float  # multiplying two codes
    proof: float  # the cosine of a pair
    machine: float  # time that this machine takes for what the constants above count
    lists: int  # with so many lists,
    visits: float  # a row visits these,
    uneven: float  # and there are so many times more products than with lists of equal size
    false_pairs: float  # share of all pairs that codes propose in vain
    crowded_pairs: float  # share of all pairs that lie in large groups
    duplicates: float  # share of the rows that are removed


class Machines(NamedTuple):
    """Where the run takes place; sizes in bytes."""

    cores: int  # of each machine
    memory: int
    nodes: int = 1
    max_memory: int | None = None  # what the run may hold
    disk: int | None = None  # free for OUT
    disk_speed: int | None = None  # a second; None: files are in memory already


class RunPlan(NamedTuple):
    """What a run will cost; sizes in bytes."""

    rows: int
    dim: int
    duplicates: float  # share of the rows that are removed
    machines: Machines
    seconds: dict[str, float]  # wall time of each stage
    compute: dict[str, float]  # seconds of all cores together
    memory: float  # peak of one machine
    disk: float  # peak of OUT
    out: float  # what remains of it
    lists: int  # coarse lists,
    visits: float  # how many of them a row visits,
    partitions: int  # and tasks that join them
    problems: list[str]  # what does not fit

    def __str__(self) -> str:
        nodes, cores = self.machines.nodes, self.machines.cores
        total = {**self.seconds, "all": sum(self.seconds.values())}
        lines = [
            f"{self.rows:,} rows × {self.dim}, {self.duplicates:.0%} of them removed; "
            f"{f'{nodes} machines of ' if nodes > 1 else ''}{cores} cores, "
            f"{amount(self.machines.memory)}",
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

    def as_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {**self._asdict(), "machines": self.machines._asdict()}


def run(options: Plan) -> RunPlan:
    """Run ``snip plan``."""
    features = None
    if options.features is not None:
        features = open_features(options.features, **options.some("parts", "array", "column"))
    rows = int(options.rows or 0) or (features.rows if features else 0)
    dim = features.dim if features else options.dim
    path = None if options.rates is None else Path(options.rates).expanduser()
    if path is not None and not options.probe:
        rates = load_rates(path, dim)
    else:
        if path is not None:
            out_folder.refuse_output_file(path, [] if features is None else features.inputs())
        threshold = options.threshold
        if threshold is None:
            threshold = usual_threshold(options.features)[0]
        rates = probe(features, rows, dim, threshold, options.recall, options.seed)
        if path is not None:
            atomic.save_json(path, {"kind": "rates", **rates._asdict()})
    if options.duplicates is not None:
        rates = rates._replace(duplicates=options.duplicates)
    memory, *sizes = (
        None if text is None else parse_bytes(text)
        for text in (options.memory, options.max_memory, options.disk, options.disk_speed)
    )
    machines = Machines(cores(options.cores), memory or machine_memory(), options.nodes, *sizes)
    return estimate(rates, rows, machines)


def load_rates(path: Path, dim: int) -> Rates:
    """Read the rates of an earlier probe; refuse a file that is none, or of rows of other width."""
    found = atomic.load_json(path)
    known = found if isinstance(found, dict) else {}
    values: dict[str, Any] = {name: known.get(name) for name in Rates._fields}
    for name, value in values.items():
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise SnipError(
                f"{path}: expected what snip plan --probe --rates FILE writes; its {name} is "
                f"{value!r}; measure again with --probe"
            )
    if values["dim"] != dim:
        raise SnipError(
            f"{path}: measured on rows of width {values['dim']}, not {dim}; measure again with "
            "--probe"
        )
    return Rates(**values)


def estimate(rates: Rates, rows: int, machines: Machines) -> RunPlan:
    """Return what a join of so many rows costs."""
    cores, nodes, disk_speed = machines.cores, machines.nodes, machines.disk_speed
    raw, machine = rates.dim * rates.itemsize, rates.machine
    lists = 1 if rows <= SINGLE_LIST_ROWS else list_count(rows)
    visits = 1.0 if lists == 1 else max(1.0, rates.visits * (lists / rates.lists) ** VISIT_GROWTH)
    visited, trained = rows * visits, training_rows(rows, lists)
    encode_tasks = math.ceil(rows / task_rows(rows))
    removed, all_pairs = rates.duplicates * rows, rows * rows / 2
    members = min(rows, MEMBERS_A_DUPLICATE * removed)
    listed = MET * (PAIRS_A_DUPLICATE * removed + rates.false_pairs * all_pairs)
    needed, peak, partitions, mapped = share_memory(rates, rows, machines, lists, visited)

    # Disk: codes, the rows of all lists, hashes, pairs. A partition reads pages that hold its rows.
    record = code_record((rates.width, rates.wide)).itemsize
    codes = rows * record + visited * 8
    share = min(1.0, visits / partitions)
    read = 1 if mapped else partitions * (1 - (1 - share) ** max(1, PAGE // record))
    out = rows + removed * EDGE_BYTES + members * MEMBER_BYTES
    work = codes + HASH_BYTES * rows + 16.0 * encode_tasks * (lists + 1) + PAIR_BYTES * removed

    # Time: operations of one core, then shared among cores, or waiting for the disk.
    k_means = ROUNDS * trained * lists * rates.row_list
    products = rates.uneven * rows / lists * (visited - rows / 2)
    proofs = listed + rates.crowded_pairs * all_pairs * CROWD_PROOFS
    compute = {
        "start": START_S * machine,
        "fit": rates.fit * (calibration_rows(rows) + trained) + k_means,
        "encode": rows * (rates.row + lists * rates.row_list + COPY_S * machine),
        "join": products * rates.product
        + proofs * rates.proof
        + (visited * VISIT_S + partitions * encode_tasks * OPEN_S + removed * EDGE_S) * machine,
        "group": members * GROUP_S * machine,
        "write": members * WRITE_S * machine,
    }
    moved = {  # bytes over the disk of a machine
        "encode": (rows * raw + codes) / nodes,
        "join": (read * rows * record + visited * 8 + 2 * listed * max(PAGE, raw)) / nodes,
        "group": members * max(PAGE, raw),
        "write": out,
    }
    speed = 1 + (cores - 1) * GAIN
    faster = {"fit": speed, "encode": speed * nodes, "join": speed * nodes}
    seconds = {name: spent / faster.get(name, 1) for name, spent in compute.items()}
    if disk_speed:
        seconds = {name: max(s, moved.get(name, 0) / disk_speed) for name, s in seconds.items()}
    return RunPlan(
        rows, rates.dim, rates.duplicates, machines, seconds, compute, peak, out + work, out,
        lists, visits, partitions, list_problems(machines, needed, peak, out + work),
    )  # fmt: skip


def share_memory(
    rates: Rates, rows: int, machines: Machines, lists: int, visited: float
) -> tuple[int, float, int, int]:
    """Return the memory that a run needs, its peak, partitions, and mapped codes.

    A partition holds as many codes as the bound allows. Pages of mapped codes can be dropped.
    """
    cores, memory, nodes, max_memory, *_ = machines
    size, widths = SizeOnly(rows, rates), (rates.width, rates.wide)
    needed = pipeline.needed_memory(size, cores)
    bound = max_memory or max(memory // 4, needed)
    mapped = pipeline.mapped_codes(size, widths, bound)
    most = pipeline.most_visits(size, widths, cores, bound, mapped)
    most = max(1, min(most, int(visited) // (pipeline.PARTITIONS_A_WORKER * cores * nodes)))
    record = 0 if mapped else code_record(widths).itemsize
    held = min(needed + cores * most * (pipeline.VISIT_BYTES + record), max(bound, needed))
    return needed, LIBRARY_BYTES + held, min(lists, math.ceil(visited / most)), mapped


def list_problems(machines: Machines, needed: int, peak: float, space: float) -> list[str]:
    """Return what does not fit: memory that a run needs and holds, space on disk."""
    advice = "take a larger machine, or fewer rows at a time with --reference"
    return [
        f"{what}: the run needs at least {amount(needs)}, found {amount(found)}: {mend}"
        for what, needs, found, mend in (
            ("--max_memory", needed, machines.max_memory, "give more"),
            ("memory", peak, machines.memory, advice),
            ("disk", space, machines.disk, "take another disk"),
        )
        if found is not None and needs > found
    ]


class SizeOnly(Features):
    """Features of which only the size is known."""

    def __init__(self, rows: int, rates: Rates) -> None:
        self.rows, self.dim, self.dtype = rows, rates.dim, np.dtype(f"f{rates.itemsize}")


def probe(
    features: Features | None, rows: int, dim: int, threshold: float, recall: float, seed: int
) -> Rates:
    """Measure rates for a set of ``rows`` rows, in a few seconds, on rows of ``features``.

    Without these, the sample is made of random rows.
    """
    source = None if features is None or features.rows < FEW_ROWS else features
    raw = sample_of_set(source, rows, dim, seed)
    sample, timed = open_features(raw), min(len(raw), task_rows(len(raw)))
    with (
        library_threads(1, torch_too=False),
        tempfile.TemporaryDirectory(prefix="snip-plan-") as name,
    ):
        start, folder = time.process_time(), Path(name) / "encode"
        model = fit_model(sample, threshold, recall, seed, 1, total=rows)
        fitting = time.process_time() - start
        nlist = model.lists.nlist

        encode = partial(encode_task, sample, model, folder, 0, timed, chunk_rows=TIMED_ROWS)
        encoding = seconds_of(encode) / timed
        homes = np.load(folder / "homes.npy")
        visits = np.diff(np.load(folder / "starts.npy"))
        codes = encode_rows(model.narrow, raw[:PAIR_ROWS], 1)
        wide = encode_rows(model.wide, raw[:PAIR_ROWS], 1) if model.wide else None
        timed_operations = time_operations(sample, model, codes, wide)
        numbers = np.random.default_rng(0).integers(0, 1 << 62, 1 << 20)
        sorting = seconds_of(partial(np.sort, numbers))
        counted = count_pairs(raw, codes, wide, model, source.rows if source else rows)
    by_chance = homes.mean() * (visits.mean() + 1)  # with few rows a list, their numbers vary
    return Rates(
        dim=raw.shape[1],
        itemsize=raw.dtype.itemsize,
        width=model.widths[0],
        wide=model.widths[1],
        fit=fitting / (calibration_rows(len(raw)) + training_rows(len(raw), nlist)),
        row=max(0.0, encoding - timed_operations["row_list"] * nlist),
        machine=sorting / SORT_S,
        lists=nlist,
        visits=float(visits.sum()) / timed,
        uneven=max(1.0, float((homes * visits).mean() / by_chance)),
        **timed_operations,
        **counted,
    )


def time_operations(
    sample: Features, model: Model, codes: Codes, wide: Codes | None
) -> dict[str, float]:
    """Return ``row_list``, ``product`` and ``proof`` of `Rates`."""
    count = len(codes.falls)
    some = np.arange(min(count, TIMED_ROWS))
    few, lists = codes.values[: len(some)], CoarseLists(codes.values[: 1 << 8], 0.0, 0.0)
    assigning = seconds_of(partial(assign_lists, few, lists))
    records = np.zeros(count, code_record(model.widths))
    records["narrow"], records["falls"] = codes
    if wide is not None:
        records["wide"], records["wide_falls"] = wide
    stored, members = CodeStore([records], count), Members(some, some)
    columns, limits, threshold = min(COLUMN_TILE, len(some)), model.limits, model.threshold
    multiplying = seconds_of(
        partial(compare_tiles, sample, stored, members, columns, limits=limits, threshold=threshold)
    )
    other = np.roll(some, len(some) // 2)
    proving = seconds_of(lambda: list(verify_pairs(sample, some, other, -1.0, 1)))
    return {
        "row_list": assigning / len(few) / len(lists.centroids),
        "product": multiplying / (columns * (len(some) - columns / 2)),
        "proof": proving / len(some),
    }


def sample_of_set(features: Features | None, rows: int, dim: int, seed: int) -> np.ndarray:
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
        made = rng.standard_normal((count, dim), np.float32)
        made *= spread
        made[:, -1] += SHARED
        made /= np.linalg.norm(made, axis=1, keepdims=True)
        raw = made.astype(np.float16)
    copies = min(COPIES, count // 8)
    of = raw[:copies].astype(np.float32)
    noise = rng.standard_normal((copies, dim), np.float32)
    noise *= rng.uniform(*NOISE, (copies, 1)) / np.linalg.norm(noise, axis=1, keepdims=True)
    raw[-copies:] = of + noise * np.linalg.norm(of, axis=1, keepdims=True)
    return raw


def count_pairs(
    raw: np.ndarray, codes: Codes, wide: Codes | None, model: Model, rows: int
) -> dict[str, float]:
    """Return ``false_pairs``, ``crowded_pairs`` and ``duplicates`` of `Rates`, by a sample.

    A sample of n of N rows has each pair of the set with probability (n / N)².
    """
    raw = raw[: len(codes.falls)]
    first = np.sort(np.unique(row_hashes(raw), return_index=True)[1])
    both = (wide.where(first), model.limits.wide) if wide else None
    a, b = close_pairs(codes.where(first), model.limits.narrow, 1, both)
    degree = np.bincount(np.concatenate([a, b]), minlength=len(first))
    large = np.maximum(degree[a], degree[b]) >= CROWDED_DEGREE
    i, j = first[a[~large]], first[b[~large]]
    true = int((indexed_cosines(raw, raw, i, j) >= np.float32(model.threshold)).sum())
    copies, crowd = len(raw) - len(first), int((degree >= CROWDED_DEGREE).sum())
    share = (true / PAIRS_A_DUPLICATE + copies) * rows / len(raw) ** 2 + crowd / len(raw)
    all_pairs = len(first) ** 2 / 2
    enough = true + copies + crowd >= ENOUGH_PAIRS
    return {
        "false_pairs": (len(i) - true) / all_pairs,
        "crowded_pairs": float(large.sum()) / all_pairs,
        "duplicates": min(share, 0.9) if enough else USUAL_DUPLICATES,
    }


def seconds_of(work: Callable[[], Any]) -> float:
    """Return the shortest processor time of three calls, in all threads together."""
    return min(timeit.repeat(work, timer=time.process_time, number=1, repeat=3))


def free_space(out: Path) -> int:
    """Return the free bytes of the disk on which a folder lies, or will lie."""
    place = out.expanduser().absolute()
    return shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free


def amount(size: float) -> str:
    """Return bytes as text: ``3.2 GB``."""
    unit, name = next(((unit, name) for unit, name in UNITS if size >= unit), (1, "bytes"))
    return f"{size / unit:.3g} {name}" if size < 1000 * unit else f"{size / unit:,.0f} {name}"


def span(seconds: float) -> str:
    """Return a time as text: ``1.5 min``."""
    unit, name = next(((unit, name) for unit, name in SPANS if seconds >= 1.5 * unit), (1, "s"))
    return f"{seconds / unit:.1f} {name}"
