"""Kernels that numpy does not have: products of int8 codes, lists, exact cosines, hashes, forests.

They are C++ (``cpp/``), compiled once for each instruction set and picked when this module is
imported; where they were not built, numpy computes the same (`fallback`). All give the same bits,
so none changes a result. ``SNIPDEDUP_NATIVE`` names the kernels to use: ``vnni``, ``avx2``,
``portable``, or ``numpy`` (or ``0``) for none.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from snipdedup.errors import UsageError
from snipdedup.native import fallback

try:
    from snipdedup.native import _kernels  # type: ignore[attr-defined]
except ImportError:  # not built
    _kernels = None

EVERY_COLUMN = 1 << 40  # as `first`: all columns are met
_module: Any = fallback if _kernels is None else _kernels


def names() -> list[str]:
    """Return the kernels that this machine has, the fastest first; numpy is always one."""
    return [*(_kernels.names() if _kernels is not None else []), "numpy"]


def is_built() -> bool:
    """Tell whether the compiled kernels are there."""
    return _kernels is not None


def used() -> str:
    """Return the name of the kernels in use."""
    return "numpy" if _module is fallback else str(_kernels.used())


def use(name: str) -> None:
    """Use the kernels of a name from now on; raises UsageError if there are none."""
    name = "numpy" if name == "0" else name
    global _module  # noqa: PLW0603 - the one choice of this process
    if name not in names():
        raise UsageError(f"SNIPDEDUP_NATIVE={name}: this machine has {', '.join(names())}")
    _module = fallback if name == "numpy" else _kernels
    if _module is _kernels:
        _module.use(name)


if os.environ.get("SNIPDEDUP_NATIVE"):
    use(os.environ["SNIPDEDUP_NATIVE"])


def columns(codes: np.ndarray, falls: np.ndarray | None = None) -> Any:
    """Return codes, (m, w) int8 from -127 to 127, made ready to be columns of products.

    All products with a column are larger by its fall, (m,) int32.
    """
    falls = None if falls is None else np.ascontiguousarray(falls, np.int32)
    return _module.Columns(np.ascontiguousarray(codes), falls)


def products(rows: np.ndarray, columns_: Any) -> np.ndarray:
    """Return the products of codes, (n, w) int8, with columns, (n, m) int32."""
    return np.asarray(_module.products(np.ascontiguousarray(rows), columns_))


def hits(
    rows: np.ndarray,
    columns_: Any,
    limits: np.ndarray,
    wide: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None = None,
    *,
    first: int = EVERY_COLUMN,
    references: tuple[np.ndarray, np.ndarray] | None = None,
    references_only: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the row and the column of each product that reaches its row's limit, (hits,) int32.

    Parameters
    ----------
    rows : (n, w) int8
    columns_ : `columns` of (m, w) int8
    limits : (n,) float
        Rounded up to integers.
    wide : rows (n, v) int8, limits (n,) float, columns (m, v) int8, falls (m,) int32; optional
        The product of a hit's wide codes and the column's fall reach a limit too.
    first : int
        Row r meets the columns before r + first only.
    references : (n,) and (m,) bool, optional
        Which rows and columns are reference rows: two of them do not pair.
    references_only : bool
        Nor do two others.
    """
    x, least, y, falls = wide if wide is not None else (None, None, None, None)
    left, right = references if references is not None else (None, None)
    return _module.hits(
        np.ascontiguousarray(rows), columns_, whole_limits(limits),
        None if x is None else np.ascontiguousarray(x),
        None if y is None else np.ascontiguousarray(y),
        None if least is None else whole_limits(least),
        None if falls is None else np.ascontiguousarray(falls, np.int32),
        first, left, right, references_only,
    )  # fmt: skip


def whole_limits(limits: np.ndarray) -> np.ndarray:
    """Return limits rounded up to int32, those beyond its range at its ends."""
    if limits.dtype == np.int32:
        return limits
    ends = np.iinfo(np.int32)
    return np.ceil(limits).clip(ends.min, ends.max).astype(np.int64).astype(np.int32)


def assign(
    rows: np.ndarray,
    centroids: Any,
    widest: np.ndarray | None = None,
    distances: np.ndarray | None = None,
    radius: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the home list of each code, 2 x·c - ‖c‖² of it, and which rows visit which lists.

    All int32, visits ordered by row, then list; homes are among them.

    Parameters
    ----------
    rows : (n, w) int8
    centroids : `columns` of (nlist, w) int8
    widest : (nlist,) float32, optional
        Distance of each centroid from the one furthest away; with ``radius``.
    distances : (nlist, nlist) float32, optional
        Of all centroids; without it they are computed where they are needed.
    radius : (n,) float32, optional
        Visit radius of each row; without it no visits are returned.
    """
    return _module.assign(np.ascontiguousarray(rows), centroids, widest, distances, radius)


class Records:
    """Records, arrays (n,) of a structured type, seen as one: each but the last has ``size``."""

    def __init__(self, parts: Sequence[np.ndarray], size: int) -> None:
        kind = parts[0].dtype
        self._fields = [kind[name] for name in kind.names or ()]
        widths = [field.itemsize for field in self._fields]
        self._records = _module.Records([as_bytes(part) for part in parts], size, widths)

    def take(self, places: np.ndarray, memory: np.ndarray) -> list[np.ndarray]:
        """Copy the records at places, (k,) int64, to ``memory``; return their fields, (k, ...).

        ``memory`` is uint8, as large as the records; each field is a view of a part of it.
        """
        self._records.take(np.ascontiguousarray(places, np.int64), memory)
        fields, first, count = [], 0, len(places)
        for kind in self._fields:
            part = memory[first : first + count * kind.itemsize]
            fields.append(part.view(kind.base).reshape(count, *kind.shape))
            first += count * kind.itemsize
        return fields


def code_dots(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the product of each row of codes, (n, w) int8, with the same row of others, int32."""
    return np.asarray(_module.dots(np.ascontiguousarray(x), np.ascontiguousarray(y)))


def as_bytes(rows: np.ndarray) -> np.ndarray:
    """Return the bytes of rows, (n, bytes of a row) uint8; a view if the rows are contiguous."""
    rows = np.ascontiguousarray(rows)
    return rows.view(np.uint8).reshape(len(rows), math.prod(rows.shape[1:]) * rows.itemsize)


def widen(rows: np.ndarray) -> np.ndarray:
    """Return rows of floats as float32."""
    return np.asarray(_module.widen(as_bytes(rows), rows.itemsize))


def whole_rows(rows: np.ndarray, longest: float) -> tuple[np.ndarray, np.ndarray]:
    """Return rows as integers of norm ``longest``, (n, d) int16, and their norms, (n,) float32.

    A row whose norm is no number, or above 1e15 or below 1e-15, becomes zeros.
    """
    found, norms = _module.whole(as_bytes(rows), rows.itemsize, longest)
    return found, norms


def matrix(values: np.ndarray) -> Any:
    """Return a (d, w) int8 matrix made ready for `project`."""
    return _module.Matrix(np.ascontiguousarray(values))


def project(rows: np.ndarray, matrix_: Any) -> np.ndarray:
    """Return products of integers, (n, d) int16, with a matrix, (n, w) float32.

    Exact as long as they are below 2^24.
    """
    return np.asarray(matrix_.project(np.ascontiguousarray(rows)))


def finish_codes(
    products_: np.ndarray, unit: float, axis: np.ndarray, length: float, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return int8 codes, (n, w), and their falls, (n,) int32; see `fallback.round_codes`.

    Coordinates are products, (n, w) float32, times ``unit``. What their squares lack of ``length``
    is turned to the unit vector ``axis``, (w,) float32; all are scaled and rounded.
    """
    codes, falls = _module.finish(np.ascontiguousarray(products_), unit, axis, length, scale)
    return codes, falls


def orthonormal(rows: np.ndarray, least: float) -> np.ndarray:
    """Return rows made orthonormal in their order by the method of Gram and Schmidt, (m, d).

    Zeros for those of whose norm earlier rows leave no more than the share ``least``. Each sum is
    made in one order.
    """
    return np.asarray(_module.orthonormal(np.ascontiguousarray(rows), least))


def row_norms(rows: np.ndarray) -> np.ndarray:
    """Return the norm of each row of floats in float64, (n,)."""
    return np.asarray(_module.norms(as_bytes(rows), rows.itemsize))


def cosines(
    x: np.ndarray,
    y: np.ndarray,
    i: np.ndarray,
    j: np.ndarray,
    x_norms: np.ndarray,
    y_norms: np.ndarray,
) -> np.ndarray:
    """Return the cosines of rows i of x with rows j of y, (n,) float32.

    In float64, rounded once: the order in which terms are added cannot show. Rows that are equal
    bit for bit have 1. Norms are those of `row_norms`.
    """
    found = _module.cosines(
        as_bytes(x), x_norms, as_bytes(y), y_norms, x.itemsize,
        np.ascontiguousarray(i, np.int64), np.ascontiguousarray(j, np.int64),
    )  # fmt: skip
    return np.asarray(found)


def cosine_tables(
    x: np.ndarray, y: np.ndarray, x_norms: np.ndarray, y_norms: np.ndarray, groups: int = 1
) -> np.ndarray:
    """Return all cosines of rows x with rows y of the same group, (groups, m, n) float32.

    As `cosines` returns them. ``x`` holds m rows of each
    group one after another, ``y`` n.
    """
    found = _module.table(as_bytes(x), x_norms, as_bytes(y), y_norms, x.itemsize, groups)
    return np.asarray(found)


def word_hashes(words: np.ndarray, offsets: np.ndarray, mixed: bool) -> np.ndarray:
    """Return Σ (w₂ₖ + o₂ₖ)(w₂ₖ₊₁ + o₂ₖ₊₁) of each row's words, modulo 2^64, (n,) uint64.

    ``words`` (n, an even number) and ``offsets`` are uint64; words are mixed first if asked.
    """
    return np.asarray(_module.hashes(np.ascontiguousarray(words), offsets, mixed))


def join_best(
    start: np.ndarray, end: np.ndarray, parent: np.ndarray, order: np.ndarray | None = None
) -> np.ndarray:
    """Join the ends of edges, best first; return the places of those that connected two components.

    ``parent``, (nodes,) uint32 or int64, is changed: each node points to a smaller one of its
    component, the smallest to itself. ``order``, int64, is that of the edges, or of some of them.
    """
    found = _module.join_best(
        np.ascontiguousarray(start, np.int64), np.ascontiguousarray(end, np.int64), order, parent
    )
    return np.asarray(found)


def decode(
    names: np.ndarray,
    codes: np.ndarray,
    starts: np.ndarray,
    centroids: np.ndarray,
    words: np.ndarray,
    residual: bool,
) -> np.ndarray:
    """Return the vectors of names, (n, w, d) float32; zeros for negative ones.

    Parameters
    ----------
    names : (n, w) int
        Places in ``codes``; lists are counted on from their number.
    codes : (entries, m) uint8
        Of a product quantiser with 8 bits, sorted by list.
    starts : (nlist + 1,) int64
        Where each list begins, then the number of codes.
    centroids : (nlist, d) float32
        Of the lists; added to what the codes say if they are of a ``residual``.
    words : (m, 256, d / m) float32
    """
    names = np.ascontiguousarray(names, np.int64)
    return np.asarray(_module.decode(names, codes, starts, centroids, words, residual))


def common_lengths(
    rows: tuple[np.ndarray, np.ndarray],
    vectors: np.ndarray,
    at: np.ndarray,
    others: tuple[np.ndarray, np.ndarray],
    ridge: float,
    limits: np.ndarray,
) -> np.ndarray:
    """Return ‖x − y‖² as far as common names tell, (p,) float64; see `fallback.common_lengths`.

    Parameters
    ----------
    rows : (n, w) int, (n, w) float32
        Names of vectors, each at most once a row, negative for none; x's product with each.
        vectors : (n, w, d) float32
        What the names stand for.
    at : (p,) int
        The row that is x.
    others : (p, w) int, (p, w) float32
        As ``rows``, for y.
    limits : (p,) float64
        A length above its limit may come out smaller, but above the limit.
    """
    x, along_x, y, along_y = (
        np.ascontiguousarray(part, kind)
        for part, kind in zip((*rows, *others), 2 * (np.int64, np.float32), strict=True)
    )
    at, vectors = np.ascontiguousarray(at, np.int64), np.ascontiguousarray(vectors)
    return np.asarray(_module.common_lengths(x, along_x, vectors, at, y, along_y, ridge, limits))
