"""Lists of the kept rows for other tools: DataComp's uids, and keys for webdataset.

A list that names rows by uid or key cannot tell two rows of one name apart: if one of them is kept
and the other removed, the list is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from snipdedup.errors import SnipError, UsageError
from snipdedup.metadata.kept_rows import count_kept
from snipdedup.metadata.keys import fingerprints, number_equal
from snipdedup.metadata.precheck import ColumnUse
from snipdedup.metadata.tables import KEY_COLUMNS, Metadata, Table, as_texts
from snipdedup.storage import atomic
from snipdedup.storage.external_sort import Sorter, Spread, pack

FOLDER = "export"
DATACOMP, KEYS = "datacomp", "keys"
UID = np.dtype("u8,u8")  # the type that DataComp's resharder reads
UID_TEXT = re.compile("[0-9a-fA-F]{32}")
RECORD = np.dtype([("high", "u8"), ("low", "u8"), ("row", "<i8"), ("is_dup", "?")])

Numbers = Callable[[Metadata, Table, int, Any, np.ndarray], np.ndarray]


def list_columns(kinds: list[str], metadata: Metadata | None, key: str | None) -> dict[str, str]:
    """Return the column that each list is made of; refuse metadata without it."""
    if metadata is None:
        if {DATACOMP, KEYS} & set(kinds):
            raise UsageError("--export names rows by their metadata: give --metadata too")
        return {}
    columns = {}
    if DATACOMP in kinds:
        columns[DATACOMP] = metadata.require_column(None, ("uid",), "a column uid")
    if KEYS in kinds:
        columns[KEYS] = metadata.require_column(key, KEY_COLUMNS, "--key")
    return columns


def list_uses(columns: dict[str, str], metadata: Metadata) -> list[ColumnUse]:
    """Return what columns, from `list_columns`, are read for."""

    def convert(numbers: Numbers, file: Table, first: int, batch: Any) -> None:
        removed = np.ones(batch.num_rows, bool)  # which rows need a key is not known yet
        numbers(metadata, file, first, batch, removed)
        as_texts(file, batch.schema.names[0], batch.column(0))

    uses = {
        DATACOMP: (partial(convert, uid_numbers), "leave datacomp out of --export"),
        KEYS: (partial(convert, key_numbers),
               "name another column with --key, or leave keys out of --export"),
    }  # fmt: skip
    return [ColumnUse([column], *uses[kind]) for kind, column in columns.items()]


def write_lists(
    columns: dict[str, str], metadata: Metadata, is_dup: np.ndarray, out: Path, work: Path
) -> list[Path]:
    """Write the lists of `list_columns` into the folder ``out``; return their paths.

    Refused: invalid uids, kept rows without a key, a name of both a kept and a removed row.
    ``work`` is for temporary files.
    """
    paths = []
    if DATACOMP in columns:
        parts = _kept_names(metadata, columns[DATACOMP], uid_numbers, is_dup, work)
        paths.append(out / "datacomp.npy")
        with atomic.writing_npy(paths[-1], UID, (count_kept(is_dup),)) as file:
            for names in parts:
                uids = pack(UID, names["high"], names["low"])
                uids.sort()
                uids.tofile(file)
    if KEYS in columns:
        for _ in _kept_names(metadata, columns[KEYS], key_numbers, is_dup, work):
            pass  # refused before anything is written
        paths.append(out / "keys.txt")
        _write_keys(paths[-1], metadata, columns[KEYS], is_dup)
    return paths


def _kept_names(
    metadata: Metadata, column: str, numbers: Numbers, is_dup: np.ndarray, work: Path
) -> Iterator[np.ndarray]:
    """Yield the names of the kept rows as `RECORD`, in parts whose ``high`` ascends."""
    spread = Spread(metadata.rows, 0, (1 << 64) - 1)
    sorter = Sorter(work / "names", RECORD, lambda records: records["high"], spread=spread)
    for file, first, batch in metadata.read([column]):
        rows = np.arange(first, first + batch.num_rows)
        removed = np.asarray(is_dup[first : first + batch.num_rows])
        sorter.add(pack(RECORD, *numbers(metadata, file, first, batch, removed), rows, removed))
    for records in sorter.ascending():
        _refuse_shared(metadata, column, records)
        yield records[~records["is_dup"]]


def _refuse_shared(metadata: Metadata, column: str, records: np.ndarray) -> None:
    """Refuse a name that a kept and a removed row have in common."""
    name, is_dup = number_equal(records["high"], records["low"]), records["is_dup"]
    removed, count = np.bincount(name, weights=is_dup), np.bincount(name)
    shared = np.flatnonzero(((removed > 0) & (removed < count))[name])
    if len(shared):
        first = shared[np.argmin(records["row"][shared])]
        same = records[name == name[first]]
        kept, gone = (int(same["row"][same["is_dup"] == dup].min()) for dup in (False, True))
        text = metadata.take(column, np.array([kept]))[0].as_py()
        raise SnipError(
            f"{len(shared):,} rows share their {column} with a row that is decided otherwise: "
            f"{text!r} is kept in {metadata.place(kept)} and removed in {metadata.place(gone)}; "
            f"a list by {column} cannot tell them apart; use the files in metadata/, or a column "
            "without repeats"
        )


def uid_numbers(
    metadata: Metadata, file: Table, first: int, batch: Any, is_dup: np.ndarray
) -> np.ndarray:
    """Return uids as numbers, (2, n) uint64: the first 16 hexadecimal digits and the last 16."""
    del is_dup  # wrong uids are not DataComp's, whichever rows are kept
    uids = as_texts(file, batch.schema.names[0], batch.column(0)).to_pylist()
    for row, uid in enumerate(uids, first):
        if not UID_TEXT.fullmatch(uid or ""):
            raise SnipError(
                f"{metadata.place(row)}: uid {uid!r}, expected 32 hexadecimal digits, as DataComp's"
            )
    return np.frombuffer(bytes.fromhex("".join(uids)), ">u8").astype(np.uint64).reshape(-1, 2).T


def key_numbers(
    metadata: Metadata, file: Table, first: int, batch: Any, is_dup: np.ndarray
) -> np.ndarray:
    """Return keys' fingerprints, (2, n) uint64; refuse kept rows that have no key."""
    prints, known = fingerprints(file, batch)
    nameless = np.flatnonzero(~known & ~is_dup)
    if len(nameless):
        raise SnipError(
            f"{metadata.place(first + int(nameless[0]))}: no {batch.schema.names[0]}, so no list "
            "by it can name this row; use the files in metadata/, or another column with --key"
        )
    return prints


def _write_keys(path: Path, metadata: Metadata, column: str, is_dup: np.ndarray) -> None:
    """Write the keys of the kept rows, one a line, in row order."""
    with atomic.replacing(path) as part, part.open("w", encoding="utf-8", newline="\n") as file:
        for table, first, batch in metadata.read([column]):
            keep = pa.array(~np.asarray(is_dup[first : first + batch.num_rows]))
            keys = as_texts(table, column, batch.column(0).filter(keep)).to_pylist()
            for key in keys:
                if len(key.splitlines()) != 1:
                    raise SnipError(
                        f"{table.path}: {column} {key!r} has a line break; a list has one a line"
                    )
            file.writelines(f"{key}\n" for key in keys)
