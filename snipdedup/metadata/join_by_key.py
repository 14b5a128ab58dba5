"""Decisions found by key: a join of two tables on disk, in parts that fit into memory.

One side is the set that a mask was made for, each row with its decision; the other is whatever copy
of it a user holds, shuffled, cut or mixed with other rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from snipdedup import progress
from snipdedup.features.shards import plan_blocks
from snipdedup.metadata.files import Table, open_table
from snipdedup.metadata.keys import classes, fingerprints, part_of
from snipdedup.metadata.spill import Spill, parts_for, spilling
from snipdedup.metadata.tables import Metadata
from snipdedup.storage import atomic

STAYS, GOES, AMBIGUOUS, UNMATCHED, CONTRADICTED = range(5)
STATES = ("stays", "goes", "ambiguous", "unmatched", "contradicted")
ZEROS = 1 << 22  # bytes written at a time
SHOWN_ROWS = 3  # rows of each kind that a message names


class Keyed(NamedTuple):
    """Rows with what they are known by.

    Attributes
    ----------
    marks : (2, n) uint64
        Fingerprints of their keys.
    known : (n,) bool
        False where a row has no key.
    witness : (n,) uint64
        Fingerprint of a second column that should agree too; 0 where there is none.
    """

    marks: np.ndarray
    known: np.ndarray
    witness: np.ndarray


@dataclass
class Joined:
    """How the rows of a table were decided.

    Attributes
    ----------
    is_dup : (rows,) bool
        On disk; True = remove.
    counts : (5,) int64
        Rows by state.
    examples : list of list of int
        By state its first rows, a few of them.
    repeated : int
        Rows that share their key with another row of the table.
    """

    is_dup: np.ndarray
    counts: np.ndarray = field(default_factory=lambda: np.zeros(len(STATES), np.int64))
    examples: list[list[int]] = field(default_factory=lambda: [[] for _ in STATES])
    repeated: int = 0

    def note(self, rows: np.ndarray, state: np.ndarray) -> None:
        """Count rows, and keep the first ones of each state."""
        self.counts += np.bincount(state, minlength=len(STATES))
        for number in np.unique(state):
            first = np.sort(rows[state == number])[:SHOWN_ROWS].tolist()
            self.examples[number] = sorted([*self.examples[number], *first])[:SHOWN_ROWS]


def keyed(file: Table, batch: Any, columns: Sequence[str], witness: str | None) -> Keyed:
    """Return what the rows of a batch are known by."""
    marks, known = fingerprints(file, batch.select(list(columns)))
    second = np.zeros(batch.num_rows, np.uint64)
    if witness is not None:
        found, held = fingerprints(file, batch.select([witness]))
        second[held] = found[0, held] | np.uint64(1)
    return Keyed(marks, known, second)


def wanted(columns: Sequence[str], witness: str | None) -> list[str]:
    """Return the columns that `keyed` needs."""
    return [*columns, *([witness] if witness and witness not in columns else [])]


def decided_rows(
    metadata: Metadata, is_dup: np.ndarray, columns: Sequence[str], witness: str | None
) -> Iterator[tuple[Keyed, np.ndarray]]:
    """Yield rows and whether each goes, (n,) bool, of metadata that matches a mask by position."""
    for file, first, batch in metadata.read(wanted(columns, witness)):
        goes = np.asarray(is_dup[first : first + batch.num_rows])
        yield keyed(file, batch, columns, witness), goes


def published_rows(
    staying: Metadata, column: str, groups: Path
) -> Iterator[tuple[Keyed, np.ndarray]]:
    """Yield the same of an OUT without its META: what stays has metadata, what goes has keys.

    Parameters
    ----------
    staying : Metadata
        Of the rows that stay.
    column : str
        Its column that ``groups.parquet`` holds as ``key``.
    groups : Path
        The ``groups.parquet`` of OUT.
    """
    for file, _, batch in staying.read([column]):
        yield keyed(file, batch, [column], None), np.zeros(batch.num_rows, bool)
    table = open_table(groups)
    for _, batch in table.batches(["key", "is_dup"]):
        gone = batch.filter(batch.column("is_dup")).select(["key"])
        yield keyed(table, gone, ["key"], None), np.ones(gone.num_rows, bool)


def join_decisions(
    decided: Iterable[tuple[Keyed, np.ndarray]],
    decided_count: int,
    metadata: Metadata,
    columns: Sequence[str],
    witness: str | None,
    removing: Sequence[int],
    work: Path,
) -> Joined:
    """Decide the rows of metadata by the keys of decided rows.

    Parameters
    ----------
    decided : iterable of (Keyed, (n,) bool)
        From `decided_rows` or `published_rows`.
    decided_count : int
        How many rows that will be, nearly.
    metadata : Metadata
    columns, witness
        Its columns that are the key, and the one that should agree too.
    removing : sequence of int
        The states whose rows are removed: `GOES` and what else the user says.
    work : Path
        A folder; the mask stays there.

    Returns
    -------
    Joined
        A key that is decided in two ways makes its rows ambiguous. A row whose witness is not that
        of the one row of its key is contradicted.
    """
    parts = parts_for(decided_count + metadata.rows)
    joined = Joined(empty_mask(work / "is_dup.bin", metadata.rows))
    with (
        spilling(work / "decided", parts) as left,
        spilling(work / "rows", parts) as right,
        progress.bar(decided_count + metadata.rows, "keys", "rows") as bar,
    ):
        for rows, goes in decided:
            put(left, rows, goes=goes)
            bar.update(len(goes))
        for file, first, batch in metadata.read(wanted(columns, witness)):
            rows, numbers = keyed(file, batch, columns, witness), np.arange(batch.num_rows) + first
            put(right, rows, row=numbers)
            lost = numbers[~rows.known]
            joined.is_dup[lost] = UNMATCHED in removing
            joined.note(lost, np.full(len(lost), UNMATCHED))
            bar.update(batch.num_rows)
        for part in progress.track(range(parts), "join", "parts", parts):
            settle(joined, left.read(part), right.read(part), removing)
    return joined


def empty_mask(path: Path, rows: int) -> np.ndarray:
    """Return a mask on disk, (rows,) bool, that says False."""
    with atomic.explained(path):  # in full: a hole that the disk cannot fill ends a process
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for start, stop in plan_blocks(rows, ZEROS):
                file.write(bytes(stop - start))
    return np.memmap(path, np.bool_, "r+", shape=(rows,)) if rows else np.zeros(0, bool)


def put(spill: Spill, rows: Keyed, **more: np.ndarray) -> None:
    """Spill the rows that have a key, with one more column."""
    columns = {"high": rows.marks[0], "low": rows.marks[1], "witness": rows.witness, **more}
    held = pa.RecordBatch.from_pydict(
        {name: values[rows.known] for name, values in columns.items()}
    )
    spill.add(part_of(rows.marks[:, rows.known], spill.parts), held)


def settle(joined: Joined, decided: Any, rows: Any, removing: Sequence[int]) -> None:
    """Decide the rows of one part; either table may be None."""
    if rows is None:
        return
    number, mine = rows["row"].to_numpy(), table_marks(rows)
    if decided is None:
        label = classes(mine)
        state = np.full(len(number), UNMATCHED)
    else:
        known = decided["goes"].to_numpy()
        both = classes(np.concatenate([table_marks(decided), mine], axis=1))
        of, label = both[: len(known)], both[len(known) :]
        state = states(of, known, int(both.max()) + 1)[label]
        lone = np.bincount(of, minlength=int(both.max()) + 1)[label] == 1
        theirs = np.zeros(int(both.max()) + 1, np.uint64)
        theirs[of] = decided["witness"].to_numpy()
        own, other = rows["witness"].to_numpy(), theirs[label]
        state[lone & (own != other) & (own > 0) & (other > 0)] = CONTRADICTED
    joined.is_dup[number] = np.isin(state, removing)
    joined.note(number, state)
    joined.repeated += int((np.bincount(label)[label] > 1).sum())


def table_marks(table: Any) -> np.ndarray:
    """Return the fingerprints in a part, (2, n) uint64."""
    return np.stack([table["high"].to_numpy(), table["low"].to_numpy()])


def states(label: np.ndarray, goes: np.ndarray, count: int) -> np.ndarray:
    """Return the state of each of ``count`` keys, from rows that have them: (count,) int64."""
    all_ = np.bincount(label, minlength=count)
    going = np.bincount(label, weights=goes, minlength=count)
    found = np.full(count, AMBIGUOUS)
    found[going == 0] = STAYS
    found[(going == all_) & (all_ > 0)] = GOES
    found[all_ == 0] = UNMATCHED
    return found
