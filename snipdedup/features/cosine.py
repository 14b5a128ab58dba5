"""The number that decides: the cosine of two rows in float64, and what rows may be compared.

Everything faster only proposes pairs. What is kept, removed or reported rests on `pair_cosine`.

Libraries add up a product in an order of the processor's, so its last bits are the processor's.
What is rounded here does not show them: sums are made in one order (`row_sums`), or lie so far from
where their rounding would change that no order could change it (`unsettled`).
"""

from __future__ import annotations

import numpy as np

from snipdedup import native
from snipdedup.native.fallback import row_sums

# float32 unit rows give dot products this close to the cosine, at any width up to 65,536.
PROPOSAL_ERROR = 1e-5
PLAIN_NORM = np.float32(1e15)  # norms up to here, and from its inverse on, are safe in float32
SAFE_PEAK = 1e100  # squares of larger (or inversely smaller) float64 values could overflow
LENGTH = 127 * 256  # the norm of a row's integers is at most this


def integer_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return rows as integers of norm `longest`, (n, d) int16, and which cannot be compared.

    These become zeros.
    """
    most = longest(rows.shape[1])
    whole, norms = native.whole_rows(rows, most)
    bad, odd, unit = odd_rows(rows, norms)
    whole[odd] = np.rint(unit * np.float32(most))
    return whole, bad


def odd_rows(rows: np.ndarray, norms: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return which rows cannot be compared, (n,) bool, and the rows that float32 norms do not suit.

    Of the latter the places, (o,) int64, and unit rows, (o, d) float32; bad ones are zeros.
    """
    odd = np.flatnonzero(~((norms > 1 / PLAIN_NORM) & (norms < PLAIN_NORM)))  # NaN is odd too
    bad = np.zeros(len(rows), bool)
    unit = unit_rows64(rows[odd]).astype(np.float32)
    bad[odd] = ~unit.any(1)
    return bad, odd, unit


def longest(dim: int) -> int:
    """Return the norm that rows are scaled to before they are rounded to integers.

    Rounding lengthens a row by half a unit a coordinate at most; one more is for float32.
    """
    return LENGTH - 1 - int(np.ceil(dim**0.5 / 2))


def bad_rows(rows: np.ndarray) -> np.ndarray:
    """Return which rows of (n, d) cannot be compared, (n,) bool: NaN, infinity, or all zeros."""
    return odd_rows(rows, native.whole_rows(rows, 1)[1])[0]


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Return rows scaled to norm 1, (n, d) float32; bad rows become zeros.

    The scaling is accurate to float32 whatever the norms are; use it to propose, not to decide.
    """
    values, (_, norms) = native.widen(rows), native.whole_rows(rows, 1)
    _, odd, unit = odd_rows(rows, norms)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        values *= (1 / norms)[:, None]
    values[odd] = unit
    return values


def unit_rows64(rows: np.ndarray) -> np.ndarray:
    """Return rows scaled to norm 1 in float64; bad rows become zeros."""
    values = rescaled(rows.astype(np.float64))
    with np.errstate(over="ignore"):  # beside infinity
        norms = np.sqrt(row_sums(values * values))
    norms[~np.isfinite(norms) | (norms == 0)] = np.inf
    values[np.isinf(norms)] = 0
    values /= norms[:, None]
    return values


def pair_cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the cosine of each row of ``x`` with the same row of ``y``, (n,) float32.

    A float64 dot product over float64 norms of the rows as stored, rounded to float32; rows that
    are equal bit for bit have exactly 1. The same on every processor.
    """
    places = np.arange(len(x))
    return indexed_cosines(x, y, places, places)


def indexed_cosines(x: np.ndarray, y: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Return the cosines of rows i of x with rows j of y, (n,) float32; see `pair_cosine`."""
    if x is not y and len(i) < len(x):
        used, i = np.unique(i, return_inverse=True)
        x = x[used]
    if x is not y and len(j) < len(y):
        used, j = np.unique(j, return_inverse=True)
        y = y[used]
    left = rescaled(x)
    right = left if y is x else rescaled(y)
    x_norms = native.row_norms(left)
    y_norms = x_norms if y is x else native.row_norms(right)
    found = native.cosines(left, right, i, j, x_norms, y_norms)
    if left is not x or right is not y:
        found[same_bits(x[i], y[j])] = 1
    return found


def all_cosines(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the cosines of all rows of x with all rows of y, (m, n) float32; see `pair_cosine`."""
    left = rescaled(x)
    right = left if y is x else rescaled(y)
    x_norms = native.row_norms(left)
    y_norms = x_norms if y is x else native.row_norms(right)
    return np.asarray(native.cosine_tables(left, right, x_norms, y_norms)[0])


def same_bits(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return which rows of two arrays of one dtype are equal bit for bit, (n,) bool."""
    words = np.dtype(f"u{x.dtype.itemsize}")
    a, b = np.ascontiguousarray(x).view(words), np.ascontiguousarray(y).view(words)
    return np.asarray((a == b).all(axis=1))


def rescaled(rows: np.ndarray) -> np.ndarray:
    """Return rows, float64 ones scaled by powers of two where their squares could overflow."""
    if rows.dtype != np.float64:  # squares of float16 and float32 fit float64
        return rows
    peaks = np.abs(rows).max(axis=1, initial=0)
    wild = np.isfinite(peaks) & (peaks > 0) & ((peaks > SAFE_PEAK) | (peaks < 1 / SAFE_PEAK))
    if wild.any():
        rows = rows.copy()
        rows[wild] = np.ldexp(rows[wild], -np.frexp(peaks[wild])[1][:, None])
    return rows
