"""What the compiled kernels compute, by numpy and torch, bit for bit: without a compiler.

Products of codes are integers below 2^24 wherever codes have at most 1,024 coordinates, so float32
products of BLAS are exact, in whatever order it adds. Float sums that a result shows are made in
one order, by `row_sums`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

EXACT_WIDTH = 1 << 10  # products of so many int8 values are below 2^24
BLOCK = 1024  # rows computed at a time
DOT_ROWS = 1 << 12  # codes multiplied row by row at a time
ELIMINATED = 256  # systems of equations solved side by side: they stay in the cache
GRAMS, GRAM_LANES = 32, 16  # rows whose vectors are multiplied together; sums side by side
BLOCK_EDGES = 1 << 16  # edges joined at a time: few enough to stay in the cache
FEW_COLUMNS = 8  # added up one by one
MIXER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: multiplying loses nothing
HALF = np.uint64(32)
HALF_ULP = 2.0**-53  # relative error of one operation in float64
PEAK = 127  # largest int8
TILE_ROWS, PANEL = 1024, 64  # of rows and columns, by which hits are ordered


class Columns:
    """Codes, (m, w) int8, made ready to be columns of products."""

    def __init__(self, codes: np.ndarray, falls: np.ndarray | None = None) -> None:
        import torch  # multiplies beside other threads, as numpy's BLAS does not

        self.codes, self.falls = codes, falls
        self.parts = [
            torch.from_numpy(codes[:, start : start + EXACT_WIDTH].T.astype(np.float32))
            for start in range(0, codes.shape[1], EXACT_WIDTH)
        ]

    def part_products(self, rows: np.ndarray, number: int) -> Any:
        """Return products with some of the coordinates, whole numbers, (n, m) float32 tensor."""
        import torch

        start = number * EXACT_WIDTH
        return torch.from_numpy(rows[:, start : start + EXACT_WIDTH]).float() @ self.parts[number]

    def products(self, rows: np.ndarray) -> np.ndarray:
        """Return all products with rows, (n, w) int8, and falls, (n, m) int32."""
        total = np.zeros((len(rows), len(self.codes)), np.int32)
        for number in range(len(self.parts)):
            total += self.part_products(rows, number).int().numpy()
        return total if self.falls is None else total + self.falls

    def reach(self, rows: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where products reach the limit of their row, (n,) int32."""
        import torch

        fallen = np.arange(0) if self.falls is None else np.flatnonzero(self.falls)
        if len(self.parts) != 1 or len(fallen) > len(self.codes) // 2:
            i, j = np.nonzero(self.products(rows) >= limits[:, None])
            return i, j
        # a limit that float32 rounds is beyond all products: these stay below 2^24
        least = torch.from_numpy(limits.astype(np.float32))
        close = self.part_products(rows, 0) >= least[:, None]
        close[:, torch.from_numpy(fallen)] = False
        i, j = np.divmod(torch.nonzero(close.ravel())[:, 0].numpy(), len(self.codes))
        if not len(fallen):
            return i, j
        some = Columns(self.codes[fallen], None if self.falls is None else self.falls[fallen])
        more = np.nonzero(some.products(rows) >= limits[:, None])
        return np.concatenate([i, more[0]]), np.concatenate([j, fallen[more[1]]])


class Matrix:
    """A (d, w) int8 matrix, made ready for products with int16 rows that stay below 2^24."""

    def __init__(self, matrix: np.ndarray) -> None:
        self.values = matrix.astype(np.float32)

    def project(self, rows: np.ndarray) -> np.ndarray:
        """Return the products with rows, (n, d) int16, (n, w) float32."""
        return np.asarray(rows.astype(np.float32) @ self.values)


def products(rows: np.ndarray, columns: Columns) -> np.ndarray:
    """Return all products of rows with columns, (n, m) int32."""
    return columns.products(rows)


def hits(
    rows: np.ndarray,
    columns: Columns,
    limits: np.ndarray,
    wide_rows: np.ndarray | None,
    wide_columns: np.ndarray | None,
    wide_limits: np.ndarray | None,
    wide_falls: np.ndarray | None,
    first: int,
    reference_rows: np.ndarray | None,
    reference_columns: np.ndarray | None,
    references_only: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the wanted hits; see `snipdedup.native.hits`."""
    found: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0, np.int32),) * 2]
    for start in range(0, len(rows), BLOCK):
        i, j = columns.reach(rows[start : start + BLOCK], limits[start : start + BLOCK])
        i = i + start
        keep = j < i + first
        if reference_rows is not None and reference_columns is not None:
            a, b = reference_rows[i], reference_columns[j]
            keep &= (a != b) if references_only else ~(a & b)
        i, j = i[keep], j[keep]
        if (
            wide_rows is not None
            and wide_columns is not None
            and wide_limits is not None
            and wide_falls is not None
        ):
            keep = dots(wide_rows[i], wide_columns[j]) + wide_falls[j] >= wide_limits[i]
            i, j = i[keep], j[keep]
        found.append((i.astype(np.int32), j.astype(np.int32)))
    i, j = (np.concatenate(side) for side in zip(*found, strict=True))
    order = np.lexsort((j, i, j // PANEL, i // TILE_ROWS))  # the order of the compiled kernels
    return i[order], j[order]


def assign(
    rows: np.ndarray,
    centroids: Columns,
    widest: np.ndarray | None,
    distances: np.ndarray | None,
    radius: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return homes and visits; see `snipdedup.native.assign`."""
    del distances  # computed anew
    sizes = dots(centroids.codes, centroids.codes)
    homes, bests = np.empty(len(rows), np.int32), np.empty(len(rows), np.int32)
    found: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0, np.int32),) * 2]
    for start in range(0, len(rows), BLOCK):
        part = slice(start, start + BLOCK)
        near = 2 * centroids.products(rows[part]) - sizes
        home = near.argmax(1)
        best = near[np.arange(len(home)), home]
        homes[part], bests[part] = home, best
        if radius is None or widest is None:
            continue
        twice = 2 * radius[part]
        least = np.ceil(best - twice.astype(np.float64) * widest[home])
        i, j = np.nonzero(near >= least[:, None])
        own, other = centroids.codes[home[i]], centroids.codes[j]
        apart = (sizes[home[i]] + sizes[j] - 2 * dots(own, other)).astype(np.float32)
        use_ = best[i] - near[i, j] <= twice[i] * np.sqrt(apart)
        found.append(((i[use_] + start).astype(np.int32), j[use_].astype(np.int32)))
    i, j = (np.concatenate(side) for side in zip(*found, strict=True))
    return homes, bests, i, j


class Records:
    """Records of bytes in parts; see `snipdedup.native.Records`."""

    def __init__(self, parts: list[np.ndarray], size: int, widths: list[int]) -> None:
        self.parts, self.size, self.ends = parts, size, np.cumsum(widths)

    def take(self, places: np.ndarray, memory: np.ndarray) -> None:
        """Copy the records at places to ``memory``, field after field."""
        taken, number = np.empty((len(places), self.ends[-1]), np.uint8), places // self.size
        for part in np.unique(number):
            use = number == part
            taken[use] = self.parts[part][places[use] - part * self.size]
        fields = np.split(taken, self.ends[:-1], axis=1)
        memory[:] = np.concatenate([field.ravel() for field in fields])


def dots(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the product of each row of codes with the same row of others, (n,) int32."""
    found = np.empty(len(x), np.int32)
    for start in range(0, len(x), DOT_ROWS):
        part = slice(start, start + DOT_ROWS)
        found[part] = np.einsum("ij,ij->i", x[part].astype(np.int32), y[part].astype(np.int32))
    return found


def stored(rows: np.ndarray, itemsize: int) -> np.ndarray:
    """Return floats of which the bytes are given, (n, d)."""
    return rows.view(np.dtype(f"f{itemsize}"))


def widen(rows: np.ndarray, itemsize: int) -> np.ndarray:
    """Return rows as float32."""
    with np.errstate(over="ignore"):
        return stored(rows, itemsize).astype(np.float32)


def whole(rows: np.ndarray, itemsize: int, longest: float) -> tuple[np.ndarray, np.ndarray]:
    """Return rows as integers of norm ``longest``, and their norms; see `snipdedup.native`."""
    values = widen(rows, itemsize)
    with np.errstate(all="ignore"):
        norms = np.sqrt(row_sums(values * values))
        factor = (np.float32(1) / norms) * np.float32(longest)
        plain = (norms > np.float32(1e-15)) & (norms < np.float32(1e15))
        scaled = np.rint(values * factor[:, None])
    scaled[~plain] = 0
    return scaled.astype(np.int16), norms


def finish(
    products_: np.ndarray, unit: float, axis: np.ndarray, length: float, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and falls; see `snipdedup.native.finish_codes`."""
    values = products_ * np.float32(unit)
    inside, along = row_sums(values * values), row_sums(values * axis)
    square = np.float32(length) - (inside - along * along)
    rest = np.sqrt(np.maximum(square, np.float32(0))) - along
    scaled = (values + rest[:, None] * axis) * np.float32(scale)
    return round_codes(scaled)


def round_codes(scaled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scaled coordinates, (n, w) float32, as int8, and their falls, (n,) int32.

    Of what int8 cannot hold, o, a product with another row's code loses no more than
    127 Σ|o| + Σo² / 2 for each of the two rows: by so much a row's limit falls.
    """
    codes = np.rint(scaled).clip(-PEAK, PEAK).astype(np.int8)
    size = np.abs(scaled)
    falls = np.zeros(len(scaled), np.int32)
    some = np.flatnonzero((size > np.float32(PEAK + 0.5)).any(1))
    over = size[some]
    over = np.where(over > np.float32(PEAK + 0.5), over - np.float32(PEAK), np.float32(0))
    squares = row_sums(over * over)
    falls[some] = np.ceil(np.float32(PEAK) * row_sums(over) + squares / np.float32(2))
    return codes, falls


def orthonormal(rows: np.ndarray, least: float) -> np.ndarray:
    """Return rows made orthonormal; see `snipdedup.native.orthonormal`."""
    rows = rows.copy()
    work = np.empty_like(rows)
    smallest = least * np.sqrt(row_sums(rows * rows))
    for number in range(len(rows)):
        row = rows[number]
        size = np.sqrt(row_sums(row * row))
        if size <= smallest[number]:
            row[:] = 0
            continue
        row /= size
        later, terms = rows[number + 1 :], work[number + 1 :]
        along = row_sums(np.multiply(later, row, out=terms))
        later -= np.multiply(along[:, None], row, out=terms)
    return rows


def row_sums(terms: np.ndarray) -> np.ndarray:
    """Return the sums over the last axis, always added in the same order; spoils ``terms``.

    The second half is added to the first, until few columns are left: only sums of whole columns,
    which every processor rounds alike.
    """
    width = terms.shape[-1]
    with np.errstate(all="ignore"):
        while width > FEW_COLUMNS:
            half = width // 2
            terms[..., :half] += terms[..., width - half : width]
            width -= half
        total = 0 * terms[..., 0] if not width else terms[..., 0] + 0
        for column in range(1, width):
            total += terms[..., column]
    return np.asarray(total)


def norms(rows: np.ndarray, itemsize: int) -> np.ndarray:
    """Return norms in float64, (n,)."""
    values = stored(rows, itemsize).astype(np.float64)
    return np.sqrt(row_dots(values, values))


def cosines(
    x: np.ndarray,
    x_norms: np.ndarray,
    y: np.ndarray,
    y_norms: np.ndarray,
    itemsize: int,
    i: np.ndarray,
    j: np.ndarray,
) -> np.ndarray:
    """Return cosines of stored rows, (n,) float32; see `snipdedup.native.cosines`."""
    found = np.empty(len(i), np.float32)
    for start in range(0, len(i), BLOCK):
        part = slice(start, start + BLOCK)
        left, right = x[i[part]], y[j[part]]
        a, b = (stored(side, itemsize).astype(np.float64) for side in (left, right))
        with np.errstate(all="ignore"):
            quick = row_dots(a, b) / (x_norms[i[part]] * y_norms[j[part]])
            cosine = quick.astype(np.float32)
            again = np.flatnonzero(unsettled(quick, a.shape[1]))
            if len(again):
                a, b = a[again], b[again]
                dot, xx, yy = (row_sums(p * q) for p, q in ((a, b), (a, a), (b, b)))
                cosine[again] = (dot / (np.sqrt(xx) * np.sqrt(yy))).astype(np.float32)
        cosine = np.minimum(cosine, np.float32(1))
        cosine[(left == right).all(1)] = 1
        found[part] = cosine
    return found


def table(
    x: np.ndarray,
    x_norms: np.ndarray,
    y: np.ndarray,
    y_norms: np.ndarray,
    itemsize: int,
    groups: int,
) -> np.ndarray:
    """Return all cosines of rows of one group; see `snipdedup.native.cosine_tables`."""
    a, b = (stored(side, itemsize).astype(np.float64) for side in (x, y))
    a, b = a.reshape(groups, -1, a.shape[1]), b.reshape(groups, -1, b.shape[1])
    with np.errstate(all="ignore"):
        sizes = x_norms.reshape(groups, -1, 1) * y_norms.reshape(groups, 1, -1)
        quick = (a @ b.swapaxes(1, 2)) / sizes
        cosine = quick.astype(np.float32)
        again = np.nonzero(unsettled(quick, a.shape[2]) | (quick > 1 - 1e-7))
    group, i, j = (side.astype(np.int64) for side in again)
    rows, columns = group * a.shape[1] + i, group * b.shape[1] + j
    cosine[again] = cosines(x, x_norms, y, y_norms, itemsize, rows, columns)
    return np.asarray(np.minimum(cosine, np.float32(1)))


def unsettled(cosine: np.ndarray, dim: int) -> np.ndarray:
    """Return which cosines another order of adding could round to another float32, bool.

    A dot product of d terms is off by at most d half ulps of the product of the norms, in whatever
    order (Higham, 2002, section 3.1), and so are squared norms.
    """
    error = 2 * (2 * dim + 16) * HALF_ULP
    low, high = (cosine - error).astype(np.float32), (cosine + error).astype(np.float32)
    return np.asarray((low != high) & np.isfinite(cosine))


def row_dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the dot product of each row with the same row of another array, (n,)."""
    with np.errstate(all="ignore"):
        return np.asarray(np.matmul(a[:, None, :], b[:, :, None])[:, 0, 0])


def hashes(words: np.ndarray, offsets: np.ndarray, mixed: bool) -> np.ndarray:
    """Return sums of products of two offset words, (n,) uint64; see `hashing.row_hashes`."""
    found = np.empty(len(words), np.uint64)
    for start in range(0, len(words), BLOCK):
        part = words[start : start + BLOCK]
        if mixed:
            part = (part ^ (part >> HALF)) * MIXER
            part ^= part >> HALF
        part = part + offsets
        np.einsum("ij,ij->i", part[:, 0::2], part[:, 1::2], out=found[start : start + BLOCK])
    return found


def join_best(
    start: np.ndarray, end: np.ndarray, order: np.ndarray | None, parent: np.ndarray
) -> np.ndarray:
    """Return the places of the edges that connect components; see `snipdedup.native.join_best`."""
    order = np.arange(len(start)) if order is None else order
    chosen = [np.empty(0, np.int64)]
    for low in range(0, len(order), BLOCK_EDGES):
        places = order[low : low + BLOCK_EDGES]
        u, v = find_roots(parent, start[places]), find_roots(parent, end[places])
        apart = np.flatnonzero(u != v)
        ends = np.concatenate([u[apart], v[apart]])
        parent[ends] = np.arange(len(ends))  # numbers below len(ends), one a distinct root
        number = parent[ends].astype(np.int64)
        label = np.arange(len(ends))
        picks = boruvka(number[: len(apart)], number[len(apart) :], label)
        smallest = np.full(len(ends), ends.max(initial=0))
        np.minimum.at(smallest, label[number], ends)
        parent[ends] = smallest[label[number]]
        chosen.append(places[apart[picks]])
    return np.concatenate(chosen)


def find_roots(parent: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Return the smallest node connected with each, in ``parent``'s type; shortens its paths."""
    root = parent[nodes]
    open_ = np.flatnonzero(parent[root] != root)
    while len(open_):
        root[open_] = parent[root[open_]]
        part = root[open_]
        open_ = open_[parent[part] != part]
    parent[nodes] = root
    return np.asarray(root)


def boruvka(u: np.ndarray, v: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Return the places of the forest's edges among edges (u, v) given best first.

    In each round every component takes its best edge. ``label``, (nodes,) int64, is each node's own
    number, and becomes the smallest of its component.
    """
    start, end, rank = u, v, np.arange(len(u))
    chosen = np.zeros(len(u), bool)
    while len(u):
        best = best_edge(u, v, rank, len(label))
        picks = best[best < len(start)]
        chosen[picks] = True
        link_smaller(label, label[start[picks]], label[end[picks]])
        u, v = label[u], label[v]
        open_ = u != v
        u, v, rank = u[open_], v[open_], rank[open_]
    return np.flatnonzero(chosen)


def best_edge(u: np.ndarray, v: np.ndarray, rank: np.ndarray, nodes: int) -> np.ndarray:
    """Return for each node the smallest rank of an edge at it, else the largest int64.

    ``rank`` is ascending.
    """
    best = np.full(nodes, np.iinfo(np.int64).max)
    best[u[::-1]] = rank[::-1]  # from the worst edge to the best: the last assignment holds
    other = np.full(nodes, np.iinfo(np.int64).max)
    other[v[::-1]] = rank[::-1]
    return np.minimum(best, other)


def link_smaller(label: np.ndarray, u: np.ndarray, v: np.ndarray) -> None:
    """Join the components of ``u`` and ``v`` in place; labels become each component's smallest.

    Union by minimum with pointer jumping. ``label`` must be fully compressed (label[label] ==
    label) before, and is so afterwards.
    """
    while len(u):
        low, high = np.minimum(u, v), np.maximum(u, v)
        np.minimum.at(label, high, low)
        while True:
            jumped = label[label]
            if np.array_equal(jumped, label):
                break
            label[:] = jumped
        u, v = label[u], label[v]
        open_ = u != v
        u, v = u[open_], v[open_]


def decode(
    names: np.ndarray,
    codes: np.ndarray,
    starts: np.ndarray,
    centroids: np.ndarray,
    words: np.ndarray,
    residual: bool,
) -> np.ndarray:
    """Return the vectors of names, (n, w, d) float32; see `snipdedup.native.decode`."""
    flat, (count, m) = names.ravel(), codes.shape
    found = np.zeros((len(flat), centroids.shape[1]), np.float32)
    coded, lists = np.flatnonzero((flat >= 0) & (flat < count)), np.flatnonzero(flat >= count)
    found[coded] = words[np.arange(m), codes[flat[coded]]].reshape(len(coded), -1)
    if residual:
        found[coded] += centroids[np.searchsorted(starts, flat[coded], side="right") - 1]
    found[lists] = centroids[flat[lists] - count]
    return found.reshape(*names.shape, -1)


def common_lengths(
    names: np.ndarray,
    products: np.ndarray,
    vectors: np.ndarray,
    at: np.ndarray,
    other_names: np.ndarray,
    other_products: np.ndarray,
    ridge: float,
    limits: np.ndarray,
) -> np.ndarray:
    """Return the squared lengths of x − y within the span of common vectors, scaled, (p,) float64.

    With v the products of x − y with the r common vectors Q it is vᵀ G⁻¹ v √(d / r), where G is
    Q Qᵀ and a ridge. Of [G v; vᵀ 0] symmetric elimination of all columns but the last leaves
    −vᵀ G⁻¹ v. Many systems are solved side by side; where a name is not common, its row of G is
    zero, and changes nothing. ``limits`` would only save work.
    """
    del limits
    lengths, width, dim = np.empty(len(at)), names.shape[1], vectors.shape[2]
    gram = np.concatenate(
        [np.empty((0, width, width), np.float32)]
        + [gram_of(vectors[low : low + GRAMS]) for low in range(0, len(vectors), GRAMS)]
    )
    for start in range(0, len(at), ELIMINATED):
        part = slice(start, start + ELIMINATED)
        x, y = names[at[part]], other_names[part]
        same = (x[:, :, None] == y[:, None, :]) & (x >= 0)[:, :, None]
        both = same.any(axis=2)
        theirs = np.where(same, other_products[part][:, None, :], 0).sum(axis=2)
        v = np.where(both, products[at[part]] - theirs, 0).astype(np.float64)
        table = np.where(both[:, :, None] & both[:, None, :], gram[at[part]], 0)
        left = np.zeros((width + 1, width + 1, len(x)))
        left[:width, :width] = table.transpose(1, 2, 0)
        left[width, :width] = left[:width, width] = v.T
        trace, r = np.zeros(len(x)), np.maximum(both.sum(axis=1), 1)
        for j in range(width):
            trace += left[j, j]
        left[range(width), range(width)] += ridge * np.maximum(trace / r, ridge)
        for j in range(width):
            row = left[j, j + 1 :]
            left[j + 1 :, j + 1 :] -= (row / left[j, j])[:, None] * row
        lengths[part] = -left[width, width] * np.sqrt(dim / r)
    return lengths


def gram_of(vectors: np.ndarray) -> np.ndarray:
    """Return the products of the vectors of each row with one another, (n, w, w) float32.

    Added up in `GRAM_LANES` lanes, of which the second half is added to the first.
    """
    count, width, dim = vectors.shape
    sums = np.zeros((count, width, width, GRAM_LANES), np.float32)
    padded = np.pad(vectors, ((0, 0), (0, 0), (0, -dim % GRAM_LANES)))
    for k in range(0, dim, GRAM_LANES):
        part = padded[:, :, k : k + GRAM_LANES]
        sums += part[:, :, None] * part[:, None]
    lanes = GRAM_LANES
    while lanes > 1:
        lanes //= 2
        sums = sums[..., :lanes] + sums[..., lanes:]
    return sums[..., 0]
