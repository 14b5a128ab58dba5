"""64-bit hashes of rows, and checksums of shards made of them.

The first read of all rows hashes each row to find exact copies. A shard's checksum is made of the
same hashes, so it costs no second pass. It proves that the rows and their order are unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from snipdedup.features.formats import Shard
from snipdedup.parallel import scratch

HASH_BYTES = 1 << 18  # of rows hashed at a time: they stay in the cache while they are mixed
READ_BYTES = 1 << 24  # of a shard read at a time
HALF = np.uint64(32)
MIXER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: multiplying loses nothing

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
    hashes = np.empty(len(words), np.uint64)
    step = max(1, HASH_BYTES // max(1, words[:1].nbytes))
    for start in range(0, len(words), step):
        part = words[start : start + step]
        part = (mixed(part) if rows.dtype.itemsize == words.itemsize else part) + offsets
        np.einsum("ij,ij->i", part[:, 0::2], part[:, 1::2], out=hashes[start : start + step])
    return hashes


def mixed(words: np.ndarray) -> np.ndarray:
    """Return words mixed one by one, different ones differently; overwritten by the next call."""
    found, moved = (scratch(use, words.shape, np.uint64) for use in ("mixed", "moved"))
    np.right_shift(words, HALF, out=moved)
    np.bitwise_xor(words, moved, out=found)
    np.multiply(found, MIXER, out=found)
    np.right_shift(found, HALF, out=moved)
    return np.bitwise_xor(found, moved, out=found)


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
