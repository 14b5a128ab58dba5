"""One file of metadata: parquet or CSV, opened by its footer, streamed in bounded batches.

A CSV is read as text; a column becomes numbers only where each of them, written as text again, is
the text that was there (``007`` and ``1.10`` stay texts), so that nothing is lost in parquet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from snipdedup.errors import SnipError
from snipdedup.storage.remote import arrow_source

SUFFIXES = (".parquet", ".csv")
BATCH_ROWS = 65_536
BATCH_BYTES = 32 << 20
STREAM_BYTES = 1 << 20
# A block is also the longest CSV row that can be read; quoted texts may hold line breaks.
CSV_READ = pa.csv.ReadOptions(block_size=16 << 20)
CSV_PARSE = pa.csv.ParseOptions(newlines_in_values=True)
DEFAULT_CODEC = "snappy"
CODECS = {
    "UNCOMPRESSED": "none",
    "GZIP": "gzip",
    "BROTLI": "brotli",
    "ZSTD": "zstd",
    "LZ4": "lz4",
    "LZ4_RAW": "lz4",
}

# Types that pyarrow reads, but neither filters nor takes: read as the types beside them.
VIEWS = {"string_view": pa.string(), "binary_view": pa.binary()}
# Ways to write numbers as text, each with one text for one number. Of float64 it is the shortest
# text that reads as the same value: whole numbers with .0 or without, what is very small or large
# as arrow writes it (0.00001, 1e-7), or as Python, pandas and numpy do (1e-05, 1e-07).
WAYS = {
    "whole": pa.int64(), "arrow": pa.float64(), "arrow .0": pa.float64(),
    "python": pa.float64(), "python .0": pa.float64(),
}  # fmt: skip
WHOLE = r"^(0|-?[1-9][0-9]{0,17})$"
SHORT_WHOLE = r"^(0|-?[1-9][0-9]{0,14})$"  # float64 and int64 are written alike
NUMBER = r"^-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?$"
PLAIN_FLOATS = (1e-4, 1e15)  # between these arrow and Python differ by .0 only


class Table:
    """Rows of one metadata file.

    Attributes
    ----------
    path : Path
    rows : int
    schema : pyarrow.Schema
        With everything the file says about its columns: types, nullability, metadata.
    codec : str
        Compression to write the rows with.
    """

    def __init__(self, path: Path, rows: int, schema: Any, codec: str) -> None:
        self.path, self.rows, self.schema, self.codec = path, rows, schema, codec
        doubled = sorted({name for name in schema.names if schema.names.count(name) > 1})
        if doubled:
            raise SnipError(f"{path}: several columns are called {', '.join(doubled)}; rename them")

    def batches(
        self, columns: list[str] | None = None, rows: np.ndarray | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Yield (first row, record batch) in row order.

        Parameters
        ----------
        columns : list of str, optional
            Only these.
        rows : (n,) int64, optional
            Ascending rows that are wanted; parts of the file without any may be left out.
        """
        raise NotImplementedError


class ParquetTable(Table):
    """A parquet file; row groups are read one at a time, a bounded batch at a time."""

    def __init__(self, path: Path) -> None:
        file = open_parquet(path)
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        self.groups = [(group.num_rows, group.total_byte_size) for group in groups]
        schema = without_views(file.schema_arrow)
        super().__init__(path, file.metadata.num_rows, schema, codec_of(groups))

    def batches(
        self, columns: list[str] | None = None, rows: np.ndarray | None = None
    ) -> Iterator[tuple[int, Any]]:
        """See `Table.batches`; row groups without a wanted row are not read."""
        file = open_parquet(self.path)
        first = 0
        try:
            for number, (count, size) in enumerate(self.groups):
                if holds_any(rows, first, first + count):
                    # a row may be long (a list of features, say): bound bytes, not only rows
                    fit = max(1, min(BATCH_ROWS, BATCH_BYTES * count // max(size, 1)))
                    at = first
                    for batch in file.iter_batches(fit, row_groups=[number], columns=columns):
                        yield at, self._plain(batch)
                        at += batch.num_rows
                first += count
        except (pa.ArrowException, OSError) as error:
            raise SnipError(
                f"{self.path}: damaged: its rows cannot be read: {error}; fetch or write it again"
            ) from error

    def _plain(self, batch: Any) -> Any:
        """Return a batch in the types of the schema."""
        fields = [self.schema.field(name) for name in batch.schema.names]
        if [field.type for field in fields] == batch.schema.types:
            return batch
        arrays = [
            values if values.type == field.type else values.cast(field.type)
            for values, field in zip(batch.columns, fields, strict=True)
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields))


def without_views(schema: Any) -> Any:
    """Return a schema with plain types for `VIEWS`, in lists and structs too."""
    fields = [field.with_type(plain(field.type)) for field in schema]
    return pa.schema(fields, schema.metadata)


def plain(kind: Any) -> Any:
    """Return the type that values of an arrow type are read as."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(plain(field.type)) for field in kind])
    for fits, made in ((pa.types.is_list, pa.list_), (pa.types.is_large_list, pa.large_list)):
        if fits(kind):
            return made(kind.value_field.with_type(plain(kind.value_type)))
    return VIEWS.get(str(kind), kind)


class CsvTable(Table):
    """A CSV file: counted, and its types found, in one pass when it is opened."""

    def __init__(self, path: Path) -> None:
        rows = 0
        self.possible: dict[str, list[str] | None] = dict.fromkeys(csv_names(path))
        for batch in csv_texts(path):
            rows += batch.num_rows
            for name in self.possible:
                self._look(name, batch.column(name))
        super().__init__(path, rows, pa.schema([]), DEFAULT_CODEC)
        agree([self])

    def _look(self, name: str, texts: Any) -> None:
        """Strike the ways in which further texts of a column are not written."""
        left = self.possible[name]
        left = list(WAYS) if left is None else left
        said = texts.filter(pc.not_equal(texts, "")) if left else []
        if len(said):
            fit = ways_of(said)
            self.possible[name] = [way for way in left if way in fit]

    def batches(
        self, columns: list[str] | None = None, rows: np.ndarray | None = None
    ) -> Iterator[tuple[int, Any]]:
        """See `Table.batches`; a CSV is read from its beginning."""
        at = 0
        schema = self.schema if columns is None else pa.schema(map(self.schema.field, columns))
        for batch in csv_texts(self.path):
            if rows is not None and (not len(rows) or at > rows[-1]):
                return
            if holds_any(rows, at, at + batch.num_rows):
                arrays = [numbers(batch.column(field.name), field.type) for field in schema]
                whole = pa.RecordBatch.from_arrays(arrays, schema=schema)
                for begin in range(0, whole.num_rows, BATCH_ROWS):
                    yield at + begin, whole.slice(begin, BATCH_ROWS)
            at += batch.num_rows


def holds_any(rows: np.ndarray | None, start: int, stop: int) -> bool:
    """Tell whether any of the ascending ``rows`` (None: all) lies in ``start`` to ``stop``."""
    if rows is None:
        return stop > start
    low, high = np.searchsorted(rows, [start, stop])
    return bool(high > low)


def open_table(path: Path) -> Table:
    """Open one metadata file.

    Raises
    ------
    SnipError
        If it is missing, empty, truncated, or neither parquet nor CSV.
    """
    if not path.is_file():
        raise SnipError(f"no such file: {path}")
    if not path.stat().st_size:
        raise SnipError(f"{path}: empty file, expected metadata; fetch or write it again")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise SnipError(f"{path}: expected metadata of type {' or '.join(SUFFIXES)}")
    return ParquetTable(path) if suffix == ".parquet" else CsvTable(path)


def open_parquet(path: Path) -> Any:
    """Return ``pyarrow.parquet.ParquetFile``, buffered, or refuse the file by name."""
    try:
        # pre_buffer would hold the whole row group
        return pq.ParquetFile(arrow_source(path), buffer_size=STREAM_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise SnipError(
            f"{path}: truncated or not a parquet file: {error}; fetch or write it again"
        ) from error


def codec_of(groups: Sequence[Any]) -> str:
    """Return the codec that holds most bytes of a file's row groups, as pyarrow writes it."""
    sizes: dict[str, int] = {}
    for group in groups[:1]:
        for chunk in map(group.column, range(group.num_columns)):
            sizes[chunk.compression] = sizes.get(chunk.compression, 0) + chunk.total_compressed_size
    return (
        CODECS.get(max(sizes, key=lambda name: sizes[name]), DEFAULT_CODEC)
        if sizes
        else (DEFAULT_CODEC)
    )


def agree(files: Sequence[CsvTable]) -> None:
    """Give CSV files of one set the same types: the narrowest that fit the values of all.

    Each file may write its numbers in a way of its own: ``1`` in one and ``1.0`` in another.
    """
    kinds: dict[str, Any] = {}
    for name in {name for file in files for name in file.possible}:
        said = [file.possible.get(name) for file in files]
        fit = [{WAYS[way] for way in ways} for ways in said if ways is not None]
        left = [kind for kind in dict.fromkeys(WAYS.values()) if all(kind in s for s in fit)]
        filled = bool(fit)
        kinds[name] = left[0] if filled and left else pa.string()
    for file in files:
        file.schema = pa.schema([(name, kinds[name]) for name in file.possible])


def ways_of(texts: Any) -> set[str]:
    """Return in which of `WAYS` all texts, none of them empty, are written as numbers."""

    def every(pattern: str) -> bool:
        return bool(pc.all(pc.match_substring_regex(texts, pattern)).as_py())

    if not every(NUMBER):
        return set()
    if every(SHORT_WHOLE):
        return {"whole", "arrow", "python"}
    fit = {"whole"} if every(WHOLE) else set()
    values = texts.cast(pa.float64())
    short = values.cast(pa.string())
    pointed = pc.if_else(
        pc.match_substring_regex(short, "[.e]"), short, pc.binary_join_element_wise(short, ".0", "")
    )
    size = pc.abs(values)
    low, high = PLAIN_FLOATS
    odd = pc.or_(pc.greater_equal(size, high), pc.less(size, low))
    theirs = texts.filter(odd).to_pylist()
    written = [repr(value) for value in values.filter(odd).to_pylist()]
    for way, ours in {"": short, " .0": pointed}.items():
        same = pc.equal(texts, ours)
        if pc.all(same).as_py():
            fit.add(f"arrow{way}")
        shown = written if way else [text.removesuffix(".0") for text in written]
        if pc.all(pc.or_(same, odd)).as_py() and theirs == shown:
            fit.add(f"python{way}")
    return fit


def csv_names(path: Path) -> list[str]:
    """Return the names of a CSV's columns."""
    with refusing_csv(path):
        names = list(pa.csv.open_csv(arrow_source(path), CSV_READ, CSV_PARSE).schema.names)
    if len(set(names)) < len(names):
        raise SnipError(f"{path}: several columns have one name: {', '.join(names)}")
    return names


def csv_texts(path: Path) -> Iterator[Any]:
    """Yield record batches of a CSV with every column as text; line breaks in quotes allowed."""
    texts = pa.csv.ConvertOptions(column_types=dict.fromkeys(csv_names(path), pa.string()))
    with refusing_csv(path):
        yield from pa.csv.open_csv(arrow_source(path), CSV_READ, CSV_PARSE, texts)


@contextmanager
def refusing_csv(path: Path) -> Iterator[None]:
    """Turn what pyarrow says of a broken CSV into our error."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SnipError(f"{path}: not a CSV with one kind of row: {error}") from error


def numbers(texts: Any, kind: Any) -> Any:
    """Return texts as ``kind``; for numbers an empty text is null."""
    if kind == pa.string():
        return texts
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts).cast(kind)
