"""Rows compared by their keys: ``snip filter --on``, and a check of masks that go by position.

One side of a join is the set that a mask was made for, each row with its decision; the other is any
copy of it, shuffled, cut or mixed with other rows. Both are sorted by 128-bit fingerprints of their
keys. A wrong column, another set, or running numbers that start anew in each download would give a
wrong result without an error: so rows in doubt are counted and named, and a join with too many is
refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from snipdedup import progress
from snipdedup.errors import SnipError, UsageError
from snipdedup.features.shards import plan_blocks
from snipdedup.metadata.gather import find_run_metadata
from snipdedup.metadata.masks import MASK, Mask, place_all
from snipdedup.metadata.tables import (
    ColumnUse,
    Metadata,
    Table,
    as_texts,
    open_metadata,
    try_column_uses,
)
from snipdedup.storage import atomic
from snipdedup.storage.external_sort import Sorter, Spread, pack

KEPT, REMOVED, AMBIGUOUS, UNMATCHED, CONTRADICTED = range(5)
STATES = ("stays", "goes", "ambiguous", "unmatched", "contradicted")  # as the manifest names them
CONTENT_COLUMNS = ("url", "uid", "hash", "md5", "sha256")  # what a row is, not its number
MOST_IN_DOUBT = 0.5  # share of the rows, unless the user has decided what happens to them
STATE_ROWS = 1 << 22  # states written and read at a time
SHOWN_ROWS = 3  # rows of each state that a message names
ROW_KEY = np.dtype([("row", "<i8"), ("key", "<u8")])
# Rows of both sides; ``row`` is below 0 for a decided row.
KEYED_ROW = np.dtype([("high", "u8"), ("low", "u8"), ("content", "u8"), ("row", "<i8")])
DECIDED = np.array([-1, -2])  # ``row`` of one that is kept, and of one that is removed


def fingerprints(table: Table, batch: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the fingerprint of each row of a table's record batch, all its columns together.

    Columns are texts, bytes or numbers; a number counts as its text. Returns the fingerprints,
    (2, n) uint64, and whether a row has a key, (n,) bool: not if a column is null or empty.
    """
    columns = [
        key_bytes(table, name, values).to_pylist()
        for name, values in zip(batch.schema.names, batch.columns, strict=True)
    ]
    known = np.array([all(row) for row in zip(*columns, strict=True)], bool)
    keys = columns[0]
    if len(columns) > 1:  # lengths tell where a value ends
        rows = zip(*columns, strict=True)
        keys = [b"".join(b"%d:%b" % (len(value), value) for value in row) for row in rows]
    digests = b"".join(blake2b(key, digest_size=16).digest() for key in keys)
    return np.frombuffer(digests, np.uint64).reshape(-1, 2).T, known


def key_bytes(table: Table, name: str, values: Any) -> Any:
    """Return a column's values as ``large_binary``: numbers by their text, null as no bytes."""
    if not is_binary(values.type):
        values = as_texts(table, name, values, pa.large_string())
    return values.cast(pa.large_binary()).fill_null(b"")


def is_binary(kind: Any) -> bool:
    """Tell whether an arrow type holds bytes that need not be text."""
    tests = pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary
    return any(test(kind) for test in tests)


def number_equal(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Return a number from 0 for each of n fingerprints, (n,) int64, the same for equal ones."""
    order = np.lexsort((low, high))
    new = (np.diff(high[order]) != 0) | (np.diff(low[order]) != 0)
    number = np.zeros(len(high), np.int64)
    number[order[1:]] = np.cumsum(new)
    return number


class KeyColumns(NamedTuple):
    """The columns of a key, and one of content that should agree too where the key is a number."""

    key: Sequence[str]
    content: str | None = None

    def records(self, file: Table, rows: int | np.ndarray, batch: Any) -> np.ndarray:
        """Return the ``rows`` of a batch that have a key as `KEYED_ROW`."""
        prints, known = fingerprints(file, batch.select(list(self.key)))
        content = np.zeros(batch.num_rows, np.uint64)  # 0: none
        if self.content is not None:
            found, there = fingerprints(file, batch.select([self.content]))
            content[there] = found[0, there] | np.uint64(1)
        return pack(KEYED_ROW, *prints, content, np.asarray(rows))[known]

    def needed(self) -> list[str]:
        """Return the columns to read."""
        return list(dict.fromkeys([*self.key, *([self.content] if self.content else [])]))


@dataclass
class KeyJoin:
    """A join of the rows of ``metadata`` with those of a mask's set, and what `run` finds.

    ``known`` has all rows of the mask's set, in its order; or the kept rows only, where ``groups``
    (``groups.parquet``) has the keys of the removed rows. ``policies`` say by state ``keep`` or
    ``remove``; without one rows are kept, but there may not be many. ``counts``, (5,) int64, are
    rows by state, ``examples`` the first rows of each, ``repeated`` rows that share their key.
    """

    metadata: Metadata
    known: Metadata
    groups: Path | None
    known_columns: KeyColumns
    columns: KeyColumns
    policies: dict[int, str | None]
    counts: np.ndarray = field(default_factory=lambda: np.zeros(len(STATES), np.int64))
    examples: list[list[int]] = field(default_factory=lambda: [[] for _ in STATES])
    repeated: int = 0

    def run(self, mask: Mask, work: Path) -> np.ndarray:
        """Return the rows to remove, (rows,) bool, on disk; refuse a join of mostly doubtful rows.

        A key of several rows that are not decided alike makes its rows ambiguous. A row whose
        content is not that of the one row of its key is contradicted.
        """
        count, path = self.metadata.rows, work / "states.npy"
        spread = Spread(mask.rows + count, 0, (1 << 64) - 1)
        sorter = Sorter(work / "rows", KEYED_ROW, lambda r: r["high"], spread=spread)
        with progress.bar(mask.rows + count, "keys", "rows") as bar:
            for records in self._keyed_rows(mask):
                sorter.add(records)
                bar.update(len(records))
        blocks = plan_blocks(count, STATE_ROWS)
        # in full: a hole that the disk cannot fill ends a process
        with atomic.writing_npy(path, np.dtype(np.uint8), (count,)) as out:
            for start, stop in blocks:
                out.write(bytes([UNMATCHED]) * (stop - start))  # until decided
        states = np.load(path, mmap_mode="r+")
        with progress.bar(sorter.count, "join", "rows") as bar:
            for records in sorter.ascending():
                self._decide(states, records)
                bar.update(len(records))
        for start, stop in blocks:
            part = states[start:stop]
            self.counts += np.bincount(part, minlength=len(STATES))
            for state, rows_shown in enumerate(self.examples):
                found = np.flatnonzero(part == state)[: SHOWN_ROWS - len(rows_shown)]
                rows_shown.extend((start + found).tolist())
            part[:] = np.isin(
                part, [s for s, policy in self.policies.items() if policy == "remove"]
            )
        for state in (CONTRADICTED, UNMATCHED, AMBIGUOUS):
            if self.policies.get(state) is None and self.counts[state] > MOST_IN_DOUBT * count:
                raise SnipError(self._refusal(state))
        return states.view(np.bool_)

    def _keyed_rows(self, mask: Mask) -> Iterator[np.ndarray]:
        """Yield the rows of the mask's set, then the others, as `KEYED_ROW`."""
        for file, first, batch in self.known.read(self.known_columns.needed()):
            removed = np.zeros(batch.num_rows, int)
            if self.groups is None:
                removed = np.asarray(mask.is_dup[first : first + batch.num_rows]).astype(int)
            yield self.known_columns.records(file, DECIDED[removed], batch)
        if self.groups is not None:
            table = Table(self.groups)
            for _, batch in table.batches(["key", "is_dup"]):
                keys = batch.filter(batch.column("is_dup")).select(["key"])
                yield KeyColumns(["key"]).records(table, DECIDED[1], keys)
        for file, first, batch in self.metadata.read(self.columns.needed()):
            yield self.columns.records(file, np.arange(first, first + batch.num_rows), batch)

    def _decide(self, states: np.ndarray, records: np.ndarray) -> None:
        """Set the states of rows of whose keys all records are here."""
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
        states[own["row"]] = np.where(contradicted, CONTRADICTED, state[mine])
        self.repeated += int((np.bincount(mine, minlength=1)[mine] > 1).sum())

    def _places(self, state: int) -> str:
        """Return the first rows of a state, for messages."""
        return ", ".join(self.metadata.place(row) for row in self.examples[state])

    def _refusal(self, state: int) -> str:
        key, known, content = ", ".join(self.columns.key), self.known.describe(), self.columns[1]
        problem = {
            UNMATCHED: f"are not in {known} by their {key}: another column or set? If not, "
            "choose what becomes of them: --unmatched keep or remove",
            AMBIGUOUS: f"have a {key} that is both kept and removed in {known}: it does not "
            "tell rows apart; name more columns by comma, or say --ambiguous keep or remove",
            CONTRADICTED: f"have the {key} of a row of {known} but another {content}: numbers of "
            f"another download? Join by --on {content}",
        }
        count = f"{int(self.counts[state]):,} of {self.metadata.rows:,} rows"
        return f"{count} ({self._places(state)}, ...) {problem[state]}"

    def describe(self) -> dict[str, Any]:
        """Return the manifest's entry about the join."""
        counts = dict(zip(STATES, self.counts.tolist(), strict=True))
        return {"on": list(self.columns.key), **counts, "repeated": self.repeated}

    def report(self) -> str:
        """Return the lines that a run prints about its join."""
        counts = self.counts
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
                fate = "removed" if self.policies.get(state) == "remove" else "kept"
                line += f"; they are {fate}: {self._places(state)}"
            if counts[state] or state != CONTRADICTED:
                lines.append(line)
        lines.append(f"  {'repeated':<23}{self.repeated:>12,}  share their key with another row")
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
        place_all(known.sizes(), mask)
    known_columns = [str(known.column(name)) for name in asked]
    content: Sequence[str | None] = (None, None)
    if groups is None and not any(column.lower() in CONTENT_COLUMNS for column in columns):
        both = ([m.column(None, [name]) for m in (known, metadata)] for name in CONTENT_COLUMNS)
        content = next((pair for pair in both if all(pair)), content)
    both_keys = KeyColumns(known_columns, content[0]), KeyColumns(columns, content[1])
    for table, key in zip((known, metadata), both_keys, strict=True):
        use = ColumnUse(key.needed(), key.records, "find rows by another column with --on")
        try_column_uses(table, [use])
    policies = {REMOVED: "remove", UNMATCHED: unmatched, AMBIGUOUS: ambiguous}
    return KeyJoin(metadata, known, groups, *both_keys, policies)


def _find_known(mask: Mask, keys: str | None, asked: Sequence[str]) -> tuple[Metadata, Path | None]:
    """Return ``known`` and ``groups`` of `KeyJoin`: from --keys, from OUT's settings, or OUT."""
    if keys is not None:
        return open_metadata(keys), None
    folder = mask.path.parent
    manifest = mask.manifest
    if manifest is None:
        raise SnipError(
            f"{mask.path} is a mask alone and names no rows; give the metadata that it matches by "
            "position with --keys"
        )
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


def check_removed_keys(metadata: Metadata, mask: Mask, first: int, work: Path) -> str | None:
    """Compare the keys of removed rows with those in OUT, the mask's folder; refuse others.

    Row 0 of the metadata is the mask's row ``first``. Returns what to print, None where OUT has no
    keys of these rows.
    """
    groups = mask.path.parent / "groups.parquet"
    column = _key_column(groups, mask, metadata)
    if column is None:
        return None
    sorter = Sorter(work / "removed_keys", ROW_KEY, lambda records: records["row"].view(np.uint64))
    table = Table(groups)
    for _, batch in table.batches(["row", "key", "is_dup"]):
        row = batch.column("row").to_numpy() - first
        inside = batch.column("is_dup").to_numpy(zero_copy_only=False)
        inside = inside & (row >= 0) & (row < metadata.rows)
        prints, _ = fingerprints(table, batch.select(["key"]))
        sorter.add(pack(ROW_KEY, row[inside], prints[0, inside]))
    count = sorter.count
    # groups.parquet of some methods does not list all removed rows: it proves nothing then.
    if not count or count != np.count_nonzero(mask.is_dup[first : first + metadata.rows]):
        return None
    for records in sorter.ascending():
        records.sort(order="row")
        for file, which, batch in metadata.pick([column], records["row"]):
            prints, _ = fingerprints(file, batch)
            wrong = np.flatnonzero(prints[0] != records["key"][which])
            if len(wrong):
                row = int(records["row"][which][wrong[0]])
                there = pq.read_table(groups, columns=["key"], filters=[("row", "=", row + first)])
                raise SnipError(
                    f"{metadata.place(row)} has the {column} {batch[0][int(wrong[0])].as_py()!r}, "
                    f"the row that {groups.parent} removed there {there['key'][0].as_py()!r}: "
                    f"these rows are in another order, or are others; find them by --on {column}"
                )
    return f"  checked: the {column} of {count:,} removed rows is that in {groups}"


def _key_column(groups: Path, mask: Mask, metadata: Metadata) -> str | None:
    """Return the metadata's column that OUT holds as ``key``, None where none can be compared."""
    out, manifest = groups.parent, mask.manifest
    if manifest is None or not groups.is_file():
        return None
    if manifest["outputs"].get(MASK, {}).get("sha256") != atomic.sha256(mask.path):
        return None  # not the mask that the run wrote
    asked = manifest["settings"].get("key")
    if asked is None and (out / "metadata").is_dir():
        asked = open_metadata(out / "metadata").column()
    same = [name for name in metadata.columns if asked and name.lower() == asked.lower()]
    if len(same) != 1:
        return None
    # Of these types a value has one text, whatever file it is in.
    tests = pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, is_binary
    kinds = [file.schema.field(same[0]).type for file in metadata.files]
    return same[0] if all(any(test(kind) for test in tests) for kind in kinds) else None
