"""What a join of N rows costs: a law of growth for each stage, times rates that were measured.

With L lists, v lists a row lives in or visits, and h = N / L rows at home in a list, the work of
the stages is: fit, 8 rounds of 48 L rows × L lists; encode, N rows, N × L products with centroids
and N × v visits written; join, N × v visits read, N × (v - 1/2) × h products of codes, and the
pairs that these propose; all else in proportion to rows, or to those in groups. With L = √N,
encode and join both grow as N^1.5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from snipdedup.features.scan import SORT_ROWS
from snipdedup.join.encoding import task_rows
from snipdedup.join.forest import HELD_EDGES
from snipdedup.join.lists import ROUNDS
from snipdedup.join.memory import (
    DISTANCE_BYTES,
    GROUPS_BYTES,
    PARTITION_BYTES,
    SORT_BYTES,
    TRAINING_CODES,
    VISIT_BYTES,
)
from snipdedup.join.model import (
    SINGLE_LIST_ROWS,
    calibration_rows,
    list_count,
    training_rows,
)
from snipdedup.join.pipeline import PARTITIONS_A_WORKER
from snipdedup.join.tiles import COLUMN_TILE, ROW_TILE
from snipdedup.join.verify import GATHER_PAIRS
from snipdedup.storage.external_sort import HELD, row_kind

PAGE = 4096  # bytes read from a disk for one row at the least
ROW_MEMBERS = 1.77  # rows in groups for each row that goes: most groups are of two or three rows
MET = 2.0  # times that a pair is proposed: it meets where either row lives
FITTED, STAYS = 1.3e8, 2.4e8  # bytes: blocks of work, whatever the rows
HASHED, EDGE, GROUPED, MEMBER = 12, 12, 17, 29  # bytes of records in files
WRITTEN_SORTS = 4  # rows that go, their counts, the forest, members by row: each sorted once
TREE = 1.25  # pairs among the rows of groups for each row that goes


@dataclass(frozen=True)
class Rates:
    """Seconds that one thread takes for one unit of work, and bytes; measured by `probe`.

    Attributes
    ----------
    dim, itemsize, width : int
        What they were measured with: features, and codes.
    start : float
        Seconds until a command is under way.
    fit, fit_row : float
        Fitting: in any case, and for each row of the sample.
    nearest : float
        For each row and list, in k-means.
    row, row_list, row_visit : float
        Encoding: for each row, each row and list, each visit that is written.
    copy : float
        Looking for exact copies: for each row that is sorted.
    spill : float
        For each record that is sorted in files, since memory does not hold all.
    opened, visit, product, tile : float
        Joining: for each partition and task of encode, each visit read, each product of two codes,
        each tile.
    prove, crowd : float
        For each pair proved, and each pair of a crowded tile.
    edge, member, written : float
        For each edge of the forest, each row in a group, each row of a group written.
    gain : float
        What one more core adds to one core's speed.
    lists, visits : tuple of float
        Numbers of lists, ascending, and the lists that a row lives in or visits at each.
    uneven : float
        Mean of h × visitors over lists, over the product of their means.
    false_pairs : float
        Share of all pairs of rows, none alike, that codes propose.
    crowded_pairs : float
        Share of all pairs of rows that lie in crowded tiles: those of very large groups.
    visit_bytes : float
        On disk, for each visit.
    edge_bytes, member_bytes : float
        In OUT, for each edge of the forest and each row in a group.
    base : float
        Anonymous memory of the libraries, in bytes.
    """

    dim: int
    itemsize: int
    width: int
    start: float
    fit: float
    fit_row: float
    nearest: float
    row: float
    row_list: float
    row_visit: float
    copy: float
    spill: float
    opened: float
    visit: float
    product: float
    tile: float
    prove: float
    crowd: float
    edge: float
    member: float
    written: float
    gain: float
    lists: tuple[float, ...]
    visits: tuple[float, ...]
    uneven: float
    false_pairs: float
    crowded_pairs: float
    visit_bytes: float
    edge_bytes: float
    member_bytes: float
    base: float

    def visits_at(self, nlist: int) -> float:
        """Return the visits of a row at a number of lists: a power law through two measured."""
        if len(self.lists) == 1 or nlist == 1:
            return self.visits[0] if nlist > 1 else 1.0
        low, high = self.lists[-2:]
        power = math.log(self.visits[-1] / self.visits[-2]) / math.log(high / low)
        return max(1.0, self.visits[-1] * (nlist / high) ** power)


@dataclass(frozen=True)
class Job:
    """What is to be done, and with what.

    Attributes
    ----------
    rows, dim, itemsize : int
    duplicates : float
        Share of the rows that go.
    cores, nodes : int
        Cores of a machine, and machines; encode and join are shared among these.
    memory : int
        Bytes of RAM of a machine.
    bound : int
        Bytes that tasks may load: ``--max_memory``.
    disk_speed : float
        Bytes a second of a machine's disk; 0: all is in the page cache.
    """

    rows: int
    dim: int
    itemsize: int
    duplicates: float
    cores: int
    nodes: int
    memory: int
    bound: int
    disk_speed: float = 0.0


class Counts(NamedTuple):
    """How much there is to do."""

    lists: int
    sample: int
    trained: int
    visits: float
    products: float
    tiles: float
    listed: float
    crowded: float
    edges: float
    members: float
    tasks: int
    partitions: int


@dataclass(frozen=True)
class Stage:
    """What one stage costs.

    Attributes
    ----------
    name : str
    compute : float
        Seconds of all cores together.
    seconds : float
        Time, of computing or of waiting for the disk, whichever is longer.
    moved : float
        Bytes over each machine's disk.
    memory : float
        Peak of anonymous memory.
    """

    name: str
    compute: float
    seconds: float
    moved: float
    memory: float


@dataclass(frozen=True)
class Cost:
    """What a run costs.

    Attributes
    ----------
    stages : list of Stage
    counts : Counts
    disk : float
        Bytes of OUT and its work folder at the peak, metadata apart.
    out : float
        Bytes that remain.
    """

    stages: list[Stage]
    counts: Counts
    disk: float
    out: float

    @property
    def seconds(self) -> float:
        """Time of the run."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def compute(self) -> float:
        """Seconds of all cores together."""
        return sum(stage.compute for stage in self.stages)

    @property
    def memory(self) -> float:
        """Peak of anonymous memory of one machine."""
        return max(stage.memory for stage in self.stages)


def count(job: Job, rates: Rates) -> Counts:
    """Return how much there is to do."""
    rows, lists = job.rows, 1 if job.rows <= SINGLE_LIST_ROWS else list_count(job.rows)
    visits = rows * rates.visits_at(lists)
    home = rows / lists
    products = rates.uneven * home * (visits - rows / 2)
    tiles = lists * math.ceil(home / COLUMN_TILE) * max(1.0, visits / lists / ROW_TILE)
    true = TREE * job.duplicates * rows
    threads = job.cores * job.nodes
    most = max(
        1.0,
        min(
            (job.bound / job.cores + PARTITION_BYTES) / (VISIT_BYTES + 2 * rates.width),
            visits / (PARTITIONS_A_WORKER * threads),
        ),
    )
    return Counts(
        lists=lists,
        sample=calibration_rows(rows),
        trained=training_rows(rows, lists),
        visits=visits,
        products=products,
        tiles=tiles,
        listed=MET * (true + rates.false_pairs * rows * rows / 2),
        crowded=rates.crowded_pairs * rows * rows / 2,
        edges=job.duplicates * rows,
        members=min(rows, ROW_MEMBERS * job.duplicates * rows),
        tasks=math.ceil(rows / task_rows(rows)),
        partitions=min(lists, math.ceil(visits / most)),
    )


def estimate(job: Job, rates: Rates) -> Cost:
    """Return what a job costs, stage by stage."""
    number, memory = count(job, rates), memories(job, rates)
    rows, row_bytes = job.rows, job.dim * job.itemsize
    one = 1 + (job.cores - 1) * rates.gain
    all_ = one * job.nodes
    read_back = number.visits * rates.visit_bytes
    proofs = 2 * number.listed * max(PAGE, row_bytes) * (job.disk_speed > 0)
    sorted_ = spilled(number.edges, HELD)
    fitted = number.sample + number.trained
    k_means = ROUNDS * number.trained * number.lists * rates.nearest
    work = {  # seconds of one core, how many times faster all are, bytes of each machine
        "start": (rates.start, 1.0, 0.0),
        "fit": (rates.fit + rates.fit_row * fitted, 1.0, fitted * row_bytes),
        "k-means": (k_means, one, 0.0),
        "encode": (
            rows * (rates.row + rates.row_list * number.lists) + number.visits * rates.row_visit,
            all_,
            (rows * row_bytes + read_back) / job.nodes,
        ),
        "copies": (
            rows * rates.copy + spilled(rows, SORT_ROWS) * rates.spill,
            1.0,
            8.0 * rows + 4 * HASHED * spilled(rows, SORT_ROWS),
        ),
        "join": (join_seconds(number, rates), all_, (read_back + proofs) / job.nodes),
        "forest": (
            MET * number.edges * rates.edge + 2 * spilled(number.edges, HELD_EDGES) * rates.spill,
            1.0,
            EDGE * (2 * MET * number.edges + 8 * spilled(number.edges, HELD_EDGES)),
        ),
        "group": (
            number.members * rates.member + sorted_ * rates.spill,
            1.0,
            number.members * max(row_bytes, PAGE * (job.disk_speed > 0)) + 4 * GROUPED * sorted_,
        ),
        "write": (
            number.members * rates.written + WRITTEN_SORTS * sorted_ * rates.spill,
            1.0,
            out_bytes(job, rates) + 4 * GROUPED * WRITTEN_SORTS * sorted_,
        ),
    }
    stages = []
    for name, (compute, faster, moved) in work.items():
        waiting = moved / job.disk_speed if job.disk_speed else 0.0
        spent = max(compute / faster, waiting)
        stages.append(Stage(name, compute, spent, moved, memory[name]))
    out = out_bytes(job, rates)
    return Cost(stages, number, out + work_bytes(job, rates), out)


def join_seconds(number: Counts, rates: Rates) -> float:
    """Return the seconds of one core that joining takes."""
    return (
        number.visits * rates.visit
        + number.partitions * number.tasks * rates.opened
        + number.products * rates.product
        + number.tiles * rates.tile
        + number.listed * rates.prove
        + number.crowded * rates.crowd
    )


def spilled(count: float, held: int) -> float:
    """Return how many of so many records go through files: all, where memory holds fewer."""
    return count if count > held else 0.0


def memories(job: Job, rates: Rates) -> dict[str, float]:
    """Return the peak of anonymous memory of each stage, in bytes."""
    number, threads, width = count(job, rates), job.cores, rates.width
    rows, raw, wide = job.rows, job.dim * job.itemsize, job.dim * 4
    task = min(rows, task_rows(rows)) * (2 * width + number.visits / rows * (width + 40))
    partition = number.visits / number.partitions * (VISIT_BYTES + 2 * width)
    roots = rows * np.dtype(row_kind(rows)).itemsize
    fit = 2.2 * number.sample * raw + number.sample * (12 * width + 60)
    fit += TRAINING_CODES * width * number.trained
    held = {  # of the first stages, what is not given back stays until the end
        "start": 0.0,
        "fit": FITTED + fit,
        "k-means": FITTED + fit,
        "encode": STAYS + threads * (task + DISTANCE_BYTES * 2048 * number.lists),
        "copies": STAYS + SORT_BYTES * min(rows, SORT_ROWS) + rows,
        "join": STAYS + threads * (partition + GATHER_PAIRS * wide),
        "forest": STAYS + 100 * min(number.edges, 3.0 * HELD_EDGES),
        "group": STAYS + min(100 * number.members, GROUPS_BYTES),
        "write": STAYS + min(165 * number.members, GROUPS_BYTES),
    }
    held["forest"] += roots if number.edges > HELD_EDGES else 0
    held["group"] += roots if number.edges > HELD else 0
    return {name: rates.base + size for name, size in held.items()}


def work_bytes(job: Job, rates: Rates) -> float:
    """Return the bytes of the work folder at its largest."""
    number = count(job, rates)
    hashes, places = 8.0 * job.rows, 16.0 * number.tasks * (number.lists + 1)
    found = 20 * (MET * number.edges + spilled(number.edges, HELD_EDGES))
    sorted_ = 2 * GROUPED * spilled(number.edges, HELD) + MEMBER * spilled(number.members, HELD)
    return number.visits * rates.visit_bytes + hashes + places + found + sorted_


def out_bytes(job: Job, rates: Rates) -> float:
    """Return the bytes of OUT, metadata apart."""
    number = count(job, rates)
    return job.rows + number.edges * rates.edge_bytes + number.members * rates.member_bytes
