"""Is each removed row's match there: groups and mask against one another and the raw features.

Groups come a few at a time; of all rows one byte is held. Rows of a batch are read in row order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup.auditing.verdict import Verdict
from snipdedup.deduplication.out_reader import pick
from snipdedup.features.cosine import bad_rows, pair_cosine
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.groups.members import Members, group_starts
from snipdedup.parallel import ordered_map

PAIRS = 4096  # whose cosines one thread computes at a time
ROUNDING = 1e-6  # a stored cosine may be off by this: sums in another order, rounded to float32


@dataclass(frozen=True)
class Captions:
    """Features of captions, which must match as well.

    Attributes
    ----------
    features : Features
    threshold : float
        Cosine from which two captions match.
    """

    features: Features
    threshold: float


@dataclass(frozen=True)
class Run:
    """A finished OUT, as far as an audit has to know it.

    Attributes
    ----------
    folder : Path
    manifest : dict
    names, offsets : list of str, (shards + 1,) int64
        The shards: file names and first rows; the last offset is the number of rows.
    is_dup : (rows,) bool
        Memory-mapped.
    """

    folder: Path
    manifest: dict[str, Any]
    names: list[str]
    offsets: np.ndarray
    is_dup: np.ndarray

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.offsets[-1])

    @property
    def threshold(self) -> float:
        """Cosine from which two rows are a pair."""
        return float(self.manifest["settings"]["threshold"])

    @property
    def by_design(self) -> str | None:
        """What lets removed rows be far from a row that stays: a rule, None where nothing does."""
        settings = self.manifest["settings"]
        if settings["method"] == "semdedup":
            return "semdedup"
        chains = settings["grouping"] == "components" and not self.references_only
        return "components" if chains else None

    @property
    def references_only(self) -> bool:
        """Whether rows go for rows of references only."""
        return bool(self.manifest["settings"].get("references_only"))

    def place(self, row: int) -> str:
        """Return a row as a message names it, with its file; < 0: the complement of another's."""
        if row < 0:
            return f"row {~row:,} of a reference"
        shard = int(np.searchsorted(self.offsets, row, side="right")) - 1
        return f"row {row:,} ({self.names[shard]} row {row - self.offsets[shard]})"


class Proof:
    """Takes the members of whole groups, a few groups at a time, and notes what is wrong.

    Parameters
    ----------
    run : Run
    features : Features or None
        None where they are not those of the run, so that nothing can be proved.
    captions : Captions or None
    verdict : Verdict
    chosen : (n,) int64 or None
        Which removed rows to prove, by their number among them, ascending; None for all.
    threads, memory : int

    Attributes
    ----------
    removed, groups, largest, chained : int
        What the members amount to, to be compared with the manifest.
    proved, reach : int
        Pairs whose cosine was computed, and those of them that reach the threshold.
    lowest : float
        The lowest of these cosines.
    named : list of (rows, counts)
        Rows that stand for others, and for how many.
    """

    def __init__(
        self,
        run: Run,
        features: Features | None,
        captions: Captions | None,
        verdict: Verdict,
        *,
        chosen: np.ndarray | None,
        threads: int,
        memory: int,
    ) -> None:
        self.run, self.features, self.captions, self.verdict = run, features, captions, verdict
        self.chosen, self.threads, self.memory = chosen, threads, memory
        self.seen = np.zeros(run.rows, bool)
        self.last = (-1, -1)
        self.removed = self.groups = self.chained = self.proved = self.reach = 0
        self.largest, self.lowest = 1, np.inf
        self.named = [(np.empty(0, np.int64), np.empty(0, np.int64))]

    def add(self, members: Members) -> None:
        """Take the members of whole groups; rows of references are named by complement, < 0."""
        members = self._within(members)
        if not len(members.row):
            return
        self._order(members)
        self._mask(members)
        self._representatives(members)
        gone = pick(members, members.is_dup)
        sizes = np.diff(group_starts(members.group))
        self.groups += len(sizes)
        self.largest = max(self.largest, int(sizes.max()))
        self.chained += int((gone.similarity < np.float32(self.run.threshold)).sum())
        chosen: Any = slice(None)
        if self.chosen is not None:
            ends = [self.removed, self.removed + len(gone.row)]
            chosen = self.chosen[slice(*np.searchsorted(self.chosen, ends))] - self.removed
        self.removed += len(gone.row)
        own = gone.representative[gone.representative >= 0]
        self.named.append(np.unique(own, return_counts=True))
        some = pick(gone, chosen)
        self._prove(pick(some, some.representative >= 0))

    def _within(self, members: Members) -> Members:
        """Leave out what names rows that there are not."""
        inside = (members.row >= 0) & (members.row < self.run.rows)
        inside &= members.representative < self.run.rows
        self.verdict.fail_each(
            "range",
            members.row[~inside],
            lambda row: (
                f"groups.parquet: row {row:,} or its representative is none of the "
                f"{self.run.rows:,} rows"
            ),
        )
        return pick(members, inside)

    def _order(self, members: Members) -> None:
        """Members are ordered by group, then row; a group is named by its smallest row."""
        group = np.append(self.last[0], members.group)
        row = np.append(self.last[1], members.row)
        self.last = (int(group[-1]), int(row[-1]))
        same = group[1:] == group[:-1]
        wrong = (group[1:] < group[:-1]) | (same & (row[1:] <= row[:-1]))
        wrong |= ~same & (members.row != members.group)
        wrong |= self.seen[members.row]
        self.seen[members.row] = True
        self.verdict.fail_each(
            "order",
            members.row[wrong],
            lambda row: (
                f"groups.parquet: {self.run.place(row)} is out of place: expected each "
                "row once, ordered by group, and groups named by their smallest row"
            ),
        )

    def _mask(self, members: Members) -> None:
        """`is_dup` says the same in both files."""
        mask = self.run.is_dup[members.row]
        for removed, said in (
            (True, "is_dup.npy removes it, groups.parquet lets it stay"),
            (False, "is_dup.npy lets it stay, groups.parquet removes it"),
        ):
            rows = members.row[(mask == removed) & (members.is_dup != removed)]
            self.verdict.fail_each("mask", rows, partial(self._of_row, said))

    def _representatives(self, members: Members) -> None:
        """A removed row is represented by a row of its group that stays; others by themselves."""
        order = np.argsort(members.row, kind="stable")
        at = np.searchsorted(members.row, members.representative, sorter=order)
        at = order[np.minimum(at, len(order) - 1)]
        right = (members.row[at] == members.representative) & (members.group[at] == members.group)
        if self.run.by_design != "semdedup":  # its representatives may be removed themselves
            own = np.maximum(members.representative, 0)  # those of references are < 0
            right &= ~members.is_dup[at] & ~self.run.is_dup[own]
        right = np.where(members.is_dup, right, members.representative == members.row)
        right |= members.is_dup & (members.representative < 0)  # of a reference
        if self.run.references_only:
            self.verdict.fail_each(
                "representative",
                members.row[members.is_dup & (members.representative >= 0)],
                partial(self._of_row, "it goes for a row of FEATURES, expected one of a reference"),
            )
        # a mask that disagrees is named already
        right |= ~members.is_dup & self.run.is_dup[members.row]
        self.verdict.fail_each(
            "representative",
            np.flatnonzero(~right),
            lambda i: (
                f"{self.run.place(members.row[i])}: its representative "
                f"{self.run.place(members.representative[i])} is not a row of its group that stays"
            ),
        )

    def _prove(self, gone: Members) -> None:
        """Compare rows with their representatives on the raw features, and on their captions'."""
        if self.features is None:
            return

        def other(i: int) -> str:
            return self.run.place(int(gone.representative[i]))

        found = self.cosines(self.features, gone.row, gone.representative)
        self.judge(gone.row, found, gone.similarity, other)
        if self.captions is None or self.run.by_design:
            return
        text = self.cosines(self.captions.features, gone.row, gone.representative)
        self.verdict.fail_each(
            "captions",
            np.flatnonzero(~(text >= np.float32(self.captions.threshold))),
            lambda i: (
                f"{self.run.place(gone.row[i])}: the cosine of its caption with that of its "
                f"representative {other(i)} is {text[i]:.6f}, expected "
                f"{self.run.manifest['settings']['text_threshold']:g} or more"
            ),
        )

    def cosines(
        self, features: Features, a: np.ndarray, b: np.ndarray, other: Features | None = None
    ) -> np.ndarray:
        """See `raw_cosines`."""
        how = {"threads": self.threads, "memory": self.memory}
        return raw_cosines(features, a, b, other, **how)

    def judge(
        self,
        row: np.ndarray,
        found: np.ndarray,
        written: np.ndarray,
        other: Callable[[int], str],
    ) -> None:
        """Compare cosines with the threshold, and with those that are written.

        Parameters
        ----------
        row : (n,) int64
            Removed rows.
        found, written : (n,) float32
            Their cosines with their representatives: on raw features, and in groups.parquet.
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
        self.verdict.fail_each(
            "cosine",
            np.flatnonzero(~reaches),
            lambda i: (
                f"{self.run.place(row[i])}: its cosine with its representative {other(i)} is "
                f"{found[i]:.6f}, expected {self.run.threshold:g} or more"
            ),
        )
        self.verdict.fail_each(
            "similarity",
            np.flatnonzero(reaches & ~(np.abs(found - written) <= ROUNDING)),
            lambda i: (
                f"{self.run.place(row[i])}: groups.parquet says cosine {written[i]:.6f}, "
                f"with its representative {other(i)} it is {found[i]:.6f}"
            ),
        )

    def _of_row(self, said: str, row: int) -> str:
        return f"{self.run.place(row)}: {said}"

    def finish(self) -> None:
        """Note rows that are removed but in no group, and counts that are not the manifest's."""
        rows = np.flatnonzero(self.run.is_dup & ~self.seen)
        self.verdict.fail_each(
            "mask",
            rows,
            partial(self._of_row, "is_dup.npy removes it, groups.parquet does not have it"),
        )
        counts = self.run.manifest["counts"]
        found = {
            "rows": self.run.rows,
            "removed": self.removed,
            "groups": self.groups,
            "largest_group": self.largest,
            "chained": self.chained,
        }
        for name, value in found.items():
            if counts[name] != value:
                self.verdict.fail(
                    "counts", f"snip.json counts {name} {counts[name]:,}, groups.parquet {value:,}"
                )

    def dup_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows that represent others, ascending, and how many each."""
        rows, counts = map(np.concatenate, zip(*self.named, strict=True))
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

    Rows are gathered in row order, as many at a time as fit into ``memory`` bytes. ``other`` is
    what ``b`` are rows of, if they are not of the same features.
    """
    cosine = np.empty(len(a), np.float32)
    order = np.argsort(a, kind="stable")
    common = np.result_type(features.dtype, other.dtype if other else features.dtype)
    fit = max(PAIRS, memory // (2 * features.dim * common.itemsize))
    for start, stop in plan_blocks(len(a), fit):
        part = order[start:stop]
        left, i = np.unique(a[part], return_inverse=True)
        right, j = np.unique(b[part], return_inverse=True)
        x = features.gather(left).astype(common, copy=False)
        y = (other or features).gather(right).astype(common, copy=False)
        found = pair_cosines(x, y, i, j, threads)
        cosine[part] = np.where(bad_rows(x)[i] | bad_rows(y)[j], np.float32(np.nan), found)
    return cosine


def pair_cosines(
    x: np.ndarray, y: np.ndarray, i: np.ndarray, j: np.ndarray, threads: int
) -> np.ndarray:
    """Return the cosines of rows i of x with rows j of y, (n,) float32."""

    def compute(span: tuple[int, int]) -> np.ndarray:
        return pair_cosine(x[i[slice(*span)]], y[j[slice(*span)]])

    return np.concatenate(list(ordered_map(compute, plan_blocks(len(i), PAIRS), threads)))
