"""Kernels on int8 codes: all sets give numpy's bits, and numpy those of plain integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from same_bits import by_all_kernels

from snipdedup import native
from snipdedup.native import fallback

SIZES = st.sampled_from([0, 1, 2, 5, 6, 7, 15, 16, 17, 63, 64, 65, 130])
WIDTHS = st.sampled_from([1, 2, 3, 4, 7, 31, 32, 33, 64, 65, 100, 256])
SEEDS = st.integers(0, 2**31)
KINDS = st.sampled_from(["any", "ends", "zeros"])


def codes(rng, rows, width, kind="any"):
    """Codes of all values, or of 127, -127 and 0 only."""
    if kind == "any":
        return rng.integers(-127, 128, (rows, width), np.int8)
    return rng.choice(np.array([-127, 0, 127] if kind == "ends" else [0], np.int8), (rows, width))


def exact(x, y):
    return x.astype(np.int64) @ y.T.astype(np.int64)


@settings(max_examples=80)
@given(seed=SEEDS, n=SIZES, m=SIZES, width=WIDTHS, kind=KINDS, falls=st.booleans())
def test_products_are_those_of_integers(seed, n, m, width, kind, falls):
    rng = np.random.default_rng(seed)
    x, y = codes(rng, n, width, kind), codes(rng, m, width, kind)
    more = rng.integers(0, 10**7, m).astype(np.int32) if falls else None
    found = by_all_kernels(lambda: native.products(x, native.columns(y, more)))
    assert found.dtype == np.int32
    assert np.array_equal(found, exact(x, y) + (more if falls else 0))


@pytest.mark.parametrize("width", [1023, 1024, 1025, 3000])
def test_products_of_wide_codes_at_their_ends(width):
    """Beyond 2^24, where float32 alone would round."""
    x = np.stack([np.full(width, value, np.int8) for value in (127, -127, 1)])
    y = np.concatenate([x, codes(np.random.default_rng(width), 20, width)])
    found = by_all_kernels(lambda: native.products(x, native.columns(y)))
    assert np.array_equal(found, exact(x, y))


def test_rows_of_other_strides_are_those_rows():
    rng = np.random.default_rng(0)
    x, y = codes(rng, 60, 64), codes(rng, 90, 64)
    found = by_all_kernels(lambda: native.products(x[::3, ::2], native.columns(y[::2, ::2])))
    assert np.array_equal(found, exact(x[::3, ::2], y[::2, ::2]))


def plain_hits(x, y, falls, limits, wide, first, references, references_only):
    """The hits of the rule, one pair after another, by row and column."""
    table = exact(x, y) + falls
    found = set()
    for i in range(len(x)):
        for j in range(len(y)):
            if table[i, j] < np.ceil(limits[i]) or j >= i + first:
                continue
            if references is not None:
                old, known = references[0][i], references[1][j]
                if (old == known) if references_only else (old and known):
                    continue
            if wide is not None:
                a, least, b, more = wide
                if int(exact(a[i : i + 1], b[j : j + 1])[0, 0]) + more[j] < np.ceil(least[i]):
                    continue
            found.add((i, j))
    return found


@settings(max_examples=80)
@given(
    seed=SEEDS,
    n=st.sampled_from([0, 1, 5, 7, 40]),
    m=st.sampled_from([0, 1, 16, 65, 130]),
    width=WIDTHS,
    kind=KINDS,
    wide=st.booleans(),
    first=st.sampled_from([native.EVERY_COLUMN, 0, 1, 60, -3]),
    share=st.sampled_from([None, 0.0, 0.3, 1.0]),
    references_only=st.booleans(),
    quantile=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
)
def test_hits_are_those_of_the_rule(
    seed, n, m, width, kind, wide, first, share, references_only, quantile
):
    """Limits lie on products, so that ties are met."""
    rng = np.random.default_rng(seed)
    x, y = codes(rng, n, width, kind), codes(rng, m, width, kind)
    falls = (rng.integers(0, 5000, m) * (rng.random(m) < rng.choice([0, 0.2, 1]))).astype(np.int32)
    table = exact(x, y) + falls
    limits = np.quantile(table, quantile, axis=1, method="lower") if m else np.zeros(n)
    limits = limits - rng.choice([0, 0.5, -0.5, 1], n)
    both = None
    if wide:
        a, b = codes(rng, n, 33), codes(rng, m, 33)
        more = rng.integers(0, 5000, m).astype(np.int32)
        both = a, rng.integers(-9000, 9000, n).astype(float), b, more
    references = None if share is None else (rng.random(n) < share, rng.random(m) < share)
    how = {"first": first, "references": references, "references_only": references_only}
    found = by_all_kernels(lambda: native.hits(x, native.columns(y, falls), limits, both, **how))
    assert [side.dtype for side in found] == [np.int32, np.int32]
    pairs = list(zip(*(side.tolist() for side in found), strict=True))
    assert len(set(pairs)) == len(pairs)
    wanted = plain_hits(x, y, falls, limits, both, first, references, references_only)
    assert set(pairs) == wanted


def test_hits_of_many_rows_come_in_one_order():
    """By tiles of rows, then panels of columns: what is cut off a list of hits is the same."""
    rng = np.random.default_rng(1)
    x, y = codes(rng, 2100, 8), codes(rng, 200, 8)
    i, j = by_all_kernels(lambda: native.hits(x, native.columns(y), np.full(2100, 20_000)))
    assert len(i) > 10_000
    tile, panel = i // fallback.TILE_ROWS, j // fallback.PANEL
    order = np.lexsort((j, i, panel, tile))
    assert np.array_equal(order, np.arange(len(i)))
    assert np.array_equal(np.sort(i * 200 + j), np.flatnonzero(exact(x, y) >= 20_000))


@pytest.mark.parametrize("value", [1e30, -1e30, 2.0**31, -(2.0**31), 2.0**31 - 1, np.inf, -np.inf])
def test_limits_beyond_all_products(value):
    x = codes(np.random.default_rng(0), 30, 12)
    found = by_all_kernels(lambda: native.hits(x, native.columns(x), np.full(30, value)))
    assert len(found[0]) == (900 if value < 0 else 0)


@pytest.mark.parametrize("limit", [0.2, 1, -0.7, -3])
def test_limits_are_rounded_up(limit):
    assert native.whole_limits(np.array([limit])).tolist() == [int(np.ceil(limit))]
    whole = np.array([3], np.int32)
    assert native.whole_limits(whole) is whole


@settings(max_examples=60)
@given(
    seed=SEEDS,
    n=st.sampled_from([0, 1, 7, 300]),
    nlist=st.sampled_from([1, 2, 64, 65, 130]),
    width=WIDTHS,
    kind=KINDS,
    reach=st.sampled_from([None, 0.0, 20.0, 1e6]),
    table=st.booleans(),
)
def test_homes_and_visits_are_those_of_the_rule(seed, n, nlist, width, kind, reach, table):
    rng = np.random.default_rng(seed)
    x, centroids = codes(rng, n, width, kind), codes(rng, nlist, width, kind)
    apart = ((centroids[:, None].astype(np.int64) - centroids) ** 2).sum(2)
    distances = np.sqrt(apart.astype(np.float32))
    widest = distances.max(1)
    radius = None if reach is None else (reach * rng.random(n)).astype(np.float32)

    def assign():
        given = (widest, distances if table else None, radius) if reach is not None else ()
        return native.assign(x, native.columns(centroids), *given)

    home, best, row, list_ = by_all_kernels(assign)
    near = 2 * exact(x, centroids) - (centroids.astype(np.int64) ** 2).sum(1)
    assert np.array_equal(home, near.argmax(1)) if n else not len(home)
    assert np.array_equal(best, near.max(1, initial=-(2**62)))
    if reach is None:
        assert not len(row)
        return
    gap = near.max(1, initial=-(2**62))[:, None] - near
    visited = gap <= 2 * radius[:, None].astype(float) * np.sqrt(apart[home].astype(float))
    edge = np.abs(gap - 2 * radius[:, None] * np.sqrt(apart[home].astype(float))) <= 1e-6 * gap
    found = np.zeros_like(visited)
    found[row, list_] = True
    assert found.sum() == len(row)
    assert np.array_equal(found | edge, visited | edge)
    assert found[np.arange(n), home].all()
    assert np.array_equal(np.lexsort((list_, row)), np.arange(len(row)))


@settings(max_examples=50)
@given(seed=SEEDS, n=SIZES, width=WIDTHS, kind=KINDS)
def test_dots_of_rows(seed, n, width, kind):
    rng = np.random.default_rng(seed)
    x, y = codes(rng, n, width, kind), codes(rng, n, width, kind)
    found = by_all_kernels(lambda: native.code_dots(x, y))
    assert found.dtype == np.int32
    assert np.array_equal(found, (x.astype(np.int64) * y).sum(1))


@settings(max_examples=50)
@given(seed=SEEDS, n=SIZES, dim=WIDTHS, width=st.sampled_from([1, 15, 16, 64, 70, 128]))
def test_products_with_a_matrix_are_those_of_integers(seed, n, dim, width):
    """Of rows and columns as long as the bound of 2^24 allows."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(-32_000, 32_001, (n, dim)).astype(np.int16)
    most = max(1, int(2**24 / (32_000 * dim)))
    matrix = rng.integers(-min(127, most), min(127, most) + 1, (dim, width)).astype(np.int8)
    found = by_all_kernels(lambda: native.project(rows, native.matrix(matrix)))
    assert found.dtype == np.float32
    assert np.array_equal(found, rows.astype(np.int64) @ matrix.astype(np.int64))


@settings(max_examples=50)
@given(
    seed=SEEDS,
    n=st.sampled_from([0, 1, 9]),
    width=WIDTHS,
    scale=st.sampled_from([0.0, 100.0, 600.0, 2000.0]),
)
def test_codes_are_coordinates_rounded(seed, n, width, scale):
    """Recomputed in float64; where a coordinate lies within float32 of a half either will do."""
    rng = np.random.default_rng(seed)
    products = np.rint(rng.standard_normal((n, width)) * 1e5 / width**0.5).astype(np.float32)
    axis = rng.standard_normal(width).astype(np.float32)
    axis /= np.linalg.norm(axis)
    unit, length = 0.7e-5, 1.01
    codes_, falls = by_all_kernels(lambda: native.finish_codes(products, unit, axis, length, scale))
    assert (codes_.dtype, falls.dtype) == (np.int8, np.int32)
    values = products.astype(float) * np.float32(unit)
    along = values @ axis.astype(float)
    rest = np.sqrt(np.maximum(0, np.float32(length) - (values**2).sum(1) + along**2)) - along
    scaled = (values + rest[:, None] * axis) * scale
    error = 1e-3 + 1e-5 * scale  # of a small residual the root is less exact
    assert np.abs(codes_ - scaled.clip(-127, 127)).max(initial=0) <= 0.5 + error
    over = np.where(np.abs(scaled) > 127.5, np.abs(scaled) - 127, 0)
    lost = np.ceil(127 * over.sum(1) + (over**2).sum(1) / 2)
    slack = 1 + 1e-4 * lost + (127.5 + scale / 100) * width * error
    assert (np.abs(falls - lost) <= slack).all()
    assert not falls[(np.abs(scaled) < 127.4).all(1)].any()


@pytest.mark.parametrize("rows", [1, 7, 9, 40])
@pytest.mark.parametrize("width", [0, 5, 256])
def test_records_are_taken_and_cut_into_fields(rows, width):
    kind = np.dtype([("one", np.int8, 64), ("two", "<i4"), ("three", np.int8, width)])
    source = np.frombuffer(np.random.default_rng(rows).bytes(rows * kind.itemsize), kind)
    parts = [source[start : start + 3] for start in range(0, rows, 3)]
    for places in (np.empty(0, np.int64), np.arange(rows)[::-2], np.arange(3 * rows) % rows):

        def taken(places=places):
            memory = np.empty(len(places) * kind.itemsize, np.uint8)
            return tuple(native.Records(parts, 3).take(places, memory))

        for name, field in zip(kind.names, by_all_kernels(taken), strict=True):
            assert np.array_equal(field, source[name][places])


ROWS, WIDER = np.ones((3, 8), np.int8), np.ones((3, 9), np.int8)
PAIRED = np.zeros(3, [("one", np.int8, 4), ("two", "<i4")])


@pytest.mark.parametrize(
    "call",
    [
        lambda: native.products(ROWS, native.columns(WIDER)),
        lambda: native.columns(ROWS, np.zeros(2, np.int32)),
        lambda: native.hits(ROWS, native.columns(WIDER), np.zeros(3)),
        lambda: native.hits(ROWS, native.columns(ROWS), np.zeros(2)),
        lambda: native.hits(
            ROWS, native.columns(ROWS), np.zeros(3), (WIDER, np.zeros(3), ROWS, np.zeros(3))
        ),
        lambda: native.hits(
            ROWS, native.columns(ROWS), np.zeros(3), (ROWS, np.zeros(2), ROWS, np.zeros(3))
        ),
        lambda: native.hits(
            ROWS, native.columns(ROWS), np.zeros(3), (ROWS, np.zeros(3), ROWS, np.zeros(4))
        ),
        lambda: native.hits(
            ROWS, native.columns(ROWS), np.zeros(3), (ROWS[:2], np.zeros(3), ROWS, np.zeros(3))
        ),
        lambda: native.hits(
            ROWS, native.columns(ROWS), np.zeros(3), references=(np.ones(3, bool), np.ones(2, bool))
        ),
        lambda: native.assign(ROWS, native.columns(WIDER)),
        lambda: native.assign(ROWS, native.columns(ROWS[:0])),
        lambda: native.assign(
            ROWS, native.columns(ROWS), np.zeros(3, "f4"), None, np.zeros(2, "f4")
        ),
        lambda: native.assign(
            ROWS, native.columns(ROWS), np.zeros(2, "f4"), None, np.zeros(3, "f4")
        ),
        lambda: native.assign(
            ROWS, native.columns(ROWS), np.zeros(3, "f4"), np.zeros((3, 2), "f4"), np.zeros(3, "f4")
        ),
        lambda: native.code_dots(ROWS, WIDER),
        lambda: native.code_dots(ROWS, ROWS[:2]),
        lambda: native.project(ROWS.astype(np.int16), native.matrix(WIDER.T.copy())),
        lambda: native.finish_codes(np.ones((3, 8), "f4"), 1, np.ones(7, "f4"), 1, 1),
        lambda: native.Records([PAIRED], 3).take(np.arange(2), np.empty(17, np.uint8)),
        lambda: native.Records([PAIRED, PAIRED], 3).take(np.array([6]), np.empty(8, np.uint8)),
        lambda: native.Records([PAIRED], 3).take(np.array([-1]), np.empty(8, np.uint8)),
        lambda: native.Records([PAIRED, WIDER], 3),
        lambda: native.Records([PAIRED, PAIRED], 4),
        lambda: native.products(ROWS[0], native.columns(ROWS)),
    ],
)
def test_shapes_and_types_that_do_not_fit_are_refused(call, kernels):
    if kernels == "numpy":
        pytest.skip("numpy's counterparts are not checked")
    with pytest.raises((ValueError, TypeError, IndexError)):
        call()
