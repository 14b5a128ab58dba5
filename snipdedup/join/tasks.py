"""The tasks of a join. Each reads what the stages before it left and leaves one file or folder.

A task that is done, and whose files are whole, is not done again. What it leaves does not depend on
who did it: a thread, another process, another machine.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snipdedup.errors import DamagedError, SnipError
from snipdedup.features.scan import Scan, finish_scan
from snipdedup.features.shards import Features
from snipdedup.join.encoding import encode_spans, encode_task, load_seen
from snipdedup.join.fitting import load_or_fit
from snipdedup.join.forest import Edges
from snipdedup.join.joining import join_task, load_joined
from snipdedup.join.model import Model
from snipdedup.join.partitions import load_partition, plan_partitions
from snipdedup.parallel import pick_device
from snipdedup.storage import atomic
from snipdedup.storage.external_sort import load_column

SCANNED = ("bad.npy", "copies.npy", "firsts.npy", "skip.npy")


class Run(NamedTuple):
    """Lists ``low`` to ``high`` (exclusive), joined as one task."""

    low: int
    high: int


@dataclass
class Tasks:
    """What every task of a join needs to know, and the folder in which they meet.

    Small enough to be sent to other machines: what is large is read from files there.
    """

    features: Features
    work: Path
    threshold: float
    recall: float
    seed: int
    keep_bad: bool
    chunk_rows: int
    device: str
    frozen: int
    across: bool = False
    encoder: Path | None = None
    kept: Path | None = None  # the model of an earlier run

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def folders(self) -> list[Path]:
        """The folder of each encode task."""
        return [self.work / "encode" / f"{number:06d}" for number in range(len(self.spans))]

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """The rows of each encode task."""
        return encode_spans(self.features.rows)

    @cached_property
    def model(self) -> Model:
        """What the first task fitted; its hubs are rows of these features."""
        model = Model.load(self.fitted)
        try:
            model.hubs.check(self.features)
        except DamagedError as error:
            raise DamagedError(f"{self.fitted}: {error}; run again, it begins anew") from error
        return model

    @cached_property
    def skip(self) -> np.ndarray:
        """Which rows take no part, (rows,) bool, in pages that processes share."""
        return np.load(self.scanned.parent / "skip.npy", mmap_mode="r").view(np.ndarray)

    @property
    def fitted(self) -> Path:
        """The mark of the first task."""
        return self.work / "model.npz"

    def fit(self, threads: int) -> None:
        """Fit the model.

        Beside references there are no hubs: a row that must meet a reference row may not be left
        to one that stands for it, and pairs among FEATURES may not hang on a reference row.
        """
        load_or_fit(
            self.features, self.threshold, self.recall, self.seed, self.fitted, threads,
            self.encoder, self.kept, masses=not self.frozen,
        )  # fmt: skip

    def encoded(self, number: int) -> Path:
        """Return the mark of an encode task."""
        return self.folders[number] / "done.json"

    def encode(self, number: int) -> None:
        """Turn a range of rows into codes."""
        folder, (begin, end) = self.folders[number], self.spans[number]
        if not atomic.is_done(self.encoded(number), folder):
            encode_task(
                self.features, self.model, folder, begin, end,
                chunk_rows=self.chunk_rows, frozen=self.frozen,
            )  # fmt: skip

    @property
    def scanned(self) -> Path:
        """The mark of the task that looks at all that was read."""
        return self.work / "scan" / "done.json"

    def scan(self, threads: int) -> None:
        """Refuse or list bad rows, find exact copies."""
        folder = self.scanned.parent
        if atomic.is_done(self.scanned, folder):
            return
        parts = [load_seen(folder) for folder in self.folders]
        found = finish_scan(self.features, parts, self.keep_bad, threads, self.work / "copies")
        skip = found.skipped(self.features.rows, self.frozen)
        arrays = (found.bad, found.copies, found.firsts, skip)
        for name, array in zip(SCANNED, arrays, strict=True):
            atomic.save_npy(folder / name, array, lasting=False)
        atomic.write_done_file(
            self.scanned, [folder / name for name in SCANNED], {"checksums": found.checksums}
        )
        del found, arrays  # maps of files that go now
        shutil.rmtree(self.work / "copies", ignore_errors=True)

    def load_scan(self) -> Scan:
        """Read back what was scanned; long arrays are mapped."""
        folder = self.scanned.parent
        bad, copies, firsts = (load_column(folder / name) for name in SCANNED[:3])
        return Scan(bad, copies, firsts, atomic.load_json(self.scanned)["checksums"])

    @property
    def planned(self) -> Path:
        """The mark of the plan: it is the plan."""
        return self.work / "plan.json"

    def visits(self) -> np.ndarray:
        """Return how many rows live in or visit each list, (nlist,) int64."""
        total = np.zeros(self.model.lists.nlist + 1, np.int64)
        for folder in self.folders:
            total += np.load(folder / "starts.npy")
        return np.diff(total)

    def homes(self) -> np.ndarray:
        """Return how many rows live in each list, (nlist,) int64."""
        total = np.zeros(self.model.lists.nlist, np.int64)
        for folder in self.folders:
            total += np.load(folder / "homes.npy")
        return total

    def plan(self, visits: np.ndarray, most: int, bound: int | None) -> None:
        """Cut lists into runs of at most ``most`` visits, and note them for all who join them.

        A plan that is there holds, unless it has runs beyond ``bound`` visits, where that is given.
        """
        whole = atomic.is_done(self.planned, self.work)
        if not whole or (bound is not None and not fits(self.runs(), visits, bound)):
            atomic.write_done_file(self.planned, [], {"runs": plan_partitions(visits, most)})

    def runs(self) -> list[Run]:
        """Read the plan."""
        return [Run(*run) for run in atomic.load_json(self.planned)["runs"]]

    def joined(self, run: Run) -> Path:
        """Return the mark of a join task: what it found."""
        return self.work / "join" / f"{run.low:06d}-{run.high:06d}.npz"

    def join(self, run: Run, threads: int = 1) -> None:
        """Find the pairs of a run of lists, and keep their forest."""
        path = self.joined(run)
        if load_joined(path) is None:
            width = self.model.projection.width
            partition = load_partition(self.folders, *run, self.skip, width)
            forest, proposed = join_task(
                self.features,
                self.model,
                partition,
                threshold=self.threshold,
                threads=threads,
                device=pick_device(self.device),
                frozen=self.frozen,
                across=self.across,
            )
            atomic.save_npz(path, lasting=False, **forest._asdict(), proposed=np.array(proposed))

    def found(self, run: Run) -> tuple[Edges, int]:
        """Return the forest of a run of lists, and how many pairs were proposed."""
        found = load_joined(self.joined(run))
        if found is None:
            raise SnipError(f"{self.joined(run)}: damaged while the run went on; start it again")
        return found


def fits(runs: Sequence[Run], visits: np.ndarray, bound: int) -> bool:
    """Tell whether all runs of more than one list have at most ``bound`` visits."""
    totals = np.concatenate([[0], np.cumsum(visits)])
    return all(totals[high] - totals[low] <= bound for low, high in runs if high - low > 1)
