"""The rows that a mask keeps, written: of metadata as parquet, of features in their own type."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from snipdedup import progress
from snipdedup.errors import SnipError
from snipdedup.features.formats import Shard, open_shard
from snipdedup.features.shards import plan_blocks
from snipdedup.metadata.tables import Metadata, Table, open_table
from snipdedup.storage import atomic

FILES = "files"  # below a work folder: what is written before all of it is whole
FLUSH_ROWS = 131_072  # a row group of what is written: enough to compress well
FLUSH_BYTES = 64 << 20
FEATURE_ROWS = 16_384  # rows of features in memory at a time


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
    names = kept_names(metadata.files, [column.field.name for column in added])
    targets = [folder / name for name in names]
    with progress.bar(metadata.rows, "metadata", "rows") as bar:
        for file, path, first in zip(metadata.files, targets, metadata.offsets, strict=False):
            done_file = done and done / f"{path.name}.json"
            if done_file and atomic.is_done(done_file, folder):
                bar.update(file.rows)
                continue
            for rows in _write_kept_file(file, path, is_dup, int(first), added):
                bar.update(rows)
            if done_file:
                atomic.write_done_file(done_file, [path], {})
    return targets


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
    file: Table, path: Path, is_dup: np.ndarray, first: int, added: Sequence[AddedColumn]
) -> Iterator[int]:
    """Write the kept rows of a file that begins at row ``first``; yield how many are read.

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
            yield batch.num_rows
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting))


def feature_rows(path: Path) -> int:
    """Return the rows of a file of features; refuse one that is damaged, by its name."""
    if path.suffix.lower() != ".npz":
        return open_shard(path).rows
    counts = {name: open_shard(path, name).rows for name in _array_names(path)}
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
        kept = count_kept(is_dup)
        with atomic.replacing(target) as part, zipfile.ZipFile(part, "w") as archive:
            for name in _array_names(path):
                shard = open_shard(path, name)
                header = {"descr": shard.dtype.str, "fortran_order": False}
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array_header_1_0(
                        file, {**header, "shape": (kept, shard.dim)}
                    )
                    file.writelines(_kept_blocks(shard, is_dup))
    else:
        write_kept(Metadata([open_table(path)]), is_dup, target.parent)


def write_kept_npy(shard: Shard, path: Path, is_dup: np.ndarray) -> None:
    """Write the kept rows of a shard as ``.npy``."""
    with atomic.writing_npy(path, shard.dtype, (count_kept(is_dup), shard.dim)) as file:
        file.writelines(_kept_blocks(shard, is_dup))


def count_kept(is_dup: np.ndarray) -> int:
    """Return how many rows are kept."""
    return len(is_dup) - int(np.count_nonzero(is_dup))


def _array_names(path: Path) -> list[str]:
    """Return the names of the arrays in an ``.npz``."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError) as error:
        raise SnipError(f"{path}: truncated or not an .npz archive: {error}") from error


def _kept_blocks(shard: Shard, is_dup: np.ndarray) -> Iterator[bytes]:
    """Yield the bytes of the kept rows, block by block."""
    for start, stop in plan_blocks(shard.rows, FEATURE_ROWS):
        yield shard.read(start, stop)[~np.asarray(is_dup[start:stop])].tobytes()
