"""Metadata: the table that lies beside the features, row for row, over one or more files.

Nothing is held in memory but offsets: files are streamed, and what stays of each is written under
its own name, in its own schema.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from snipdedup import progress, store
from snipdedup.errors import SnipError
from snipdedup.shards import Features, is_shard_name, natural_sort
from snipdedup.tables import SUFFIXES, CsvTable, Table, agree, open_table

KEY_COLUMNS = ("key", "uid", "sample_id", "hash")
DUP_COUNT = "dup_count"
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
        parts = []
        cuts = np.searchsorted(rows, self.offsets)
        for number in np.flatnonzero(np.diff(cuts)):
            local = rows[cuts[number] : cuts[number + 1]] - self.offsets[number]
            parts += take_texts(self.files[number], column, local)
        return pa.chunked_array(parts, pa.string())


def open_metadata(spec: str | Path) -> Metadata:
    """Open metadata; of parquet files the footers only are read, CSV files are counted.

    Parameters
    ----------
    spec : str or Path
        A folder (its ``*.parquet``, else its ``*.csv``; not recursive), a glob, or a file.

    Raises
    ------
    SnipError
        If there is none, a file is damaged, or the files differ in their columns.
    """
    folders = [folder for folder in [Path(spec).expanduser()] if folder.is_dir()]
    return metadata_of([open_table(path) for path in find_metadata(spec)], folders)


def metadata_of(files: Sequence[Table], folders: Sequence[Path] = ()) -> Metadata:
    """Return files as one `Metadata`; CSV files agree on types, as far as their values do."""
    agree([file for file in files if isinstance(file, CsvTable)])
    return Metadata(files, folders)


def find_metadata(spec: str | Path) -> list[Path]:
    """Return the files that a META argument means, in natural order."""
    text = str(spec)
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


def take_texts(file: Table, column: str, rows: np.ndarray) -> list[Any]:
    """Return a column's values at ascending rows of one file, as arrays of strings."""
    parts = []
    cut = 0
    for at, batch in file.batches([column], rows):
        stop = int(np.searchsorted(rows, at + batch.num_rows))
        if stop > cut:
            values = batch.column(0).take(pa.array(rows[cut:stop] - at))
            try:
                parts.append(values.cast(pa.string()))
            except (pa.ArrowException, NotImplementedError) as error:
                raise SnipError(
                    f"{file.path}: column {column!r} is {values.type}, expected texts or numbers"
                ) from error
        cut = stop
    return parts


def write_kept(
    metadata: Metadata,
    is_dup: np.ndarray,
    folder: Path,
    counts: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    first_file: int = 0,
    last_file: int | None = None,
    offset: int = 0,
    resume: bool = False,
) -> list[Path]:
    """Write the rows of each file that stay, as parquet of the same name and schema.

    Parameters
    ----------
    metadata : Metadata
    is_dup : (n,) bool
        True = remove; may be memory-mapped.
    folder : Path
        Where the files go. A file of which nothing stays is written with no rows.
    counts : ((m,) int64, (m,) int64), optional
        Ascending rows of the mask and their ``dup_count``; rows that are not listed have 0.
        Adds the column ``dup_count``.
    first_file, last_file : int
        Which of ``metadata.files`` to write, ``last_file`` exclusive.
    offset : int
        The place in ``is_dup`` of row 0 of ``metadata``.
    resume : bool
        Leave files that are there already.

    Returns
    -------
    list of Path
        The files, in order.

    Raises
    ------
    SnipError
        If rows lie outside the mask, two files would have one name, or a file is damaged.
    """
    stop = len(metadata.files) if last_file is None else last_file
    begin, end = int(metadata.offsets[first_file]), int(metadata.offsets[stop])
    if end > begin and (offset + begin < 0 or offset + end > len(is_dup)):
        raise SnipError(
            f"{named(metadata.files[first_file:stop])}: rows {offset + begin:,} to "
            f"{offset + end:,} of the set are wanted, the mask has {len(is_dup):,}"
        )
    chosen = metadata.files[first_file:stop]
    targets = [folder / name for name in kept_names(chosen, adding_counts=counts is not None)]
    with progress.bar(end - begin, "metadata", "rows") as bar:
        for number, path in enumerate(targets, first_file):
            file = metadata.files[number]
            if resume and path.is_file():
                bar.update(file.rows)
                continue
            place = offset + int(metadata.offsets[number])
            for rows in write_file(file, path, is_dup, place, counts):
                bar.update(rows)
    return targets


def kept_names(files: Sequence[Table], adding_counts: bool) -> list[str]:
    """Return the names to write files under; refuse names and columns that would clash."""
    names: dict[str, Path] = {}
    for file in files:
        name = file.path.stem + ".parquet"
        if name in names:
            raise SnipError(
                f"{names[name]} and {file.path} would both be written as {name}; rename one"
            )
        names[name] = file.path
        if adding_counts and DUP_COUNT in file.schema.names:
            raise SnipError(
                f"{file.path} has a column {DUP_COUNT} already, which snip writes; drop or rename "
                "it first"
            )
    return list(names)


def write_file(
    file: Table,
    path: Path,
    is_dup: np.ndarray,
    offset: int,
    counts: tuple[np.ndarray, np.ndarray] | None,
) -> Iterator[int]:
    """Write the rows of one file that stay, yielding how many rows were read each time.

    ``offset`` is the mask's place of the file's row 0.
    """
    schema = file.schema
    if counts is not None:
        schema = schema.append(pa.field(DUP_COUNT, pa.int64()))
    with writing(path, schema, file.codec) as write:
        for at, batch in file.batches():
            begin = offset + at
            stay = ~np.asarray(is_dup[begin : begin + batch.num_rows])
            columns = batch.filter(pa.array(stay)).columns
            if counts is not None:
                found = dense_counts(counts, begin, begin + batch.num_rows)
                columns = [*columns, pa.array(found[stay])]
            write(pa.RecordBatch.from_arrays(columns, schema=schema))
            yield batch.num_rows


def dense_counts(counts: tuple[np.ndarray, np.ndarray], start: int, stop: int) -> np.ndarray:
    """Return ``dup_count`` of rows ``start`` to ``stop``, (n,) int64, 0 where none is listed."""
    rows, values = counts
    low, high = np.searchsorted(rows, [start, stop])
    found = np.zeros(stop - start, np.int64)
    found[rows[low:high] - start] = values[low:high]
    return found


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

    with store.replacing(path) as part, pq.ParquetWriter(part, schema, compression=codec) as writer:
        yield write
        flush()
