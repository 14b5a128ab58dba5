"""The number that decides: the cosine of two rows in float64, and what rows may be compared.

Everything faster only proposes pairs. What is kept, removed or reported rests on `pair_cosine`.

Libraries add up a product in an order of the processor's, so its last bits are the processor's.
What is rounded here does not show them: sums are made in one order (`row_sums`), or lie so far from
where their rounding would change that no order could change it (`unsettled`).
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np

from snipdedup.parallel import scratch

# float32 unit rows give dot products this close to the cosine, at any width up to 65,536.
PROPOSAL_ERROR = 1e-5
PLAIN_NORM = 1e15  # norms up to here, and from its inverse on, are safe in float32
FEW_ROWS = 4096  # whose conversion is not worth a second for torch to be imported
SAFE_PEAK = 1e100  # squares of larger (or inversely smaller) float64 values could overflow
SQUARE_BYTES = 1 << 22  # of rows whose squares are laid out at a time
PAIRS_AT_ONCE = 256  # whose rows are laid side by side, to stay in the cache
FEW_COLUMNS = 8  # added up one by one
HALF_ULP = 2.0**-53  # relative error of one operation in float64


class Directions(NamedTuple):
    """Rows in float32, and what scales each to norm 1.

    ``values`` is an (n, d) and ``factor`` an (n,) float32 tensor. ``bad``, (n,) bool, are rows that
    cannot be compared (NaN, infinity, or all zeros); their values are zeros.
    """

    values: Any
    factor: Any
    bad: np.ndarray

    def unit(self) -> np.ndarray:
        """Return the rows scaled to norm 1, (n, d) float32."""
        return np.asarray((self.values * self.factor[:, None]).numpy())


def directions(rows: np.ndarray, wide: Any = None) -> Directions:
    """Return the directions of (n, d) rows, accurate to float32 whatever their norms are.

    ``wide``, a (>= n, d) float32 tensor, is memory for the values of float16 rows.
    """
    import torch

    raw = torch.from_numpy(np.ascontiguousarray(rows))
    if rows.dtype == np.float16:  # torch converts float16 several times faster than numpy
        values = raw.float() if wide is None else wide[: len(rows)].copy_(raw)
    else:
        values = raw.float()
    norms = plain_norms(values)
    factor, bad = 1 / norms, np.zeros(len(rows), bool)
    odd = ~((norms > 1 / PLAIN_NORM) & (norms < PLAIN_NORM)).numpy()
    if odd.any():  # NaN is odd too
        unit = torch.from_numpy(unit_rows64(rows[odd])).float()
        values = values.clone() if values.data_ptr() == raw.data_ptr() else values
        values[odd], factor[odd] = unit, 1.0
        bad[odd] = ~unit.any(1).numpy()
    return Directions(values, factor, bad)


def plain_norms(values: Any) -> Any:
    """Return the norm of each row of an (n, d) float32 tensor, (n,); see `square_sums`."""
    import torch

    return torch.from_numpy(square_sums(values.numpy())).sqrt_()


def square_sums(values: np.ndarray) -> np.ndarray:
    """Return the squared norm of each row, (n,), of an (n, d) float32 or float64 array.

    They are rounded alike on every processor; see `row_sums`.
    """
    step = max(1, SQUARE_BYTES // max(1, values[:1].nbytes))
    squares = scratch("squares", (min(step, len(values)), values.shape[1]), values.dtype)
    sums = np.empty(len(values), values.dtype)
    for start in range(0, len(values), step):
        part = values[start : start + step]
        with np.errstate(invalid="ignore", over="ignore"):
            terms: Any = np.multiply(part, part, out=squares[: len(part)])
            if "torch" in sys.modules:  # adds faster than numpy; the same
                terms = sys.modules["torch"].from_numpy(terms)
            sums[start : start + len(part)] = row_sums(terms)
    return sums


def row_sums(terms: Any) -> Any:
    """Return the sums over the last axis of an array or tensor; spoils ``terms``.

    The second half is added to the first, until few columns are left: only sums of whole columns,
    always in the same order, which every processor rounds alike.
    """
    width = terms.shape[-1]
    while width > FEW_COLUMNS:
        half = width // 2
        part = terms[..., :half]
        part += terms[..., width - half : width]
        width -= half
    total = 0 * terms[..., 0] if not width else terms[..., 0] + 0
    for column in range(1, width):
        total += terms[..., column]
    return total


def bad_rows(rows: np.ndarray) -> np.ndarray:
    """Return which rows of (n, d) cannot be compared, (n,) bool: NaN, infinity, or all zeros."""
    return directions(rows).bad


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Return rows scaled to norm 1, (n, d) float32; bad rows become zeros.

    The scaling is accurate to float32 whatever the norms are; use it to propose, not to decide.
    """
    return directions(rows).unit()


def unit_rows64(rows: np.ndarray) -> np.ndarray:
    """Return rows scaled to norm 1 in float64; bad rows become zeros."""
    values = rescaled64(rows)
    norms = np.sqrt(square_sums(values))
    norms[~np.isfinite(norms) | (norms == 0)] = np.inf
    values[np.isinf(norms)] = 0
    values /= norms[:, None]
    return values


def pair_cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the cosine of each row of ``x`` with the same row of ``y``, (n,) float32.

    A float64 dot product over float64 norms of the rows as stored, rounded to float32; rows that
    are equal bit for bit have exactly 1. The same on every processor.
    """
    differ = np.flatnonzero(~same_bits(x, y))
    cosine = np.ones(len(x), np.float32)
    if not len(differ):
        return cosine
    if len(differ) < len(x):
        x, y = x[differ], y[differ]
    a, b = rescaled64(x), rescaled64(y)
    quick = quotients(row_dots(a, b), row_dots(a, a), row_dots(b, b))
    found = quick.astype(np.float32)
    again = np.flatnonzero(unsettled(quick, a.shape[1]))
    if len(again):
        a, b = a[again], b[again]
        sums = [row_sums(left * right) for left, right in ((a, b), (a, a), (b, b))]
        found[again] = quotients(*sums).astype(np.float32)
    cosine[differ] = np.minimum(found, np.float32(1))
    return cosine


def indexed_cosines(x: np.ndarray, y: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Return the cosines of rows i of x with rows j of y, (n,) float32; see `pair_cosine`."""
    parts = [np.empty(0, np.float32)]
    for start in range(0, len(i), PAIRS_AT_ONCE):
        span = slice(start, start + PAIRS_AT_ONCE)
        parts.append(pair_cosine(np.take(x, i[span], axis=0), np.take(y, j[span], axis=0)))
    return np.concatenate(parts)


def quotients(dots: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return cosines from dot products and squared norms, (n,) float64."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(dots / (np.sqrt(x) * np.sqrt(y)))


def unsettled(cosine: np.ndarray, dim: int) -> np.ndarray:
    """Return which float64 cosines another order of adding could round to another float32, bool.

    A dot product of ``dim`` terms is off by at most so many half ulps of the product of the norms,
    in whatever order (Higham, 2002, section 3.1), and so are squared norms.
    """
    error = 2 * (2 * dim + 16) * HALF_ULP
    low, high = (cosine - error).astype(np.float32), (cosine + error).astype(np.float32)
    return np.asarray((low != high) & np.isfinite(cosine))


def row_dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the dot product of each row with the same row of another array, (n,).

    One product a row, in BLAS: twice as fast as einsum, and as independent of the other rows.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray(np.matmul(a[:, None, :], b[:, :, None])[:, 0, 0])


def same_bits(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return which rows of two arrays of one dtype are equal bit for bit, (n,) bool."""
    words = np.dtype(f"u{x.dtype.itemsize}")
    a, b = np.ascontiguousarray(x).view(words), np.ascontiguousarray(y).view(words)
    return np.asarray((a == b).all(axis=1))


def rescaled64(rows: np.ndarray) -> np.ndarray:
    """Return a float64 copy of rows, scaled by powers of two only where squares could overflow."""
    if rows.dtype != np.float64 and len(rows) <= FEW_ROWS and "torch" not in sys.modules:
        return rows.astype(np.float64)  # exact, whoever converts
    if rows.dtype != np.float64:  # squares of float16 and float32 fit float64
        import torch  # converts float16 several times faster than numpy

        return np.asarray(torch.from_numpy(np.ascontiguousarray(rows)).float().double().numpy())
    values = rows.copy()
    peaks = np.abs(values).max(axis=1, initial=0)
    wild = np.isfinite(peaks) & (peaks > 0) & ((peaks > SAFE_PEAK) | (peaks < 1 / SAFE_PEAK))
    if wild.any():
        values[wild] = np.ldexp(values[wild], -np.frexp(peaks[wild])[1][:, None])
    return values
