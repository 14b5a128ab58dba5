"""``snip filter --on``: rows are decided by what columns say, not by position.

One side is the set that a mask was made for, each row with its decision; the other is any copy of
it, shuffled, cut or mixed with other rows. Both sides are sorted by fingerprints of their keys, on
disk where they are long. A wrong column, another set, or running numbers that start anew in each
download would give a wrong result without an error: so rows in doubt are counted and named, and a
join with too many of them is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snipdedup import progress
from snipdedup.errors import SnipError, UsageError
from snipdedup.features.shards import plan_blocks
from snipdedup.metadata.keys import fingerprints, number_equal
from snipdedup.metadata.masks import Mask, place_all, sizes_of
from snipdedup.metadata.precheck import ColumnUse
from snipdedup.metadata.tables import Metadata, Table, open_metadata, open_table
from snipdedup.metadata.texts import find_run_metadata
from snipdedup.storage import atomic
from snipdedup.storage.external_sort import Sorter, Spread, pack
from snipdedup.storage.out_folder import read_manifest

KEPT, REMOVED, AMBIGUOUS, UNMATCHED, CONTRADICTED = range(5)
STATES = ("stays", "goes", "ambiguous", "unmatched", "contradicted")  # as the manifest names them
CONTENT_COLUMNS = ("url", "uid", "hash", "md5", "sha256")  # what a row is, not its number
MOST_IN_DOUBT = 0.5  # share of the rows, unless the user has decided what happens to them
ZEROS = 1 << 22  # bytes written at a time
SHOWN_ROWS = 3  # rows of each state that a message names
# Rows of both sides; ``row`` is below 0 for a decided row.
RECORD = np.dtype([("high", "u8"), ("low", "u8"), ("content", "u8"), ("row", "<i8")])
DECIDED = np.array([-1, -2])  # ``row`` of one that is kept, and of one that is removed


class KeyColumns(NamedTuple):
    """The columns of a key, and one of content that should agree too where the key is a number."""

    key: Sequence[str]
    content: str | None = None

    def records(
        self, file: Table, rows: int | np.ndarray, batch: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the ``rows`` of a batch as `RECORD`, and whether each has a key, (n,) bool."""
        prints, known = fingerprints(file, batch.select(list(self.key)))
        content = np.zeros(batch.num_rows, np.uint64)  # 0: none
        if self.content is not None:
            found, there = fingerprints(file, batch.select([self.content]))
            content[there] = found[0, there] | np.uint64(1)
        return pack(RECORD, *prints, content, np.asarray(rows))[known], known

    def needed(self) -> list[str]:
        """Return the columns to read."""
        return list(dict.fromkeys([*self.key, *([self.content] if self.content else [])]))

    def use(self) -> ColumnUse:
        """Return what the columns are read for."""
        return ColumnUse(self.needed(), self.records, "find rows by another column with --on")


@dataclass
class JoinResult:
    """How the rows of a table were decided: ``is_dup`` (rows,) bool, on disk, True = remove.

    ``counts`` (5,) int64 are rows by state, ``examples`` the first rows of each state, ``repeated``
    the rows that share their key with another row of the table.
    """

    is_dup: np.ndarray
    counts: np.ndarray = field(default_factory=lambda: np.zeros(len(STATES), np.int64))
    examples: list[list[int]] = field(default_factory=lambda: [[] for _ in STATES])
    repeated: int = 0

    def add(self, rows: np.ndarray, state: np.ndarray, removing: Sequence[int]) -> None:
        """Decide rows by their states."""
        self.is_dup[rows] = np.isin(state, removing)
        self.counts += np.bincount(state, minlength=len(STATES))
        for number in np.unique(state):
            first = np.sort(rows[state == number])[:SHOWN_ROWS].tolist()
            self.examples[number] = sorted([*self.examples[number], *first])[:SHOWN_ROWS]


@dataclass(frozen=True)
class KeyJoin:
    """A join to be made.

    Attributes
    ----------
    known : Metadata
        Of all rows of the mask's set, in its order; or of the kept rows only, where ``groups``
        (``groups.parquet``) has the keys of the removed rows.
    known_columns, columns : KeyColumns
        In ``known``, and in the metadata to filter.
    removing, asked : sequence of int
        States whose rows are removed; states that the user allows for any number of rows.
    """

    known: Metadata
    groups: Path | None
    known_columns: KeyColumns
    columns: KeyColumns
    removing: Sequence[int]
    asked: Sequence[int]

    def run(self, metadata: Metadata, mask: Mask, work: Path) -> JoinResult:
        """Decide the rows of metadata; refuse a join of which more than half are in doubt.

        A key of several rows that are not decided alike makes its rows ambiguous. A row whose
        content is not that of the one row of its key is contradicted.
        """
        total = mask.rows + metadata.rows
        spread = Spread(total, 0, (1 << 64) - 1)
        sorter = Sorter(work / "rows", RECORD, lambda records: records["high"], spread=spread)
        result = JoinResult(_empty_mask(work / "is_dup.bin", metadata.rows))
        with progress.bar(total, "keys", "rows") as bar:
            for records in self._decided(mask):
                sorter.add(records)
                bar.update(len(records))
            for file, first, batch in metadata.read(self.columns.needed()):
                rows = np.arange(first, first + batch.num_rows)
                records, known = self.columns.records(file, rows, batch)
                sorter.add(records)
                lost = rows[~known]
                result.add(lost, np.full(len(lost), UNMATCHED), self.removing)
                bar.update(batch.num_rows)
        with progress.bar(sorter.count, "join", "rows") as bar:
            for records in sorter.ascending():
                self._decide(result, records)
                bar.update(len(records))
        for state in (CONTRADICTED, UNMATCHED, AMBIGUOUS):
            in_doubt = int(result.counts[state])
            if state not in self.asked and in_doubt > MOST_IN_DOUBT * metadata.rows:
                raise SnipError(self._refusal(state, result, metadata))
        return result

    def _decided(self, mask: Mask) -> Iterator[np.ndarray]:
        """Yield the rows of the mask's set as `RECORD`."""
        for file, first, batch in self.known.read(self.known_columns.needed()):
            goes = np.zeros(batch.num_rows, int)
            if self.groups is None:
                goes = np.asarray(mask.is_dup[first : first + batch.num_rows]).astype(int)
            yield self.known_columns.records(file, DECIDED[goes], batch)[0]
        if self.groups is not None:
            table = open_table(self.groups)
            for _, batch in table.batches(["key", "is_dup"]):
                keys = batch.filter(batch.column("is_dup")).select(["key"])
                yield KeyColumns(["key"]).records(table, DECIDED[1], keys)[0]

    def _decide(self, result: JoinResult, records: np.ndarray) -> None:
        """Decide rows; no key is in two of these parts."""
        key = number_equal(records["high"], records["low"])
        keys = int(key.max(initial=-1)) + 1
        decided = records["row"] < 0
        count = np.bincount(key[decided], minlength=keys)
        removed = np.bincount(key[records["row"] == DECIDED[1]], minlength=keys)
        state = np.full(keys, AMBIGUOUS)
        state[removed == 0] = KEPT
        state[removed == count] = REMOVED
        state[count == 0] = UNMATCHED
        content = np.zeros(keys, np.uint64)
        content[key[decided]] = records["content"][decided]
        own, mine = records[~decided], key[~decided]
        other = np.where(count[mine] == 1, content[mine], 0)
        contradicted = (own["content"] != other) & (own["content"] > 0) & (other > 0)
        result.add(own["row"], np.where(contradicted, CONTRADICTED, state[mine]), self.removing)
        result.repeated += int((np.bincount(mine, minlength=1)[mine] > 1).sum())

    def _refusal(self, state: int, result: JoinResult, metadata: Metadata) -> str:
        key, known, content = ", ".join(self.columns.key), self.known.describe(), self.columns[1]
        problem = {
            UNMATCHED: f"are not in {known} by their {key}: another column or set? If not, "
            "choose what becomes of them: --unmatched keep or remove",
            AMBIGUOUS: f"have a {key} that is both kept and removed in {known}: it does not "
            "tell rows apart; name more columns by comma, or say --ambiguous keep or remove",
            CONTRADICTED: f"have the {key} of a row of {known} but another {content}: numbers of "
            f"another download? Join by --on {content}",
        }
        examples = ", ".join(metadata.place(row) for row in result.examples[state])
        count = f"{int(result.counts[state]):,} of {metadata.rows:,} rows"
        return f"{count} ({examples}, ...) {problem[state]}"

    def describe(self, result: JoinResult) -> dict[str, Any]:
        """Return the manifest's entry about the join."""
        counts = dict(zip(STATES, result.counts.tolist(), strict=True))
        return {"on": list(self.columns.key), **counts, "repeated": result.repeated}

    def report(self, result: JoinResult, metadata: Metadata) -> str:
        """Return the lines that a run prints about its join."""
        counts = result.counts
        matched = int(counts.sum() - counts[[UNMATCHED, CONTRADICTED]].sum())
        lines = [f"  matched by {', '.join(self.columns.key):<12}{matched:>12,}"]
        reasons = {
            UNMATCHED: "not in the mask's set",
            AMBIGUOUS: "of these: their key is both kept and removed there",
            CONTRADICTED: f"another {self.columns.content}, so no match",
        }
        for state, reason in reasons.items():
            line = f"  {STATES[state]:<23}{counts[state]:>12,}  {reason}"
            if counts[state]:
                where = ", ".join(metadata.place(row) for row in result.examples[state])
                line += f"; they are {'removed' if state in self.removing else 'kept'}: {where}"
            if counts[state] or state != CONTRADICTED:
                lines.append(line)
        lines.append(f"  {'repeated':<23}{result.repeated:>12,}  share their key with another row")
        return "\n".join(lines)


def plan_key_join(
    metadata: Metadata,
    mask: Mask,
    on: str,
    keys: str | None,
    unmatched: str | None,
    ambiguous: str | None,
) -> KeyJoin:
    """Find the columns of ``--on`` on both sides; the other arguments are flags of that name."""
    asked = [name.strip() for name in on.split(",") if name.strip()]
    if not asked:
        raise UsageError(f"--on names columns, by comma, found {on!r}")
    columns = [str(metadata.column(name)) for name in asked]
    known, groups = _find_known(mask, keys, asked)
    if groups is None:
        place_all(sizes_of(known), mask)
    known_columns = [str(known.column(name)) for name in asked]
    content: Sequence[str | None] = (None, None)
    if groups is None and not any(column.lower() in CONTENT_COLUMNS for column in columns):
        both = ([m.column(None, [name]) for m in (known, metadata)] for name in CONTENT_COLUMNS)
        content = next((pair for pair in both if all(pair)), content)
    policies = {UNMATCHED: unmatched, AMBIGUOUS: ambiguous}
    return KeyJoin(
        known,
        groups,
        KeyColumns(known_columns, content[0]),
        KeyColumns(columns, content[1]),
        [REMOVED, *(state for state, policy in policies.items() if policy == "remove")],
        [state for state, policy in policies.items() if policy is not None],
    )


def _find_known(mask: Mask, keys: str | None, asked: Sequence[str]) -> tuple[Metadata, Path | None]:
    """Return ``known`` and ``groups`` of `KeyJoin`: from --keys, from OUT's settings, or OUT."""
    if keys is not None:
        return open_metadata(keys), None
    folder = mask.path.parent
    if mask.sizes is None:  # no manifest vouches for it
        raise SnipError(
            f"{mask.path} is a mask alone and names no rows; give the metadata that it matches by "
            "position with --keys"
        )
    manifest = read_manifest(folder, "dedup")
    used = find_run_metadata(manifest) if manifest["request"].get("metadata") else None
    if used is not None:
        return used, None
    if (folder / "metadata").is_dir():
        found = open_metadata(folder / "metadata")
        if found.rows == mask.rows:
            return found, None
        column = found.column(manifest["settings"]["key"])
        if found.rows == mask.rows - int(np.count_nonzero(mask.is_dup)) and column is not None:
            if [column.lower()] == [name.lower() for name in asked]:
                return found, folder / "groups.parquet"
            raise SnipError(
                f"{folder} knows the removed rows by their {column} only, and the metadata that "
                f"it was made from is not there; join --on {column}, or give it with --keys"
            )
    raise SnipError(
        f"{folder} was made without metadata, or it is not there any more; give the metadata that "
        "matches its features by position with --keys"
    )


def _empty_mask(path: Path, rows: int) -> np.ndarray:
    """Return a mask on disk, (rows,) bool, of False."""
    with atomic.explained(
        path
    ):  # in full: a hole in a map that the disk cannot fill ends a process
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for start, stop in plan_blocks(rows, ZEROS):
                file.write(bytes(stop - start))
    return np.memmap(path, np.bool_, "r+", shape=(rows,)) if rows else np.zeros(0, bool)
