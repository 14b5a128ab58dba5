"""The tasks of a join: fit, encode, scan, plan, join. Each leaves one file or folder, its own.

A task is done when its done file is there and the files that it names are whole; it is not done
again. What it leaves does not depend on who does it: a thread, another process, another machine.
Of one kind, tasks are independent; each kind needs all tasks of the kinds before it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snipdedup.errors import DamagedError, InputError
from snipdedup.features.formats import load_npz
from snipdedup.features.scan import Scan, finish_scan
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.join import encoding
from snipdedup.join.encoding import encode_task, load_seen, sort_small
from snipdedup.join.forest import Edges, ForestBuilder
from snipdedup.join.hubs import no_hubs
from snipdedup.join.model import Model, fit_model
from snipdedup.join.tiles import COLUMN_TILE, CodeStore, Members, code_record, compare_tiles
from snipdedup.parallel import ordered_map, pick_device
from snipdedup.storage import atomic
from snipdedup.storage.external_sort import load_column

SCANNED = ("bad.npy", "copies.npy", "firsts.npy", "skip.npy")


@dataclass(frozen=True)
class JoinSettings:
    """What a join is asked for."""

    threshold: float  # cosine from which two rows are a pair
    recall: float  # target recall: the share of duplicate rows that must be found
    seed: int
    keep_bad: bool  # leave out rows that cannot be compared, instead of refusing them
    chunk_rows: int  # rows read at a time
    device: str  # auto, cpu or cuda
    reference_rows: int = 0  # the first rows are these; pairs among them are not looked for
    references_only: bool = False  # nor are pairs among the others
    encoder: Path | None = None  # its descriptors become the codes
    kept_model: Path | None = None  # of an earlier run, to be used instead of a new one


class Partition(NamedTuple):
    """Lists ``low`` to ``high`` (exclusive), joined as one task."""

    low: int
    high: int


@dataclass
class JoinTasks:
    """What every task needs to know, and the work folder that holds what they leave.

    Small enough to be sent to other machines: what is large is read from files there.
    """

    features: Features
    settings: JoinSettings
    work: Path

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    # fit

    @property
    def model_file(self) -> Path:
        """The model; it is the done file of `fit`."""
        return self.work / "model.npz"

    def fit(self, threads: int) -> None:
        """Fit the model, or take an earlier run's: its codes and lists suit any rows of one width.

        Hubs of an earlier run are rows of its own set, so they are left out. Beside references
        there are none: a row that must meet a reference row may not be left to a hub, and pairs
        among FEATURES may not depend on a reference row.
        """
        if self.model_file.is_file():
            return
        asked = self.settings
        if asked.kept_model is not None:
            model = Model.load(asked.kept_model)
            hubs = no_hubs(model.sharpest, self.features.dim, model.threshold)
            model = replace(model, hubs=hubs)
        else:
            model = fit_model(
                self.features, asked.threshold, asked.recall, asked.seed, threads, asked.encoder,
                with_hubs=not asked.reference_rows,
            )  # fmt: skip
        model.save(self.model_file)

    @cached_property
    def model(self) -> Model:
        """The fitted model; its hubs are rows of these features."""
        model = Model.load(self.model_file)
        try:
            model.hubs.check(self.features)
        except DamagedError as error:
            raise DamagedError(f"{self.model_file}: {error}; run again, it begins anew") from error
        return model

    # encode

    @property
    def task_size(self) -> int:
        """Rows of an encode task; the last one may have fewer."""
        return encoding.task_rows(self.features.rows)

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """The rows (begin, end) of each encode task."""
        return plan_blocks(self.features.rows, self.task_size)

    @cached_property
    def folders(self) -> list[Path]:
        """The folder of each encode task."""
        return [self.work / "encode" / f"{number:06d}" for number in range(len(self.spans))]

    def encode_file(self, number: int) -> Path:
        """Return the done file of an encode task."""
        return self.folders[number] / "done.json"

    def encode(self, number: int) -> None:
        """Turn a range of rows into sorted codes."""
        folder = self.folders[number]
        if not atomic.is_done(self.encode_file(number), folder):
            encode_task(
                self.features, self.model, folder, *self.spans[number],
                chunk_rows=self.settings.chunk_rows, reference_rows=self.settings.reference_rows,
            )  # fmt: skip

    # scan

    @property
    def scan_file(self) -> Path:
        """The done file of `scan`."""
        return self.work / "scan" / "done.json"

    def scan(self, threads: int) -> None:
        """Refuse or list bad rows, and find exact copies, by what the encode tasks saw."""
        folder = self.scan_file.parent
        if atomic.is_done(self.scan_file, folder):
            return
        parts, copies = [load_seen(folder) for folder in self.folders], self.work / "copies"
        found = finish_scan(self.features, parts, self.settings.keep_bad, threads, copies)
        skip = found.skipped(self.features.rows, self.settings.reference_rows)
        arrays = (found.bad, found.copies, found.firsts, skip)
        for name, array in zip(SCANNED, arrays, strict=True):
            atomic.save_npy(folder / name, array, lasting=False)
        files = [folder / name for name in SCANNED]
        atomic.write_done_file(self.scan_file, files, {"checksums": found.checksums})
        del found, arrays  # they map files that are removed now
        shutil.rmtree(copies, ignore_errors=True)

    def load_scan(self) -> Scan:
        """Read what `scan` found; long arrays are mapped."""
        folder = self.scan_file.parent
        bad, copies, firsts = (load_column(folder / name) for name in SCANNED[:3])
        return Scan(bad, copies, firsts, atomic.load_json(self.scan_file)["checksums"])

    @cached_property
    def skip(self) -> np.ndarray:
        """Which rows take no part, (rows,) bool, in pages that processes share."""
        return np.load(self.scan_file.parent / "skip.npy", mmap_mode="r").view(np.ndarray)

    # plan

    @property
    def plan_file(self) -> Path:
        """The plan; it is the done file of `plan`."""
        return self.work / "plan.json"

    @cached_property
    def visits(self) -> np.ndarray:
        """How many rows live in or visit each list, (nlist,) int64."""
        return np.diff(sum(np.load(folder / "starts.npy") for folder in self.folders))

    @cached_property
    def homes(self) -> np.ndarray:
        """How many rows live in each list, (nlist,) int64."""
        return np.asarray(sum(np.load(folder / "homes.npy") for folder in self.folders))

    def plan(self, most: int, bound: int | None) -> None:
        """Cut the lists into partitions of at most ``most`` visits, and write them down.

        A plan that is there holds, unless it has partitions beyond ``bound`` visits, if given.
        """
        is_there = atomic.is_done(self.plan_file, self.work)
        if not is_there or (bound is not None and not self.fits(bound)):
            atomic.write_done_file(self.plan_file, [], {"partitions": cut_lists(self.visits, most)})

    def partitions(self) -> list[Partition]:
        """Read the plan."""
        return [Partition(*part) for part in atomic.load_json(self.plan_file)["partitions"]]

    def fits(self, bound: int) -> bool:
        """Tell whether all partitions of more than one list have at most ``bound`` visits."""
        totals = np.concatenate([[0], np.cumsum(self.visits)])
        parts = self.partitions()
        return all(totals[high] - totals[low] <= bound for low, high in parts if high - low > 1)

    # join

    def join_file(self, partition: Partition) -> Path:
        """Return the done file of a join task: the pairs that it found."""
        return self.work / "join" / f"{partition.low:06d}-{partition.high:06d}.npz"

    @cached_property
    def lists(self) -> list[ListedRows]:
        """The lists of all encode tasks; their rows are mapped."""
        opened = map(open_lists, self.folders)
        return [
            ListedRows(rows, np.array(starts), np.array(homes)) for rows, starts, homes in opened
        ]

    @cached_property
    def codes(self) -> CodeStore:
        """The codes of all rows, mapped; a row's place is its number."""
        return CodeStore([open_array(folder, "codes") for folder in self.folders], self.task_size)

    def join(self, partition: Partition, threads: int = 1, *, mapped: bool = False) -> None:
        """Find the pairs of a partition, and write their forest.

        With ``mapped`` the codes of all rows stay mapped; otherwise those of the partition are
        read.
        """
        if self.load_joined(partition) is not None:
            return
        lists = self.lists if mapped else map(open_lists, self.folders)
        listed = merge_lists((part.of(partition) for part in lists), self.skip)
        if mapped:
            codes, places = self.codes, listed.rows
        else:
            rows, places = np.unique(listed.rows, return_inverse=True)
            codes = load_codes(self.folders, self.spans, code_record(self.model.widths), rows)
        device = pick_device(self.settings.device)
        forest, count = join_partition(
            self.features, self.model, codes, places, listed, self.settings, threads, device
        )
        arrays = {**forest._asdict(), "candidates": np.array(count)}
        atomic.save_npz(self.join_file(partition), lasting=False, **arrays)

    def load_joined(self, partition: Partition) -> tuple[Edges, int] | None:
        """Return the forest of a partition and its number of candidate pairs.

        None where it is not joined, or its file is damaged.
        """
        try:
            file = load_npz(self.join_file(partition), [*Edges._fields, "candidates"])
            return Edges(*(file[name] for name in Edges._fields)), int(file["candidates"])
        except InputError:
            return None


def cut_lists(visits: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Cut lists into partitions (low, high) of at most ``most`` visits, or one list."""
    parts, first, total = [], 0, 0
    for number, count in enumerate(visits):
        if number > first and total + count > most:
            parts.append((first, number))
            first, total = number, 0
        total += int(count)
    return [*parts, (first, len(visits))]


class ListedRows(NamedTuple):
    """Which rows are in which list: sorted by list, rows at home before visitors."""

    rows: np.ndarray  # (v,) int64: global rows
    starts: np.ndarray  # (lists + 1,) int64: where each list begins
    homes: np.ndarray  # (lists,) int64: how many of its rows live there

    def of(self, partition: Partition) -> ListedRows:
        """Return those of some lists."""
        starts = self.starts[partition.low : partition.high + 1]
        rows, homes = self.rows[starts[0] : starts[-1]], self.homes[slice(*partition)]
        return ListedRows(rows, starts - starts[0], homes)


def open_lists(folder: Path) -> ListedRows:
    """Map the lists of an encode task."""
    return ListedRows(*(open_array(folder, name) for name in ListedRows._fields))


def open_array(folder: Path, name: str) -> np.ndarray:
    """Map an array of an encode task."""
    return np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray)


def merge_lists(parts: Iterable[ListedRows], skip: np.ndarray) -> ListedRows:
    """Bring the rows of some lists that take part together from all encode tasks."""
    rows, keys, lists = [], [], 0
    for part in parts:
        lists, sizes = len(part.homes), np.diff(part.starts)
        key = np.repeat(2 * np.arange(lists, dtype=np.int32), sizes)  # twice the list,
        inside = np.arange(len(key)) - np.repeat(part.starts[:-1], sizes)
        key += inside >= np.repeat(part.homes, sizes)  # one more for a visitor
        use = ~skip[part.rows]
        keys.append(key[use])
        rows.append(part.rows[use])
    key = np.concatenate(keys)
    order = sort_small(key, 2 * lists)
    key = key[order]
    return ListedRows(
        np.concatenate(rows)[order],
        np.searchsorted(key, 2 * np.arange(lists + 1)),
        np.bincount(key[key % 2 == 0] // 2, minlength=lists),
    )


def load_codes(
    folders: list[Path], spans: list[tuple[int, int]], kind: np.dtype, rows: np.ndarray
) -> CodeStore:
    """Read the codes of distinct rows, ascending; a row's place is its place among these.

    ``folders`` are of the encode tasks, ``spans`` the rows (begin, end) of each. Files are open
    while they are read only: of two billion rows there are thousands of tasks.
    """
    codes = np.empty(len(rows), kind)
    for folder, (begin, end) in zip(folders, spans, strict=True):
        part = slice(*np.searchsorted(rows, (begin, end)))
        if part.start < part.stop:
            codes[part] = open_array(folder, "codes")[rows[part] - begin]
    return CodeStore([codes], max(1, len(rows)))


def join_partition(
    features: Features,
    model: Model,
    codes: CodeStore,
    places: np.ndarray,
    rows: ListedRows,
    settings: JoinSettings,
    threads: int,
    device: str,
) -> tuple[Edges, int]:
    """Find and verify the pairs of a partition; return their forest and the candidates' number.

    ``places``, (v,) int64, are those of the rows' codes in the store ``codes``.

    The columns of a list are its rows at home; they are compared with one another and its visitors.
    """
    columns = [
        (number, column)
        for number, homes in enumerate(rows.homes)
        for column in range(0, int(homes), COLUMN_TILE)
    ]

    members = Members(rows.rows, places)

    def compare(place: tuple[int, int]) -> tuple[list[Edges], int]:
        number, column = place
        begin, end = int(rows.starts[number]), int(rows.starts[number + 1])
        return compare_tiles(
            features,
            codes,
            members.where(slice(begin + column, end)),
            min(COLUMN_TILE, int(rows.homes[number]) - column),
            limits=model.limits,
            threshold=settings.threshold,
            device=device,
            reference_rows=settings.reference_rows,
            references_only=settings.references_only,
        )

    builder, count = ForestBuilder(settings.reference_rows), 0
    for edges, candidates in ordered_map(compare, columns, threads):
        count += candidates
        for part in edges:
            builder.add(part)
    return builder.forest(), count
