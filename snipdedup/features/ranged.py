"""Rows of a remote file: blocks in order, and single rows by ranges that join neighbours."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from snipdedup.errors import InputError
from snipdedup.features import formats
from snipdedup.storage.remote import RANGE_BYTES, RemotePath

GAP_BYTES = 1 << 15  # between wanted rows: fewer cost less than another request


class RemoteNpyShard(formats.NpyShard):
    """A remote ``.npy``, or a member of an uncompressed ``.npz``."""

    path: RemotePath

    def _fill(self, start: int, rows: np.ndarray) -> None:
        flat = rows.reshape(-1).view(np.uint8)
        begin = self.data + start * self.dim * self.stored.itemsize
        flat[:] = np.frombuffer(self.path.read_range(begin, begin + flat.nbytes), np.uint8)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """See `Shard.take`."""
        found = np.empty((len(rows), self.dim), self.stored)
        size = self.dim * self.stored.itemsize
        cuts = list(plan_ranges(rows, size))
        ranges = [
            (self.data + int(rows[low]) * size, self.data + (int(rows[high - 1]) + 1) * size)
            for low, high in cuts
        ]
        for (low, high), data in zip(cuts, self.path.read_ranges(ranges), strict=True):
            block = np.frombuffer(data, self.stored).reshape(-1, self.dim)
            found[low:high] = block[rows[low:high] - rows[low]]
        return found.astype(self.dtype, copy=False)

    def take_into(self, rows: np.ndarray, out: np.ndarray) -> None:
        """See `Shard.take_into`."""
        out[:] = self.take(rows)


def plan_ranges(rows: np.ndarray, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut ascending rows where the gap is wide, or the range would be long.

    Parameters
    ----------
    rows : (n,) int64
        Ascending.
    row_bytes : int

    Yields
    ------
    (int, int)
        Positions in ``rows``, the second exclusive.
    """
    if not len(rows):
        return
    wide = np.flatnonzero((np.diff(rows) - 1) * row_bytes > GAP_BYTES) + 1
    most = max(1, RANGE_BYTES // row_bytes)  # rows that one request spans
    low = 0
    for high in [*wide.tolist(), len(rows)]:
        while low < high:
            cut = low + int(np.searchsorted(rows[low:high], rows[low] + most))
            yield low, cut
            low = cut


def open_remote_shard(path: RemotePath, array: str | None, column: str | None) -> formats.Shard:
    """Open one remote file of rows; see `formats.open_shard`.

    Raises
    ------
    InputError
        If it is missing or empty, or cannot be read by ranges.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path}; check the URL")
    if not path.stat().st_size:
        raise InputError(f"{path}: empty file, expected rows of features; write it again")
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return RemoteNpyShard(path)
    if suffix == ".npz":
        return formats.open_npz(path, array, RemoteNpyShard)
    if suffix == ".parquet":
        return formats.ParquetShard(path, column)
    raise InputError(f"{path}: expected a file of type {', '.join(formats.SUFFIXES)}")
