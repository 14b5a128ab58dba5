"""64-bit hashes of rows, checksums of shards made of them, and shards that two inputs share.

The first read of all rows hashes each row to find exact copies. A shard's checksum is made of the
same hashes, so it costs no second pass. It proves that the rows and their order are unchanged.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import product
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from snipdedup import native
from snipdedup.features.formats import ArrayShard, Shard
from snipdedup.native.fallback import HALF, MIXER
from snipdedup.storage.remote import RemotePath, map_requests

READ_BYTES = 1 << 24  # of a shard read at a time
FEW_ROWS = 16  # fewer may well be equal though nobody copied them
HARD = 10**6  # steps that numpy may take to tell whether two arrays share memory

Checksums = Sequence[tuple[int, int]]  # number of a shard, checksum of the rows that were read


def row_hashes(rows: np.ndarray) -> np.ndarray:
    """Return a 64-bit hash of each row's bytes, (n,) uint64.

    Sums of products of two words, each offset by a random constant (NH, Black et al., UMAC,
    1999). Low bits that all words lack, all hashes lack; of small numbers in float64 that would be
    most, so these words are mixed first. Equal hashes are a reason to compare, not a proof.
    """
    data = np.ascontiguousarray(rows).view(np.uint8)
    padding = -data.shape[1] % 16
    if padding:
        data = np.pad(data, ((0, 0), (0, padding)))
    words = data.view(np.uint64)
    offsets = np.random.default_rng(0x5E1F).integers(0, 2**64, words.shape[1], np.uint64)
    return native.word_hashes(words, offsets, rows.dtype.itemsize == words.itemsize)


def mixed(words: np.ndarray) -> np.ndarray:
    """Return words mixed one by one, different ones differently."""
    words = (words ^ (words >> HALF)) * MIXER
    return np.asarray(words ^ (words >> HALF))


def rows_checksum(hashes: np.ndarray, first: int) -> int:
    """Return the checksum of some rows of a shard, the first of them its row ``first``.

    A sum modulo 2^64 of a number for each hash and its place, so that parts of a shard can be read
    in any order: `sum_checksums` adds them up.
    """
    places = np.arange(first, first + len(hashes), dtype=np.uint64) * MIXER
    return int(mixed(hashes + places).sum(dtype=np.uint64))


def sum_checksums(parts: Iterable[Checksums], shards: int) -> list[int]:
    """Return the checksum of each of so many shards from those of its parts; 0 without rows."""
    totals = [0] * shards
    for part in parts:
        for shard, checksum in part:
            totals[shard] = (totals[shard] + checksum) % 2**64
    return totals


def shard_checksum(shard: Shard) -> int:
    """Read a whole shard, and return its checksum."""
    step = max(1, READ_BYTES // max(1, shard.dim * shard.dtype.itemsize))
    spans = [(start, min(start + step, shard.rows)) for start in range(0, shard.rows, step)]
    return sum(rows_checksum(row_hashes(shard.read(*span)), span[0]) for span in spans) % 2**64


def checksum_text(checksum: int) -> str:
    """Return a checksum as manifests hold it."""
    return f"{checksum:016x}"


class SharedShard(NamedTuple):
    """Numbers of two shards of two inputs that are one, and whether one is a copy of the other."""

    own: int
    other: int
    copied: bool


def find_shared(own: Sequence[Shard], others: Sequence[Shard]) -> SharedShard | None:
    """Return the first shard that is one of the others too, or a copy of one.

    Files are one by device and inode or resolved path, URLs by scheme, host and path, arrays by
    their memory. Of shards that agree in shape, type and two rows, all rows are compared by their
    checksums.
    """
    names: dict[Hashable, int] = {}
    for place, other in enumerate(others):
        for name in names_of(other):
            names.setdefault(name, place)
    for number, shard in enumerate(own):
        for name in names_of(shard):
            if name in names:
                return SharedShard(number, names[name], False)
    most: Any = HARD
    arrays, known_arrays = (
        [(n, shard.array) for n, shard in enumerate(shards) if isinstance(shard, ArrayShard)]
        for shards in (own, others)
    )
    for (number, array), (place, known_array) in product(arrays, known_arrays):
        with suppress(np.exceptions.TooHardError):  # hard to tell: taken for two
            if np.shares_memory(array, known_array, most):
                return SharedShard(number, place, False)
    shapes = set(map(shape_of, own)) & set(map(shape_of, others)) - {None}

    def sample(shard: Shard) -> Hashable:
        rows = np.array([(shard.rows - 1) // 2, shard.rows - 1])
        return shape_of(shard) in shapes and (shape_of(shard), shard.take(rows).tobytes())

    known: dict[Hashable, list[int]] = defaultdict(list)
    for place, bits in enumerate(map_requests(sample, others)):
        known[bits].append(place)
    for number, bits in enumerate(map_requests(sample, own)):
        for place in known[bits] if bits else []:
            if shard_checksum(own[number]) == shard_checksum(others[place]):
                return SharedShard(number, place, True)
    return None


def names_of(shard: Shard) -> Iterator[Hashable]:
    """Yield what tells a shard's file from all others; nothing for an array."""
    if isinstance(shard.path, RemotePath):
        parts = urlsplit(shard.path.url)
        yield parts.scheme.lower(), parts.netloc.rpartition("@")[2].lower(), parts.path, parts.query
    elif not isinstance(shard, ArrayShard):
        stat = shard.path.stat()
        if stat.st_ino:  # some file systems have none
            yield stat.st_dev, stat.st_ino
        yield os.path.realpath(shard.path)


def shape_of(shard: Shard) -> Hashable:
    """Return rows, width and type, which copies have in common; None for too few rows to tell."""
    return (shard.rows, shard.dim, shard.dtype.str) if shard.rows >= FEW_ROWS else None
