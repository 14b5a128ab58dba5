"""A person's decisions (``--decisions``): rows that are kept or removed whatever the rules say.

The groups of such rows are decided twice: first by the rules alone; then with all rows kept that
stayed or were told to stay, and none that was told to go. So nothing else changes, but that rows
whose representative is gone get another one, or stay.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from snipdedup.deduplication.read_out import pick
from snipdedup.errors import SnipError
from snipdedup.groups.members import Block, Members, Rank, concatenate, sort_members
from snipdedup.metadata.find_keys import open_keys
from snipdedup.metadata.gather import RowTexts
from snipdedup.metadata.tables import Metadata
from snipdedup.storage.external_sort import among

FILE = "decisions.csv"  # in OUT
KEEP, DROP = "keep", "drop"
# Decides rows of a block again: it, a rank, rows that are kept, and rows that are removed.
Decide = Callable[[Block, Rank, np.ndarray, np.ndarray], Members]


class Decisions(NamedTuple):
    """Rows that are told to be kept, and those told to be removed, (n,) int64 each, ascending."""

    kept: np.ndarray
    dropped: np.ndarray

    def digest(self) -> str:
        """Return a text that differs where the decisions do."""
        return hashlib.sha256(self.csv().encode()).hexdigest()

    def csv(self) -> str:
        """Return them as a file that `read_decisions` reads, ordered by row."""
        words = [*((row, KEEP) for row in self.kept.tolist())]
        words += [(row, DROP) for row in self.dropped.tolist()]
        return "row,decision\n" + "".join(f"{row},{word}\n" for row, word in sorted(words))

    def column(self, rows: np.ndarray) -> Any:
        """Return what was decided of rows, (n,) strings; null where nothing was."""
        kept, dropped = among(self.kept, rows), among(self.dropped, rows)
        words = pa.array([KEEP, DROP], pa.string())
        return words.take(pa.array(np.where(dropped, 1, 0), mask=~(kept | dropped)))


def read_sheet(path: Path, what: str, columns: set[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the lines of a CSV file, each with its place; refuse one without one of the columns.

    Spreadsheets of some countries save it with semicolons or tabs; these are read, too.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SnipError(f"{path}: expected {what} as UTF-8 CSV: {error}") from error
    head = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count))
    missing = columns - set(reader.fieldnames or ())
    if missing:
        raise SnipError(f"{path}: expected {what}, it has no column {min(missing)}")
    for line in reader:
        yield f"{path} line {reader.line_num}", {k: (v or "").strip() for k, v in line.items() if k}


def read_decisions(
    paths: Sequence[Path], rows: int, metadata: Metadata | None = None, key: str | None = None
) -> Decisions:
    """Read files with a column ``decision`` and ``row`` or ``key``; later files go before earlier.

    Lines without a decision are left out. Refused are rows that the set of ``rows`` rows does not
    have, keys that no row has or several have, lines whose row has another key, and a row with two
    decisions in one file. ``key`` is the metadata's column of keys, if it is not the usual one.
    """
    decided: dict[int, bool] = {}
    for path in paths:
        lines = [
            (where, line, word)
            for where, line in read_sheet(path, "a file of decisions", {"decision"})
            if (word := line["decision"].lower())
        ]
        names = {line.get("key", "") for _, line, _ in lines} - {""}
        known = {}
        if names and metadata is not None:
            known = rows_of_keys(path, rows, metadata, key, names)
        own: dict[int, bool] = {}
        for where, line, word in lines:
            if word not in (KEEP, DROP):
                raise SnipError(f"{where}: expected keep or drop as decision, found {word!r}")
            row = named_row(where, line, rows, None if metadata is None else known)
            if own.setdefault(row, word == KEEP) != (word == KEEP):
                raise SnipError(f"{where}: row {row:,} is told to be kept and to be removed")
        decided |= own
    kept = sorted(row for row, keep in decided.items() if keep)
    dropped = sorted(row for row, keep in decided.items() if not keep)
    return Decisions(np.array(kept, np.int64), np.array(dropped, np.int64))


def named_row(
    where: str, line: dict[str, str], rows: int, known: dict[str, list[int]] | None
) -> int:
    """Return the row that a line names by number, by key, or by both; ``known`` has rows of keys.

    Without ``known`` no keys are known, and a key beside a number is not looked at.
    """
    number, key = line.get("row", ""), line.get("key", "")
    keys = known or {}
    named = keys.get(key) or keys.get(key.removeprefix("'"), [])
    if number:
        if not number.isdecimal() or int(number) >= rows:
            raise SnipError(
                f"{where}: expected a row from 0 to {rows - 1:,}, found {number!r}; the file may "
                "be of another run"
            )
        if key and known is not None and int(number) not in named:
            raise SnipError(
                f"{where}: row {number} does not have the key {key!r} in this set; the file may be "
                "of another run"
            )
        return int(number)
    if not key:
        raise SnipError(f"{where}: expected a row number or a key, found neither")
    if known is None:
        raise SnipError(f"{where}: {key!r} is a key, and no metadata is known: give --metadata")
    if len(named) != 1:
        many = f"{len(named)} rows have" if named else "no row has"
        raise SnipError(f"{where}: {many} the key {key!r}; name rows by number")
    return named[0]


def rows_of_keys(
    where: Path, rows: int, metadata: Metadata, asked: str | None, names: set[str]
) -> dict[str, list[int]]:
    """Return the rows of each of some keys; in a sheet they may have a quote in front."""
    keys = open_keys(where, rows, RowTexts(metadata), asked)
    if keys.column is None:
        raise SnipError(f"{where}: {metadata.describe()} has no column of keys: name row numbers")
    return keys.rows_of(sorted(names | {name.removeprefix("'") for name in names}))


def decided_rank(rank: Rank, kept: np.ndarray, dropped: np.ndarray) -> Rank:
    """Return a keep order in which ``kept`` rows come first and ``dropped`` ones last."""

    def places(rows: np.ndarray) -> np.ndarray:
        order = np.lexsort((rank(rows), among(dropped, rows), ~among(kept, rows)))
        place = np.empty(len(rows), np.uint64)
        place[order] = np.arange(len(rows), dtype=np.uint64)
        return place

    return places


def decide_again(
    members: Members, block: Block, decisions: Decisions, rank: Rank, decide: Decide
) -> Members:
    """Return the members of whole groups with those groups decided again that have decisions."""
    every = np.concatenate(decisions)
    groups = np.unique(members.group[np.isin(members.row, every)])
    inside = np.isin(members.group, groups)
    some, others = pick(members, inside), pick(members, ~inside)
    if not len(some.row):
        return members
    kept = np.union1d(some.row[~some.is_dup], decisions.kept)
    kept = np.setdiff1d(kept, decisions.dropped)
    new_rank = decided_rank(rank, kept, decisions.dropped)
    new = decide(block.of(np.sort(some.row)), new_rank, kept, decisions.dropped)
    is_dup = (new.is_dup & ~among(kept, new.row)) | among(decisions.dropped, new.row)
    named = np.where(is_dup, new.representative, new.row)
    # what was told to go, and duplicates no row that stays, names itself
    named = np.where(np.isin(named, new.row[is_dup]), new.row, named)
    similarity = np.where(named == new.row, np.float32(1), new.similarity)
    new = Members(new.row, new.group, named, similarity, is_dup)
    return sort_members(concatenate(others, new))


def add_lone(members: Members, rows: np.ndarray) -> Members:
    """Return members and removed ``rows`` that are in no group, each as a group of its own."""
    ones = np.ones(len(rows), np.float32)
    return sort_members(
        concatenate(members, Members(rows, rows, rows, ones, np.ones(len(rows), bool)))
    )
