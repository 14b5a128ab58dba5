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
from snipdedup.deduplication.read_out import BATCH_ROWS, pick, whole_groups
from snipdedup.features.cosine import bad_rows, indexed_cosines
from snipdedup.features.shards import Features, plan_blocks
from snipdedup.groups.members import Members, group_starts
from snipdedup.metadata.tables import stream_parquet
from snipdedup.parallel import ordered_map

PAIRS, MOST_PAIRS = 4096, 1 << 16  # whose rows one thread reads at a time: at the least, the most
ROUNDING = 1e-6  # a stored cosine may be off by this: sums in another order, rounded to float32
SHOWN = 5  # violations of one kind in words


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
    for every in whole_groups(run.folder / "groups.parquet", marked=True):
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
        run.fail_rows(kind, members.row, wrong, text)
    text = "its representative {} is not a kept row of its group"
    run.fail_rows(
        "representative", members.row, ~right, lambda i: text.format(run.place(representative[i]))
    )


@dataclass
class RemovedRows:
    """Compares the removed rows of ``groups.parquet`` with their representatives, on raw features.

    Without ``features`` no cosine is computed; ``captions`` are features of the rows' texts, where
    texts had to match too. ``chosen`` (n,) int64 are the removed rows to compare, by their number
    among all removed rows, ascending; None for all.
    """

    run: AuditedRun
    features: Features | None
    captions: Features | None
    references: dict[str, AuditedReference]  # those that can be read, by name
    chosen: np.ndarray | None
    compared: int = 0  # pairs whose cosine was computed,
    reach: int = 0  # those that reach the threshold,
    lowest: float = np.inf  # and the lowest cosine

    def check(self) -> None:
        """Read ``groups.parquet``, and note in ``run`` what is wrong."""
        run, file = self.run, stream_parquet(self.run.folder / "groups.parquet")
        columns = ["row", "shard", "shard_row", "representative", "similarity", "is_dup"]
        columns += ["reference"] * bool(run.manifest.get("references"))
        before, counts = 0, Counter[str | None]()
        with progress.bar(int(np.count_nonzero(run.is_dup)), "comparing", "removed rows") as bar:
            for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                table = pa.Table.from_batches([batch])
                self.check_places(table)
                removed = table.filter(pc.field("is_dup"))
                bar.update(removed.num_rows)
                chosen = removed
                if self.chosen is not None:
                    places = chosen_places(self.chosen, before, removed.num_rows)
                    chosen = removed.take(pa.array(places))
                before += removed.num_rows
                counts += self.check_pairs(chosen)
        known = self.references if self.features is not None else {}
        of = "rows" if self.chosen is None else "sampled rows"
        for name in sorted(name for name in counts if name and name not in known):
            run.fail("unproved", f"{counts[name]:,} {of} removed for rows of {name} are not proved")
        if run.manifest.get("references"):
            proved, plural = sum(counts[name] for name in known), "s" * (len(self.references) != 1)
            text = f"{proved:,} {of} are removed for rows of {len(self.references):,} reference"
            run.note("references", text + plural)

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

    def check_pairs(self, removed: Any) -> Counter[str | None]:
        """Compare removed rows, and count them by the reference of their representatives.

        None stands for the set itself.
        """
        run, counts = self.run, Counter[str | None]()
        if "reference" not in removed.column_names:
            removed = removed.append_column("reference", pa.nulls(removed.num_rows, pa.string()))
        for name in pc.unique(removed["reference"]).to_pylist():
            field = pc.field("reference")
            part = removed.filter(field.is_null() if name is None else field == name)
            counts[name] = part.num_rows
            if self.features is None or not (name is None or name in self.references):
                continue
            row, other, written = (
                part[column].to_numpy() for column in ("row", "representative", "similarity")
            )
            if name is not None:
                self.check_reference(self.references[name], self.features, row, other, written)
                continue
            inside = (row >= 0) & (row < run.rows) & (other >= 0) & (other < run.rows)
            row, other, written = row[inside], other[inside], written[inside]
            self.check_cosines(self.features, row, self.features, other, written, run.place)
            if self.captions is not None and not (run.semdedup or run.components):
                self.check_captions(self.captions, row, other)
        return counts

    def check_reference(
        self, reference: AuditedReference, features: Features,
        row: np.ndarray, other: np.ndarray, written: np.ndarray,
    ) -> None:  # fmt: skip
        """Compare rows with their representatives in one reference."""
        name, run = reference.name, self.run
        kept = (other >= 0) & (other < reference.features.rows)
        kept[kept] &= ~reference.is_dup[other[kept]]
        text = f"its representative, row {{:,}} of {name}, is not a kept row there"
        run.fail_rows("reference", row, ~kept, lambda i: text.format(other[i]))

        def place(row: int) -> str:
            path, number = reference.features.place(row)
            return f"row {row:,} of {name} ({path.name} row {number})"

        own, others = row[kept], other[kept]
        self.check_cosines(features, own, reference.features, others, written[kept], place)

    def check_cosines(
        self, features: Features, row: np.ndarray, others: Features, other: np.ndarray,
        written: np.ndarray, place: Callable[[int], str],
    ) -> None:  # fmt: skip
        """Compare cosines with the threshold, and with those in ``groups.parquet``, ``written``.

        ``place`` names a row of ``others``.
        """
        run = self.run
        found = raw_cosines(features, row, others, other, run.threads, run.memory)
        reaches = found >= np.float32(run.threshold)
        self.compared += len(found)
        self.reach += int(reaches.sum())
        self.lowest = min(self.lowest, float(found.min(initial=np.inf)))
        if not run.manifest["verified"]:
            return
        if run.components:
            reaches |= np.isfinite(found)
        run.fail_rows(
            "cosine", row, ~reaches,
            lambda i: f"its cosine with its representative {place(int(other[i]))} is "
            f"{found[i]:.6f}, expected {run.threshold:g} or more",
        )  # fmt: skip
        run.fail_rows(
            "similarity", row, reaches & ~(np.abs(found - written) <= ROUNDING),
            lambda i: f"groups.parquet has cosine {written[i]:.6f}, with its representative "
            f"{place(int(other[i]))} it is {found[i]:.6f}",
        )  # fmt: skip

    def check_captions(self, captions: Features, row: np.ndarray, other: np.ndarray) -> None:
        """Compare cosines of captions with the threshold of texts."""
        run, limit = self.run, float(self.run.manifest["settings"]["text_threshold"])
        found = raw_cosines(captions, row, captions, other, run.threads, run.memory)
        run.fail_rows(
            "captions", row, ~(found >= np.float32(limit)),
            lambda i: "the cosine of its caption with that of its representative "
            f"{run.place(other[i])} is {found[i]:.6f}, expected {limit:g} or more",
        )  # fmt: skip


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
