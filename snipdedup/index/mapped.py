"""The nearest codes to one vector, from an index that stays on disk: only visited lists are read.

For many queries `search` is faster, which loads all codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from snipdedup.errors import SnipError
from snipdedup.features.shards import plan_blocks
from snipdedup.index.codes import ShardCodes, map_shard, pack, unpack
from snipdedup.index.folder import Index

MOST_MAPPED = 128  # shards that stay mapped
DECODE_ROWS = 1 << 15  # codes turned into vectors at a time


class Entries(NamedTuple):
    """Rows of some lists: ``rows`` (n,) int64, ``lists`` (n,) int64, ``codes`` (n, code_size)."""

    rows: np.ndarray
    lists: np.ndarray
    codes: np.ndarray


class MappedLists:
    """The lists of a finished index, mapped shard by shard."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.held: dict[int, ShardCodes] = {}
        for number in range(len(index.files)):  # a wrong one is refused now
            self.shard(number)

    def shard(self, number: int) -> ShardCodes:
        """Return the codes of a shard; where there are very many, most are mapped when asked for.

        A mapped shard holds four open files, and a process may often have no more than 1024.
        """
        if number in self.held:
            return self.held[number]
        shard = self.index.fitting(number, map_shard(self.index.files[number]))
        if len(self.held) < MOST_MAPPED:
            self.held[number] = shard
        return shard

    def visit(self, lists: np.ndarray) -> Entries:
        """Return the entries of some lists, in the order of shards, in each as asked."""
        parts = [Entries(np.empty(0, np.int64), np.empty(0, np.int64), self._no_codes())]
        for number in range(len(self.index.files)):
            parts += entries_of(self.shard(number), int(self.index.offsets[number]), lists)
        return Entries(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def code_of(self, row: int) -> tuple[int, np.ndarray] | None:
        """Return list and code of a stored row; None if it is in no list.

        The row numbers of one shard are read.
        """
        number = int(np.searchsorted(self.index.offsets, row, side="right")) - 1
        shard = self.shard(number)
        wanted = pack(np.array([row - self.index.offsets[number]]), shard.ids.shape[1])
        places = np.flatnonzero((shard.ids == wanted).all(axis=1))
        if not len(places):
            return None
        ends = np.cumsum(shard.sizes, dtype=np.int64)
        return int(np.searchsorted(ends, places[0], side="right")), np.array(shard.codes[places[0]])

    def vector_of(self, row: int) -> np.ndarray:
        """Return q(x) of a stored row, (dim,) float32.

        Raises
        ------
        SnipError
            If the row is in no list.
        """
        found = self.code_of(row)
        if found is None:
            raise SnipError(
                f"row {row} is in no list of {self.index.folder}: it was NaN, infinite or zero "
                "when the index was built"
            )
        return self.index.quantiser.decode(np.array([found[0]]), found[1][None])[0]

    def nearest(self, x: np.ndarray, *, nprobe: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the nearest entries in the lists to visit.

        Parameters
        ----------
        x : (dim,) float32
            A vector as `Space.vectors` makes them.
        nprobe, k : int

        Returns
        -------
        D : (n,) float32
            Squared distances to the codes, ascending; n is at most k.
        I : (n,) int64
            Rows; where distances are equal, ascending.
        """
        x = np.ascontiguousarray(x, np.float32)
        lists = self.index.quantiser.assign(x[None], nprobe)[1][0]
        entries = self.visit(lists[lists >= 0])
        D = np.empty(len(entries.rows), np.float32)
        for low, high in plan_blocks(len(D), DECODE_ROWS):
            off = self.index.quantiser.decode(entries.lists[low:high], entries.codes[low:high]) - x
            D[low:high] = np.einsum("ij,ij->i", off, off)
        order = np.lexsort((entries.rows, D))[:k]
        return D[order], entries.rows[order]

    def _no_codes(self) -> np.ndarray:
        return np.empty((0, self.index.code_size), np.uint8)


def entries_of(shard: ShardCodes, first: int, lists: np.ndarray) -> Iterator[Entries]:
    """Yield the entries of each of some lists in one shard, whose first global row is given."""
    ends = np.cumsum(shard.sizes, dtype=np.int64)
    for number in lists.tolist():
        span = slice(ends[number] - int(shard.sizes[number]), ends[number])
        rows = unpack(shard.ids[span]) + first
        yield Entries(rows, np.full(len(rows), number), np.asarray(shard.codes[span]))
