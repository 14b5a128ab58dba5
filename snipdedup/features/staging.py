"""Features in tables and tensor files of other libraries, copied once to temporary files.

A table is what offers Arrow's C stream (``__arrow_c_stream__``: pandas, polars, DuckDB, Arrow), a
data set of Arrow or Lance, or one of Hugging Face ``datasets``. Its column of lists becomes a
``.npy``, its other columns, the metadata, a parquet file. Memory holds one batch. The copy lies in
the folder for temporary files (``TMPDIR``) and is removed with the shard.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup import progress
from snipdedup.errors import InputError, SnipError
from snipdedup.features.formats import NpyShard
from snipdedup.features.list_columns import find_list_column, list_rows

BATCH_ROWS = 8192
OLDER = ("fetch_arrow_reader", "iterchunks")  # of DuckDB and of Arrow's columns, before streams
TABLE = ("__arrow_c_stream__", "__arrow_c_array__", "scanner", "with_format", *OLDER)


class StagedShard(NpyShard):
    """A copy of rows in a temporary file; ``metadata`` is the parquet file beside it, or None.

    The files are dated by their CRC32, so that the same rows are the same input, whenever copied.
    """

    def __init__(self, path: Path, metadata: Path | None = None) -> None:
        for file in (path, metadata):
            if file is not None:
                checksum = crc32_of(file)
                os.utime(file, ns=(checksum, checksum))
        super().__init__(path)
        self.metadata = metadata


def is_table(given: Any) -> bool:
    """Tell whether something offers its rows in one of the ways of tables."""
    return not isinstance(given, dict) and any(hasattr(given, way) for way in TABLE)


def stage_table(source: Any, column: str | None, name: str) -> StagedShard:
    """Copy a table; ``column`` names its features, where it has several columns of lists."""
    import pyarrow.parquet as pq

    with staged() as folder, progress.phase(f"copying the rows of {name}"):
        schema, batches = read_table(source)
        column = find_list_column(schema, column, name, "column=")
        others = [field.name for field in schema if field.name != column]
        path = folder / f"{name.replace(' ', '_')}.parquet"

        def parts() -> Iterator[np.ndarray]:
            first, dim, writer = 0, None, None
            for batch in batches:
                if others and writer is None:
                    writer = pq.ParquetWriter(path, batch.select(others).schema)
                if writer is not None:
                    writer.write_batch(batch.select(others))
                if batch.num_rows:
                    where = f"{name}: row {{}} of column {column!r}"
                    rows = list_rows(batch.column(column), where, first, dim)
                    first, dim = first + len(rows), rows.shape[1]
                    yield rows
            if writer is not None:
                writer.close()

        shard = folder / name.replace(" ", "_")
        write_npy(shard, parts(), name)
        return keep(StagedShard(shard, path if path.exists() else None), folder)


def read_table(source: Any) -> tuple[Any, Iterator[Any]]:
    """Return the schema of a table, and its record batches."""
    import pyarrow as pa

    if hasattr(source, "with_format"):  # of Hugging Face: its files may hold rows that it left out
        tables = source.with_format("arrow").iter(BATCH_ROWS)
        first = next(tables, None)
        if first is None:
            raise InputError(f"no rows at all in {source}; expected at least one feature")
        return first.schema, (b for t in chain_first(first, tables) for b in t.to_batches())
    if hasattr(source, "scanner"):
        reader = source.scanner(batch_size=BATCH_ROWS).to_reader()
        return reader.schema, iter(reader)
    if hasattr(source, "fetch_arrow_reader"):  # in DuckDB 1.1 the stream is of another form
        source = source.fetch_arrow_reader(BATCH_ROWS)
    if isinstance(source, pa.Array | pa.ChunkedArray):
        source = pa.table({"features": source})
    try:
        reader = pa.RecordBatchReader.from_stream(source)
    except (pa.ArrowException, TypeError):  # one column, not a table
        reader = pa.table({"features": pa.chunked_array(source)}).to_reader()
    return reader.schema, (part for batch in reader for part in cut(batch))


def cut(batch: Any) -> Iterator[Any]:
    """Cut a record batch: a table in memory is often one."""
    for start in range(0, batch.num_rows, BATCH_ROWS):
        yield batch.slice(start, BATCH_ROWS)


def chain_first(first: Any, rest: Iterable[Any]) -> Iterator[Any]:
    """Yield what was taken from an iterator, then the rest."""
    yield first
    yield from rest


def stage_file(path: Path, array: str | None, column: str | None) -> StagedShard:
    """Copy the features of a file of `OPENERS`; each array or column may be named."""
    suffix = path.suffix.lower()
    if not path.exists():
        raise InputError(f"no such file: {path}")
    module, extra, opener = OPENERS[suffix]
    try:
        if suffix == ".lance":
            import lance

            return stage_table(lance.dataset(str(path)), column, path.name)
        with staged() as folder, progress.phase(f"copying {path.name}"), opener(path) as arrays:
            rows = arrays[choose(path, arrays, array)]
            count = shape_of(rows)[0]
            starts = range(0, count, BATCH_ROWS)
            parts = (plain(rows[start : min(start + BATCH_ROWS, count)]) for start in starts)
            write_npy(folder / path.name, parts, str(path))
            return keep(StagedShard(folder / path.name), folder)
    except ImportError as error:
        raise SnipError(
            f"{path}: a {suffix} needs {module}: pip install 'snipdedup-toolkit[{extra}]'"
        ) from error
    except SnipError:
        raise
    except Exception as error:  # each library has its own
        raise InputError(
            f"{path}: truncated or not a {suffix}: {str(error).splitlines()[0]}"
        ) from error


def choose(path: Path, arrays: dict[str, Any], name: str | None) -> str:
    """Return the name of the array that is meant: the one named, or the only one with rows."""
    fitting = [key for key, value in arrays.items() if len(shape_of(value)) == 2]
    if name is None and len(fitting) == 1:
        return fitting[0]
    if name is None or name not in arrays:
        asked = f"no array {name!r}" if name else f"expected one 2-D array, found {len(fitting)}"
        raise InputError(
            f"{path}: {asked}; choose one with --array: {', '.join(arrays) or 'none here'}"
        )
    return name


def shape_of(array: Any) -> tuple[int, ...]:
    """Return the shape of an array of any library; safetensors call it otherwise."""
    return tuple(array.get_shape() if hasattr(array, "get_shape") else array.shape)


def plain(rows: Any) -> np.ndarray:
    """Return numpy's array of rows; of torch's other types of floats float32, which is exact."""
    if hasattr(rows, "detach"):
        rows = rows.detach().cpu()
        if (
            rows.is_floating_point()
            and rows.dtype.itemsize < 4
            and str(rows.dtype)[6:] != "float16"
        ):
            rows = rows.float()
        rows = rows.numpy()
    return np.asarray(rows)


@contextmanager
def open_safetensors(path: Path) -> Iterator[dict[str, Any]]:
    """Open the tensors of a file, which are read by rows."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        yield {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118


@contextmanager
def open_torch(path: Path) -> Iterator[dict[str, Any]]:
    """Map a tensor, or a dictionary of tensors; nothing in the file is run."""
    import torch

    found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    named = found if isinstance(found, dict) else {"tensor": found}
    yield {str(name): one for name, one in named.items() if isinstance(one, torch.Tensor)}


@contextmanager
def open_hdf5(path: Path) -> Iterator[dict[str, Any]]:
    """Open the arrays of all groups, named as paths."""
    import h5py

    found: dict[str, Any] = {}
    with h5py.File(path, "r") as file:
        file.visititems(
            lambda name, one: found.update({name: one} if isinstance(one, h5py.Dataset) else {})
        )
        yield found


@contextmanager
def open_zarr(path: Path) -> Iterator[dict[str, Any]]:
    """Open an array, or those of a group."""
    import zarr

    opened = zarr.open(str(path), mode="r")
    yield {"array": opened} if isinstance(opened, zarr.Array) else dict(opened.arrays())


# suffix: module, extra, and what opens it (Lance is a table)
OPENERS: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    ".safetensors": ("safetensors", "safetensors", open_safetensors),
    ".pt": ("torch", "torch", open_torch),
    ".h5": ("h5py", "hdf5", open_hdf5),
    ".hdf5": ("h5py", "hdf5", open_hdf5),
    ".zarr": ("zarr", "zarr", open_zarr),
    ".lance": ("pylance", "lance", open_zarr),
}


@contextmanager
def staged() -> Iterator[Path]:
    """Make a temporary folder; remove it if the block fails."""
    folder = Path(tempfile.mkdtemp(prefix="snip-input-"))
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def keep(shard: StagedShard, folder: Path) -> StagedShard:
    """Let the folder go with the shard, or with this process; not with processes forked off it."""
    weakref.finalize(shard, remove, folder, os.getpid())
    return shard


def remove(folder: Path, owner: int) -> None:
    """Remove a folder in the process that made it."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def write_npy(path: Path, parts: Iterable[np.ndarray], name: str) -> None:
    """Write rows to a ``.npy`` file; how many there are is known at the end."""
    shape, dtype = (0, 0), np.dtype(np.float32)

    def write_header(file: Any) -> None:
        file.seek(0)  # numpy leaves room for a longer number of rows
        entries = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, entries)

    with path.open("wb") as file:
        for part in parts:
            if not shape[1]:
                shape, dtype = (0, *part.shape[1:]), part.dtype.newbyteorder("<")
                write_header(file)
            file.write(np.ascontiguousarray(part, dtype).data)
            shape = (shape[0] + len(part), *shape[1:])
        if not shape[0]:
            raise InputError(f"no rows at all in {name}; expected at least one feature")
        write_header(file)


def crc32_of(path: Path) -> int:
    """Return the CRC32 of a file."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum
