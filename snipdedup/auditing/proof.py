"""Checks each removed row: mask, groups.parquet, and the cosine on the raw features agree.

Groups come some at a time. One byte is held for each row of the set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from snipdedup.auditing.result import AuditResult
from snipdedup.deduplication.read_out import BATCH_ROWS, pick
from snipdedup.features.cosine import bad_rows, indexed_cosines
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.groups.members import Members, group_starts
from snipdedup.metadata.tables import stream_parquet
from snipdedup.parallel import ordered_map

PAIRS = 4096  # whose cosines one thread computes at a time
ROUNDING = 1e-6  # a stored cosine may be off by this: sums in another order, rounded to float32


class Captions(NamedTuple):
    """Features of captions, and the cosine from which two captions match."""

    features: Features
    threshold: float


class Reference(NamedTuple):
    """A reference as it is on disk now; ``is_dup`` (rows,) bool are rows that it removed itself."""

    name: str
    features: Features
    is_dup: np.ndarray


@dataclass(frozen=True)
class AuditedRun:
    """What an audit knows of a finished run.

    Attributes
    ----------
    folder, manifest : Path, dict
    names, offsets : list of str, (shards + 1,) int64
        File name and first row of each shard; the last offset is the number of rows.
    is_dup : (rows,) bool
        Memory-mapped.
    """

    folder: Path
    manifest: dict[str, Any]
    names: list[str]
    offsets: np.ndarray
    is_dup: np.ndarray

    @property
    def threshold(self) -> float:
        """Cosine from which two rows are a pair."""
        return float(self.manifest["settings"]["threshold"])

    @property
    def references_only(self) -> bool:
        """Whether rows are removed for rows of references only."""
        return bool(self.manifest["settings"].get("references_only"))

    @property
    def by_design(self) -> str | None:
        """The rule by which a removed row may be far from each kept row; None for the star rule."""
        settings = self.manifest["settings"]
        if settings["method"] == "semdedup":
            return "semdedup"
        chains = settings["grouping"] == "components" and not self.references_only
        return "components" if chains else None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.offsets[-1])

    def place(self, row: int) -> str:
        """Return a row with its file, for messages; below 0: the complement of a reference row."""
        if row < 0:
            return f"row {~row:,} of a reference"
        shard = int(np.searchsorted(self.offsets, row, side="right")) - 1
        return f"row {row:,} ({self.names[shard]} row {row - self.offsets[shard]})"


@dataclass
class Proof:
    """Takes the members of whole groups, some groups at a time, and notes what is wrong.

    Without ``features`` no cosine is computed. ``chosen`` (n,) int64 are the removed rows to
    prove, by their number among all removed rows, ascending; None for all.

    Attributes
    ----------
    removed, groups, largest, chained : int
        Counts of the members, to be compared with the manifest.
    proved, reach, lowest : int, int, float
        Pairs whose cosine was computed, those that reach the threshold, and the lowest cosine.
    """

    run: AuditedRun
    features: Features | None
    captions: Captions | None
    result: AuditResult
    chosen: np.ndarray | None
    threads: int
    memory: int
    removed: int = 0
    groups: int = 0
    largest: int = 1
    chained: int = 0
    proved: int = 0
    reach: int = 0
    lowest: float = np.inf

    def __post_init__(self) -> None:
        self.seen = np.zeros(self.run.rows, bool)
        self.last = (-1, -1)  # group and row
        self.represented = [(np.empty(0, np.int64), np.empty(0, np.int64))]

    def add(self, members: Members) -> None:
        """Check the members of whole groups; rows of references come as complements, < 0."""
        inside = (members.row >= 0) & (members.row < self.run.rows)
        inside &= members.representative < self.run.rows
        self.result.fail_each(
            "range",
            members.row[~inside],
            lambda row: (
                f"groups.parquet: row {row:,} or its representative is none of the "
                f"{self.run.rows:,} rows"
            ),
        )
        members = pick(members, inside)
        if not len(members.row):
            return
        self._check_members(members)
        removed = pick(members, members.is_dup)
        sizes = np.diff(group_starts(members.group))
        self.groups += len(sizes)
        self.largest = max(self.largest, int(sizes.max()))
        self.chained += int((removed.similarity < np.float32(self.run.threshold)).sum())
        own = removed.representative[removed.representative >= 0]
        self.represented.append(np.unique(own, return_counts=True))
        some = removed
        if self.chosen is not None:
            span = np.searchsorted(self.chosen, [self.removed, self.removed + len(removed.row)])
            some = pick(removed, self.chosen[slice(*span)] - self.removed)
        self.removed += len(removed.row)
        self._prove(pick(some, some.representative >= 0))

    def _check_members(self, members: Members) -> None:
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
        if run.by_design != "semdedup":  # whose representatives may be removed themselves
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
            self._fail_rows(kind, members.row[wrong], text)
        self.result.fail_each(
            "representative",
            np.flatnonzero(~right),
            lambda i: (
                f"{run.place(members.row[i])}: its representative {run.place(representative[i])} "
                "is not a kept row of its group"
            ),
        )

    def _prove(self, removed: Members) -> None:
        """Compare rows with their representatives, on raw features and on their captions'."""
        if self.features is None:
            return

        def other(i: int) -> str:
            return self.run.place(int(removed.representative[i]))

        found = self._cosines(self.features, removed.row, removed.representative)
        self._check_cosines(removed.row, found, removed.similarity, other)
        captions = self.captions
        if captions is None or self.run.by_design:
            return
        text = self._cosines(captions.features, removed.row, removed.representative)
        self.result.fail_each(
            "captions",
            np.flatnonzero(~(text >= np.float32(captions.threshold))),
            lambda i: (
                f"{self.run.place(removed.row[i])}: the cosine of its caption with that of its "
                f"representative {other(i)} is {text[i]:.6f}, expected {captions.threshold:g} or "
                "more"
            ),
        )

    def _cosines(
        self, features: Features, a: np.ndarray, b: np.ndarray, other: Features | None = None
    ) -> np.ndarray:
        return raw_cosines(features, a, b, other, threads=self.threads, memory=self.memory)

    def _check_cosines(
        self,
        row: np.ndarray,
        found: np.ndarray,
        written: np.ndarray,
        other: Callable[[int], str],
    ) -> None:
        """Compare cosines with the threshold, and with those in groups.parquet.

        Parameters
        ----------
        row : (n,) int64
            Removed rows.
        found, written : (n,) float32
            Cosines with their representatives: on raw features, and in groups.parquet.
        other : function of int
            Names the representative of one of them.
        """
        reaches = found >= np.float32(self.run.threshold)
        self.proved += len(found)
        self.reach += int(reaches.sum())
        self.lowest = min(self.lowest, float(found.min(initial=np.inf)))
        if not self.run.manifest["verified"]:
            return
        if self.run.by_design == "components":
            reaches |= np.isfinite(found)
        self.result.fail_each(
            "cosine",
            np.flatnonzero(~reaches),
            lambda i: (
                f"{self.run.place(row[i])}: its cosine with its representative {other(i)} is "
                f"{found[i]:.6f}, expected {self.run.threshold:g} or more"
            ),
        )
        self.result.fail_each(
            "similarity",
            np.flatnonzero(reaches & ~(np.abs(found - written) <= ROUNDING)),
            lambda i: (
                f"{self.run.place(row[i])}: groups.parquet has cosine {written[i]:.6f}, "
                f"with its representative {other(i)} it is {found[i]:.6f}"
            ),
        )

    def _fail_rows(self, kind: str, rows: np.ndarray, text: str) -> None:
        self.result.fail_each(kind, rows, lambda row: f"{self.run.place(row)}: {text}")

    def check_references(self, references: list[Reference]) -> None:
        """Prove the rows that are removed for a row of a reference.

        Those of references that could not be opened are noted as not proved.
        """
        by_name = {reference.name: reference for reference in references}
        unproved: dict[str, int] = {}
        proved = 0
        columns = ["row", "reference", "representative", "similarity"]
        file = stream_parquet(self.run.folder / "groups.parquet")
        for batch in file.iter_batches(BATCH_ROWS, columns=columns):
            table = pa.Table.from_batches([batch]).filter(pc.field("reference").is_valid())
            for name in pc.unique(table["reference"]).to_pylist():
                part = table.filter(pc.field("reference") == name)
                if name in by_name and self.features is not None:
                    proved += part.num_rows
                    self._prove_reference(by_name[name], self.features, part)
                else:
                    unproved[name] = unproved.get(name, 0) + part.num_rows
        for name, rows in unproved.items():
            self.result.fail("unproved", f"{rows:,} rows removed for rows of {name} are not proved")
        plural = "s" * (len(references) != 1)
        self.result.note(
            "references",
            f"{proved:,} rows are removed for rows of {len(references):,} reference{plural}",
        )

    def _prove_reference(self, reference: Reference, features: Features, part: Any) -> None:
        """Compare rows with their representatives in one reference."""
        row, other, written = (
            part[name].to_numpy() for name in ("row", "representative", "similarity")
        )
        kept = (other >= 0) & (other < reference.features.rows)
        kept[kept] &= ~reference.is_dup[other[kept]]
        self.result.fail_each(
            "reference",
            np.flatnonzero(~kept),
            lambda i: (
                f"{self.run.place(row[i])}: its representative, row {other[i]:,} of "
                f"{reference.name}, is not a kept row there"
            ),
        )
        row, other, written = row[kept], other[kept], written[kept]

        def name_other(i: int) -> str:
            path, place = reference.features.place(int(other[i]))
            return f"row {other[i]:,} of {reference.name} ({path.name} row {place})"

        found = self._cosines(features, row, other, reference.features)
        self._check_cosines(row, found, written, name_other)

    def finish(self) -> None:
        """Note removed rows without a group, and counts that differ from the manifest's."""
        rows = np.flatnonzero(self.run.is_dup & ~self.seen)
        self._fail_rows("mask", rows, "is_dup.npy removes it, groups.parquet does not have it")
        found = {
            "rows": self.run.rows,
            "removed": self.removed,
            "groups": self.groups,
            "largest_group": self.largest,
            "chained": self.chained,
        }
        for name, value in found.items():
            written = self.run.manifest["counts"][name]
            if written != value:
                self.result.fail(
                    "counts", f"snip.json counts {name} {written:,}, groups.parquet {value:,}"
                )

    def dup_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows that represent others, ascending, and how many each."""
        rows, counts = map(np.concatenate, zip(*self.represented, strict=True))
        order = np.argsort(rows)
        return rows[order], counts[order]


def raw_cosines(
    features: Features,
    a: np.ndarray,
    b: np.ndarray,
    other: Features | None = None,
    *,
    threads: int,
    memory: int,
) -> np.ndarray:
    """Return the cosine of each pair of rows, (n,) float32; NaN with a row that has none.

    Rows are read in row order, as many at a time as fit into ``memory`` bytes. ``other`` is what
    ``b`` are rows of, if not ``features``.
    """
    other = other or features
    cosine = np.empty(len(a), np.float32)
    order = np.argsort(a, kind="stable")
    common = np.result_type(features.dtype, other.dtype)
    fit = max(PAIRS, memory // (2 * features.dim * common.itemsize))
    for start, stop in plan_blocks(len(a), fit):
        part = order[start:stop]
        left, i = np.unique(a[part], return_inverse=True)
        right, j = np.unique(b[part], return_inverse=True)
        x = features.gather(left).astype(common, copy=False)
        y = other.gather(right).astype(common, copy=False)
        found = cosines_of_places(x, y, i, j, threads)
        cosine[part] = np.where(bad_rows(x)[i] | bad_rows(y)[j], np.float32(np.nan), found)
    return cosine


def cosines_of_places(
    x: np.ndarray, y: np.ndarray, i: np.ndarray, j: np.ndarray, threads: int
) -> np.ndarray:
    """Return the cosines of rows i of x with rows j of y, (n,) float32."""

    def compute(span: tuple[int, int]) -> np.ndarray:
        return indexed_cosines(x, y, i[slice(*span)], j[slice(*span)])

    return np.concatenate(list(ordered_map(compute, plan_blocks(len(i), PAIRS), threads)))
