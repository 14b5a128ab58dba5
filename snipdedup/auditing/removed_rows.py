"""Each removed row of a run, recomputed: mask, groups.parquet and cosines of raw features agree.

Nothing of the join is used. ``groups.parquet`` is read twice, a batch at a time: by whole groups,
then by rows. One byte is held for each row of the set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from snipdedup import progress
from snipdedup.deduplication.decisions import Decisions
from snipdedup.deduplication.read_out import BATCH_ROWS, pick, whole_groups
from snipdedup.errors import SnipError
from snipdedup.features.cosine import bad_rows, indexed_cosines
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.groups.members import Members, group_starts
from snipdedup.metadata.tables import stream_parquet
from snipdedup.parallel import ordered_map
from snipdedup.storage.external_sort import among

PAIRS, MOST_PAIRS = 4096, 1 << 16  # whose rows one thread reads at a time: at the least, the most
ROUNDING = 1e-6  # a stored cosine may be off by this: sums in another order, rounded to float32
GROUPS = "groups.parquet"
SHOWN = 5  # violations of one kind in words


class AuditedReference(NamedTuple):
    """A reference as it is on disk now; ``is_dup`` (rows,) bool are rows that it removed itself."""

    name: str
    features: Features
    is_dup: np.ndarray


@dataclass
class AuditedFeatures:
    """Features as they are on disk now, and what the cosines of pairs in them are.

    ``column`` of ``groups.parquet`` holds these; that of second features may be None.
    """

    name: str
    features: Features
    threshold: float
    column: str | None
    is_second: bool = True
    reach: int = 0  # pairs that reach the threshold
    lowest: float = np.inf


@dataclass
class Violations:
    """Violations of one kind: how many, and the first ones in words."""

    count: int = 0
    shown: list[str] = field(default_factory=list)


class AuditedRun:
    """A finished run, what was compared in it, and what is wrong.

    ``offsets`` (shards + 1,) int64 are the first rows of the shards, then the number of rows.
    ``is_dup`` (rows,) bool is mapped; it is empty until the mask was opened. The audit takes so
    many ``threads``, and so many bytes of ``memory`` for raw rows.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], threads: int, memory: int) -> None:
        self.folder, self.manifest, self.threads, self.memory = folder, manifest, threads, memory
        self.checked: dict[str, list[str]] = {}
        self.violations: dict[str, Violations] = {}
        shards, settings = manifest["shards"], manifest["settings"]
        self.names = [shard["name"] for shard in shards]
        self.offsets = np.cumsum([0, *(shard["rows"] for shard in shards)], dtype=np.int64)
        self.rows = int(self.offsets[-1])
        self.is_dup = np.empty(0, bool)
        self.threshold = float(settings["threshold"])
        self.decisions = Decisions(*[np.empty(0, np.int64)] * 2)  # what a person decided
        self.references_only = bool(settings.get("references_only"))
        # by these rules a removed row may be far from each kept row, by the star rule it is not
        self.semdedup = settings["method"] == "semdedup"
        self.components = settings["grouping"] == "components" and not (
            self.semdedup or self.references_only
        )

    def place(self, row: int) -> str:
        """Return a row with its file, for messages; below 0: the complement of a reference row."""
        if row < 0:
            return f"row {~row:,} of a reference"
        shard = int(np.searchsorted(self.offsets, row, side="right")) - 1
        return f"row {row:,} ({self.names[shard]} row {row - self.offsets[shard]})"

    def note(self, subject: str, text: str) -> None:
        """Add a line about what was compared."""
        self.checked.setdefault(subject, []).append(text)

    def fail(self, kind: str, message: str) -> None:
        """Add one violation."""
        self.fail_each(kind, [message], str)

    def fail_each(self, kind: str, found: Any, describe: Callable[[Any], str]) -> None:
        """Add many violations; ``describe`` puts the first ones into words."""
        if len(found):
            entry = self.violations.setdefault(kind, Violations())
            entry.count += len(found)
            entry.shown += [describe(one) for one in found[: SHOWN - len(entry.shown)]]

    def fail_rows(
        self, kind: str, rows: np.ndarray, wrong: np.ndarray, text: str | Callable[[int], str]
    ) -> None:
        """Add a violation for each ``wrong`` row, (n,) bool; a text may be made of its place."""
        self.fail_each(
            kind,
            np.flatnonzero(wrong),
            lambda i: f"{self.place(rows[i])}: {text if isinstance(text, str) else text(i)}",
        )


def check_groups(run: AuditedRun) -> tuple[np.ndarray, np.ndarray]:
    """Check the groups of ``groups.parquet`` against the mask, and count them again.

    Returns the rows that represent others, ascending, and how many each, (m,) int64.
    """
    counts = {"rows": run.rows, "removed": 0, "groups": 0, "largest_group": 1, "chained": 0}
    represented = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    seen, last = np.zeros(run.rows, bool), (-1, -1)
    for every in whole_groups(run.folder / GROUPS):
        inside = (every.row >= 0) & (every.row < run.rows) & (every.representative < run.rows)
        text = f"or its representative is none of the {run.rows:,} rows"
        run.fail_each("range", every.row[~inside], f"groups.parquet: row {{:,}} {text}".format)
        members = pick(every, inside)
        if not len(members.row):
            continue
        check_members(run, members, seen, last)
        last = int(members.group[-1]), int(members.row[-1])
        removed = pick(members, members.is_dup)
        sizes = np.diff(group_starts(members.group))
        counts["removed"] += len(removed.row)
        counts["groups"] += len(sizes)
        counts["largest_group"] = max(counts["largest_group"], int(sizes.max()))
        counts["chained"] += int((removed.similarity < np.float32(run.threshold)).sum())
        own = removed.representative[removed.representative >= 0]
        represented.append(np.unique(own, return_counts=True))
    unseen = np.flatnonzero(run.is_dup & ~seen)
    text = "is_dup.npy removes it, groups.parquet does not have it"
    run.fail_each("mask", unseen, lambda row: f"{run.place(row)}: {text}")
    for name, value in counts.items():
        written = run.manifest["counts"][name]
        if written != value:
            run.fail("counts", f"snip.json counts {name} {written:,}, groups.parquet {value:,}")
    rows, times = map(np.concatenate, zip(*represented, strict=True))
    order = np.argsort(rows)
    return rows[order], times[order]


def check_members(
    run: AuditedRun, members: Members, seen: np.ndarray, last: tuple[int, int]
) -> None:
    """Check order, mask and representatives of whole groups, and mark their rows as ``seen``.

    Members are ordered by group, then row, ``last`` before them; a group is named by its smallest
    row. ``is_dup`` is the same in both files. A removed row is represented by a kept row of its
    group (or a row of a reference), a kept row by itself.
    """
    is_dup, representative = members.is_dup, members.representative
    group, row = np.append(last[0], members.group), np.append(last[1], members.row)
    same = group[1:] == group[:-1]
    misplaced = (group[1:] < group[:-1]) | (same & (row[1:] <= row[:-1]))
    misplaced |= (~same & (members.row != members.group)) | seen[members.row]
    seen[members.row] = True
    mask = run.is_dup[members.row]
    order = np.argsort(members.row, kind="stable")
    at = np.searchsorted(members.row, representative, sorter=order)
    at = order[np.minimum(at, len(order) - 1)]
    right = (members.row[at] == representative) & (members.group[at] == members.group)
    if not run.semdedup:  # whose representatives may be removed themselves
        right &= ~is_dup[at] & ~run.is_dup[np.maximum(representative, 0)]
    alone = (representative == members.row) & among(run.decisions.dropped, members.row)
    right = np.where(is_dup, right | (representative < 0) | alone, representative == members.row)
    right |= ~is_dup & mask  # the mask is wrong, which has its own line
    own = is_dup & (representative >= 0) & run.references_only
    for kind, wrong, text in (
        ("order", misplaced, "out of place in groups.parquet: expected each row once, ordered "
         "by group, and groups named by their smallest row"),
        ("mask", mask & ~is_dup, "is_dup.npy removes it, groups.parquet keeps it"),
        ("mask", ~mask & is_dup, "is_dup.npy keeps it, groups.parquet removes it"),
        ("representative", own, "removed for a row of FEATURES, expected one of a reference"),
    ):  # fmt: skip
        run.fail_rows(kind, members.row, wrong, text)
    text = "its representative {} is not a kept row of its group"
    run.fail_rows(
        "representative", members.row, ~right, lambda i: text.format(run.place(representative[i]))
    )


class RemovedRows:
    """Compares the removed rows of ``groups.parquet`` with their representatives, on raw features.

    Without ``features`` no cosine is computed; ``seconds`` are second features, in which rows had
    to match, too. ``chosen`` (n,) int64 are the removed rows to compare, by their number
    among all removed rows, ascending; None for all. A table without a column is refused.
    """

    def __init__(
        self, run: AuditedRun, features: Features | None, seconds: list[AuditedFeatures],
        references: list[AuditedReference], chosen: np.ndarray | None,
    ) -> None:  # fmt: skip
        self.run, self.chosen, self.file = run, chosen, stream_parquet(run.folder / GROUPS)
        self.columns = ["row", "shard", "shard_row", "representative", "similarity", "is_dup"]
        self.columns += ["reference"] * bool(run.manifest.get("references"))
        self.columns += [second.column for second in seconds if second.column is not None]
        missing = set(self.columns) - set(self.file.schema_arrow.names)
        if missing:
            raise SnipError(f"it has no column {min(missing)}")
        self.references = [] if features is None else references
        self.kinds = list(seconds)  # of features
        if features is not None:  # the rows of the set, then those of each reference
            sets = [features, *(reference.features for reference in references)]
            every = Features([shard for one in sets for shard in one.shards])
            first = AuditedFeatures("FEATURES", every, run.threshold, "similarity", is_second=False)
            self.kinds.insert(0, first)
        self.sizes = np.array([run.rows, *(len(one.is_dup) for one in self.references)])
        self.first = np.cumsum(self.sizes) - self.sizes  # rows of these before each of them
        self.masks = [run.is_dup, *(one.is_dup for one in self.references)]
        self.unproved, self.proved = Counter[str](), 0  # rows that are removed for references
        self.compared = 0  # pairs whose cosines were computed

    def check(self) -> None:
        """Read ``groups.parquet``, and note in ``run`` what is wrong."""
        run, before, count = self.run, 0, len(self.references)
        with progress.bar(int(np.count_nonzero(run.is_dup)), "comparing", "removed rows") as bar:
            for batch in self.file.iter_batches(BATCH_ROWS, columns=self.columns):
                table = pa.Table.from_batches([batch])
                self.check_places(table)
                removed = table.filter(pc.field("is_dup"))
                compared = np.full(removed.num_rows, self.chosen is None)
                if self.chosen is not None:
                    compared[chosen_places(self.chosen, before, removed.num_rows)] = True
                self.check_pairs(removed, compared)
                before += removed.num_rows
                bar.update(removed.num_rows)
        for name, rows in self.unproved.items():
            run.fail("unproved", f"{rows:,} rows removed for rows of {name} are not proved")
        if run.manifest.get("references"):
            text = f"{self.proved:,} rows are removed for rows of {count:,} reference"
            run.note("references", text + "s" * (count != 1))

    def check_places(self, table: Any) -> None:
        """Compare the file, and the row in it, that ``groups.parquet`` gives for each row."""
        run = self.run
        row = np.clip(table["row"].to_numpy(), 0, run.rows - 1)  # others: noted before
        shard = np.searchsorted(run.offsets, row, side="right") - 1
        names = pa.array(run.names, pa.string()).take(pa.array(shard))
        wrong = pc.not_equal(names, table["shard"]).to_numpy()
        wrong |= table["shard_row"].to_numpy() != row - run.offsets[shard]
        text = "groups.parquet: {} has another place"
        run.fail_each("places", row[wrong], lambda r: text.format(run.place(r)))

    def check_pairs(self, removed: Any, compared: np.ndarray) -> None:
        """Look for the representatives of removed rows, in the set or in a reference.

        Their cosines are computed where ``compared``, (n,) bool.
        """
        run, names = self.run, [reference.name for reference in self.references]
        row, other = (removed[name].to_numpy() for name in ("row", "representative"))
        known = (row >= 0) & (row < run.rows)  # others: noted before
        which = np.zeros(len(row), np.int64)  # 0: the set, then the references
        if "reference" in removed.column_names:
            found = pc.index_in(removed["reference"], pa.array(names, pa.string()))
            listed = removed["reference"].is_null().to_numpy() | found.is_valid().to_numpy()
            self.unproved.update(removed["reference"].filter(pa.array(~listed)).to_pylist())
            which += found.fill_null(-1).to_numpy() + 1
            known &= listed
        self.proved += int(np.count_nonzero(which))
        right = known & (other >= 0) & (other < self.sizes[which])
        for number in range(1, len(self.masks)):
            at = np.flatnonzero(right & (which == number))
            right[at] = ~self.masks[number][other[at]]
        run.fail_rows(
            "reference", row, known & ~right & (which > 0),
            lambda i: f"its representative, row {other[i]:,} of {names[which[i] - 1]}, is not a "
            "kept row there",
        )  # fmt: skip
        use = right & compared & ((row != other) | (which > 0))
        self.compared += int(np.count_nonzero(use))
        place = self.first[which[use]] + other[use]
        for kind in self.kinds:  # second ones: there are no references then
            written = None if kind.column is None else removed[kind.column].to_numpy()[use]
            self.check_cosines(kind, row[use], place, written)

    def name(self, place: int) -> str:
        """Return a row of the set or of a reference in words, by its place among all of them."""
        if place < self.run.rows:
            return self.run.place(place)
        number = int(np.searchsorted(self.first, place, side="right")) - 1
        reference, row = self.references[number - 1], place - int(self.first[number])
        path, own = reference.features.place(row)
        return f"row {row:,} of {reference.name} ({path.name} row {own})"

    def check_cosines(
        self, kind: AuditedFeatures, row: np.ndarray, other: np.ndarray, written: np.ndarray | None
    ) -> None:
        """Compare cosines with the threshold, and with those in ``groups.parquet``, ``written``."""
        run, second = self.run, kind.is_second
        found = raw_cosines(kind.features, row, other, run.threads, run.memory)
        reaches = found >= np.float32(kind.threshold)
        kind.reach += int(reaches.sum())
        kind.lowest = min(kind.lowest, float(found.min(initial=np.inf)))
        if not run.manifest["verified"]:
            return
        if run.components:
            reaches |= np.isfinite(found)
        of = f" in {kind.name}" if second else ""
        run.fail_rows(
            "also" if second else "cosine", row, ~reaches,
            lambda i: f"its cosine{of} with its representative {self.name(int(other[i]))} is "
            f"{found[i]:.6f}, expected {kind.threshold:g} or more",
        )  # fmt: skip
        if written is not None:
            run.fail_rows(
                "also_similarity" if second else "similarity", row,
                reaches & ~(np.abs(found - written) <= ROUNDING),
                lambda i: f"groups.parquet has cosine {written[i]:.6f}{of}, with its "
                f"representative {self.name(int(other[i]))} it is {found[i]:.6f}",
            )  # fmt: skip


def chosen_places(chosen: np.ndarray, begin: int, count: int) -> np.ndarray:
    """Return which of ``count`` items, numbered from ``begin`` on, are chosen, as places in them.

    ``chosen`` (n,) int64 are numbers of items, ascending.
    """
    low, high = np.searchsorted(chosen, [begin, begin + count])
    return chosen[low:high] - begin


def raw_cosines(
    features: Features, a: np.ndarray, b: np.ndarray, threads: int, memory: int
) -> np.ndarray:
    """Return the cosines of rows ``a`` with rows ``b``, (n,) float32; NaN where a row has none.

    Threads read in row order, together as many rows at a time as fit into ``memory`` bytes.
    """
    order = np.argsort(a, kind="stable")

    def compute(span: tuple[int, int]) -> np.ndarray:
        part = order[slice(*span)]
        rows, at = np.unique(np.concatenate([a[part], b[part]]), return_inverse=True)
        x, (i, j) = features.gather(rows), at.reshape(2, -1)
        bad = bad_rows(x)
        return np.where(bad[i] | bad[j], np.float32(np.nan), indexed_cosines(x, x, i, j))

    fit = min(MOST_PAIRS, memory // (2 * threads * features.dim * features.dtype.itemsize))
    spans = plan_blocks(len(a), max(PAIRS, fit))
    cosine = np.empty(len(a), np.float32)
    cosine[order] = np.concatenate([cosine[:0], *ordered_map(compute, spans, threads)])
    return cosine
