"""Shards of two inputs that are one: the same file or array, or a copy of it.

Files are told by device and inode and by their resolved paths, URLs by scheme, host and path. Two
that differ in these may be copies where sizes and shapes agree: then a few bytes of each are read,
and all of both only where these agree too.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from snipdedup.features.formats import ArrayShard, Shard
from snipdedup.storage.remote import RemotePath, map_requests

SAMPLE_BYTES = 4096  # read in the middle and at the end of what may be a copy
CHUNK_BYTES = 1 << 22  # of two files compared at a time
CHUNK_ROWS = 1 << 12  # of an array and something else
FEW_ROWS = 16  # fewer may well be equal though nobody copied them
HARD = 10**6  # steps that numpy may take to tell whether two arrays share memory


class Shared(NamedTuple):
    """Two shards that are one, by their places, and whether the one is a copy of the other."""

    own: int
    other: int
    copied: bool


def find_shared(own: Sequence[Shard], others: Sequence[Shard]) -> Shared | None:
    """Return the first of these shards that is one of the others too, or a copy of one."""
    return find_named(own, others) or find_in_memory(own, others) or find_copied(own, others)


def find_named(own: Sequence[Shard], others: Sequence[Shard]) -> Shared | None:
    """Return the first shard whose file is one of the others'."""
    known: dict[Hashable, int] = {}
    for number, shard in enumerate(others):
        for name in names_of(shard):
            known.setdefault(name, number)
    for number, shard in enumerate(own):
        for name in names_of(shard):
            if name in known:
                return Shared(number, known[name], False)
    return None


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


def find_in_memory(own: Sequence[Shard], others: Sequence[Shard]) -> Shared | None:
    """Return the first array that has memory in common with one of the others."""
    for number, shard in enumerate(own):
        for place, other in enumerate(others):
            if (
                isinstance(shard, ArrayShard)
                and isinstance(other, ArrayShard)
                and overlap(shard.array, other.array)
            ):
                return Shared(number, place, False)
    return None


def overlap(one: np.ndarray, other: np.ndarray) -> bool:
    """Tell whether two arrays have memory in common; False where that is hard to tell."""
    try:
        how: Any = {"max_work": HARD}
        return np.shares_memory(one, other, **how)
    except np.exceptions.TooHardError:
        return False


def find_copied(own: Sequence[Shard], others: Sequence[Shard]) -> Shared | None:
    """Return the first shard that equals one of the others.

    Files are compared byte for byte; where one of two is an array, row by row.
    """
    rows = any(isinstance(shard, ArrayShard) for shard in (*own, *others))
    shapes = [shape_of(shard, rows) for shard in own], [shape_of(shard, rows) for shard in others]
    common = set(shapes[0]) & set(shapes[1]) - {None}
    places = [[number for number, shape in enumerate(side) if shape in common] for side in shapes]
    marks = [
        map_requests(partial(sample_of, rows=rows), [side[number] for number in which])
        for side, which in zip((own, others), places, strict=True)
    ]
    known: dict[Hashable, list[int]] = {}
    for place, mark in zip(places[1], marks[1], strict=True):
        known.setdefault((shapes[1][place], mark), []).append(place)
    for number, mark in zip(places[0], marks[0], strict=True):
        for place in known.get((shapes[0][number], mark), []):
            if equal(own[number], others[place], rows):
                return Shared(number, place, True)
    return None


def shape_of(shard: Shard, rows: bool) -> Hashable:
    """Return what two copies have in common, known without reading; None: too few rows to say."""
    if shard.rows < FEW_ROWS:
        return None
    size = 0 if rows else shard.path.stat().st_size
    return shard.rows, shard.dim, str(shard.dtype), size


def sample_of(shard: Shard, rows: bool) -> bytes:
    """Return some bytes of a shard that its copies have too."""
    if rows:
        last = shard.rows - 1
        return b"".join(shard.read(row, row + 1).tobytes() for row in (last // 2, last))
    size = shard.path.stat().st_size
    parts = []
    for begin in (size // 2, max(0, size - SAMPLE_BYTES)):
        parts.append(read_bytes(shard.path, begin, min(begin + SAMPLE_BYTES, size)))
    return b"".join(parts)


def equal(one: Shard, other: Shard, rows: bool) -> bool:
    """Tell whether two shards are equal; reads no further than they are."""
    if rows:
        return all(
            one.read(start, min(start + CHUNK_ROWS, one.rows)).tobytes()
            == other.read(start, min(start + CHUNK_ROWS, one.rows)).tobytes()
            for start in range(0, one.rows, CHUNK_ROWS)
        )
    return all(a == b for a, b in zip_longest(chunks(one.path), chunks(other.path)))


def chunks(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes in order."""
    size = path.stat().st_size
    for begin in range(0, size, CHUNK_BYTES):
        yield read_bytes(path, begin, min(begin + CHUNK_BYTES, size))


def read_bytes(path: Path, begin: int, end: int) -> bytes:
    """Return the bytes ``begin`` to ``end`` (exclusive) of a file."""
    if isinstance(path, RemotePath):
        return path.read_range(begin, end)
    with path.open("rb") as file:
        file.seek(begin)
        return file.read(end - begin)
