"""Keys: 128-bit fingerprints of what columns hold, by which rows are told apart and found again.

Two different keys share a fingerprint with probability 2^-128 a pair: among 10^10 keys it is not to
be expected even once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from snipdedup.errors import SnipError
from snipdedup.metadata.files import Table

# Odd constants with mixed bits: golden ratio, splitmix64, xxhash64.
FACTORS = np.array([[0x9E3779B97F4A7C15], [0xC2B2AE3D27D4EB4F]], np.uint64)
FINISH = np.array([[0xBF58476D1CE4E5B9], [0x165667B19E3779F9]], np.uint64)
WORD = 8  # bytes of a text taken in at a time
LAST_WORD = np.array([(1 << 8 * left) - 1 for left in range(WORD)], np.uint64)  # by bytes left


def fingerprints(table: Table, batch: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the fingerprint of each row of a record batch, all its columns together.

    Parameters
    ----------
    table : Table
        The file that the batch is from, for messages.
    batch : pyarrow.RecordBatch
        Columns of texts, bytes or numbers; a number counts as its text.

    Returns
    -------
    marks : (2, n) uint64
    known : (n,) bool
        False where a column is null or empty: nothing is found by such a key.
    """
    marks = np.zeros((2, batch.num_rows), np.uint64)
    known = np.ones(batch.num_rows, bool)
    for name, values in zip(batch.schema.names, batch.columns, strict=True):
        data, starts = text_bytes(table, name, values)
        marks = mix_in(marks, data, starts)
        known &= np.diff(starts) > 0
    return marks, known


def text_bytes(table: Table, name: str, values: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return a column's texts as bytes one after another, and where each begins.

    Returns
    -------
    data : (bytes + 8,) uint8
        Padded, so that a whole word may be read at each text's end.
    starts : (n + 1,) int64
        A null is an empty text.
    """
    try:
        if not is_bytes(values.type):
            values = values.cast(pa.large_string())
        values = values.cast(pa.large_binary()).fill_null(b"")
    except (pa.ArrowException, NotImplementedError) as error:
        raise SnipError(
            f"{table.path}: column {name!r} is {values.type}, expected texts or numbers to tell "
            "rows apart by"
        ) from error
    _, offsets, held = values.buffers()
    starts = np.frombuffer(offsets, np.int64)[values.offset : values.offset + len(values) + 1]
    data = np.zeros(int(starts[-1] - starts[0]) + WORD, np.uint8)
    if held is not None:
        data[:-WORD] = np.frombuffer(held, np.uint8)[starts[0] : starts[-1]]
    return data, starts - starts[0]


def is_bytes(kind: Any) -> bool:
    """Tell whether an arrow type holds bytes that need not be text."""
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def mix_in(marks: np.ndarray, data: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return fingerprints after one more text each.

    Two lanes of multiply and xor-shift, eight bytes a step, all texts side by side; each step is a
    bijection of the lane, so texts that differ in one word never meet before another differs.

    Parameters
    ----------
    marks : (2, n) uint64
    data, starts
        From `text_bytes`.
    """
    length = np.diff(starts)
    order = np.argsort(-length, kind="stable")  # those with bytes left come first
    at, left = starts[:-1][order], length[order]
    words = np.ndarray(len(data) - WORD + 1, "<u8", data, strides=(1,))
    falling = -left
    lanes = (marks[:, order] ^ left.astype(np.uint64)) * FACTORS
    for begin in range(0, int(left.max(initial=0)), WORD):
        active = int(np.searchsorted(falling, -begin))  # texts longer than that
        word = words[at[:active] + begin]
        short = int(np.searchsorted(falling, -begin - WORD, side="right"))
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


def classes(marks: np.ndarray) -> np.ndarray:
    """Return a number for each fingerprint, (n,) int64, the same where they are equal.

    Parameters
    ----------
    marks : (2, n) uint64
    """
    order = np.argsort(marks[0])
    new = np.diff(marks[0][order]) != 0
    other = np.diff(marks[1][order]) != 0
    if (other & ~new).any():  # one lane alone does not tell them apart: hardly ever
        order = np.lexsort(marks)
        new = (np.diff(marks[:, order]) != 0).any(axis=0)
    label = np.empty(marks.shape[1], np.int64)
    label[order[:1]] = 0
    label[order[1:]] = np.cumsum(new)
    return label


def part_of(marks: np.ndarray, parts: int) -> np.ndarray:
    """Return the part of a `Spill` that each fingerprint belongs to, (n,) int64."""
    return ((marks[0] >> np.uint64(32)) * np.uint64(parts) >> np.uint64(32)).astype(np.int64)
