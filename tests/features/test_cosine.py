"""The number that decides, against exact arithmetic."""

from __future__ import annotations

from fractions import Fraction
from unittest import mock

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from snipdedup import native
from snipdedup.features.cosine import (
    LENGTH,
    PROPOSAL_ERROR,
    all_cosines,
    bad_rows,
    indexed_cosines,
    integer_rows,
    longest,
    pair_cosine,
    rescaled,
    same_bits,
    unit_rows,
    unit_rows64,
)
from snipdedup.native import fallback
from snipdedup.native.fallback import row_dots, row_sums, unsettled

ONE = np.float32(1)
FLOATS = [np.float16, np.float32, np.float64]


def exact_cosine(x: np.ndarray, y: np.ndarray) -> float:
    """Cosine of two rows with 80 digits."""
    with mpmath.workdps(80):
        a = [mpmath.mpf(float(v)) for v in x]
        b = [mpmath.mpf(float(v)) for v in y]
        dot = mpmath.fdot(a, b)
        return float(dot / mpmath.sqrt(mpmath.fdot(a, a)) / mpmath.sqrt(mpmath.fdot(b, b)))


def finite_rows(dtype, low_exponent, high_exponent):
    """Rows whose values span a range of exponents."""
    size = dtype().itemsize * 8
    values = st.floats(-1, 1, width=size).filter(lambda v: v == 0 or abs(v) > 1e-3)
    shape = st.tuples(st.integers(1, 5), st.integers(1, 12))
    arrays = shape.flatmap(lambda s: hnp.arrays(dtype, (2, *s), elements=values))
    scales = st.tuples(*[st.integers(low_exponent, high_exponent)] * 2)
    return st.tuples(arrays, scales).map(
        lambda pair: np.stack([np.ldexp(pair[0][i], pair[1][i]) for i in (0, 1)]).astype(dtype)
    )


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(np.float16, -10, 14), (np.float32, -110, 120), (np.float64, -1000, 1000)],
)
def test_cosine_of_any_norms_is_correctly_rounded(dtype, low, high):
    @given(finite_rows(dtype, low, high))
    @settings(deadline=None, max_examples=60)
    def check(both):
        x, y = both
        good = ~(bad_rows(x) | bad_rows(y))
        found = pair_cosine(x, y)
        assert found.dtype == np.float32
        for i in np.flatnonzero(good):
            true = exact_cosine(x[i], y[i])
            assert abs(float(found[i]) - true) <= 2**-24 * max(abs(true), 2**-20) + 1e-15

    check()


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_equal_bit_for_bit_have_exactly_one(dtype):
    rng = np.random.default_rng(0)
    for width in (1, 2, 3, 512, 1024):
        x = rng.standard_normal((200, width)).astype(dtype)
        assert (pair_cosine(x, x.copy()) == ONE).all()
        assert (pair_cosine(x, -x) == -ONE).all()


def test_a_row_and_its_double_are_not_more_than_one():
    x = np.random.default_rng(1).standard_normal((500, 77))
    assert (pair_cosine(x, 2 * x) == ONE).all()
    assert (pair_cosine(x, 3 * x) <= ONE).all()
    assert np.abs(pair_cosine(x, 3 * x) - 1).max() == 0  # float64 error rounds away


def test_a_pair_at_the_threshold_by_hand():
    # (4, 3) and (24, 7): 117 / 125 = .936; scaled by powers of two it must not move
    x, y = np.array([[4.0, 3.0]]), np.array([[24.0, 7.0]])
    expected = np.float32(float(Fraction(117, 125)))
    for scale in (1.0, 2.0**-40, 2.0**500, 2.0**-500):
        assert pair_cosine(x * scale, y)[0] == expected
        assert pair_cosine(x, y * scale)[0] == expected
    assert pair_cosine(x.astype(np.float16), y.astype(np.float16))[0] == expected


@pytest.mark.parametrize("norm", [1e-300, 1e-200, 1e-30, 1e-3, 1.0, 1e30, 1e200, 1e300])
def test_extreme_norms_in_float64(norm):
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((2, 50, 64))
    plain = pair_cosine(x, y)
    assert np.array_equal(pair_cosine(np.ldexp(x, int(np.log2(norm))), y), plain)
    assert np.abs(pair_cosine(x * norm, y) - plain).max() <= 2**-24
    assert np.abs(unit_rows(x * norm) - unit_rows(x)).max() < 1e-6
    assert np.abs(unit_rows64(x * norm) - unit_rows64(x)).max() < 1e-15
    assert not bad_rows(x * norm).any()


def test_float32_and_float16_at_their_ends():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((20, 32)).astype(np.float32)
    for scale in (2.0**-120, 2.0**120):
        scaled = x * np.float32(scale)
        assert np.array_equal(pair_cosine(scaled, x[::-1].copy()), pair_cosine(x, x[::-1].copy()))
        assert np.abs(unit_rows(scaled) - unit_rows(x)).max() < 1e-6
        assert not bad_rows(scaled).any()
    tiny = (rng.integers(-1000, 1000, (20, 32)) * 2.0**-24).astype(np.float16)  # subnormals
    large = np.ldexp(tiny, 24).astype(np.float16)
    assert np.array_equal(pair_cosine(tiny, large[::-1].copy()), pair_cosine(large, large[::-1]))
    assert np.abs(unit_rows(tiny) - unit_rows(large)).max() < 1e-6
    assert not bad_rows(tiny).any()
    one_bit = np.zeros((1, 9), np.float16)
    one_bit[0, 4] = 2.0**-24
    assert not bad_rows(one_bit).any()
    assert unit_rows(one_bit)[0, 4] == 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_bad_rows_are_nan_infinity_and_zero_only(dtype):
    top, least = np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal
    rows = np.ones((9, 5), dtype)
    rows[1, 3] = np.nan
    rows[2, 0] = np.inf
    rows[3, 4] = -np.inf
    rows[4] = 0
    rows[5] = -0.0
    rows[6] = top  # its square overflows
    rows[7] = 0
    rows[7, 2] = least  # its square underflows
    rows[8, 1:3] = np.inf, -np.inf
    expected = [False, True, True, True, True, True, False, False, True]
    assert bad_rows(rows).tolist() == expected
    assert not unit_rows(rows)[expected].any()
    assert not unit_rows64(rows)[expected].any()
    good = ~np.array(expected)
    assert np.abs(np.linalg.norm(unit_rows64(rows)[good], axis=1) - 1).max() < 1e-15
    assert np.abs(np.linalg.norm(unit_rows(rows)[good], axis=1) - 1).max() < 1e-6


def test_no_rows():
    empty = np.empty((0, 4), np.float32)
    assert bad_rows(empty).shape == (0,)
    assert pair_cosine(empty, empty).shape == (0,)
    assert unit_rows(empty).shape == (0, 4)


@pytest.mark.parametrize("dtype", FLOATS)
def test_proposals_are_close_enough_to_decide_later(dtype):
    rng = np.random.default_rng(4)
    x = (rng.standard_normal((300, 1024)) * 7).astype(dtype)
    y = (x + rng.standard_normal(x.shape)).astype(dtype)
    proposed = np.einsum("ij,ij->i", unit_rows(x), unit_rows(y))
    assert np.abs(proposed - pair_cosine(x, y)).max() < PROPOSAL_ERROR


def test_same_bits_tells_zeros_apart_and_nans_alike():
    x = np.array([[0.0, 1], [np.nan, 1], [1, 2]], np.float32)
    y = np.array([[-0.0, 1], [np.nan, 1], [1, np.nextafter(np.float32(2), ONE)]], np.float32)
    assert same_bits(x, y).tolist() == [False, True, False]
    assert pair_cosine(x[:1], y[:1]) == ONE


def test_inputs_are_left_as_they_were():
    x = np.array([[1e200, 2e200], [np.nan, 1.0]])
    before = x.copy()
    for function in (bad_rows, unit_rows, unit_rows64, rescaled):
        function(x)
        assert np.array_equal(x, before, equal_nan=True)
    pair_cosine(x, x)
    assert np.array_equal(x, before, equal_nan=True)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**31), shape=st.tuples(st.integers(0, 4), st.integers(1, 70)))
def test_sums_of_rows_are_sums_and_do_not_hang_on_other_rows(seed, shape):
    values = np.random.default_rng(seed).standard_normal((*shape, 3)).transpose(2, 0, 1)
    found = row_sums(values.copy())
    assert np.allclose(found, values.sum(-1), atol=1e-12)
    for which in range(3):
        assert np.array_equal(row_sums(values[which].copy()), found[which])


def reordered(shuffle):
    """`row_dots` that adds in another order, as another processor does."""
    return lambda a, b: row_dots(*(np.ascontiguousarray(side[:, shuffle]) for side in (a, b)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_order_of_adding_never_shows(dtype, kernels):
    """Among cosines that lie at the border of two float32, some hang on the order; not for us."""
    rng = np.random.default_rng(3)
    dim, quick = 60, []
    x, y = (rng.integers(-8, 9, (50_000, dim)).astype(dtype) / dtype(8) for _ in range(2))
    y[:, :8] = x[:, :8]  # cosines up to one
    expected = pair_cosine(x, y)
    native.use("numpy")
    for _ in range(3):
        shuffled = reordered(rng.permutation(dim))
        a, b = rescaled(x.astype(np.float64)), rescaled(y.astype(np.float64))
        quick.append(shuffled(a, b) / (np.sqrt(shuffled(a, a)) * np.sqrt(shuffled(b, b))))
        with mock.patch.object(fallback, "row_dots", shuffled):
            assert np.array_equal(pair_cosine(x, y), expected)
    apart = np.ptp(quick, axis=0)
    assert apart.max() <= 2 * (2 * dim + 16) * 2.0**-53


def test_cosines_at_the_border_of_two_roundings_are_unsettled():
    below, border = (
        np.float32(0.95),
        (np.float64(np.float32(0.95)) + np.nextafter(np.float32(0.95), ONE)) / 2,
    )
    values = np.array(
        [below, border - 1e-11, border - 1e-15, border, border + 1e-15, border + 1e-11]
    )
    assert unsettled(values, 64).tolist() == [False, False, True, True, True, False]
    assert not unsettled(np.array([np.nan, np.inf, -np.inf, 1.0, -1.0]), 64).any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_tables_and_lists_of_pairs_hold_the_cosine_that_decides(dtype, kernels):
    rng = np.random.default_rng(5)
    x = rng.standard_normal((40, 33)).astype(dtype)
    y = np.concatenate([x[:20], 2 * x[20:30], rng.standard_normal((25, 33)).astype(dtype)])
    y[-1] = 0
    i, j = (side.ravel() for side in np.indices((len(x), len(y))))
    expected = pair_cosine(x[i], y[j])
    assert np.array_equal(indexed_cosines(x, y, i, j), expected, equal_nan=True)
    table = expected.reshape(len(x), len(y))
    assert np.array_equal(all_cosines(x, y), table, equal_nan=True)
    assert (all_cosines(x, x).diagonal() == ONE).all()
    some = rng.integers(0, len(i), 7)  # fewer pairs than rows
    assert np.array_equal(indexed_cosines(x, y, i[some], j[some]), expected[some], equal_nan=True)


def test_wild_norms_in_tables_and_lists_of_pairs(kernels):
    rng = np.random.default_rng(6)
    x = rng.standard_normal((30, 9))
    wild = np.ldexp(x, rng.integers(-1000, 1000, (30, 1)))
    wild[0] = x[0]
    i, j = (side.ravel() for side in np.indices((30, 30)))
    with np.errstate(over="raise"):
        found = indexed_cosines(wild, x, i, j)
        assert np.array_equal(found, pair_cosine(wild[i], x[j]))
        assert np.array_equal(found, pair_cosine(x[i], x[j]))
        assert np.array_equal(all_cosines(wild, x).ravel(), found)
        assert np.array_equal(all_cosines(wild, wild), all_cosines(x, x))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [1, 5, 512])
def test_integers_of_rows_are_their_directions_rounded(dtype, dim, kernels):
    rng = np.random.default_rng(dim)
    scales = {
        np.float16: (1e-3, 1, 1e2),
        np.float32: (1e-30, 1, 1e30),
        np.float64: (1e-300, 1, 1e300),
    }
    for scale in scales[dtype]:
        x = (rng.standard_normal((60, dim)) * scale).astype(dtype)
        x[3], x[4, 0], x[5, -1] = 0, np.nan, -np.inf
        whole, bad = integer_rows(x)
        assert whole.dtype == np.int16
        assert np.flatnonzero(bad).tolist() == [3, 4, 5]
        assert not whole[bad].any()
        unit = unit_rows64(x)
        assert np.abs(whole - longest(dim) * unit).max() <= 0.5 + 0.01
        assert np.linalg.norm(whole.astype(float), axis=1).max() <= LENGTH
        assert np.array_equal(bad, bad_rows(x))
        assert np.abs(unit_rows(x) - unit).max() < 1e-6
