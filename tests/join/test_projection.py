"""Codes whose products bound the cosine: no pair may fall below the limit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snipdedup import native
from snipdedup.features.cosine import LENGTH, integer_rows, longest, unit_rows64
from snipdedup.join import projection as room
from snipdedup.join.projection import WIDTHS, fit_projection

THRESHOLDS = (0.5, 0.8, 0.95, 0.99, 1.0)


def gaussian(rng, n, d):
    return rng.standard_normal((n, d))


def low_rank(rng, n, d):
    rank = min(d, 5)
    return rng.standard_normal((n, rank)) @ rng.standard_normal((rank, d))


def one_hot(rng, n, d):
    x = np.zeros((n, d))
    x[np.arange(n), rng.integers(0, d, n)] = 1
    x[np.arange(n), rng.integers(0, d, n)] += rng.random(n)
    return x


def clip_like(rng, n, d):
    """One direction that all rows share, and one huge coordinate, as CLIP features have."""
    x = rng.standard_normal((n, d)) + 3 * rng.standard_normal(d)
    x[:, d // 2] += 10
    return x


KINDS = (gaussian, low_rank, one_hot, clip_like)


def with_pairs(x, rng, threshold):
    """Add to each row one whose cosine with it lies a hair to either side of the threshold."""
    unit = unit_rows64(x)
    side = rng.standard_normal(unit.shape)
    side -= (side * unit).sum(1, keepdims=True) * unit
    side = unit_rows64(side)
    c = np.minimum(threshold + rng.choice([-1e-3, -1e-6, 0, 1e-6, 1e-3], (len(x), 1)), 1)
    return np.concatenate([unit, c * unit + np.sqrt(1 - c * c) * side])


def lowest_margin(projection, x, threshold):
    """Product minus the pair's limit, of all pairs; and how many pairs there are."""
    codes, falls = projection.encode(x)
    assert (codes.dtype, falls.dtype) == (np.int8, np.int32)
    unit = unit_rows64(x)
    pairs = np.triu((unit @ unit.T).astype(np.float32) >= np.float32(threshold), 1)
    products = codes.astype(np.float64) @ codes.T.astype(np.float64)
    margin = products + falls[:, None] + falls - projection.limit(threshold)
    return margin[pairs].min(initial=np.inf), int(pairs.sum())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    ("dim", "dtype"),
    [(3, np.float64), (16, np.float16), (128, np.float64), (512, np.float16)],
)
def test_no_pair_has_a_product_below_the_limit(kind, dim, dtype, width):
    rng = np.random.default_rng(dim)
    x = kind(rng, 200, dim)
    projection = fit_projection(x.astype(dtype)[:150], width, seed=0)
    for threshold in THRESHOLDS:
        rows = with_pairs(x, rng, threshold).astype(dtype)
        margin, pairs = lowest_margin(projection, rows, threshold)
        assert margin >= 0, (threshold, pairs)
        assert pairs > 50 or threshold == 1


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31), dim=st.integers(1, 40), threshold=st.sampled_from(THRESHOLDS))
def test_rows_far_outside_the_sample_are_corrected_not_lost(seed, dim, threshold):
    """The sample lies near one axis; the rows everywhere."""
    rng = np.random.default_rng(seed)
    sample = np.eye(dim)[:1] + 1e-3 * rng.standard_normal((40, dim))
    projection = fit_projection(sample, WIDTHS[-1], seed=0)
    rows = with_pairs(rng.standard_normal((60, dim)), rng, threshold)
    assert lowest_margin(projection, rows, threshold)[0] >= 0


def test_limits_fall_by_what_int8_cannot_hold():
    projection = fit_projection(np.eye(300)[:1], WIDTHS[-1], seed=0)
    x = np.concatenate([np.eye(300)[:1], np.random.default_rng(0).standard_normal((500, 300))])
    codes, falls = projection.encode(x)
    scaled = (
        projection.rotated(native.project(integer_rows(x)[0], projection.packed)).astype(np.float64)
        * projection.scale
    )
    over = np.where(np.abs(scaled) > 127.5, np.abs(scaled) - 127, 0)
    clipped = over.any(1)
    lost = 127 * over.sum(1) + (over * over).sum(1) / 2
    assert clipped.sum() > 400
    assert (falls >= lost - 0.01 * (lost > 0)).all()
    assert (falls - lost).max() <= 2
    assert not falls[~clipped].any()
    assert falls[0] == 0
    assert np.abs(codes.astype(int)).max() == 127
    held = scaled[~clipped]
    assert np.abs(codes[~clipped] - held).max() <= 0.5 + 1e-4


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**31),
    width=st.integers(1, 256),
    share=st.sampled_from([0.01, 0.1, 1.0]),
)
def test_falls_make_up_for_whatever_two_codes_lost(seed, width, share):
    """Integers, so that nothing is rounded; as long as codes become at the most."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 8, width)) * (rng.random((2, 8, width)) < share)
    x[1, :4] = x[0, :4]
    x[..., 0] += 1e-3
    x = np.rint(x / np.linalg.norm(x, axis=2, keepdims=True) * 127 * width**0.5)
    (a, below), (b, under) = (room.round_codes(side.astype(np.float32)) for side in x)
    products = (a.astype(np.int64) * b).sum(1) + below + under
    assert (products >= (x[0] * x[1]).sum(1)).all()


def test_products_bound_cosines_from_above_before_rounding():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((300, 600))  # more directions than a code has
    projection = fit_projection(x[:100], WIDTHS[-1], seed=1)
    z = projection.rotated(native.project(integer_rows(x)[0], projection.packed)).astype(np.float64)
    unit = unit_rows64(x)
    assert (z @ z.T >= unit @ unit.T - arithmetic_error(600)).all()
    assert np.allclose(np.linalg.norm(z, axis=1), 1, atol=arithmetic_error(600))


def arithmetic_error(dim):
    """What the limit allows for rows that are rounded to integers."""
    error = room.rounding_error(dim)
    return 2 * error + 3 * error**2 + room.FLOAT_ERROR


def test_products_of_sparse_rows_bound_cosines_too():
    """Few nonzero values: their rounding errors do not cancel."""
    rng = np.random.default_rng(5)
    x = np.zeros((600, 300))
    x[:, :2] = rng.standard_normal((600, 2))
    x[300:, 2:4] = 0.1 * rng.standard_normal((300, 2))
    projection = fit_projection(
        np.concatenate([x, rng.standard_normal((300, 300))]), WIDTHS[-1], seed=1
    )
    z, unit = (
        projection.rotated(native.project(integer_rows(x)[0], projection.packed)).astype(
            np.float64
        ),
        unit_rows64(x),
    )
    pairs = unit @ unit.T > 0.9
    assert (z @ z.T - unit @ unit.T)[pairs].min() >= -arithmetic_error(300)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_sample_of_a_few_rows_will_do(rows):
    rng = np.random.default_rng(0)
    projection = fit_projection(rng.standard_normal((rows, 64)), WIDTHS[-1], seed=0)
    x = with_pairs(rng.standard_normal((100, 64)), rng, 0.9)
    assert lowest_margin(projection, x, 0.9)[0] >= 0


def test_the_limit_rejects_far_pairs_and_rises_with_the_threshold():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 128))
    projection = fit_projection(x, WIDTHS[-1], seed=0)
    codes = projection.encode(x)[0].astype(float)
    products = (codes @ codes.T)[np.triu_indices(500, 1)]
    limits = [projection.limit(threshold) for threshold in THRESHOLDS]
    assert limits == sorted(limits)
    assert np.mean(products >= projection.limit(0.95)) < 0.001


def test_the_same_seed_gives_the_same_codes_and_saving_keeps_them():
    x = np.random.default_rng(0).standard_normal((200, 40)).astype(np.float16)
    one, same, other = (fit_projection(x, WIDTHS[-1], seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(one.encode(x)[0], same.encode(x)[0])
    assert not np.array_equal(one.encode(x)[0], other.encode(x)[0])
    arrays = one.arrays()
    for mine, loaded in zip(one.encode(x), type(one).from_arrays(arrays).encode(x), strict=True):
        assert np.array_equal(mine, loaded)
    with pytest.raises(ValueError, match="its codes are made by 'other', this version"):
        type(one).from_arrays({**arrays, "arithmetic": np.array("other")})


@pytest.mark.parametrize("width", WIDTHS)
def test_the_limit_allows_for_errors_that_two_rows_share(width):
    """Uniform errors, whatever those of one row have to do with the other's: by a union bound."""
    projection = fit_projection(np.eye(40), width, seed=0)
    cosine = np.float32(0.9) - projection._lost
    allowed = projection.scale**2 * cosine - projection.limit(0.9)
    s = (allowed - width / 4) / 2
    assert 2 * np.exp(-6 * (s / projection.norm) ** 2) <= room.MISS_PROBABILITY


@pytest.mark.parametrize("away", [0, 1e-9, 1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize("width", [WIDTHS[0], WIDTHS[-1]])
def test_rows_that_round_alike_are_not_lost(width, away):
    """Twice the variance of independent errors, norm² / 3, and no product below the limit."""
    rng = np.random.default_rng(width)
    x = unit_rows64(rng.standard_normal((20_000, 40)))
    side = rng.standard_normal(x.shape)
    side = unit_rows64(side - (side * x).sum(1, keepdims=True) * x)
    y = (1 - away) * x + np.sqrt(1 - (1 - away) ** 2) * side
    projection = fit_projection(x[:2000], width, seed=0)
    (a, below), (b, under) = projection.encode(x), projection.encode(y)
    product = (a.astype(np.float64) * b).sum(1)
    cosine = (x * unit_rows64(y)).sum(1)
    off = (product - projection.scale**2 * cosine) / projection.norm
    if away <= 1e-7:
        held = (below == 0) & (under == 0)
        assert 0.5 < off[held].std() < 0.65  # independent ones: .41
    for threshold in (0.95, 0.999, 1 - away):
        pair = cosine.astype(np.float32) >= np.float32(threshold)
        assert pair.sum() > 5000 or threshold > 0.999
        assert (product + below + under >= projection.limit(threshold))[pair].all()


def test_codes_are_those_of_exact_integers(kernels):
    """Recomputed by numpy's integers; rows as long as they may become, and empty blocks."""
    rng = np.random.default_rng(8)
    x = np.concatenate([clip_like(rng, 90, 200), np.eye(200)[:5], one_hot(rng, 20, 200)])
    projection = fit_projection(x[:80], 128, seed=0)
    whole = integer_rows(x)[0]
    assert np.linalg.norm(whole.astype(float), axis=1).max() <= LENGTH
    assert np.linalg.norm(projection.matrix.astype(float), axis=0).max() <= room.COLUMN
    expected = whole.astype(np.int64) @ projection.matrix.astype(np.int64)
    assert np.array_equal(native.project(whole, projection.packed), expected), kernels
    codes, falls = projection.encode(x[:0])
    assert (codes.shape, falls.shape) == ((0, 128), (0,))


@pytest.mark.parametrize("dim", [1, 7, 1000, 5000])
def test_the_largest_integers_there_can_be_are_multiplied_exactly(dim, kernels):
    """A row along a column, both as long as they may be; and the values at the ends of digits."""
    column = room.small_integers(np.full((dim, 1), dim**-0.5))
    whole = np.rint(np.full((3, dim), longest(dim) * dim**-0.5))
    whole[1] = -whole[1]
    whole[2, : min(dim, 4)] = [-32_000, 128, -128, 127][: min(dim, 4)]
    whole[2, 4:] = 0
    expected = whole.astype(np.int64) @ column.astype(np.int64)
    found = native.project(whole.astype(np.int16), native.matrix(column))
    assert np.array_equal(found, expected), kernels


def test_every_kernel_makes_the_same_codes(kernels):
    rng = np.random.default_rng(3)
    for dtype in (np.float16, np.float32, np.float64):
        x = clip_like(rng, 300, 77).astype(dtype)
        found = fit_projection(x[:50], 64, seed=0)
        native.use("numpy")
        expected = fit_projection(x[:50], 64, seed=0)
        codes = expected.encode(x)
        native.use(kernels)
        assert np.array_equal(found.matrix, expected.matrix)
        assert (found.scale, found.unit) == (expected.scale, expected.unit)
        for one, other in zip(found.encode(x), codes, strict=True):
            assert np.array_equal(one, other)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("dim", "count"), [(4, 4), (60, 20), (300, 100)])
def test_main_directions_hold_nearly_as_much_as_eigenvectors(kind, dim, count):
    x = kind(np.random.default_rng(dim), 2000, dim)
    unit = unit_rows64(x).astype(np.float32)
    found = room.main_directions(unit, count)
    lengths = np.linalg.norm(found, axis=0)
    used = lengths > 0.5
    assert np.allclose(found[:, used].T @ found[:, used], np.eye(used.sum()), atol=1e-6)
    assert not found[:, ~used].any()
    total = unit.T.astype(float) @ unit
    best = np.linalg.eigvalsh(total)[-count:].sum()
    assert np.trace(found.T @ total @ found) >= 0.93 * best  # alike in all directions: any will do
    first = found[:, -1]
    assert first @ total @ first >= 0.8 * np.linalg.eigvalsh(total)[-1]


@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (768, 80), (40, 256)])
def test_the_largest_singular_value_is_bounded_closely(shape):
    rng = np.random.default_rng(shape[0])
    for matrix in (
        rng.integers(-127, 128, shape),
        np.ones(shape),
        rng.integers(-3, 4, shape) + 60 * (rng.random(shape) < 0.02),
    ):
        bound = room.largest_singular(matrix.astype(np.int8))
        true = np.linalg.norm(matrix.astype(np.int8).astype(float), 2)
        assert true <= bound <= 1.003 * max(1, true)
    assert room.largest_singular(np.zeros(shape, np.int8)) >= 1


@pytest.mark.parametrize("width", [2, 64, 256])
def test_a_rotation_is_orthonormal_and_of_its_seed(width):
    found = room.random_rotation(width, 3)
    assert np.allclose(found @ found.T, np.eye(width), atol=1e-12)
    assert np.array_equal(found, room.random_rotation(width, 3))
    assert not np.array_equal(found, room.random_rotation(width, 4))


@pytest.mark.parametrize("whole", [3, 64, 127, 961])
def test_a_whole_singular_value_hides_the_last_bits_of_a_library(whole, monkeypatch):
    matrix = np.full((whole, 1), 1, np.int8) if whole > 127 else np.full((1, 1), whole, np.int8)
    found, true = set(), np.linalg.eigvalsh
    for error in (-1e-14, 0, 1e-14):
        monkeypatch.setattr(np.linalg, "eigvalsh", lambda gram, e=error: true(gram) * (1 + e))
        found.add(room.largest_singular(matrix))
    assert len(found) == 1
