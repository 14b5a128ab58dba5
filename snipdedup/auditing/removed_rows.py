"""Each removed row of a run, recomputed: mask, groups.parquet and cosines of raw features agree.

Nothing of the join is used. Groups come a batch at a time; one byte is held for each row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from snipdedup import progress
from snipdedup.deduplication.read_out import BATCH_ROWS, pick, whole_groups
from snipdedup.features.cosine import bad_rows, indexed_cosines
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.groups.members import Members, group_starts
from snipdedup.metadata.tables import stream_parquet
from snipdedup.parallel import ordered_map

PAIRS, MOST_PAIRS = 4096, 1 << 16  # whose rows one thread reads at a time: at the least, the most
ROUNDING = 1e-6  # a stored cosine may be off by this: sums in another order, rounded to float32
SHOWN = 5  # violations of one kind in words


class Captions(NamedTuple):
    """Features of captions, and the cosine from which two captions match."""

    features: Features
    threshold: float


class AuditedReference(NamedTuple):
    """A reference as it is on disk now; ``is_dup`` (rows,) bool are rows that it removed itself."""

    name: str
    features: Features
    is_dup: np.ndarray


@dataclass
class Violations:
    """Violations of one kind: how many, and the first ones in words."""

    count: int = 0
    shown: list[str] = field(default_factory=list)


class AuditedRun:
    """A finished run, what was compared in it, and what is wrong.

    ``offsets`` (shards + 1,) int64 are the first rows of the shards, then the number of rows.
    ``is_dup`` (rows,) bool is mapped; it is empty until the mask was opened.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.checked: dict[str, list[str]] = {}
        self.violations: dict[str, Violations] = {}
        shards, settings = manifest["shards"], manifest["settings"]
        self.names = [shard["name"] for shard in shards]
        self.offsets = np.cumsum([0, *(shard["rows"] for shard in shards)], dtype=np.int64)
        self.rows = int(self.offsets[-1])
        self.is_dup = np.empty(0, bool)
        self.threshold = float(settings["threshold"])
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

    def fail_rows(self, kind: str, rows: np.ndarray, text: str) -> None:
        """Add one violation for each row."""
        self.fail_each(kind, rows, lambda row: f"{self.place(row)}: {text}")


@dataclass
class RemovedRows:
    """Takes the rows of ``groups.parquet``, recomputes them, and notes what is wrong in ``run``.

    Without ``features`` no cosine is computed. ``chosen`` (n,) int64 are the removed rows to
    compare, by their number among all removed rows, ascending; None for all.
    """

    run: AuditedRun
    features: Features | None
    captions: Captions | None
    chosen: np.ndarray | None
    threads: int
    memory: int
    removed: int = 0  # counts, to be compared with the manifest's
    groups: int = 0
    largest: int = 1
    chained: int = 0
    compared: int = 0  # pairs whose cosine was computed,
    reach: int = 0  # those that reach the threshold,
    lowest: float = np.inf  # and the lowest cosine

    def __post_init__(self) -> None:
        self.seen = np.zeros(self.run.rows, bool)
        self.last = (-1, -1)  # group and row
        self.represented = [(np.empty(0, np.int64), np.empty(0, np.int64))]

    def check(self, references: list[AuditedReference]) -> None:
        """Read and check ``groups.parquet``."""
        path = self.run.folder / "groups.parquet"
        total = int(np.count_nonzero(self.run.is_dup))
        with progress.bar(total, "comparing", "removed rows") as bar:
            for members in whole_groups(path, marked=True):
                self.add(members)
                bar.update(int(members.is_dup.sum()))
        self.check_counts()
        self.check_places(path)
        if self.run.manifest.get("references"):
            self.check_references(path, references)

    def add(self, members: Members) -> None:
        """Check the members of whole groups; rows of references come as complements, < 0."""
        run = self.run
        inside = (members.row >= 0) & (members.row < run.rows)
        inside &= members.representative < run.rows
        run.fail_each(
            "range",
            members.row[~inside],
            lambda row: (
                f"groups.parquet: row {row:,} or its representative is none of the {run.rows:,} "
                "rows"
            ),
        )
        members = pick(members, inside)
        if not len(members.row):
            return
        self.check_members(members)
        removed = pick(members, members.is_dup)
        sizes = np.diff(group_starts(members.group))
        self.groups += len(sizes)
        self.largest = max(self.largest, int(sizes.max()))
        self.chained += int((removed.similarity < np.float32(run.threshold)).sum())
        own = removed.representative[removed.representative >= 0]
        self.represented.append(np.unique(own, return_counts=True))
        before, self.removed = self.removed, self.removed + len(removed.row)
        if self.chosen is not None:
            removed = pick(removed, chosen_places(self.chosen, before, len(removed.row)))
        self.check_pairs(pick(removed, removed.representative >= 0))

    def check_members(self, members: Members) -> None:
        """Check order, mask and representatives of whole groups.

        Members are ordered by group, then row; a group is named by its smallest row. ``is_dup`` is
        the same in both files. A removed row is represented by a kept row of its group (or a row
        of a reference), a kept row by itself.
        """
        run, is_dup, representative = self.run, members.is_dup, members.representative
        group = np.append(self.last[0], members.group)
        row = np.append(self.last[1], members.row)
        self.last = (int(group[-1]), int(row[-1]))
        same = group[1:] == group[:-1]
        misplaced = (group[1:] < group[:-1]) | (same & (row[1:] <= row[:-1]))
        misplaced |= (~same & (members.row != members.group)) | self.seen[members.row]
        self.seen[members.row] = True
        mask = run.is_dup[members.row]
        order = np.argsort(members.row, kind="stable")
        at = np.searchsorted(members.row, representative, sorter=order)
        at = order[np.minimum(at, len(order) - 1)]
        right = (members.row[at] == representative) & (members.group[at] == members.group)
        if not run.semdedup:  # whose representatives may be removed themselves
            right &= ~is_dup[at] & ~run.is_dup[np.maximum(representative, 0)]
        right = np.where(is_dup, right | (representative < 0), representative == members.row)
        right |= ~is_dup & mask  # the mask is wrong, which has its own line
        own = is_dup & (representative >= 0) & run.references_only
        for kind, wrong, text in (
            ("order", misplaced, "out of place in groups.parquet: expected each row once, ordered "
             "by group, and groups named by their smallest row"),
            ("mask", mask & ~is_dup, "is_dup.npy removes it, groups.parquet keeps it"),
            ("mask", ~mask & is_dup, "is_dup.npy keeps it, groups.parquet removes it"),
            ("representative", own, "removed for a row of FEATURES, expected one of a reference"),
        ):  # fmt: skip
            run.fail_rows(kind, members.row[wrong], text)
        run.fail_each(
            "representative",
            np.flatnonzero(~right),
            lambda i: (
                f"{run.place(members.row[i])}: its representative {run.place(representative[i])} "
                "is not a kept row of its group"
            ),
        )

    def check_pairs(self, removed: Members) -> None:
        """Compare rows with their representatives, on raw features and on their captions'."""
        run, captions = self.run, self.captions
        if self.features is None:
            return

        def other(i: int) -> str:
            return run.place(int(removed.representative[i]))

        row, representative = removed.row, removed.representative
        found = raw_cosines(
            self.features, row, self.features, representative, self.threads, self.memory
        )
        self.check_cosines(row, found, removed.similarity, other)
        if captions is None or run.semdedup or run.components:
            return
        words = captions.features
        text = raw_cosines(words, row, words, representative, self.threads, self.memory)
        run.fail_each(
            "captions",
            np.flatnonzero(~(text >= np.float32(captions.threshold))),
            lambda i: (
                f"{run.place(row[i])}: the cosine of its caption with that of its representative "
                f"{other(i)} is {text[i]:.6f}, expected {captions.threshold:g} or more"
            ),
        )

    def check_cosines(
        self, row: np.ndarray, found: np.ndarray, written: np.ndarray, other: Callable[[int], str]
    ) -> None:
        """Compare cosines of removed rows with the threshold, and with those in groups.parquet.

        ``found`` and ``written``, (n,) float32, are the cosines on raw features and in the file;
        ``other`` names the representative of the i-th.
        """
        run = self.run
        reaches = found >= np.float32(run.threshold)
        self.compared += len(found)
        self.reach += int(reaches.sum())
        self.lowest = min(self.lowest, float(found.min(initial=np.inf)))
        if not run.manifest["verified"]:
            return
        if run.components:
            reaches |= np.isfinite(found)
        run.fail_each(
            "cosine",
            np.flatnonzero(~reaches),
            lambda i: (
                f"{run.place(row[i])}: its cosine with its representative {other(i)} is "
                f"{found[i]:.6f}, expected {run.threshold:g} or more"
            ),
        )
        run.fail_each(
            "similarity",
            np.flatnonzero(reaches & ~(np.abs(found - written) <= ROUNDING)),
            lambda i: (
                f"{run.place(row[i])}: groups.parquet has cosine {written[i]:.6f}, with its "
                f"representative {other(i)} it is {found[i]:.6f}"
            ),
        )

    def check_counts(self) -> None:
        """Note removed rows without a group, and counts that differ from the manifest's."""
        rows = np.flatnonzero(self.run.is_dup & ~self.seen)
        self.run.fail_rows("mask", rows, "is_dup.npy removes it, groups.parquet does not have it")
        for name, value in (
            ("rows", self.run.rows),
            ("removed", self.removed),
            ("groups", self.groups),
            ("largest_group", self.largest),
            ("chained", self.chained),
        ):
            written = self.run.manifest["counts"][name]
            if written != value:
                text = f"snip.json counts {name} {written:,}, groups.parquet {value:,}"
                self.run.fail("counts", text)

    def check_places(self, path: Path) -> None:
        """Compare the file, and the row in it, that groups.parquet gives for each row."""
        run, names = self.run, pa.array(self.run.names, pa.string())
        for batch in stream_parquet(path).iter_batches(columns=["row", "shard", "shard_row"]):
            row = np.clip(batch.column("row").to_numpy(), 0, run.rows - 1)  # others: noted before
            shard = np.searchsorted(run.offsets, row, side="right") - 1
            other = pc.not_equal(names.take(pa.array(shard)), batch.column("shard"))
            wrong = other.to_numpy(zero_copy_only=False)
            wrong |= batch.column("shard_row").to_numpy() != row - run.offsets[shard]
            run.fail_each(
                "places", row[wrong], lambda r: f"groups.parquet: {run.place(r)} has another place"
            )

    def check_references(self, path: Path, references: list[AuditedReference]) -> None:
        """Compare rows that are removed for a reference row with it.

        Those of references that could not be opened are noted as not compared.
        """
        by_name = {reference.name: reference for reference in references}
        unproved: dict[str, int] = {}
        proved = 0
        columns = ["row", "reference", "representative", "similarity"]
        for batch in stream_parquet(path).iter_batches(BATCH_ROWS, columns=columns):
            table = pa.Table.from_batches([batch]).filter(pc.field("reference").is_valid())
            for name in pc.unique(table["reference"]).to_pylist():
                part = table.filter(pc.field("reference") == name)
                if name in by_name and self.features is not None:
                    proved += part.num_rows
                    self.check_reference(by_name[name], self.features, part)
                else:
                    unproved[name] = unproved.get(name, 0) + part.num_rows
        for name, rows in unproved.items():
            text = f"{rows:,} rows removed for rows of {name} are not proved"
            self.run.fail("unproved", text)
        plural = "s" * (len(references) != 1)
        self.run.note(
            "references",
            f"{proved:,} rows are removed for rows of {len(references):,} reference{plural}",
        )

    def check_reference(self, reference: AuditedReference, features: Features, part: Any) -> None:
        """Compare rows of groups.parquet with their representatives in one reference."""
        row, other, written = (
            part[name].to_numpy() for name in ("row", "representative", "similarity")
        )
        kept = (other >= 0) & (other < reference.features.rows)
        kept[kept] &= ~reference.is_dup[other[kept]]
        self.run.fail_each(
            "reference",
            np.flatnonzero(~kept),
            lambda i: (
                f"{self.run.place(row[i])}: its representative, row {other[i]:,} of "
                f"{reference.name}, is not a kept row there"
            ),
        )
        own, others = row[kept], other[kept]

        def name_other(i: int) -> str:
            path, place = reference.features.place(int(others[i]))
            return f"row {others[i]:,} of {reference.name} ({path.name} row {place})"

        found = raw_cosines(features, own, reference.features, others, self.threads, self.memory)
        self.check_cosines(own, found, written[kept], name_other)

    def dup_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows that represent others, ascending, and how many each, (m,) int64."""
        rows, counts = map(np.concatenate, zip(*self.represented, strict=True))
        order = np.argsort(rows)
        return rows[order], counts[order]


def chosen_places(chosen: np.ndarray, begin: int, count: int) -> np.ndarray:
    """Return which of ``count`` items, numbered from ``begin`` on, are chosen, as places in them.

    ``chosen`` (n,) int64 are numbers of items, ascending.
    """
    low, high = np.searchsorted(chosen, [begin, begin + count])
    return chosen[low:high] - begin


def raw_cosines(
    features: Features, a: np.ndarray, other: Features, b: np.ndarray, threads: int, memory: int
) -> np.ndarray:
    """Return the cosines of rows ``a`` with rows ``b`` of ``other``, (n,) float32.

    NaN stands for a row that has none. Threads read in row order, together as many rows at a time
    as fit into ``memory`` bytes.
    """
    common = np.result_type(features.dtype, other.dtype)
    order = np.argsort(a, kind="stable")

    def compute(span: tuple[int, int]) -> np.ndarray:
        part = order[slice(*span)]
        left, i = np.unique(a[part], return_inverse=True)
        right, j = np.unique(b[part], return_inverse=True)
        x = features.gather(left).astype(common, copy=False)
        y = other.gather(right).astype(common, copy=False)
        bad = bad_rows(x)[i] | bad_rows(y)[j]
        return np.where(bad, np.float32(np.nan), indexed_cosines(x, y, i, j))

    fit = min(MOST_PAIRS, memory // (2 * threads * features.dim * common.itemsize))
    spans = plan_blocks(len(a), max(PAIRS, fit))
    cosine = np.empty(len(a), np.float32)
    cosine[order] = np.concatenate([cosine[:0], *ordered_map(compute, spans, threads)])
    return cosine
