"""Lists for other tools, of the rows that stay: DataComp's uids, and keys for webdataset.

A list that names rows by uid or key cannot say which of two rows of one name is meant: where one
of them stays and the other goes, it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from snipdedup.errors import SnipError, UsageError
from snipdedup.metadata.files import Table
from snipdedup.metadata.keys import classes, fingerprints, part_of, text_bytes
from snipdedup.metadata.precheck import Use
from snipdedup.metadata.spill import parts_for, spilling
from snipdedup.metadata.tables import KEY_COLUMNS, Metadata, as_texts
from snipdedup.storage import atomic

FOLDER = "export"
DATACOMP, KEYS = "datacomp", "keys"
UID = np.dtype("u8,u8")  # the type that DataComp's resharder reads
DIGITS = 32  # of a uid
NIBBLES = np.full(256, 255, np.uint8)  # what each hexadecimal digit is worth
NIBBLES[list(b"0123456789abcdef")] = np.arange(16)
NIBBLES[list(b"ABCDEF")] = np.arange(10, 16)

Numbers = Callable[[Metadata, Table, int, Any, np.ndarray], np.ndarray]


def list_columns(kinds: list[str], metadata: Metadata | None, key: str | None) -> dict[str, str]:
    """Return the column that each list is made of; refuse metadata without it."""
    if metadata is None:
        if {DATACOMP, KEYS} & set(kinds):
            raise UsageError("--export names rows by their metadata: give --metadata too")
        return {}
    columns = {}
    if DATACOMP in kinds:
        columns[DATACOMP] = metadata.needed(None, ("uid",), "a column uid")
    if KEYS in kinds:
        columns[KEYS] = metadata.needed(key, KEY_COLUMNS, "--key")
    return columns


def uses(columns: dict[str, str], metadata: Metadata) -> list[Use]:
    """Return what columns are read for, as `list_columns` has them."""
    first = {
        file.path: int(row) for file, row in zip(metadata.files, metadata.offsets, strict=False)
    }

    def numbers(of: Numbers, file: Table, batch: Any) -> None:
        goes = np.ones(batch.num_rows, bool)  # which rows need a key is not known yet
        of(metadata, file, first[file.path], batch, goes)

    def key_texts(file: Table, batch: Any) -> None:
        numbers(key_numbers, file, batch)
        as_texts(file, batch.schema.names[0], batch.column(0))

    wanted: dict[str, tuple[Callable[[Table, Any], None], str]] = {
        DATACOMP: (partial(numbers, uid_numbers), "leave datacomp out of --export"),
        KEYS: (key_texts, "name another column with --key, or leave keys out of --export"),
    }
    return [Use([column], *wanted[kind]) for kind, column in columns.items()]


def write_lists(
    columns: dict[str, str], metadata: Metadata, is_dup: np.ndarray, out: Path, work: Path
) -> list[Path]:
    """Write the lists into the folder ``out``; return their paths.

    Parameters
    ----------
    columns : dict
        From `list_columns`.
    metadata : Metadata
    is_dup : (rows,) bool
    out, work : Path
        Where the lists go, and where sorting may spill to.

    Raises
    ------
    SnipError
        If a uid is none, a row that stays has no key, or a uid or key names a row that stays and
        one that goes.
    """
    paths = []
    if DATACOMP in columns:
        with closing(
            staying_parts(metadata, columns[DATACOMP], uid_numbers, is_dup, work)
        ) as parts:
            paths.append(write_uids(out / "datacomp.npy", parts, count_staying(is_dup)))
    if KEYS in columns:
        for _ in staying_parts(metadata, columns[KEYS], key_numbers, is_dup, work):
            pass  # refused before anything is written
        paths.append(write_keys(out / "keys.txt", metadata, columns[KEYS], is_dup))
    return paths


def count_staying(is_dup: np.ndarray) -> int:
    """Return how many rows stay."""
    return len(is_dup) - int(np.count_nonzero(is_dup))


def staying_parts(
    metadata: Metadata, column: str, numbers: Numbers, is_dup: np.ndarray, work: Path
) -> Generator[np.ndarray, None, None]:
    """Yield the names of the rows that stay, (2, n) uint64, in parts that ascend."""
    parts = parts_for(metadata.rows)
    with spilling(work / FOLDER, parts) as spill:
        for file, first, batch in metadata.read([column]):
            rows = np.arange(first, first + batch.num_rows)
            goes = np.asarray(is_dup[first : first + batch.num_rows])
            marks = numbers(metadata, file, first, batch, goes)
            held = {"high": marks[0], "low": marks[1], "row": rows, "goes": goes}
            spill.add(part_of(marks, parts), pa.RecordBatch.from_pydict(held))
        for part in range(parts):
            table = spill.read(part)
            if table is not None:
                marks = np.stack([table["high"].to_numpy(), table["low"].to_numpy()])
                goes = table["goes"].to_numpy()
                refuse_shared(metadata, column, marks, goes, table["row"].to_numpy())
                yield marks[:, ~goes]


def refuse_shared(
    metadata: Metadata, column: str, marks: np.ndarray, goes: np.ndarray, rows: np.ndarray
) -> None:
    """Refuse a name that a row that stays and one that goes have in common."""
    label = classes(marks)
    going, all_ = np.bincount(label, weights=goes), np.bincount(label)
    mixed = np.flatnonzero(((going > 0) & (going < all_))[label])
    if len(mixed):
        same = np.flatnonzero(label == label[mixed[0]])
        stay, go = int(rows[same[~goes[same]][0]]), int(rows[same[goes[same]][0]])
        name = metadata.take(column, np.array([stay]))[0].as_py()
        raise SnipError(
            f"{len(mixed):,} rows share their {column} with a row that is decided otherwise: "
            f"{name!r} stays in {metadata.place(stay)} and goes in {metadata.place(go)}. A list "
            f"by {column} cannot tell them apart; use the files in metadata/, or a column without "
            "repeats"
        )


def uid_numbers(
    metadata: Metadata, file: Table, first: int, batch: Any, goes: np.ndarray
) -> np.ndarray:
    """Return uids as numbers, (2, n) uint64: the first 16 hexadecimal digits and the last 16."""
    del goes  # a set with wrong uids is no set of DataComp's, whichever rows stay
    data, starts = text_bytes(file, batch.schema.names[0], batch.column(0))
    whole = np.diff(starts) == DIGITS
    digits = np.full((batch.num_rows, DIGITS), 255, np.uint8)
    digits[whole] = NIBBLES[data[starts[:-1][whole, None] + np.arange(DIGITS)]]
    wrong = np.flatnonzero((digits > 15).any(axis=1))
    if len(wrong):
        text = batch.column(0)[int(wrong[0])].as_py()
        raise SnipError(
            f"{metadata.place(first + int(wrong[0]))}: uid {text!r}, expected {DIGITS} "
            "hexadecimal digits, as DataComp's"
        )
    packed = (digits[:, 0::2] << 4) | digits[:, 1::2]
    return np.ascontiguousarray(packed.view(">u8").astype(np.uint64).T)


def key_numbers(
    metadata: Metadata, file: Table, first: int, batch: Any, goes: np.ndarray
) -> np.ndarray:
    """Return keys' fingerprints, (2, n) uint64; refuse rows that stay and have no key."""
    marks, known = fingerprints(file, batch)
    nameless = np.flatnonzero(~known & ~goes)
    if len(nameless):
        row = first + int(nameless[0])
        raise SnipError(
            f"{metadata.place(row)}: no {batch.schema.names[0]}, so no list by it can name this "
            "row; use the files in metadata/, or another column with --key"
        )
    return marks


def write_uids(path: Path, parts: Iterator[np.ndarray], count: int) -> Path:
    """Write uids, in parts that ascend, as one sorted ``.npy``."""
    with atomic.writing_npy(path, UID, (count,)) as file:
        for marks in parts:
            high, low = marks
            order = np.lexsort((low, high))
            uids = np.empty(len(order), UID)
            uids["f0"], uids["f1"] = high[order], low[order]
            uids.tofile(file)
    return path


def write_keys(path: Path, metadata: Metadata, column: str, is_dup: np.ndarray) -> Path:
    """Write the keys of the rows that stay, one a line, in row order."""
    with atomic.replacing(path) as part, part.open("w", encoding="utf-8", newline="\n") as file:
        for table, first, batch in metadata.read([column]):
            stay = pa.array(~np.asarray(is_dup[first : first + batch.num_rows]))
            keys = as_texts(table, column, batch.column(0).filter(stay)).to_pylist()
            for key in keys:
                if len(key.splitlines()) != 1:
                    raise SnipError(
                        f"{table.path}: {column} {key!r} has a line break; a list has one a line"
                    )
            file.writelines(f"{key}\n" for key in keys)
    return path
