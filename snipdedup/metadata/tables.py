"""Metadata: the table beside the features, row for row, in one or more parquet or CSV files.

Files are read in bounded batches. Every column of a CSV file is text: no types are guessed. What a
run will do with columns is tried on each file's first rows before hours of work begin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from snipdedup.errors import SnipError
from snipdedup.features.shards import FileRows, natural_sort
from snipdedup.storage.listing import find_files
from snipdedup.storage.remote import RemotePath, arrow_source, map_requests

SUFFIXES = (".parquet", ".csv")
KEY_COLUMNS = ("key", "uid", "sample_id", "hash")
NAME_COLUMNS = ("path", "image_path", "filename", "id")  # keys where there is none of the former
ANY_KEY = (*KEY_COLUMNS, *NAME_COLUMNS)
BATCH_ROWS = 65_536
BATCH_BYTES = 32 << 20
STREAM_BYTES = 1 << 20
# A block is also the longest CSV row that can be read; quoted texts may hold line breaks.
CSV_READ = pa.csv.ReadOptions(block_size=16 << 20)
CSV_PARSE = pa.csv.ParseOptions(newlines_in_values=True)
DEFAULT_CODEC = "snappy"
CODECS = {"UNCOMPRESSED": "none", "LZ4_RAW": "lz4"}  # that pyarrow's writer names otherwise
STRING = pa.string()
NO_CSV = "not a CSV with one kind of row"
# pyarrow reads these types but cannot filter them: they are read as the plain types.
VIEWS = {"string_view": pa.string(), "binary_view": pa.binary()}


class Table:
    """One metadata file: its rows, its arrow schema, and the codec to write its rows with.

    Row groups of parquet are read one at a time. A CSV file is read once to count its rows when it
    is opened; ``is_text`` is True for it: numbers are texts. Refused: what is missing, empty,
    truncated, or of another type.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise SnipError(f"no such file: {path}")
        if not path.stat().st_size:
            raise SnipError(f"{path}: empty file, expected metadata; fetch or write it again")
        self.path, self.is_text, self.codec = path, path.suffix.lower() == ".csv", DEFAULT_CODEC
        if path.suffix.lower() not in SUFFIXES:
            raise SnipError(f"{path}: expected metadata of type {' or '.join(SUFFIXES)}")
        if self.is_text:
            with explain_damage(path, NO_CSV):
                names = pa.csv.open_csv(arrow_source(path), CSV_READ, CSV_PARSE).schema.names
            self.schema: Any = pa.schema([(name, pa.string()) for name in names])
        else:
            footer = stream_parquet(path)
            schema, self.rows = footer.schema_arrow, int(footer.metadata.num_rows)
            fields = [field.with_type(_without_views(field.type)) for field in schema]
            self.schema = pa.schema(fields, schema.metadata)
            groups = [footer.metadata.row_group(n) for n in range(footer.num_row_groups)]
            self.groups = [(group.num_rows, group.total_byte_size) for group in groups]
            chunks = [groups[0].column(n) for n in range(groups[0].num_columns)] if groups else []
            if chunks:
                codec = max(chunks, key=lambda chunk: chunk.total_compressed_size).compression
                self.codec = CODECS.get(codec, codec.lower())
        repeated = sorted({n for n in self.schema.names if self.schema.names.count(n) > 1})
        if repeated:
            raise SnipError(
                f"{path}: several columns are called {', '.join(repeated)}; rename them"
            )
        if self.is_text:
            self.rows = sum(batch.num_rows for batch in self._csv_blocks())

    def batches(
        self, columns: list[str] | None = None, rows: np.ndarray | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Yield (first row, record batch) in row order.

        Parts of the file without any of ``rows``, (n,) int64, ascending, may be skipped.
        """
        if not self.is_text:
            yield from self._parquet_batches(columns, rows)
            return
        at = 0
        for block in self._csv_blocks():
            if rows is not None and (not len(rows) or at > rows[-1]):
                return
            chosen = block if columns is None else block.select(columns)
            for begin in range(0, chosen.num_rows, BATCH_ROWS):
                yield at + begin, chosen.slice(begin, BATCH_ROWS)
            at += block.num_rows

    def _csv_blocks(self) -> Iterator[Any]:
        texts = pa.csv.ConvertOptions(column_types=self.schema)
        with explain_damage(self.path, NO_CSV):
            yield from pa.csv.open_csv(arrow_source(self.path), CSV_READ, CSV_PARSE, texts)

    def _parquet_batches(
        self, columns: list[str] | None, rows: np.ndarray | None
    ) -> Iterator[tuple[int, Any]]:
        file, first = stream_parquet(self.path), 0
        with explain_damage(self.path, "damaged: its rows cannot be read"):
            for number, (count, size) in enumerate(self.groups):
                if rows is None or np.diff(np.searchsorted(rows, [first, first + count]))[0]:
                    # One row may be long (a list of features): bound bytes as well as rows.
                    fit = max(1, min(BATCH_ROWS, BATCH_BYTES * count // max(size, 1)))
                    at = first
                    for batch in file.iter_batches(fit, row_groups=[number], columns=columns):
                        yield at, self._cast(batch)
                        at += batch.num_rows
                first += count

    def _cast(self, batch: Any) -> Any:
        """Return a batch in the types of the schema."""
        schema = pa.schema([self.schema.field(name) for name in batch.schema.names])
        if schema.types == batch.schema.types:
            return batch
        return pa.Table.from_batches([batch]).cast(schema).combine_chunks().to_batches()[0]


@contextmanager
def explain_damage(path: Path, problem: str) -> Iterator[None]:
    """Name the file, and its problem, where pyarrow cannot read it."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SnipError(f"{path}: {problem}: {error}; fetch or write it again") from error


def stream_parquet(path: Path) -> Any:
    """Return a buffered ``pyarrow.parquet.ParquetFile``, or refuse the file by name."""
    with explain_damage(path, "truncated or not a parquet file"):
        # pre_buffer would hold the whole row group
        return pq.ParquetFile(arrow_source(path), buffer_size=STREAM_BYTES, pre_buffer=False)


def as_texts(file: Table, column: str, values: Any, kind: Any = STRING) -> Any:
    """Return values of a file's column as arrow's texts, of type ``kind``, or refuse the column."""
    try:
        return values.cast(kind)
    except (pa.ArrowException, NotImplementedError) as error:
        raise SnipError(
            f"{file.path}: column {column!r} is {values.type}, expected texts or numbers"
        ) from error


def is_name(kind: Any) -> bool:
    """Tell whether an arrow type is one of texts or of whole numbers."""
    return any(str(kind).startswith(name) for name in ("string", "large_string", "int", "uint"))


def _without_views(kind: Any) -> Any:
    """Return an arrow type with the plain types for `VIEWS`, in lists and structs too."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_views(field.type)) for field in kind])
    for is_kind, make in ((pa.types.is_list, pa.list_), (pa.types.is_large_list, pa.large_list)):
        if is_kind(kind):
            return make(kind.value_field.with_type(_without_views(kind.value_type)))
    return VIEWS.get(str(kind), kind)


class Metadata(FileRows):
    """The rows of one or more metadata files with the same columns, in any order and type.

    ``schema`` and ``columns``, their names, are the first file's.
    """

    def __init__(self, files: Sequence[Table], folders: Sequence[Path] = ()) -> None:
        self.files, self.schema = tuple(files), files[0].schema
        self.columns: list[str] = list(self.schema.names)
        super().__init__([file.path for file in files], [file.rows for file in files], folders)
        for file in files[1:]:
            different = sorted(set(file.schema.names) ^ set(self.columns))
            if different:
                raise SnipError(
                    f"{file.path} and {files[0].path} do not both have the columns "
                    f"{', '.join(different)}; files of one set have the same columns"
                )

    def describe(self) -> str:
        """Return the files as a message names them."""
        first, more = self.files[0].path, len(self.files) - 1
        return f"{first} and {more} more" if more else str(first)

    def column(self, asked: str | None = None, wanted: Sequence[str] = KEY_COLUMNS) -> str | None:
        """Return the exact name of a column; names are found in any case.

        That is the one that the user ``asked`` for, which is refused if it does not exist or could
        be either of two columns; else the first of ``wanted`` that exists, or None. One of
        `NAME_COLUMNS` that is only wanted counts if it holds texts or whole numbers.
        """
        for name in wanted if asked is None else [asked]:
            found = [column for column in self.columns if column.lower() == name.lower()]
            if asked is None and name in NAME_COLUMNS:
                found = [column for column in found if is_name(self.schema.field(column).type)]
            if name in found:
                return name
            if len(found) == 1 or (found and asked is None):
                return found[0]
            if asked is not None:
                problem = f"could be {' or '.join(found)}" if found else "is not there"
                raise SnipError(
                    f"{self.files[0].path}: column {asked!r} {problem}; its columns: "
                    f"{', '.join(self.columns)}"
                )
        return None

    def require_column(self, asked: str | None, wanted: Sequence[str], flag: str) -> str:
        """Return the name of a column as `column` does; refuse metadata without one."""
        name = self.column(asked, wanted)
        if name is None:
            raise SnipError(
                f"{self.files[0].path}: no column is called {' or '.join(wanted)}; name one with "
                f"{flag}; its columns: {', '.join(self.columns)}"
            )
        return name

    def check_matches(self, shards: Sequence[Mapping[str, Any]]) -> None:
        """Refuse metadata whose rows are not those of shards (``name``, ``rows``).

        The totals must be equal; with as many files as shards, each file must match its shard.
        """
        if len(self.files) == len(shards):
            for file, shard in zip(self.files, shards, strict=True):
                if file.rows != shard["rows"]:
                    raise SnipError(
                        f"{file.path} has {file.rows:,} rows, its features {shard['name']} have "
                        f"{shard['rows']:,}; expected one row of metadata for each row of features"
                    )
        total = sum(shard["rows"] for shard in shards)
        if self.rows != total:
            ends = dict.fromkeys(str(shards[place]["name"]) for place in (0, -1))
            raise SnipError(
                f"{self.describe()}: {self.rows:,} rows of metadata, but {total:,} rows of "
                f"features in {' .. '.join(ends)}; expected one for each"
            )

    def read(self, columns: Sequence[str]) -> Iterator[tuple[Table, int, Any]]:
        """Yield (file, global row of its first row, record batch of these columns), in row order.

        ``columns`` are exact names, from `column`; they come in the order asked.
        """
        for number, file in enumerate(self.files):
            for at, batch in file.batches(list(columns)):
                yield file, int(self.offsets[number]) + at, batch.select(columns)

    def pick(self, columns: Sequence[str], rows: np.ndarray) -> Iterator[tuple[Table, slice, Any]]:
        """Yield (file, which of ``rows``, record batch of these columns), in row order.

        ``rows``, (n,) int64, are global and ascending; row groups without any of them are not read.
        """
        cuts = np.searchsorted(rows, self.offsets)
        for number in np.flatnonzero(np.diff(cuts)).tolist():
            file, first = self.files[number], int(cuts[number])
            local = rows[first : cuts[number + 1]] - self.offsets[number]
            for at, batch in file.batches(list(columns), local):
                low, high = np.searchsorted(local, [at, at + batch.num_rows]).tolist()
                if high > low:
                    picked = batch.select(columns).take(pa.array(local[low:high] - at))
                    yield file, slice(first + low, first + high), picked

    def sizes(self) -> list[tuple[str, int]]:
        """Return the name and the number of rows of each file."""
        return [(str(file.path), file.rows) for file in self.files]

    def place(self, row: int) -> str:
        """Return the file and the row in it of a global row, for messages."""
        number, own = self.locate(row)
        return f"{self.files[number].path} row {own:,}"

    def take(self, column: str, rows: np.ndarray) -> Any:
        """Return a column's values at ascending global rows, as a chunked array of strings."""
        picked = self.pick([column], rows)
        parts = [as_texts(file, column, batch.column(0)) for file, _, batch in picked]
        return pa.chunked_array(parts, pa.string())


def open_metadata(spec: str | Path) -> Metadata:
    """Open metadata; of parquet files only the footers are read, CSV files are counted.

    ``spec`` is a folder (its ``*.parquet``, else its ``*.csv``; not recursive), a glob, a file, or
    a URL of one of these.
    """
    tables = map_requests(Table, find_metadata(spec))
    return Metadata(tables, [folder for folder in [Path(spec).expanduser()] if folder.is_dir()])


def find_metadata(spec: str | Path) -> list[Path]:
    """Return the files that a META argument means, in natural order."""
    text = spec.url if isinstance(spec, RemotePath) else str(spec)
    return natural_sort(find_files(text, None, SUFFIXES, "no metadata"))


class ColumnUse(NamedTuple):
    """What a run will do with columns (None: all of a file).

    ``convert`` is the function that the end of the run calls: it takes a file, a global row and the
    record batch of these columns from there on, and raises `SnipError` where it cannot take them.
    ``remedy`` is what the user can do then. ``by_schema``: only types can make it fail, so that one
    file of each schema is enough.
    """

    columns: Sequence[str] | None
    convert: Callable[[Table, int, Any], Any]
    remedy: str
    by_schema: bool = False


def use_of_column(column: str, convert: Callable[[Table, str, Any], Any], remedy: str) -> ColumnUse:
    """Return the use of one column, of which ``convert`` takes file, name and values."""
    return ColumnUse([column], lambda file, _, batch: convert(file, column, batch[0]), remedy)


def try_column_uses(metadata: Metadata, uses: Sequence[ColumnUse]) -> None:
    """Convert no rows of each file (types alone may be refused), then its first rows."""

    def try_file(file: Table, first: int, due: Sequence[ColumnUse]) -> None:
        whole = any(use.columns is None for use in due)
        names = dict.fromkeys(name for use in due for name in use.columns or ())
        columns = list(file.schema.names) if whole else list(names)
        schema = pa.schema([file.schema.field(name) for name in columns])
        batches = [pa.RecordBatch.from_pylist([], schema)]
        first_row = np.zeros(min(1, file.rows), np.int64)
        batches += [batch for _, batch in islice(file.batches(columns, first_row), 1)]
        for use in due:
            for batch in batches:
                try:
                    use.convert(file, first, batch.select(list(use.columns or columns)))
                except SnipError as error:
                    raise type(error)(f"{error}; {use.remedy}") from error

    seen: set[str] = set()
    tasks = []
    for file, first in zip(metadata.files, metadata.offsets.tolist(), strict=False):
        schema = str(file.schema)
        due = [use for use in uses if schema not in seen or not use.by_schema]
        seen.add(schema)
        if due:
            tasks.append((file, first, due))
    map_requests(lambda task: try_file(*task), tasks)
