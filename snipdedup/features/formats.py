"""One file of rows: ``.npy``, ``.npz`` and parquet shards, and arrays in memory.

Opening a shard reads its header only and refuses what cannot be features. Rows are returned in the
type in which they are stored. Files are opened for each read, so thousands of shards cost no
descriptors.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from snipdedup.errors import InputError
from snipdedup.features.list_columns import find_list_column, list_rows, list_value_type
from snipdedup.storage.remote import RemotePath, arrow_source

SUFFIXES = (".npy", ".npz", ".parquet")
PACKED_FREELY = 1 << 26  # bytes that a member may unpack to whatever its size
PACKED_MOST = 100  # times its size beyond that: floats pack by less than 2
# RuntimeError: encrypted; NotImplementedError, one of those: a packing that Python cannot undo
BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, EOFError, OSError)

Identity = tuple[int, int, int]  # inode, size, time of change (ns): what changes with a file
RowSet = slice | np.ndarray  # start:stop, or ascending row numbers (n,) int64


def identity_of(path: Path) -> Identity:
    """Return what changes when a file is changed or replaced."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


class Shard:
    """Rows of one file; of an array in memory, ``path`` is the name that messages show.

    ``dtype`` is float16, float32 or float64 in native byte order. Raises `InputError` if the array
    is of another type, is not 2-D, or has rows without values.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
        if dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
            raise InputError(
                f"{path}: expected float16, float32 or float64 features, found {dtype}"
                + ("; this looks like a mask" if dtype.kind == "b" else "")
            )
        if len(shape) != 2:
            raise InputError(f"{path}: expected a 2-D array (rows, width), found shape {shape}")
        if shape[0] and not shape[1]:
            raise InputError(f"{path}: its {shape[0]} rows have width 0")
        self.path = path
        self.rows, self.dim = int(shape[0]), int(shape[1])
        self.dtype = dtype.newbyteorder("=")

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows ``start`` to ``stop`` (exclusive) of the file as a fresh array."""
        rows = np.empty((stop - start, self.dim), self.dtype)
        self.read_into(slice(start, stop), rows)
        return rows

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return the given rows of the file, (n,) int64 ascending."""
        found = np.empty((len(rows), self.dim), self.dtype)
        self.read_into(rows, found)
        return found

    def read_into(self, rows: RowSet, out: np.ndarray) -> None:
        """Write rows of the file to ``out``, whose dtype may be wider."""
        out[:] = self.whole()[rows]

    def whole(self) -> np.ndarray:
        """Return all rows, of a shard that is in memory."""
        raise NotImplementedError

    def size(self) -> int:
        """Return its bytes."""
        return self.path.stat().st_size

    def changed(self) -> int:
        """Return when the file was last changed, ns; of an array the CRC32."""
        return self.path.stat().st_mtime_ns


class ArrayShard(Shard):
    """Rows that are in memory already."""

    def __init__(self, array: np.ndarray, name: str) -> None:
        super().__init__(Path(name), array.shape, array.dtype)
        self.array = array

    def whole(self) -> np.ndarray:
        """See `Shard.whole`."""
        return self.array

    def size(self) -> int:
        """See `Shard.size`."""
        return self.array.nbytes

    def changed(self) -> int:
        """See `Shard.changed`."""
        return zlib.crc32(np.ascontiguousarray(self.array).view(np.uint8).data)


class NpyShard(Shard):
    """A ``.npy`` file, or ``size`` bytes of a file from ``begin`` on that are one."""

    def __init__(self, path: Path, begin: int = 0, size: int | None = None) -> None:
        with path.open("rb") as file:
            file.seek(begin)
            size = path.stat().st_size - begin if size is None else size
            shape, _, self.stored = read_header(file, size, str(path), rows=True)
            self.data = file.tell()
        super().__init__(path, shape, self.stored)
        self.row_bytes = self.dim * self.stored.itemsize

    def read_into(self, rows: RowSet, out: np.ndarray) -> None:
        """See `Shard.read_into`."""
        if isinstance(rows, slice):
            fits = self.stored == out.dtype and out.flags.c_contiguous
            found = out if fits else np.empty(out.shape, self.stored)
            self._read_range(rows.start, found)
            if not fits:
                out[:] = found
        elif isinstance(self.path, RemotePath):
            out[:] = self.path.read_rows(self.data, self.row_bytes, rows).view(self.stored)
        elif len(rows):
            identity = identity_of(self.path)
            # touching mapped rows that are gone would end the process
            if identity[1] < self.data + self.rows * self.row_bytes:
                raise InputError(f"{self.path}: became shorter while it was read; run it again")
            mapped = _map(self.path, self.stored, self.data, (self.rows, self.dim), identity)
            if self.stored == out.dtype:
                # rows are in range; with mode "raise" numpy would fill a buffer first
                np.take(mapped, rows, axis=0, out=out, mode="clip")
            else:
                out[:] = mapped[rows]

    def _read_range(self, start: int, rows: np.ndarray) -> None:
        """Fill ``rows`` with those of the file from ``start`` on."""
        view = rows.reshape(-1).view(np.uint8).data
        with self.path.open("rb") as file:
            file.seek(self.data + start * self.row_bytes)
            try:
                count = file.readinto(view)
            except OSError as error:  # of a read, unlike of opening, it does not name the file
                raise OSError(error.errno, error.strerror, str(self.path)) from error
        if count < view.nbytes:
            raise InputError(
                f"{self.path}: expected rows {start} to {start + len(rows)}, the file ended early; "
                "it changed while it was read"
            )


# Mapping anew, and touching pages anew, takes time; a mapping holds a file open.
@lru_cache(maxsize=256)
def _map(
    path: Path, dtype: np.dtype, begin: int, shape: tuple[int, int], identity: Identity
) -> np.ndarray:
    del identity
    return np.memmap(path, dtype, "r", begin, shape).view(np.ndarray)


class PackedNpzShard(Shard):
    """A member of a compressed ``.npz``, which stays unpacked in memory for a while."""

    def __init__(self, path: Path, member: zipfile.ZipInfo) -> None:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            shape, _, dtype = read_header(file, member.file_size, str(path), rows=True)
        super().__init__(path, shape, dtype)
        self.member = member.filename

    def whole(self) -> np.ndarray:
        """See `Shard.whole`."""
        return _decoded(self, 0, identity_of(self.path))

    def decode(self, part: int) -> np.ndarray:
        """Unpack all rows, which are part 0."""
        del part
        return load_npz(self.path, [self.member])[self.member]


class ParquetShard(Shard):
    """A list column of a parquet file; rows are read by row group."""

    def __init__(self, path: Path, column: str | None) -> None:
        file = open_parquet(path)
        self.column = find_list_column(file.schema_arrow, column, str(path), "--column")
        kind = file.schema_arrow.field(self.column).type
        values = list_value_type(kind)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        self.group_starts = np.cumsum([0, *sizes], dtype=np.int64)
        rows = int(self.group_starts[-1])
        self.where = f"{path}: row {{}} of column {self.column!r}"
        dim = getattr(kind, "list_size", None)
        if dim is None or kind.value_type != values:
            dim = first_length(path, file, self.column, self.where) if rows else 0
        super().__init__(path, (rows, dim), np.dtype(f"f{values.bit_width // 8}"))

    def read_into(self, rows: RowSet, out: np.ndarray) -> None:
        """See `Shard.read_into`."""
        wanted = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        identity, cuts = identity_of(self.path), np.searchsorted(wanted, self.group_starts)
        for group in np.flatnonzero(np.diff(cuts)).tolist():
            part, first = slice(cuts[group], cuts[group + 1]), self.group_starts[group]
            places, values = wanted[part] - first, _decoded(self, group, identity)
            if isinstance(rows, slice):  # quicker to copy
                out[part] = values[places[0] : places[-1] + 1]
            else:
                out[part] = values[places]

    def decode(self, part: int) -> np.ndarray:
        """Return the rows of a row group, (n, dim).

        Refused by number: the first row that is null, holds a null, or has another length.
        """
        first, end = self.group_starts[part : part + 2].tolist()
        try:
            column = open_parquet(self.path).read_row_group(part, columns=[self.column]).column(0)
        except (ValueError, OSError) as error:  # ArrowInvalid is a ValueError
            raise InputError(
                f"{self.path}: rows {first} to {end} cannot be read: {error}; fetch or write it "
                "again"
            ) from error
        return list_rows(column, self.where, first, self.dim).astype(self.dtype, copy=False)


@lru_cache(maxsize=2)
def _decoded(shard: PackedNpzShard | ParquetShard, part: int, identity: Identity) -> np.ndarray:
    del identity
    return shard.decode(part)


def open_parquet(path: Path) -> Any:
    """Return a ``pyarrow.parquet.ParquetFile``, or refuse the file by name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(arrow_source(path))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: truncated or not a parquet file: {error}") from error


def first_length(path: Path, file: Any, column: str, where: str) -> int:
    """Return the length of the list in row 0."""
    try:
        batch = next(file.iter_batches(1, columns=[column]))
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: row 0 cannot be read: {error}; fetch it again") from error
    return list_rows(batch.column(0), where, 0).shape[1]


def open_shard(path: Path, array: str | None = None, column: str | None = None) -> Shard:
    """Open one file of rows; refuse one that is missing, empty, truncated, or holds no features.

    ``array`` names an array of an ``.npz``, ``column`` a list column of a parquet file; each is
    needed where there are several.
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


@contextmanager
def opened_npz(path: Path) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
    """Open an ``.npz``: yield the archive, and its members by the names of their arrays."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            yield archive, {i.filename.removesuffix(".npy"): i for i in archive.infolist()}
    except BROKEN_ZIP as error:
        raise InputError(f"{path}: truncated or not an .npz archive: {error}") from error


def open_npz(path: Path, array: str | None) -> Shard:
    """Open one array of an ``.npz`` archive."""
    with opened_npz(path) as (archive, members):
        name = array or (next(iter(members)) if len(members) == 1 else None)
        if name is None or name not in members:
            asked = f"no array {name!r}" if name else "several arrays"
            raise InputError(
                f"{path}: {asked}; choose one with --array: {', '.join(members) or 'none here'}"
            )
        member = members[name]
        check_member(member, path.stat().st_size)
        if member.compress_type == zipfile.ZIP_STORED:
            with archive.open(member):  # checks the member's own header
                return NpyShard(path, member_begin(path, member), member.file_size)
        if isinstance(path, RemotePath):
            raise InputError(
                f"{path}: compressed, so its rows cannot be read by ranges: fetch it "
                "first, or save it with np.savez"
            )
        return PackedNpzShard(path, member)


def member_begin(path: Path, member: zipfile.ZipInfo) -> int:
    """Return where the bytes of a stored member begin (APPNOTE.TXT, 4.3.7: local file header)."""
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        name, extra = np.frombuffer(file.read(4), "<u2")
    return member.header_offset + 30 + int(name) + int(extra)


def check_member(member: zipfile.ZipInfo, size: int) -> None:
    """Refuse a member of an archive of ``size`` bytes that says it unpacks to far more."""
    stored = member.compress_type == zipfile.ZIP_STORED
    if member.compress_size > size or (stored and member.file_size != member.compress_size):
        raise zipfile.BadZipFile(f"{member.filename} says another size than it has")
    if member.file_size > max(PACKED_FREELY, PACKED_MOST * member.compress_size):
        raise zipfile.BadZipFile(
            f"{member.filename} says that {member.compress_size} bytes unpack to "
            f"{member.file_size}; floats do not pack like that"
        )


def read_header(
    file: IO[bytes], size: int, where: str, *, rows: bool = False
) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the header of a ``.npy`` of ``size`` bytes, leaving ``file`` at the first value.

    Returns shape, whether in Fortran order, and dtype. Refused, as ``where``: what is no such
    header, an array of another length, Python objects; with ``rows`` Fortran order too.
    """
    begin, formats = file.tell(), np.lib.format
    try:
        plain = formats.read_magic(file) == (1, 0)
        read = formats.read_array_header_1_0 if plain else formats.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except Exception as error:  # the header is Python's text, so its errors are any parser's
        raise InputError(f"{where}: truncated or not a .npy file: {error}") from error
    if any(isinstance(n, bool) or n < 0 or n >= 1 << 63 for n in shape):
        raise InputError(f"{where}: damaged: its header says shape {shape}")
    if dtype.hasobject or not dtype.itemsize:
        raise InputError(f"{where}: expected plain numbers, found {dtype}")
    need, found = dtype.itemsize * prod(shape), size - (file.tell() - begin)
    if need != found:
        raise InputError(
            f"{where}: truncated or damaged: its header promises shape {shape} of {dtype} "
            f"({need} bytes), found {found}; fetch or write it again"
        )
    if rows and fortran and len(shape) == 2 and min(shape) > 1:
        raise InputError(
            f"{where}: Fortran-ordered, expected rows one after another; save it with "
            "np.save(path, np.ascontiguousarray(array))"
        )
    return shape, fortran, dtype


def map_npy(path: Path, begin: int = 0, size: int | None = None) -> np.ndarray:
    """Memory-map a ``.npy`` of any shape, or ``size`` bytes of a file that are one."""
    with path.open("rb") as file:
        file.seek(begin)
        size = path.stat().st_size - begin if size is None else size
        shape, fortran, dtype = read_header(file, size, str(path))
        if 0 in shape:
            return np.empty(shape, dtype)
        return np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def load_npz(path: Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Read arrays of an ``.npz`` whole, those of ``names`` or all.

    What the headers say is checked before memory is taken.
    """
    arrays = {}
    with opened_npz(path) as (archive, members):
        wanted: Iterable[str] = members if names is None else names
        for name in wanted:
            member = members.get(name.removesuffix(".npy"))
            if member is None:
                raise InputError(f"{path}: holds no array {name!r}")
            check_member(member, path.stat().st_size)
            with archive.open(member) as file:
                read_header(file, member.file_size, f"{path}: array {member.filename}")
                file.seek(0)
                arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    return arrays
