"""Shards of two inputs that are one: the same file or array, or a copy of it.

Files are compared by device, inode and resolved path, URLs by scheme, host and path, arrays by
their memory. Two shards that differ in these may be copies: of those that agree in shape, type and
two rows, all rows are read and compared by their checksums.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from snipdedup.features.formats import ArrayShard, Shard
from snipdedup.features.hashing import shard_checksum
from snipdedup.storage.remote import RemotePath, map_requests

FEW_ROWS = 16  # fewer may well be equal though nobody copied them
HARD = 10**6  # steps that numpy may take to tell whether two arrays share memory


class Shared(NamedTuple):
    """Two shards that are one, by their places, and whether the one is a copy of the other."""

    own: int
    other: int
    copied: bool


def find_shared(own: Sequence[Shard], others: Sequence[Shard]) -> Shared | None:
    """Return the first of these shards that is one of the others too, or a copy of one."""
    names: dict[Hashable, int] = {}
    for place, other in enumerate(others):
        for name in names_of(other):
            names.setdefault(name, place)
    for number, shard in enumerate(own):
        for name in names_of(shard):
            if name in names:
                return Shared(number, names[name], False)
    for number, shard in enumerate(own):
        for place, other in enumerate(others):
            if share_memory(shard, other):
                return Shared(number, place, False)
    return find_copy(own, others)


def names_of(shard: Shard) -> Iterator[Hashable]:
    """Yield what tells a shard's file from all others; nothing for an array."""
    if isinstance(shard, ArrayShard):
        return
    if isinstance(shard.path, RemotePath):
        parts = urlsplit(shard.path.url)
        yield parts.scheme.lower(), parts.netloc.rpartition("@")[2].lower(), parts.path, parts.query
        return
    stat = shard.path.stat()
    if stat.st_ino:  # some file systems have none
        yield stat.st_dev, stat.st_ino
    yield os.path.realpath(shard.path)


def share_memory(one: Shard, other: Shard) -> bool:
    """Tell whether two shards are arrays with common memory; False where that is hard to tell."""
    if not isinstance(one, ArrayShard) or not isinstance(other, ArrayShard):
        return False
    try:
        most: Any = {"max_work": HARD}
        return np.shares_memory(one.array, other.array, **most)
    except np.exceptions.TooHardError:
        return False


def find_copy(own: Sequence[Shard], others: Sequence[Shard]) -> Shared | None:
    """Return the first shard whose rows equal those of one of the others."""
    shapes = {shape_of(shard) for shard in own} & {shape_of(shard) for shard in others} - {None}

    def sampled(shards: Sequence[Shard]) -> list[tuple[int, Hashable]]:
        likely = [n for n, shard in enumerate(shards) if shape_of(shard) in shapes]
        return list(zip(likely, map_requests(sample_of, [shards[n] for n in likely]), strict=True))

    known: dict[Hashable, list[int]] = {}
    for place, sample in sampled(others):
        known.setdefault(sample, []).append(place)
    for number, sample in sampled(own):
        for place in known.get(sample, []):
            if shard_checksum(own[number]) == shard_checksum(others[place]):
                return Shared(number, place, True)
    return None


def shape_of(shard: Shard) -> Hashable:
    """Return rows, width and type, which copies have in common; None for too few rows to tell."""
    return (shard.rows, shard.dim, shard.dtype.str) if shard.rows >= FEW_ROWS else None


def sample_of(shard: Shard) -> Hashable:
    """Return the shape and the bytes of two rows."""
    rows = np.array([(shard.rows - 1) // 2, shard.rows - 1])
    return shape_of(shard), shard.take(rows).tobytes()
