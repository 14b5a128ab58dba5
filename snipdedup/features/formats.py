"""One file of rows: ``.npy`` and ``.npz`` shards, and arrays in memory.

Opening a shard reads its header only and refuses what cannot be features. Rows are returned in the
type in which they are stored. Files are opened for each read, so thousands of shards cost no
descriptors.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import IO

import numpy as np

from snipdedup.errors import InputError
from snipdedup.storage.remote import RemotePath

SUFFIXES = (".npy", ".npz", ".parquet")
PACKED_FREELY = 1 << 26  # bytes that a member may unpack to whatever its size
PACKED_MOST = 100  # times its size beyond that: floats pack by less than 2
# RuntimeError: encrypted; NotImplementedError, one of those: a packing that Python cannot undo
BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, EOFError, OSError)

Stamp = tuple[int, int]  # when a file was changed (ns), and its size: part of the keys of caches


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

    Raises
    ------
    InputError
        If the array is not 2-D, of another type, or has rows without values.
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
        self.read_into(start, stop, rows)
        return rows

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return the given rows of the file; ``rows`` is ascending."""
        found = np.empty((len(rows), self.dim), self.dtype)
        self.take_into(rows, found)
        return found

    def size(self) -> int:
        """Return its bytes."""
        return self.path.stat().st_size

    def changed(self) -> int:
        """Return when the file was last changed, ns; of an array the CRC32."""
        return self.path.stat().st_mtime_ns

    def read_into(self, start: int, stop: int, out: np.ndarray) -> None:
        """Write rows ``start`` to ``stop`` to ``out``, whose dtype may be wider."""
        raise NotImplementedError

    def take_into(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Write the given rows of the file, ascending, to ``out``, whose dtype may be wider."""
        raise NotImplementedError


class ArrayShard(Shard):
    """Rows that are in memory already."""

    def __init__(self, array: np.ndarray, name: str) -> None:
        super().__init__(Path(name), array.shape, array.dtype)
        self.array = array

    def size(self) -> int:
        """See `Shard.size`."""
        return self.array.nbytes

    def changed(self) -> int:
        """See `Shard.changed`."""
        return zlib.crc32(np.ascontiguousarray(self.array).view(np.uint8).data)

    def read_into(self, start: int, stop: int, out: np.ndarray) -> None:
        """See `Shard.read_into`."""
        out[:] = self.array[start:stop]

    def take_into(self, rows: np.ndarray, out: np.ndarray) -> None:
        """See `Shard.take_into`."""
        out[:] = self.array[rows]


class NpyShard(Shard):
    """A ``.npy`` file, or ``size`` bytes of a file from ``begin`` on that are one."""

    def __init__(self, path: Path, begin: int = 0, size: int | None = None) -> None:
        with path.open("rb") as file:
            file.seek(begin)
            held = path.stat().st_size - begin if size is None else size
            shape, _, self.stored = read_header(file, held, str(path), rows=True)
            self.data = file.tell()
        super().__init__(path, shape, self.stored)
        self.end = self.data + self.rows * self.dim * self.stored.itemsize

    def read_into(self, start: int, stop: int, out: np.ndarray) -> None:
        """See `Shard.read_into`."""
        if self.stored == out.dtype and out.flags.c_contiguous:
            self._fill(start, out)
            return
        rows = np.empty((stop - start, self.dim), self.stored)
        self._fill(start, rows)
        out[:] = rows

    def _fill(self, start: int, rows: np.ndarray) -> None:
        view = rows.reshape(-1).view(np.uint8).data
        with self.path.open("rb") as file:
            file.seek(self.data + start * self.dim * self.stored.itemsize)
            try:
                count = file.readinto(view)
            except OSError as error:  # of a read, unlike of opening, it does not name the file
                raise OSError(error.errno, error.strerror, str(self.path)) from error
        if count < view.nbytes:
            raise InputError(
                f"{self.path}: expected rows {start} to {start + len(rows)}, the file ended early; "
                "it changed while it was read"
            )

    def take_into(self, rows: np.ndarray, out: np.ndarray) -> None:
        """See `Shard.take_into`."""
        if not len(rows):
            return
        if isinstance(self.path, RemotePath):
            found = self.path.read_rows(self.data, self.dim * self.stored.itemsize, rows)
            out[:] = found.view(self.stored)
            return
        stamp = stamp_of(self.path)
        if stamp[1] < self.end:  # touching mapped rows that are gone would end the process
            raise InputError(f"{self.path}: became shorter while it was read; run it again")
        mapped = _map(self.path, self.stored, self.data, (self.rows, self.dim), stamp)
        if self.stored == out.dtype:
            # rows are in range; with mode "raise" numpy would fill a buffer first
            np.take(mapped, rows, axis=0, out=out, mode="clip")
        else:
            out[:] = mapped[rows]


def stamp_of(path: Path) -> Stamp:
    """Return what changes when a file is changed, so that caches read it again."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


# Mapping anew, and touching pages anew, takes time; a mapping holds a file open.
@lru_cache(maxsize=256)
def _map(
    path: Path, dtype: np.dtype, begin: int, shape: tuple[int, int], stamp: Stamp
) -> np.ndarray:
    del stamp
    return np.memmap(path, dtype, "r", begin, shape).view(np.ndarray)


class PackedNpzShard(Shard):
    """A member of a compressed ``.npz``. The last member read stays unpacked in memory."""

    def __init__(self, path: Path, member: zipfile.ZipInfo) -> None:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            shape, _, dtype = read_header(file, member.file_size, str(path), rows=True)
        super().__init__(path, shape, dtype)
        self.member = member.filename

    def read_into(self, start: int, stop: int, out: np.ndarray) -> None:
        """See `Shard.read_into`."""
        out[:] = _unpack(self.path, self.member, stamp_of(self.path))[start:stop]

    def take_into(self, rows: np.ndarray, out: np.ndarray) -> None:
        """See `Shard.take_into`."""
        out[:] = _unpack(self.path, self.member, stamp_of(self.path))[rows]


@lru_cache(maxsize=2)
def _unpack(path: Path, member: str, stamp: Stamp) -> np.ndarray:
    del stamp
    return load_npz(path, [member])[member]


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
    except BROKEN_ZIP as error:
        raise InputError(f"{path}: truncated or not an .npz archive: {error}") from error


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
    file: IO[bytes], held: int, where: str, *, rows: bool = False
) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the header of a ``.npy``, leaving ``file`` at the first value.

    Parameters
    ----------
    file : binary file
        At the header's first byte.
    held : int
        Bytes from there on that belong to the array.
    where : str
        What messages call it.
    rows : bool
        Refuse Fortran order: rows whose values do not lie one after another.

    Returns
    -------
    shape, fortran_order, dtype

    Raises
    ------
    InputError
        If it is no such header, the array has another length, or it holds Python objects.
    """
    begin = file.tell()
    try:
        plain = np.lib.format.read_magic(file) == (1, 0)
        formats = np.lib.format
        read = formats.read_array_header_1_0 if plain else formats.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except Exception as error:  # the header is Python's text, so its errors are any parser's
        raise InputError(f"{where}: truncated or not a .npy file: {error}") from error
    if any(isinstance(n, bool) or n < 0 or n >= 1 << 63 for n in shape):
        raise InputError(f"{where}: damaged: its header says shape {shape}")
    if dtype.hasobject or not dtype.itemsize:
        raise InputError(f"{where}: expected plain numbers, found {dtype}")
    need, held = dtype.itemsize * prod(shape), held - (file.tell() - begin)
    if need != held:
        raise InputError(
            f"{where}: truncated or damaged: its header promises shape {shape} of {dtype} "
            f"({need} bytes), found {held}; fetch or write it again"
        )
    if rows and fortran and len(shape) == 2 and min(shape) > 1:
        raise InputError(
            f"{where}: Fortran-ordered, expected rows one after another; save it with "
            "np.save(path, np.ascontiguousarray(array))"
        )
    return shape, fortran, dtype


def map_npy(path: Path, begin: int = 0, size: int | None = None) -> np.ndarray:
    """Memory-map a ``.npy`` of any shape, or ``size`` bytes of a file that are one.

    Raises
    ------
    InputError
        As `read_header`.
    """
    with path.open("rb") as file:
        file.seek(begin)
        held = path.stat().st_size - begin if size is None else size
        shape, fortran, dtype = read_header(file, held, str(path))
        if 0 in shape:
            return np.empty(shape, dtype)
        return np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran else "C")


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
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = {i.filename.removesuffix(".npy"): i for i in archive.infolist()}
            for name in members if names is None else names:
                member = members[name.removesuffix(".npy")]
                check_member(member, path.stat().st_size)
                with archive.open(member) as file:
                    read_header(file, member.file_size, f"{path}: array {member.filename}")
                    file.seek(0)
                    arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    except KeyError as error:
        raise InputError(f"{path}: holds no array {error}") from error
    except BROKEN_ZIP as error:
        raise InputError(f"{path}: truncated or not an .npz archive: {error}") from error
    return arrays
