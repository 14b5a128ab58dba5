"""One file of rows: what ``.npy``, ``.npz`` and parquet shards look like from inside.

Opening a shard reads its header only and refuses what cannot be features. Reading returns rows in
the type they are stored in. Files are opened for each read, so thousands of shards cost no
descriptors.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from snipdedup.errors import InputError
from snipdedup.storage.remote import RemotePath, arrow_source

SUFFIXES = (".npy", ".npz", ".parquet")
LONGEST_HEADER = 1 << 16  # bytes; numpy's own are below 200
PACKED_FREELY = 1 << 26  # bytes that a member may unpack to whatever its size
PACKED_MOST = 100  # times its size beyond that: floats pack by less than 2
# RuntimeError: encrypted; NotImplementedError, one of those: a packing that Python cannot undo
BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, EOFError, OSError)


class Shard:
    """Rows of one file.

    Attributes
    ----------
    path : Path
        The file; for an array in memory, the name shown in messages.
    rows, dim : int
        Its shape.
    dtype : numpy.dtype
        float16, float32 or float64, as stored.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
        check_type(path, shape, dtype)
        self.path = path
        self.rows, self.dim = int(shape[0]), int(shape[1])
        self.dtype = dtype.newbyteorder("=")

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows ``start`` to ``stop`` (exclusive) of the file as a fresh array."""
        raise NotImplementedError

    def read_into(self, start: int, stop: int, out: np.ndarray) -> None:
        """Write rows ``start`` to ``stop`` to ``out``, whose dtype may be wider."""
        out[:] = self.read(start, stop)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return the given rows of the file; ``rows`` is ascending."""
        raise NotImplementedError

    def take_into(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Write the given rows of the file, ascending, to ``out``, whose dtype may be wider."""
        out[:] = self.take(rows)


class ArrayShard(Shard):
    """Rows that are in memory already."""

    def __init__(self, array: np.ndarray, name: str) -> None:
        super().__init__(Path(name), array.shape, array.dtype)
        self.array = array

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `Shard.read`."""
        return np.array(self.array[start:stop], dtype=self.dtype, order="C")

    def take(self, rows: np.ndarray) -> np.ndarray:
        """See `Shard.take`."""
        return np.ascontiguousarray(self.array[rows], dtype=self.dtype)


class NpyShard(Shard):
    """A ``.npy`` file, or a member of an uncompressed ``.npz``: rows lie plainly in the file."""

    def __init__(self, path: Path, begin: int = 0, size: int | None = None) -> None:
        with path.open("rb") as file:
            file.seek(begin)
            shape, dtype = read_npy_header(file, path)
            self.data = file.tell()
        self.stored = dtype
        super().__init__(path, shape, dtype)
        need = self.rows * self.dim * dtype.itemsize
        self.end = self.data + need
        have = (path.stat().st_size - begin if size is None else size) - (self.data - begin)
        if have != need:
            raise InputError(
                f"{path}: truncated or damaged: its header promises {self.rows} x {self.dim} "
                f"{dtype} ({need} bytes of rows), the file holds {have}; fetch or write it again"
            )

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `Shard.read`."""
        rows = np.empty((stop - start, self.dim), self.stored)
        self._fill(start, rows)
        return rows.astype(self.dtype, copy=False)

    def read_into(self, start: int, stop: int, out: np.ndarray) -> None:
        """See `Shard.read_into`."""
        if self.stored == out.dtype and out.flags.c_contiguous:
            self._fill(start, out)
        else:
            super().read_into(start, stop, out)

    def _fill(self, start: int, rows: np.ndarray) -> None:
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.data + start * self.dim * self.stored.itemsize)
            left = rows.reshape(-1).view(np.uint8).data
            while left.nbytes:
                count = self._read(file, left)
                if not count:
                    raise InputError(
                        f"{self.path}: expected rows {start} to {start + len(rows)}, the file "
                        "ended early; it changed while it was read"
                    )
                left = left[count:]

    def _read(self, file: IO[bytes], out: memoryview) -> int:
        try:
            return file.readinto(out)  # type: ignore[attr-defined]
        except OSError as error:  # of a read, unlike of opening, it does not name the file
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def take(self, rows: np.ndarray) -> np.ndarray:
        """See `Shard.take`."""
        if not self.rows or not len(rows):
            return np.empty((0, self.dim), self.dtype)
        if isinstance(self.path, RemotePath):
            found = self.path.read_rows(self.data, self.dim * self.stored.itemsize, rows)
            return found.view(self.stored).astype(self.dtype, copy=False)
        return np.take(self._mapped(), rows, axis=0).astype(self.dtype, copy=False)

    def take_into(self, rows: np.ndarray, out: np.ndarray) -> None:
        """See `Shard.take_into`."""
        if not len(rows) or self.stored != out.dtype or isinstance(self.path, RemotePath):
            super().take_into(rows, out)
            return
        # rows are known to be in range; with mode "raise" numpy would fill a buffer first
        np.take(self._mapped(), rows, axis=0, out=out, mode="clip")

    def _mapped(self) -> np.ndarray:
        stamp = self.path.stat()
        if stamp.st_size < self.end:  # to touch what is not there any more ends the process
            raise InputError(f"{self.path}: became shorter while it was read; run it again")
        shape = (self.rows, self.dim)
        return _map(self.path, self.stored, self.data, shape, stamp.st_mtime_ns, stamp.st_size)


# Mapping anew, and touching pages anew, is dear; a mapping holds a file open.
@lru_cache(maxsize=256)
def _map(
    path: Path, dtype: np.dtype, begin: int, shape: tuple[int, int], mtime_ns: int, size: int
) -> np.ndarray:
    del mtime_ns, size  # part of the cache's key: a file that changed is mapped again
    return np.memmap(path, dtype, "r", begin, shape).view(np.ndarray)


class PackedNpzShard(Shard):
    """A member of a compressed ``.npz``. The last member read stays unpacked in memory."""

    def __init__(self, path: Path, member: str) -> None:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            shape, dtype = read_npy_header(file, path)
            header = file.tell()
            size = archive.getinfo(member).file_size
        super().__init__(path, shape, dtype)
        self.member = member
        need = self.rows * self.dim * dtype.itemsize
        if size - header != need:
            raise InputError(
                f"{path}: truncated or damaged: array {member} promises {need} bytes of rows, "
                f"the archive holds {size - header}; fetch or write it again"
            )

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `Shard.read`."""
        return self._unpacked()[start:stop].astype(self.dtype, copy=True)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """See `Shard.take`."""
        return self._unpacked()[rows].astype(self.dtype, copy=False)

    def _unpacked(self) -> np.ndarray:
        stamp = self.path.stat()
        return _unpack(self.path, self.member, stamp.st_mtime_ns, stamp.st_size)


@lru_cache(maxsize=2)
def _unpack(path: Path, member: str, mtime_ns: int, size: int) -> np.ndarray:
    del mtime_ns, size  # part of the cache's key: a file that changed is read again
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: array {member} cannot be unpacked: {error}") from error


class ParquetShard(Shard):
    """A list column of a parquet file; rows are read by row group."""

    def __init__(self, path: Path, column: str | None) -> None:
        file = open_parquet(path)
        self.column = column or only_list_column(path, file.schema_arrow)
        if self.column not in file.schema_arrow.names:
            raise InputError(
                f"{path}: no column {self.column!r}; it has {', '.join(file.schema_arrow.names)}"
            )
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self.group_starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        rows = int(self.group_starts[-1])
        field = file.schema_arrow.field(self.column)
        value_type = list_value_type(field.type)
        if value_type is None:
            raise InputError(
                f"{path}: column {self.column!r} is {field.type}, not a list of floats"
            )
        dtype = np.dtype(f"f{value_type.bit_width // 8}")
        dim = getattr(field.type, "list_size", None)
        if dim is None:
            dim = first_length(path, file, self.column) if rows else 0
        super().__init__(path, (rows, dim), dtype)

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `Shard.read`."""
        parts = [
            values[max(start - first, 0) : stop - first]
            for first, values in self._groups(start, stop)
        ]
        return np.concatenate(parts) if parts else np.empty((0, self.dim), self.dtype)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """See `Shard.take`."""
        if not len(rows):
            return np.empty((0, self.dim), self.dtype)
        parts = []
        for first, values in self._groups(int(rows[0]), int(rows[-1]) + 1):
            low, high = np.searchsorted(rows, [first, first + len(values)])
            parts.append(values[rows[low:high] - first])
        return np.concatenate(parts)

    def _groups(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, rows) of each row group that overlaps ``start`` to ``stop``."""
        first_group = int(np.searchsorted(self.group_starts, start, side="right")) - 1
        stamp = self.path.stat()
        for group in range(first_group, len(self.group_starts) - 1):
            first = int(self.group_starts[group])
            if first >= stop:
                break
            yield first, _row_group(self, group, stamp.st_mtime_ns, stamp.st_size)

    def decode_group(self, group: int) -> np.ndarray:
        """Return the rows of a row group."""
        first, end = self.group_starts[group : group + 2]
        try:
            table = open_parquet(self.path).read_row_group(group, columns=[self.column])
        except (ValueError, OSError) as error:  # ArrowInvalid is a ValueError
            raise InputError(
                f"{self.path}: rows {first} to {end} cannot be read: {error}; fetch or "
                "write it again"
            ) from error
        return self._values(table.column(0), int(first))

    def _values(self, column: Any, first: int) -> np.ndarray:
        """Return a chunked list column as a dense array; ``first`` is for messages."""
        parts = []
        for chunk in column.chunks:
            import pyarrow.compute as pc

            flat = chunk.flatten()
            lengths = pc.list_value_length(chunk)
            wrong = np.flatnonzero(lengths.fill_null(-1).to_numpy(zero_copy_only=False) != self.dim)
            if len(wrong):
                found = lengths[int(wrong[0])].as_py()
                what = "null" if found is None else f"a list of {found}"
                raise InputError(
                    f"{self.path}: row {first + int(wrong[0])} of column {self.column!r} is "
                    f"{what}, expected {self.dim} values"
                )
            if flat.null_count:
                at = int(np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))[0])
                raise InputError(
                    f"{self.path}: row {first + at // self.dim} of column {self.column!r} holds "
                    "a null value"
                )
            parts.append(flat.to_numpy(zero_copy_only=False).reshape(-1, self.dim))
            first += len(chunk)
        return np.concatenate(parts).astype(self.dtype, copy=False)


@lru_cache(maxsize=2)
def _row_group(shard: ParquetShard, group: int, mtime_ns: int, size: int) -> np.ndarray:
    del mtime_ns, size  # part of the cache's key: a file that changed is read again
    return shard.decode_group(group)


def open_shard(path: Path, array: str | None = None, column: str | None = None) -> Shard:
    """Open one file of rows.

    Parameters
    ----------
    path : Path
        A ``.npy``, ``.npz`` or ``.parquet`` file.
    array : str, optional
        Which array of an ``.npz``; needed where it holds several.
    column : str, optional
        Which list column of a parquet file; likewise.

    Raises
    ------
    InputError
        If the file is empty, truncated, not 2-D, not floating point, or Fortran-ordered.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: empty file, expected rows of features; fetch or write it again")
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return NpyShard(path)
    if suffix == ".npz":
        return open_npz(path, array)
    if suffix == ".parquet":
        return ParquetShard(path, column)
    raise InputError(f"{path}: expected a file of type {', '.join(SUFFIXES)}")


def open_npz(path: Path, array: str | None) -> Shard:
    """Open one array of an ``.npz`` archive."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            members = {i.filename.removesuffix(".npy"): i for i in archive.infolist()}
            name = array or (next(iter(members)) if len(members) == 1 else None)
            if name is None or name not in members:
                asked = f"no array {name!r}" if name else "several arrays"
                raise InputError(
                    f"{path}: {asked}; choose one with --array: {', '.join(members) or 'none here'}"
                )
            info = members[name]
            check_member(info, path.stat().st_size)
            if info.compress_type != zipfile.ZIP_STORED:
                if isinstance(path, RemotePath):
                    raise InputError(
                        f"{path}: compressed, so its rows cannot be read by ranges: fetch it "
                        "first, or save it with np.savez"
                    )
                return PackedNpzShard(path, info.filename)
            with archive.open(info):  # checks the member's own header
                pass
            begin = member_begin(path, info)
        return NpyShard(path, begin, info.file_size)
    except BROKEN_ZIP as error:
        raise InputError(f"{path}: truncated or not an .npz archive: {error}") from error


def member_begin(path: Path, info: zipfile.ZipInfo) -> int:
    """Return where the bytes of a stored member begin (APPNOTE.TXT, 4.3.7: local file header)."""
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        name, extra = np.frombuffer(file.read(4), "<u2")
    return info.header_offset + 30 + int(name) + int(extra)


def read_npy_header(file: IO[bytes], path: Path) -> tuple[tuple[int, ...], np.dtype]:
    """Return shape and dtype, leaving ``file`` at the first row; refuse Fortran order."""
    shape, fortran, dtype = parse_npy_header(file, path)
    if fortran and len(shape) == 2 and min(shape) > 1:
        raise InputError(
            f"{path}: Fortran-ordered, expected rows one after another; save it with "
            "np.save(path, np.ascontiguousarray(array))"
        )
    return shape, dtype


def parse_npy_header(file: IO[bytes], path: Path) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, order and dtype that a header says, if they can be those of an array."""
    try:
        version = np.lib.format.read_magic(file)
        size = file.read(2 if version == (1, 0) else 4)
        length = int.from_bytes(size, "little")
        if length > LONGEST_HEADER:  # numpy would read it first
            raise ValueError(f"its header has {length} bytes")
        text = io.BytesIO(size + file.read(length))
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(text)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(text)
    except Exception as error:  # the header is Python's text, so its errors are any parser's
        raise InputError(f"{path}: truncated or not a .npy file: {error}") from error
    if any(isinstance(n, bool) or n < 0 or n >= 1 << 63 for n in shape):
        raise InputError(f"{path}: damaged: its header says shape {shape}")
    return shape, fortran, dtype


def map_npy(path: Path) -> np.ndarray:
    """Memory-map a ``.npy`` file of any shape.

    Raises
    ------
    InputError
        If it is not one, or is not as long as its header says, or holds Python objects.
    """
    with path.open("rb") as file:
        shape, fortran, dtype = parse_npy_header(file, path)
        begin = file.tell()
    check_size(shape, dtype, path.stat().st_size - begin, str(path))
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", begin, shape, "F" if fortran else "C")


def check_size(shape: tuple[int, ...], dtype: np.dtype, held: int, where: str) -> None:
    """Refuse an array that is not as long as its header says, or is not of plain values."""
    if dtype.hasobject or not dtype.itemsize:
        raise InputError(f"{where}: expected plain numbers, found {dtype}")
    need = dtype.itemsize * prod(shape)
    if need != held:
        raise InputError(
            f"{where}: truncated or damaged: its header promises {need} bytes, it holds {held}"
        )


def load_npz(path: Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Read arrays of an ``.npz`` whole; what its headers say is checked before memory is taken.

    Parameters
    ----------
    path : Path
    names : sequence of str, optional
        Those that are needed; without it, all.

    Raises
    ------
    InputError
        If it is not such an archive, lacks an array, or is not what its headers say.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {i.filename.removesuffix(".npy"): i for i in archive.infolist()}
            found = list(members) if names is None else names
            return {name: load_member(archive, members[name], path) for name in found}
    except KeyError as error:
        raise InputError(f"{path}: holds no array {error}") from error
    except BROKEN_ZIP as error:
        raise InputError(f"{path}: truncated or not an .npz archive: {error}") from error


def load_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> np.ndarray:
    """Read one array of an ``.npz``."""
    check_member(info, path.stat().st_size)
    with archive.open(info) as file:
        shape, _, dtype = parse_npy_header(file, path)
        check_size(shape, dtype, info.file_size - file.tell(), f"{path}: array {info.filename}")
    with archive.open(info) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def check_member(info: zipfile.ZipInfo, size: int) -> None:
    """Refuse a member of an archive of ``size`` bytes that says it unpacks to far more."""
    stored = info.compress_type == zipfile.ZIP_STORED
    if info.compress_size > size or (stored and info.file_size != info.compress_size):
        raise zipfile.BadZipFile(f"{info.filename} says another size than it has")
    if info.file_size > max(PACKED_FREELY, PACKED_MOST * info.compress_size):
        raise zipfile.BadZipFile(
            f"{info.filename} says that {info.compress_size} bytes unpack to {info.file_size}; "
            "floats do not pack like that"
        )


def check_type(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Refuse what cannot be features: not 2-D, not float16/32/64, zero width."""
    if dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
        raise InputError(
            f"{path}: expected float16, float32 or float64 features, found {dtype}"
            + ("; this looks like a mask" if dtype.kind == "b" else "")
        )
    if len(shape) != 2:
        raise InputError(f"{path}: expected a 2-D array (rows, width), found shape {shape}")
    if shape[0] and not shape[1]:
        raise InputError(f"{path}: its {shape[0]} rows have width 0")


def open_parquet(path: Path) -> Any:
    """Return ``pyarrow.parquet.ParquetFile``, or refuse the file by name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(arrow_source(path))
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: truncated or not a parquet file: {error}") from error


def first_length(path: Path, file: Any, column: str) -> int:
    """Return the length of a list column's first row."""
    try:
        batch = next(file.iter_batches(1, columns=[column]))
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: row 0 cannot be read: {error}; fetch it again") from error
    row = batch.column(0)[0].as_py()
    if row is None:
        raise InputError(f"{path}: row 0 of column {column!r} is null, expected a list of floats")
    return len(row)


def list_value_type(kind: Any) -> Any:
    """Return the float type inside an arrow list type, None for any other type."""
    import pyarrow as pa

    is_list = (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )
    if is_list and pa.types.is_floating(kind.value_type):
        return kind.value_type
    return None


def only_list_column(path: Path, schema: Any) -> str:
    """Return the name of the one list column of floats; refuse none or several."""
    names = [field.name for field in schema if list_value_type(field.type) is not None]
    if len(names) != 1:
        found = f"several: {', '.join(names)}" if names else f"none among {', '.join(schema.names)}"
        raise InputError(
            f"{path}: expected one list column of floats, found {found}; name it with --column"
        )
    return str(names[0])
