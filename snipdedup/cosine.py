"""The number that decides: the cosine of two rows in float64, and what rows may be compared.

Everything faster only proposes pairs. What is kept, removed or reported rests on `pair_cosine`.
"""

from __future__ import annotations

import numpy as np

# float32 unit rows give dot products this close to the cosine, at any width up to 65,536.
PROPOSAL_ERROR = 1e-5
SAFE_PEAK = 1e100  # squares of larger (or inversely smaller) float64 values could overflow


def bad_rows(rows: np.ndarray) -> np.ndarray:
    """Return which rows cannot be compared: NaN, infinity, or all zeros.

    Parameters
    ----------
    rows : (n, d) float16, float32 or float64

    Returns
    -------
    (n,) bool
    """
    norms = _fast_norms(rows)
    bad = ~(np.isfinite(norms) & (norms > 0))
    # Very large or small values also end up here; look at their elements.
    for row in np.flatnonzero(bad):
        bad[row] = not (np.isfinite(rows[row]).all() and rows[row].any())
    return bad


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Return rows scaled to norm 1, (n, d) float32; bad rows become zeros.

    The scaling is accurate to float32 whatever the norms are; use it to propose, not to decide.
    """
    import torch

    if rows.dtype == np.float16:  # torch converts float16 several times faster than numpy
        values = torch.from_numpy(np.ascontiguousarray(rows)).float()
    else:
        values = torch.from_numpy(unit_rows64(rows)).float()
    norms = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    values /= norms
    values[~torch.isfinite(norms[:, 0]) | (norms[:, 0] == 0)] = 0
    return np.asarray(values.numpy())


def unit_rows64(rows: np.ndarray) -> np.ndarray:
    """Return rows scaled to norm 1 in float64; bad rows become zeros."""
    values = rescaled64(rows)
    norms = np.sqrt(np.einsum("ij,ij->i", values, values))
    norms[~np.isfinite(norms) | (norms == 0)] = np.inf
    values[np.isinf(norms)] = 0
    values /= norms[:, None]
    return values


def pair_cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the cosine of each row of ``x`` with the same row of ``y``.

    A float64 dot product over float64 norms of the rows as stored, rounded to float32; rows that
    are equal bit for bit have exactly 1.

    Parameters
    ----------
    x, y : (n, d) float16, float32 or float64

    Returns
    -------
    (n,) float32
    """
    a, b = rescaled64(x), rescaled64(y)
    dot = np.einsum("ij,ij->i", a, b)
    norms = np.sqrt(np.einsum("ij,ij->i", a, a)) * np.sqrt(np.einsum("ij,ij->i", b, b))
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = (dot / norms).astype(np.float32)
    cosine[same_bits(x, y)] = 1
    return np.minimum(cosine, np.float32(1))


def same_bits(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return which rows of two arrays of one dtype are equal bit for bit, (n,) bool."""
    words = np.dtype(f"u{x.dtype.itemsize}")
    a, b = np.ascontiguousarray(x).view(words), np.ascontiguousarray(y).view(words)
    return np.asarray((a == b).all(axis=1))


def rescaled64(rows: np.ndarray) -> np.ndarray:
    """Return a float64 copy of rows, scaled by powers of two only where squares could overflow."""
    if rows.dtype != np.float64:  # squares of float16 and float32 fit float64
        import torch  # converts float16 several times faster than numpy

        return np.asarray(torch.from_numpy(np.ascontiguousarray(rows)).float().double().numpy())
    values = rows.copy()
    peaks = np.abs(values).max(axis=1, initial=0)
    wild = np.isfinite(peaks) & (peaks > 0) & ((peaks > SAFE_PEAK) | (peaks < 1 / SAFE_PEAK))
    if wild.any():
        values[wild] = np.ldexp(values[wild], -np.frexp(peaks[wild])[1][:, None])
    return values


def _fast_norms(rows: np.ndarray) -> np.ndarray:
    """Return the norm of each row, in float32 for float16 input, float64 for others."""
    import torch

    values = torch.from_numpy(np.ascontiguousarray(rows))
    values = values.float() if rows.dtype == np.float16 else values.double()
    return np.asarray(torch.linalg.vector_norm(values, dim=1).numpy())
