"""Kernels on stored rows: all sets give numpy's bits, and numpy those of exact arithmetic."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import truth
from hypothesis import given, settings
from hypothesis import strategies as st
from same_bits import by_all_kernels

from snipdedup import native
from snipdedup.features.cosine import rescaled, unit_rows64

DTYPES = st.sampled_from([np.float16, np.float32, np.float64])
DIMS = st.sampled_from([1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 64, 96, 513])
SEEDS = st.integers(0, 2**31)
SCALES = {
    np.float16: [1, 1e-3, 1e-6, 50],
    np.float32: [1, 1e-18, 1e-25, 1e-38, 1e14, 1e16, 1e30],
    np.float64: [1, 1e-18, 1e-60, 1e-99, 1e14, 1e16, 1e40, 1e99],
}


def rows_of(rng, n, dim, dtype, wild=True):
    """Rows, some of which are nearly or bit for bit alike; if ``wild``, of any norm, or bad."""
    x = rng.standard_normal((n, dim))
    if n > 8:
        x[1:3] = x[0]
        x[2] *= 1 + 1e-3 * rng.standard_normal(dim)
        x[3] = 2 * x[0]
        x[4] = -x[0]
        x[5] = np.rint(x[5] * 4)
    if wild:
        x *= rng.choice(SCALES[dtype], (n, 1))
    with np.errstate(over="ignore"):
        x = x.astype(dtype)
    if wild and n > 20:
        x[10], x[11] = 0, -0.0
        x[12, rng.integers(dim)] = np.nan
        x[13, rng.integers(dim)] = np.inf
        x[14, rng.integers(dim)] = -np.inf
        x[15], x[16] = np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal
        x[17] = x[12]  # alike bit for bit, NaN and all
    return x


def test_every_float16_is_widened():
    x = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(-1, 32)
    found = by_all_kernels(lambda: native.widen(x))
    assert np.array_equal(found, x.astype(np.float32), equal_nan=True)


@settings(max_examples=40)
@given(seed=SEEDS, n=st.sampled_from([0, 1, 5, 30]), dim=DIMS, dtype=DTYPES)
def test_rows_are_widened(seed, n, dim, dtype):
    x = rows_of(np.random.default_rng(seed), n, dim, dtype)
    found = by_all_kernels(lambda: native.widen(x))
    with np.errstate(over="ignore"):
        assert np.array_equal(found, x.astype(np.float32), equal_nan=True)


@settings(max_examples=20)
@given(seed=SEEDS, n=st.sampled_from([0, 1, 5, 64]), dim=DIMS)
def test_rows_are_made_orthonormal(seed, n, dim):
    x = np.random.default_rng(seed).standard_normal((n, dim))
    x[1:2] = 0
    x[3:4] = 2 * x[2:3]  # depends on an earlier row
    found = by_all_kernels(lambda: native.orthonormal(x, 1e-12))
    used = found.any(1)
    assert used.sum() == min(dim, n - 2 * (n > 3) if n > 1 else n)
    assert np.allclose(found[used] @ found[used].T, np.eye(used.sum()), atol=1e-9)
    assert np.allclose(x @ found.T @ found, x, atol=1e-9)  # they span the same


@settings(max_examples=60)
@given(
    seed=SEEDS,
    n=st.sampled_from([0, 1, 5, 30]),
    dim=DIMS,
    dtype=DTYPES,
    longest=st.sampled_from([1.0, 127.0, 32_500.0]),
)
def test_rows_become_integers_of_one_length(seed, n, dim, dtype, longest):
    """Where float32 holds the square of a norm; other rows become zeros."""
    x = rows_of(np.random.default_rng(seed), n, dim, dtype)
    whole, norms = by_all_kernels(lambda: native.whole_rows(x, longest))
    assert (whole.dtype, norms.dtype) == (np.int16, np.float32)
    plain = (norms > 1e-15) & (norms < 1e15)
    assert not whole[~plain].any()
    true = np.sqrt((x[plain].astype(float) ** 2).sum(1))
    assert np.allclose(norms[plain], true, rtol=1e-6)
    assert np.abs(whole[plain] - longest * unit_rows64(x[plain])).max(initial=0) <= 0.51


@settings(max_examples=40)
@given(seed=SEEDS, n=st.sampled_from([0, 1, 30]), dim=DIMS, dtype=DTYPES)
def test_norms_are_those_of_float64(seed, n, dim, dtype):
    """Their last bits may be the processor's; a cosine does not show them."""
    x = rows_of(np.random.default_rng(seed), n, dim, dtype)
    before = native.used()
    with np.errstate(all="ignore"):
        values = x.astype(np.longdouble)
        true = np.sqrt((values * values).sum(1)).astype(float)
        true[np.isinf((x.astype(float) ** 2).sum(1))] = np.inf  # squares beyond float64
    for name in native.names():
        native.use(name)
        found = native.row_norms(x)
        assert found.dtype == np.float64
        assert np.allclose(found, true, rtol=1e-13, equal_nan=True)
    native.use(before)


def cosines_of(x, y, i, j):
    return native.cosines(x, y, i, j, native.row_norms(x), native.row_norms(y))


@settings(max_examples=80)
@given(
    seed=SEEDS,
    n=st.sampled_from([1, 9, 40]),
    m=st.sampled_from([1, 9, 40]),
    pairs=st.sampled_from([0, 1, 300]),
    dim=DIMS,
    dtype=DTYPES,
)
def test_cosines_of_listed_pairs(seed, n, m, pairs, dim, dtype):
    rng = np.random.default_rng(seed)
    x, y = (rescaled(rows_of(rng, side, dim, dtype)) for side in (n, m))
    y[: min(n, m) // 2] = x[: min(n, m) // 2]
    i, j = rng.integers(0, n, pairs), rng.integers(0, m, pairs)
    found = by_all_kernels(lambda: cosines_of(x, y, i, j))
    assert found.dtype == np.float32
    words = np.dtype(f"u{x.itemsize}")
    same = (x[i].view(words) == y[j].view(words)).all(1) if pairs else np.zeros(0, bool)
    assert (found[same] == 1).all()
    assert (found[~np.isnan(found)] <= 1).all()


@settings(max_examples=60)
@given(
    seed=SEEDS,
    m=st.sampled_from([0, 1, 5, 33, 70]),
    n=st.sampled_from([0, 1, 5, 33, 70]),
    groups=st.sampled_from([1, 2, 3]),
    dim=DIMS,
    dtype=DTYPES,
)
def test_tables_hold_the_cosines_of_listed_pairs(seed, m, n, groups, dim, dtype):
    """And NaN for rows that cannot be compared."""
    rng = np.random.default_rng(seed)
    x, y = (rescaled(rows_of(rng, side * groups, dim, dtype)) for side in (m, n))
    same = min(m, n) * groups // 2
    y[:same] = x[:same]

    def tables():
        return native.cosine_tables(x, y, native.row_norms(x), native.row_norms(y), groups)

    found = by_all_kernels(tables)
    assert (found.dtype, found.shape) == (np.float32, (groups, m, n))
    group, i, j = (side.ravel() for side in np.indices(found.shape))
    expected = cosines_of(x, y, group * m + i, group * n + j)
    good = ~np.isnan(found.ravel())
    assert np.array_equal(found.ravel()[good], expected[good])
    sound = [np.isfinite(side).all(1) & side.any(1) for side in (x, y)]
    assert good[sound[0][group * m + i] & sound[1][group * n + j]].all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_cosines_are_those_of_exact_arithmetic_rounded(dtype):
    """Also of pairs that lie at the border of two float32, where the order of adding shows."""
    rng = np.random.default_rng(3)
    x = (rng.integers(-8, 9, (3000, 24)) / 8).astype(dtype)
    y = (rng.integers(-8, 9, (3000, 24)) / 8).astype(dtype)
    y[:, :12] = x[:, :12]
    places = np.arange(len(x))
    found = by_all_kernels(lambda: cosines_of(x, y, places, places))
    a, b = (side.astype(np.longdouble) for side in (x, y))
    true = (a * b).sum(1) / np.sqrt((a * a).sum(1)) / np.sqrt((b * b).sum(1))
    assert np.abs(found - true).max() <= 2**-25 * (1 + 1e-6)
    with mpmath.workdps(50):
        for place in range(0, 3000, 100):
            a, b = ([mpmath.mpf(float(v)) for v in side[place]] for side in (x, y))
            exact = mpmath.fdot(a, b) / mpmath.sqrt(mpmath.fdot(a, a) * mpmath.fdot(b, b))
            assert found[place] == np.float32(float(exact))


@settings(max_examples=40)
@given(
    seed=SEEDS, n=st.sampled_from([0, 1, 33, 300]), width=st.sampled_from([2, 4, 16, 130]),
    mixed=st.booleans(),
)  # fmt: skip
def test_hashes_are_sums_of_products(seed, n, width, mixed):
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 2**64, (n, width), np.uint64)
    words[: n // 2] = rng.choice(np.array([0, 1, 2**63, 2**64 - 1], np.uint64), (n // 2, width))
    offsets = rng.integers(0, 2**64, width, np.uint64)
    found = by_all_kernels(lambda: native.word_hashes(words, offsets, mixed))
    assert found.dtype == np.uint64

    def mix(word):
        word = ((word ^ word >> 32) * 0x9E3779B97F4A7C15) % 2**64
        return word ^ word >> 32

    for row, value in zip(words[:20].tolist(), found.tolist(), strict=False):
        used = [mix(word) for word in row] if mixed else row
        moved = [word + off for word, off in zip(used, offsets.tolist(), strict=True)]
        wanted = sum(a * b for a, b in zip(moved[::2], moved[1::2], strict=True)) % 2**64
        assert value == wanted


@settings(max_examples=80)
@given(
    seed=SEEDS,
    nodes=st.sampled_from([1, 2, 30, 500]),
    edges=st.sampled_from([0, 1, 40, 2000]),
    kind=st.sampled_from([np.uint32, np.int64]),
    ordered=st.booleans(),
    calls=st.integers(1, 3),
)
def test_the_best_edges_of_a_forest(seed, nodes, edges, kind, ordered, calls):
    """One edge after another by union-find; some edges are left out, and come in parts."""
    rng = np.random.default_rng(seed)
    start, end = rng.integers(0, nodes, (2, edges))
    order = rng.permutation(edges)[: edges - edges // 5] if ordered else None
    used = np.arange(edges) if order is None else order
    cuts = np.array_split(used, calls)

    def joined():
        parent = np.arange(nodes, dtype=kind)
        parts = [
            native.join_best(start, end, parent, part) if ordered or calls > 1
            else native.join_best(start, end, parent)
            for part in cuts
        ]  # fmt: skip
        assert (parent <= np.arange(nodes)).all()
        while not np.array_equal(parent[parent], parent):  # paths may be long still
            parent = parent[parent]
        return np.concatenate(parts), parent

    chosen, label = by_all_kernels(joined)
    assert chosen.dtype == np.int64
    root = np.arange(nodes)
    wanted = []
    for place in used:
        a, b = sorted((root[start[place]], root[end[place]]))
        if a != b:
            wanted.append(place)
            root[root == b] = a
    assert chosen.tolist() == wanted
    pairs = zip(start[used], end[used], strict=True)
    assert label.tolist() == truth.components(nodes, pairs).tolist() == root.tolist()


ROWS, WIDER = np.ones((3, 8), np.float32), np.ones((3, 9), np.float32)
NORMS, PLACES = np.ones(3), np.arange(3)
WORDS, NODES = np.ones((3, 8), np.uint64), np.arange(3, dtype=np.uint32)


@pytest.mark.parametrize(
    "call",
    [
        lambda: native.cosines(ROWS, WIDER, PLACES, PLACES, NORMS, NORMS),
        lambda: native.cosines(ROWS, ROWS, PLACES, PLACES[:2], NORMS, NORMS),
        lambda: native.cosines(ROWS, ROWS, PLACES, PLACES, NORMS[:2], NORMS),
        lambda: native.cosines(ROWS, ROWS, PLACES, PLACES, NORMS, NORMS[:2]),
        lambda: native.cosines(ROWS, ROWS, PLACES, PLACES + 1, NORMS, NORMS),
        lambda: native.cosines(ROWS, ROWS, PLACES - 1, PLACES, NORMS, NORMS),
        lambda: native.cosine_tables(ROWS, WIDER, NORMS, NORMS),
        lambda: native.cosine_tables(ROWS, ROWS, NORMS[:2], NORMS),
        lambda: native.cosine_tables(ROWS, ROWS, NORMS, NORMS, 2),
        lambda: native.cosine_tables(ROWS, ROWS, NORMS, NORMS, 0),
        lambda: native.row_norms(ROWS.astype(np.longdouble)),
        lambda: native.word_hashes(WORDS, np.ones(6, np.uint64), False),
        lambda: native.word_hashes(WORDS[:, :7], np.ones(7, np.uint64), False),
        lambda: native.join_best(PLACES, PLACES[:2], NODES.copy()),
        lambda: native.join_best(PLACES + 1, PLACES, NODES.copy()),
        lambda: native.join_best(PLACES, PLACES - 1, NODES.copy()),
        lambda: native.join_best(PLACES, PLACES, NODES.copy(), np.array([3])),
        lambda: native.join_best(PLACES, PLACES, NODES.copy(), np.array([-1])),
        lambda: native.join_best(PLACES, PLACES, NODES.astype(np.int32)),
        lambda: native.join_best(PLACES, PLACES, np.arange(6, dtype=np.uint32)[::2]),
    ],
)
def test_shapes_and_types_that_do_not_fit_are_refused(call, kernels):
    if kernels == "numpy":
        pytest.skip("numpy's counterparts are not checked")
    with pytest.raises((ValueError, TypeError, IndexError)):
        call()
