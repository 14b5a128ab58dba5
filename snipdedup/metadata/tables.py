"""Metadata: the table that lies beside the features, row for row, over one or more files.

Nothing is held in memory but offsets: files are streamed, and what stays of each is written under
its own name, in its own schema.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import glob, has_magic
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from snipdedup import progress
from snipdedup.errors import SnipError
from snipdedup.features.shards import (
    Features,
    find_remote,
    identities,
    is_shard_name,
    natural_sort,
    refuse_changed,
)
from snipdedup.metadata.files import SUFFIXES, CsvTable, Table, agree, open_table
from snipdedup.storage import atomic
from snipdedup.storage.remote import RemotePath, is_remote, map_requests

KEY_COLUMNS = ("key", "uid", "sample_id", "hash")
FLUSH_ROWS = 131_072  # a row group of what is written: enough to compress well
FLUSH_BYTES = 64 << 20


class Metadata:
    """The rows of one or more metadata files.

    Attributes
    ----------
    files : tuple of Table
        Each with ``path``, ``rows`` and ``schema``.
    offsets : (files + 1,) int64
        Row of each file's first row, then the number of rows.
    rows : int
    schema : pyarrow.Schema
        That of the first file; the others have the same columns.
    """

    def __init__(self, files: Sequence[Table], folders: Sequence[Path] = ()) -> None:
        self.files, self.folders = tuple(files), tuple(folders)
        sizes = np.array([file.rows for file in files], np.int64)
        self.offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        self.rows = int(self.offsets[-1])
        self.schema = files[0].schema
        self.opened = identities(self.paths())
        for file in files[1:]:
            refuse_other_columns(files[0], file)

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in the first file's order."""
        return list(self.schema.names)

    def paths(self) -> list[Path]:
        """Return the files' paths, in order."""
        return [file.path for file in self.files]

    def inputs(self) -> list[Path]:
        """Return the folders that were named as input, and the files."""
        return [*self.folders, *self.paths()]

    def refuse_changed(self) -> None:
        """Refuse files that changed since they were opened; see `shards.refuse_changed`."""
        refuse_changed(self.paths(), self.opened)

    def column(self, asked: str | None = None, wanted: Sequence[str] = KEY_COLUMNS) -> str | None:
        """Return the name of a column, found in any case.

        Parameters
        ----------
        asked : str, optional
            The column that the user named.
        wanted : sequence of str
            Without ``asked``: the first of these that exists, None if none does.

        Raises
        ------
        SnipError
            If ``asked`` is not there, or could be either of two columns.
        """
        if asked is None:
            found = (self._named(name) for name in wanted)
            return next((names[0] for names in found if names), None)
        names = self._named(asked)
        if len(names) == 1:
            return names[0]
        problem = f"could be {' or '.join(names)}" if names else "is not there"
        raise SnipError(
            f"{self.files[0].path}: column {asked!r} {problem}; its columns: "
            f"{', '.join(self.columns)}"
        )

    def needed(self, asked: str | None, wanted: Sequence[str], flag: str) -> str:
        """Return the name of a column as `column` does; refuse metadata without one."""
        name = self.column(asked, wanted)
        if name is None:
            raise SnipError(
                f"{self.files[0].path}: no column is called {' or '.join(wanted)}; name one with "
                f"{flag}; its columns: {', '.join(self.columns)}"
            )
        return name

    def _named(self, name: str) -> list[str]:
        if name in self.columns:
            return [name]
        return [column for column in self.columns if column.lower() == name.lower()]

    def check_matches(self, features: Features) -> None:
        """Refuse metadata that does not belong to the features, row for row; see `check_rows`."""
        self.check_rows([(str(shard.path), shard.rows) for shard in features.shards])

    def check_rows(self, shards: Sequence[tuple[str, int]]) -> None:
        """Refuse metadata whose rows are not those of shards, given by name and number of rows.

        Raises
        ------
        SnipError
            If the numbers of rows differ: in all or, with as many files as shards, in one of them.
        """
        if len(self.files) == len(shards):
            for file, (name, rows) in zip(self.files, shards, strict=True):
                if file.rows != rows:
                    raise SnipError(
                        f"{file.path} has {file.rows:,} rows, its features {name} have "
                        f"{rows:,}; expected one row of metadata for each row of features"
                    )
        total = sum(rows for _, rows in shards)
        if self.rows != total:
            first, last = shards[0][0], shards[-1][0]
            where = first if first == last else f"{first} .. {last}"
            raise SnipError(
                f"{named(self.files)}: {self.rows:,} rows of metadata, but {total:,} rows "
                f"of features in {where}; expected one for each"
            )

    def read(self, columns: Sequence[str]) -> Iterator[tuple[Table, int, Any]]:
        """Yield (file, global row of its first row, record batch of these columns), in row order.

        ``columns`` are exact names, from `column`; they come in the order asked.
        """
        for number, file in enumerate(self.files):
            for at, batch in file.batches(list(columns)):
                yield file, int(self.offsets[number]) + at, batch.select(columns)

    def pick(self, columns: Sequence[str], rows: np.ndarray) -> Iterator[tuple[Table, slice, Any]]:
        """Yield (file, which of ``rows``, record batch of their values), in row order.

        Parameters
        ----------
        columns : sequence of str
            Exact names, from `column`; they come in the order asked.
        rows : (n,) int64
            Ascending global rows. Row groups without any are not read.
        """
        cuts = np.searchsorted(rows, self.offsets)
        for number in np.flatnonzero(np.diff(cuts)):
            file, cut = self.files[number], int(cuts[number])
            local = rows[cut : cuts[number + 1]] - self.offsets[number]
            for at, batch in file.batches(list(columns), local):
                stop = int(cuts[number]) + int(np.searchsorted(local, at + batch.num_rows))
                if stop > cut:
                    places = local[cut - cuts[number] : stop - cuts[number]] - at
                    picked = batch.select(columns).take(pa.array(places))
                    yield file, slice(cut, stop), picked
                cut = stop

    def place(self, row: int) -> str:
        """Return the file and the row in it of a global row, for messages."""
        number = int(np.searchsorted(self.offsets, row, side="right")) - 1
        return f"{self.files[number].path} row {row - int(self.offsets[number]):,}"

    def take(self, column: str, rows: np.ndarray) -> Any:
        """Return one column's values at the given rows, as texts.

        Parameters
        ----------
        column : str
            Its exact name, from `column`.
        rows : (n,) int64
            Ascending global rows.

        Returns
        -------
        pyarrow.ChunkedArray of string
            n values; null where the file has null.
        """
        parts = [
            as_texts(file, column, batch.column(0)) for file, _, batch in self.pick([column], rows)
        ]
        return pa.chunked_array(parts, pa.string())


class Added(Protocol):
    """A column that is added to the rows that are written."""

    @property
    def field(self) -> Any:
        """Its ``pyarrow.Field``."""

    def between(self, start: int, stop: int) -> Any:
        """Return its values for global rows ``start`` to ``stop``, asked for in row order."""


def open_metadata(spec: str | Path) -> Metadata:
    """Open metadata; of parquet files the footers only are read, CSV files are counted.

    Parameters
    ----------
    spec : str or Path
        A folder (its ``*.parquet``, else its ``*.csv``; not recursive), a glob, or a file; or a URL
        of one of these.

    Raises
    ------
    SnipError
        If there is none, a file is damaged, or the files differ in their columns.
    """
    if is_remote(spec):
        return metadata_of(map_requests(open_table, find_metadata(spec)))
    folders = [folder for folder in [Path(spec).expanduser()] if folder.is_dir()]
    return metadata_of([open_table(path) for path in find_metadata(spec)], folders)


def metadata_of(files: Sequence[Table], folders: Sequence[Path] = ()) -> Metadata:
    """Return files as one `Metadata`; CSV files agree on types, as far as their values do."""
    agree([file for file in files if isinstance(file, CsvTable)])
    return Metadata(files, folders)


def find_metadata(spec: str | Path) -> list[Path]:
    """Return the files that a META argument means, in natural order."""
    text = str(spec)
    if is_remote(spec):
        url = spec.url if isinstance(spec, RemotePath) else text
        return find_remote(url, None, SUFFIXES, "no metadata found")
    path = Path(text).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        for suffix in SUFFIXES:
            found = natural_sort(p for p in path.iterdir() if is_shard_name(p, suffix))
            if found:
                return found
        raise SnipError(
            f"no metadata in {path}: expected {' or '.join('*' + s for s in SUFFIXES)} "
            "(the folder is not searched recursively)"
        )
    if not has_magic(text):
        raise SnipError(f"no such metadata file or folder: {text}")
    found = natural_sort(p for p in map(Path, glob(str(path))) if p.is_file())
    if not found:
        raise SnipError(f"no metadata found: nothing matches {text}")
    return found


def refuse_other_columns(first: Table, other: Table) -> None:
    """Refuse a file whose columns are not those of the first file; order and types may differ."""
    lacking = [name for name in first.schema.names if name not in other.schema.names]
    more = [name for name in other.schema.names if name not in first.schema.names]
    if lacking or more:
        found = [f"lacks {', '.join(lacking)}"] * bool(lacking)
        found += [f"has {', '.join(more)} besides"] * bool(more)
        raise SnipError(
            f"{other.path} {' and '.join(found)}, compared with {first.path}; files of one set "
            "have the same columns"
        )


def named(files: Sequence[Any]) -> str:
    """Return files (tables or shards) as a message names them."""
    first = str(files[0].path)
    return first if len(files) == 1 else f"{first} and {len(files) - 1} more"


def as_texts(file: Table, column: str, values: Any) -> Any:
    """Return values of a file's column as texts."""
    try:
        return values.cast(pa.string())
    except (pa.ArrowException, NotImplementedError) as error:
        raise SnipError(
            f"{file.path}: column {column!r} is {values.type}, expected texts or numbers"
        ) from error


def write_kept(
    metadata: Metadata,
    is_dup: np.ndarray,
    folder: Path,
    added: Sequence[Added] = (),
    *,
    offset: int = 0,
    notes: Path | None = None,
) -> list[Path]:
    """Write the rows of each file that stay, as parquet of the same name and schema.

    Parameters
    ----------
    metadata : Metadata
    is_dup : (n,) bool
        True = remove; may be memory-mapped.
    folder : Path
        Where the files go. A file of which nothing stays is written with no rows.
    added : sequence of Added
        Columns that come after the files' own.
    offset : int
        The place in ``is_dup`` of row 0 of ``metadata``.
    notes : Path, optional
        Folder of notes on files that are whole; those that a stopped run left are not written
        again.

    Returns
    -------
    list of Path
        The files, in order.

    Raises
    ------
    SnipError
        If rows lie outside the mask, two files would have one name, or a file is damaged.
    """
    if offset < 0 or offset + metadata.rows > len(is_dup):
        raise SnipError(
            f"{named(metadata.files)}: rows {offset:,} to {offset + metadata.rows:,} of the set "
            f"are wanted, the mask has {len(is_dup):,}"
        )
    names = kept_names(metadata.files, [column.field.name for column in added])
    targets = [folder / name for name in names]
    with progress.bar(metadata.rows, "metadata", "rows") as bar:
        for file, path, first in zip(metadata.files, targets, metadata.offsets, strict=False):
            note = notes and notes / f"{path.name}.json"
            if note and atomic.is_done(note, folder):
                bar.update(file.rows)
                continue
            for rows in write_file(file, path, is_dup[offset:], int(first), added):
                bar.update(rows)
            if note:
                atomic.write_done_file(note, [path], {})
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


def write_file(
    file: Table, path: Path, is_dup: np.ndarray, first: int, added: Sequence[Added]
) -> Iterator[int]:
    """Write the rows of one file that stay, yielding how many rows were read each time.

    ``first`` is the global row of the file's row 0.
    """
    schema = file.schema
    for column in added:
        schema = schema.append(column.field)
    with writing(path, schema, file.codec) as write:
        for at, batch in file.batches():
            begin, end = first + at, first + at + batch.num_rows
            stay = pa.array(~np.asarray(is_dup[begin:end]))
            columns = [*batch.columns, *(column.between(begin, end) for column in added)]
            write(staying(columns, stay, schema))
            yield batch.num_rows


def staying(columns: Sequence[Any], stay: Any, schema: Any) -> Any:
    """Return the rows of some columns that stay, as a record batch."""
    return pa.RecordBatch.from_arrays([values.filter(stay) for values in columns], schema=schema)


def try_writing(file: Table, batch: Any) -> None:
    """Write rows of a file to nowhere as `write_file` does, or refuse the column that it cannot."""
    stay = pa.array(np.arange(batch.num_rows) % 2 == 0)
    for name, values in zip(batch.schema.names, batch.columns, strict=True):
        schema = pa.schema([file.schema.field(name)])
        try:
            with pq.ParquetWriter(
                pa.BufferOutputStream(), schema, compression=file.codec
            ) as writer:
                writer.write_table(pa.Table.from_batches([staying([values], stay, schema)]))
        except (pa.ArrowException, NotImplementedError, OSError) as error:
            raise SnipError(
                f"{file.path}: column {name!r} is {values.type}, expected a type of which rows can "
                f"be written as parquet: {error}"
            ) from error


@contextmanager
def writing(path: Path, schema: Any, codec: str) -> Iterator[Any]:
    """Yield a function that takes record batches; the file appears when the block ends."""
    waiting: list[Any] = []

    def flush() -> None:
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting, schema))
            waiting.clear()

    def write(batch: Any) -> None:
        # Few rows of each batch may stay: gather them, or row groups would be tiny.
        if batch.num_rows:
            waiting.append(batch)
        if sum(b.num_rows for b in waiting) >= FLUSH_ROWS or (
            sum(b.nbytes for b in waiting) >= FLUSH_BYTES
        ):
            flush()

    with (
        atomic.replacing(path) as part,
        pq.ParquetWriter(part, schema, compression=codec) as writer,
    ):
        yield write
        flush()
