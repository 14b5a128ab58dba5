"""Keys of rows as 128-bit fingerprints, by which any number of rows are compared in bounded memory.

Two different keys share a fingerprint with probability 2^-128 a pair: among 10^10 keys it is not to
be expected even once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from snipdedup.errors import SnipError
from snipdedup.metadata.tables import Table

# Odd constants with mixed bits: golden ratio, splitmix64, xxhash64.
FACTORS = np.array([[0x9E3779B97F4A7C15], [0xC2B2AE3D27D4EB4F]], np.uint64)
FINISH = np.array([[0xBF58476D1CE4E5B9], [0x165667B19E3779F9]], np.uint64)
WORD = 8  # bytes of a key mixed in at a time
LAST_WORD = np.array([(1 << 8 * left) - 1 for left in range(WORD)], np.uint64)  # by bytes left


def fingerprints(table: Table, batch: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the fingerprint of each row of a table's record batch, all its columns together.

    Columns are texts, bytes or numbers; a number counts as its text.

    Returns
    -------
    prints : (2, n) uint64
    known : (n,) bool
        False where a column is null or empty: such a row has no key.
    """
    prints = np.zeros((2, batch.num_rows), np.uint64)
    known = np.ones(batch.num_rows, bool)
    for name, values in zip(batch.schema.names, batch.columns, strict=True):
        data, starts = _flat_bytes(as_bytes(table, name, values))
        prints = _mix_in(prints, data, starts)
        known &= np.diff(starts) > 0
    return prints, known


def as_bytes(table: Table, name: str, values: Any) -> Any:
    """Return a column's values as ``large_binary``: numbers by their text, null as no bytes."""
    try:
        if not is_binary(values.type):
            values = values.cast(pa.large_string())
        return values.cast(pa.large_binary()).fill_null(b"")
    except (pa.ArrowException, NotImplementedError) as error:
        raise SnipError(
            f"{table.path}: column {name!r} is {values.type}, expected texts or numbers to tell "
            "rows apart by"
        ) from error


def is_binary(kind: Any) -> bool:
    """Tell whether an arrow type holds bytes that need not be text."""
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def _flat_bytes(values: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes of a ``large_binary`` array, and where each value begins.

    Returns
    -------
    data : (bytes + 8,) uint8
        Padded, so that a whole word may be read at each value's end.
    starts : (n + 1,) int64
    """
    _, offsets, held = values.buffers()
    starts = np.frombuffer(offsets, np.int64)[values.offset : values.offset + len(values) + 1]
    data = np.zeros(int(starts[-1] - starts[0]) + WORD, np.uint8)
    if held is not None:
        data[:-WORD] = np.frombuffer(held, np.uint8)[starts[0] : starts[-1]]
    return data, starts - starts[0]


def _mix_in(prints: np.ndarray, data: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return fingerprints after one more value each, from `_flat_bytes`.

    Two lanes of multiply and xor-shift take eight bytes a step of all values at once. Each step is
    a bijection of the lane, so values that differ in one word never meet before another differs.
    """
    length = np.diff(starts)
    order = np.argsort(-length, kind="stable")  # those with bytes left come first
    at, left = starts[:-1][order], length[order]
    words = np.ndarray(len(data) - WORD + 1, "<u8", data, strides=(1,))
    lanes = (prints[:, order] ^ left.astype(np.uint64)) * FACTORS
    for begin in range(0, int(left.max(initial=0)), WORD):
        active = int(np.searchsorted(-left, -begin))  # values longer than that
        word = words[at[:active] + begin]
        short = int(np.searchsorted(-left, -begin - WORD, side="right"))
        word[short:] &= LAST_WORD[left[short:active] - begin]
        part = lanes[:, :active]
        part ^= word
        part *= FACTORS
        part ^= part >> np.uint64(29)
    lanes *= FINISH
    lanes ^= lanes >> np.uint64(32)
    mixed = np.empty_like(lanes)
    mixed[:, order] = lanes
    return mixed


def number_equal(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Return a number from 0 for each of n fingerprints, (n,) int64, the same for equal ones."""
    order = np.argsort(high)
    new, other = (np.diff(lane[order]) != 0 for lane in (high, low))
    if (other & ~new).any():  # one lane alone does not tell them apart: hardly ever
        order = np.lexsort((low, high))
        new = (np.diff(high[order]) != 0) | (np.diff(low[order]) != 0)
    number = np.zeros(len(high), np.int64)
    number[order[1:]] = np.cumsum(new)
    return number
