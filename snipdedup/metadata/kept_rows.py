"""The rows that a mask keeps, written: of metadata, of features, and as lists for other tools.

Metadata is written as parquet, features in their own type. Lists are DataComp's uids, and keys for
webdataset. They cannot tell two rows of one name apart: if one of them is kept and the other
removed, the list is refused.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from snipdedup import progress
from snipdedup.errors import SnipError, UsageError
from snipdedup.features.formats import Shard, open_shard, opened_npz
from snipdedup.features.shards import plan_blocks
from snipdedup.metadata.join_by_key import fingerprints, number_equal
from snipdedup.metadata.tables import KEY_COLUMNS, ColumnUse, Metadata, Table, as_texts
from snipdedup.storage import atomic
from snipdedup.storage.external_sort import Sorter, Spread, pack

LISTS = "export"  # the folder of lists
DATACOMP, KEYS = "datacomp", "keys"  # kinds of lists
FLUSH_ROWS = 131_072  # a row group of what is written: enough to compress well
FLUSH_BYTES = 64 << 20
FEATURE_ROWS = 16_384  # rows of features in memory at a time
UID = np.dtype("u8,u8")  # the type that DataComp's resharder reads
UID_TEXT = re.compile("[0-9a-fA-F]{32}")
NAMED_ROW = np.dtype([("high", "u8"), ("low", "u8"), ("row", "<i8"), ("is_dup", "?")])


class AddedColumn(Protocol):
    """A column that is added to the rows that are written."""

    @property
    def field(self) -> Any:
        """Its ``pyarrow.Field``."""

    def between(self, start: int, stop: int) -> Any:
        """Return its values for global rows ``start`` to ``stop``, asked for in row order."""


def write_kept(
    metadata: Metadata,
    is_dup: np.ndarray,
    folder: Path,
    added: Sequence[AddedColumn] = (),
    *,
    done: Path | None = None,
) -> list[Path]:
    """Write the kept rows of each file, as parquet of the same name and schema; return the paths.

    ``is_dup`` is (rows,) bool, True = remove. Columns ``added`` come after the files' own. A file
    of which no row is kept is written with no rows. ``done`` is a folder of done files: what a
    stopped run finished is not written again.
    """
    if len(is_dup) != metadata.rows:
        raise SnipError(
            f"{metadata.describe()} has {metadata.rows:,} rows, the mask has {len(is_dup):,}"
        )
    paths = [folder / n for n in kept_names(metadata.files, [c.field.name for c in added])]
    with progress.bar(metadata.rows, "metadata", "rows") as bar:
        for file, path, first in zip(metadata.files, paths, metadata.offsets, strict=False):
            done_file = done and done / f"{path.name}.json"
            if done_file and atomic.is_done(done_file, folder):
                bar.update(file.rows)
                continue
            _write_kept_file(file, path, is_dup, int(first), added, bar)
            if done_file:
                atomic.write_done_file(done_file, [path], {})
    return paths


def kept_names(files: Sequence[Table], added: Sequence[str] = ()) -> list[str]:
    """Return the names to write files under; refuse names and columns that would clash."""
    names: dict[str, Path] = {}
    for file in files:
        name = file.path.stem + ".parquet"
        if name in names:
            raise SnipError(
                f"{names[name]} and {file.path} would both be written as {name}; rename one"
            )
        names[name] = file.path
        for column in added:
            if column in file.schema.names:
                raise SnipError(
                    f"{file.path} has a column {column} already, which snip writes; drop or "
                    "rename it first"
                )
    return list(names)


def try_writing(file: Table, first: int, batch: Any) -> None:
    """Write rows of a file to memory as `write_kept` does; refuse the column that it cannot."""
    keep = pa.array((first + np.arange(batch.num_rows)) % 2 == 0)
    for name, values in zip(batch.schema.names, batch.columns, strict=True):
        schema = pa.schema([file.schema.field(name)])
        memory = pa.BufferOutputStream()
        try:
            with pq.ParquetWriter(memory, schema, compression=file.codec) as writer:
                kept = pa.RecordBatch.from_arrays([values.filter(keep)], schema=schema)
                writer.write_table(pa.Table.from_batches([kept]))
        except (pa.ArrowException, NotImplementedError, OSError) as error:
            raise SnipError(
                f"{file.path}: column {name!r} is {values.type}, expected a type of which rows can "
                f"be written as parquet: {error}"
            ) from error


def _write_kept_file(
    file: Table, path: Path, is_dup: np.ndarray, first: int, added: Sequence[AddedColumn], bar: Any
) -> None:
    """Write the kept rows of a file that begins at row ``first``.

    Batches are gathered: of each only a few rows may be kept, and row groups would be tiny.
    """
    schema, waiting = file.schema, []
    for column in added:
        schema = schema.append(column.field)
    with (
        atomic.replacing(path) as part,
        pq.ParquetWriter(part, schema, compression=file.codec) as writer,
    ):
        for at, batch in file.batches():
            begin, end = first + at, first + at + batch.num_rows
            keep = pa.array(~np.asarray(is_dup[begin:end]))
            columns = [*batch.columns, *(column.between(begin, end) for column in added)]
            arrays = [values.filter(keep) for values in columns]
            kept = pa.RecordBatch.from_arrays(arrays, schema=schema)
            if kept.num_rows:
                waiting.append(kept)
            rows, size = sum(b.num_rows for b in waiting), sum(b.nbytes for b in waiting)
            if rows >= FLUSH_ROWS or size >= FLUSH_BYTES:
                writer.write_table(pa.Table.from_batches(waiting))
                waiting.clear()
            bar.update(batch.num_rows)
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting))


def feature_arrays(path: Path) -> dict[str, Shard]:
    """Open a file of features; return the arrays of an ``.npz`` by name, else the one array."""
    if path.suffix.lower() != ".npz":
        return {"": open_shard(path)}
    with opened_npz(path) as (_, members):
        return {name: open_shard(path, name) for name in members}


def feature_rows(path: Path) -> int:
    """Return the rows of a file of features; refuse one that is damaged, by its name."""
    counts = {name: shard.rows for name, shard in feature_arrays(path).items()}
    if len(set(counts.values())) != 1:
        found = ", ".join(f"{name} {rows:,}" for name, rows in counts.items()) or "no array"
        raise SnipError(f"{path}: expected arrays with one row for each image, found {found}")
    return next(iter(counts.values()))


def write_kept_features(path: Path, target: Path, is_dup: np.ndarray) -> None:
    """Write the kept rows of a file of features in its own format, ``is_dup`` (rows,) bool.

    ``path`` and ``target`` have one name: ``.npy``, ``.npz`` (all its arrays, written uncompressed
    so that they can be read in place) or parquet.
    """
    suffix = path.suffix.lower()
    if suffix == ".npy":
        write_kept_npy(open_shard(path), target, is_dup)
    elif suffix == ".npz":
        with atomic.replacing(target) as part, zipfile.ZipFile(part, "w") as archive:
            for name, shard in feature_arrays(path).items():
                shape = count_kept(is_dup), shard.dim
                header = {"descr": shard.dtype.str, "fortran_order": False, "shape": shape}
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array_header_1_0(file, header)
                    file.writelines(_kept_blocks(shard, is_dup))
    else:
        write_kept(Metadata([Table(path)]), is_dup, target.parent)


def write_kept_npy(shard: Shard, path: Path, is_dup: np.ndarray) -> None:
    """Write the kept rows of a shard as ``.npy``."""
    with atomic.writing_npy(path, shard.dtype, (count_kept(is_dup), shard.dim)) as file:
        file.writelines(_kept_blocks(shard, is_dup))


def count_kept(is_dup: np.ndarray) -> int:
    """Return how many rows are kept."""
    return len(is_dup) - int(np.count_nonzero(is_dup))


def _kept_blocks(shard: Shard, is_dup: np.ndarray) -> Iterator[bytes]:
    """Yield the bytes of the kept rows, block by block."""
    for start, stop in plan_blocks(shard.rows, FEATURE_ROWS):
        yield shard.read(start, stop)[~np.asarray(is_dup[start:stop])].tobytes()


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
    remedies = {
        DATACOMP: "leave datacomp out of --export",
        KEYS: "name another column with --key, or leave keys out of --export",
    }

    def convert(kind: str, file: Table, first: int, batch: Any) -> None:
        removed = np.ones(batch.num_rows, bool)  # which rows need a key is not known yet
        _name_numbers(kind, metadata, file, first, batch, removed)
        as_texts(file, batch.schema.names[0], batch.column(0))

    return [ColumnUse([c], partial(convert, kind), remedies[kind]) for kind, c in columns.items()]


def write_lists(
    columns: dict[str, str], metadata: Metadata, is_dup: np.ndarray, out: Path, work: Path
) -> list[Path]:
    """Write the lists of `list_columns` into the folder ``out``; return their paths.

    Refused: invalid uids, kept rows without a key, a name of both a kept and a removed row.
    """
    paths = []
    if DATACOMP in columns:
        parts = _kept_names(metadata, columns[DATACOMP], DATACOMP, is_dup, work)
        paths.append(out / "datacomp.npy")
        with atomic.writing_npy(paths[-1], UID, (count_kept(is_dup),)) as file:
            for names in parts:
                np.sort(pack(UID, names["high"], names["low"])).tofile(file)
    if KEYS in columns:
        for _ in _kept_names(metadata, columns[KEYS], KEYS, is_dup, work):
            pass  # refused before anything is written
        paths.append(out / "keys.txt")
        _write_keys(paths[-1], metadata, columns[KEYS], is_dup)
    return paths


def _kept_names(
    metadata: Metadata, column: str, kind: str, is_dup: np.ndarray, work: Path
) -> Iterator[np.ndarray]:
    """Yield the names of the kept rows as `NAMED_ROW`, in parts whose ``high`` ascends.

    A name that a kept and a removed row have in common is refused.
    """
    spread = Spread(metadata.rows, 0, (1 << 64) - 1)
    sorter = Sorter(work / "names", NAMED_ROW, lambda records: records["high"], spread=spread)
    for file, first, batch in metadata.read([column]):
        rows = np.arange(first, first + batch.num_rows)
        removed = np.asarray(is_dup[first : first + batch.num_rows])
        names = _name_numbers(kind, metadata, file, first, batch, removed)
        sorter.add(pack(NAMED_ROW, *names, rows, removed))
    for records in sorter.ascending():
        name = number_equal(records["high"], records["low"])
        removed, count = np.bincount(name, weights=records["is_dup"]), np.bincount(name)
        shared = np.flatnonzero(((removed > 0) & (removed < count))[name])
        if len(shared):
            first = shared[np.argmin(records["row"][shared])]
            same = records[name == name[first]]
            one, other = (int(same["row"][same["is_dup"] == dup].min()) for dup in (False, True))
            text, where = metadata.take(column, np.array([one]))[0].as_py(), metadata.place
            raise SnipError(
                f"{len(shared):,} rows share their {column} with a row that is decided otherwise: "
                f"{text!r} is kept in {where(one)} and removed in {where(other)}; "
                f"a list by {column} cannot tell them apart; use the files in metadata/, or a "
                "column without repeats"
            )
        yield records[~records["is_dup"]]


def _name_numbers(
    kind: str, metadata: Metadata, file: Table, first: int, batch: Any, removed: np.ndarray
) -> np.ndarray:
    """Return names as numbers, (2, n) uint64: the halves of uids, the fingerprints of keys.

    What is no uid of DataComp's is refused, whichever rows are kept; and kept rows without a key.
    """
    if kind == DATACOMP:
        uids = as_texts(file, batch.schema.names[0], batch.column(0)).to_pylist()
        for row, uid in enumerate(uids, first):
            if not UID_TEXT.fullmatch(uid or ""):
                found = f"{metadata.place(row)}: uid {uid!r}"
                raise SnipError(f"{found}, expected 32 hexadecimal digits, as DataComp's")
        return np.frombuffer(bytes.fromhex("".join(uids)), ">u8").astype(np.uint64).reshape(-1, 2).T
    prints, known = fingerprints(file, batch)
    nameless = np.flatnonzero(~known & ~removed)
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
