"""Codes of rows sorted by list: one shard's file, and all rows together in memory.

Row numbers are implied by the shard's offset and a packed local number, so a row costs its code
and a few bytes. Files are plain arrays behind a header, so that they can be mapped: what is not
looked at is never read.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from snipdedup.errors import InputError, SnipError
from snipdedup.features.formats import (
    BROKEN_ZIP,
    check_member,
    check_size,
    load_npz,
    parse_npy_header,
)
from snipdedup.storage import atomic

ZIP_NAME_LENGTH = 26  # where a zip's header of a file holds the length of its name
WALK_ROWS = 1 << 20  # entries of the lists looked at together


class ShardCodes(NamedTuple):
    """One shard's rows, sorted by list.

    Attributes
    ----------
    codes : (n, code_size) uint8
    ids : (n, width) uint8
        Rows of the shard, packed by `pack`; ascending in each list.
    sizes : (nlist,) unsigned
        Rows a list.
    bad : (b,) int64
        Rows of the shard that are NaN, infinity or zero: in no list.
    self_adc : () float64
        Sum of ‖x − q(x)‖² over the rows.
    """

    codes: np.ndarray
    ids: np.ndarray
    sizes: np.ndarray
    bad: np.ndarray
    self_adc: np.ndarray


def packed_width(rows: int) -> int:
    """Return the bytes that a row number below ``rows`` needs."""
    return max(1, (max(rows - 1, 0).bit_length() + 7) // 8)


def pack(numbers: np.ndarray, width: int) -> np.ndarray:
    """Return numbers as their lowest ``width`` bytes, (n, width) uint8."""
    wide = np.ascontiguousarray(numbers, "<i8").view(np.uint8).reshape(-1, 8)
    return np.ascontiguousarray(wide[:, :width])


def unpack(packed: np.ndarray) -> np.ndarray:
    """Return the numbers that `pack` took, (n,) int64."""
    wide = np.zeros((len(packed), 8), np.uint8)
    wide[:, : packed.shape[1]] = packed
    return wide.view("<i8")[:, 0].astype(np.int64, copy=False)


def shard_name(number: int) -> str:
    """Return the name of a shard's file."""
    return f"lists_{number:05d}.npz"


def save_shard(path: Path, shard: ShardCodes) -> None:
    """Write one shard."""
    atomic.save_npz(path, **shard._asdict())


def load_shard(path: Path) -> ShardCodes:
    """Read one shard.

    Raises
    ------
    SnipError
        If the file is missing, truncated or of another layout.
    """
    try:
        shard = ShardCodes(**load_npz(path, ShardCodes._fields))
    except InputError as error:
        raise damaged(path, str(error)) from error
    check_shard(path, shard)
    return shard


def check_shard(path: Path, shard: ShardCodes) -> None:
    """Refuse arrays that are not those of a shard."""
    kinds = [(array.ndim, array.dtype.kind) for array in shard]
    bytes_ = shard.codes.dtype.itemsize * shard.ids.dtype.itemsize
    if kinds != [(2, "u"), (2, "u"), (1, "u"), (1, "i"), (0, "f")] or bytes_ != 1:
        raise damaged(path, "its arrays are of other shapes or types")
    if len(shard.codes) != len(shard.ids) or not 1 <= shard.ids.shape[1] <= 8:
        raise damaged(path, "as many codes as row numbers expected")
    if int(shard.sizes.sum(dtype=np.int64)) != len(shard.ids) or shard.sizes.max(initial=0) > len(
        shard.ids
    ):
        raise damaged(path, "its lists do not add up")


def damaged(path: Path, why: str) -> SnipError:
    """Return the refusal of a shard's file."""
    return SnipError(
        f"{path}: not a shard of an index, or damaged ({why}); remove it and run snip index again"
    )


def map_shard(path: Path) -> ShardCodes:
    """Return one shard as `load_shard` does, with arrays that are read where they are looked at.

    The file is an uncompressed zip of ``.npy`` files: each lies in it as one run of bytes.

    Raises
    ------
    SnipError
        If the file is missing, truncated or of another layout.
    """
    try:
        with zipfile.ZipFile(path) as members, path.open("rb") as file:
            shard = ShardCodes(*(map_member(file, members, n) for n in ShardCodes._fields))
    except (InputError, KeyError, *BROKEN_ZIP) as error:
        raise damaged(path, str(error)) from error
    check_shard(path, shard)
    return shard


def map_member(file: BinaryIO, members: zipfile.ZipFile, name: str) -> np.ndarray:
    """Return one array of an ``.npz`` without reading it."""
    member = members.getinfo(f"{name}.npy")
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    file.seek(member.header_offset + ZIP_NAME_LENGTH)
    lengths = np.frombuffer(file.read(4), "<u2")  # of the name and of what extra follows it
    file.seek(int(lengths.sum()), os.SEEK_CUR)
    begin, path = file.tell(), Path(file.name)
    check_member(member, path.stat().st_size)
    shape, _, dtype = parse_npy_header(file, path)
    check_size(shape, dtype, member.file_size - (file.tell() - begin), f"array {name}")
    if 0 in shape:  # nothing to map
        return np.empty(shape, dtype)
    return np.memmap(file, dtype, "r", offset=file.tell(), shape=shape)


class Lists:
    """Codes of many rows, sorted by list, with packed row numbers, in memory.

    Attributes
    ----------
    codes : (n, code_size) uint8
    ids : (n, width) uint8
        Global rows, packed; ascending in each list.
    starts : (nlist + 1,) int64
        Where each list begins, then n.
    """

    def __init__(self, codes: np.ndarray, ids: np.ndarray, starts: np.ndarray) -> None:
        self.codes, self.ids, self.starts = codes, ids, starts

    def rows(self, places: np.ndarray | slice) -> np.ndarray:
        """Return the global rows at places in the sorted order, (n,) int64."""
        return unpack(self.ids[places])

    def list_of(self, low: int, high: int) -> np.ndarray:
        """Return the list of each place from ``low`` to ``high``, (n,) int64."""
        return np.searchsorted(self.starts, np.arange(low, high), side="right") - 1

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield (low, high) places of whole lists, about `WALK_ROWS` at a time."""
        low = 0
        for high in self.starts[1:].tolist():
            if high - low >= WALK_ROWS:
                yield low, high
                low = high
        if low < len(self.ids):
            yield low, len(self.ids)
