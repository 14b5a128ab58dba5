"""Codes whose products bound the cosine: no pair may fall below the limit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snipdedup.ground.cosine import directions, unit_rows64
from snipdedup.search import projection as room
from snipdedup.search.projection import WIDTHS, fit_projection

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
    codes, excess = projection.encode(x)
    assert codes.dtype == np.int8
    slack = projection.slack(excess)
    unit = unit_rows64(x)
    pairs = np.triu((unit @ unit.T).astype(np.float32) >= np.float32(threshold), 1)
    products = codes.astype(np.float64) @ codes.T.astype(np.float64)
    margin = products - (projection.limit(threshold) - slack[:, None] - slack[None, :])
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


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), dim=st.integers(1, 40), threshold=st.sampled_from(THRESHOLDS))
def test_rows_far_outside_the_sample_are_slackened_not_lost(seed, dim, threshold):
    """The sample lies near one axis; the rows everywhere."""
    rng = np.random.default_rng(seed)
    sample = np.eye(dim)[:1] + 1e-3 * rng.standard_normal((40, dim))
    projection = fit_projection(sample, WIDTHS[-1], seed=0)
    rows = with_pairs(rng.standard_normal((60, dim)), rng, threshold)
    assert lowest_margin(projection, rows, threshold)[0] >= 0


def test_what_int8_cannot_hold_is_reported():
    projection = fit_projection(np.eye(300)[:1], WIDTHS[-1], seed=0)
    x = np.concatenate([np.eye(300)[:1], np.random.default_rng(0).standard_normal((500, 300))])
    codes, excess = projection.encode(x)
    scaled = projection.rotated(directions(x)).numpy() * projection.scale
    lost = np.linalg.norm(scaled - np.clip(np.rint(scaled), -127, 127), axis=1)
    clipped = np.abs(scaled).max(1) > 127.5
    assert np.allclose(excess[clipped], lost[clipped], rtol=1e-4)
    assert not excess[~clipped].any()
    assert excess[0] == 0
    assert np.abs(codes.astype(int)).max() <= 127
    slack = projection.slack(np.array([0, 1, 2], np.float32))
    assert slack[0] == 0
    assert (np.diff(slack) > 0).all()


def test_products_bound_cosines_from_above_before_rounding():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((300, 600))  # more directions than a code has
    z = (
        fit_projection(x[:100], WIDTHS[-1], seed=1)
        .rotated(directions(x))
        .numpy()
        .astype(np.float64)
    )
    unit = unit_rows64(x)
    assert (z @ z.T >= unit @ unit.T - arithmetic_slack()).all()
    assert np.allclose(np.linalg.norm(z, axis=1), 1, atol=arithmetic_slack())


def arithmetic_slack():
    """What the limit allows for the arithmetic of projecting."""
    return room.BFLOAT16_SLACK if room.has_bfloat16() else room.FLOAT_SLACK


def test_products_of_sparse_rows_bound_cosines_too():
    """Few nonzero values: their rounding errors do not cancel."""
    rng = np.random.default_rng(5)
    x = np.zeros((600, 300))
    x[:, :2] = rng.standard_normal((600, 2))
    x[300:, 2:4] = 0.1 * rng.standard_normal((300, 2))
    projection = fit_projection(
        np.concatenate([x, rng.standard_normal((300, 300))]), WIDTHS[-1], seed=1
    )
    z, unit = projection.rotated(directions(x)).numpy().astype(np.float64), unit_rows64(x)
    pairs = unit @ unit.T > 0.9
    assert (z @ z.T - unit @ unit.T)[pairs].min() >= -arithmetic_slack()


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
    loaded = type(one)(arrays["matrix"], arrays["residual"], float(arrays["scale"]))
    assert np.array_equal(one.encode(x)[0], loaded.encode(x)[0])


@pytest.mark.parametrize("width", WIDTHS)
def test_the_limit_allows_for_errors_that_two_rows_share(width):
    """Uniform errors, whatever those of one row have to do with the other's: by a union bound."""
    norm = room.PEAK + 0.5 * width**0.5  # of the least scale there is
    allowed = norm * np.sqrt(2) * np.sqrt(np.log(2 / room.MISS_PROBABILITY) / 2)
    s = (allowed - width / 4) / 2
    assert 2 * np.exp(-6 * (s / norm) ** 2) < room.MISS_PROBABILITY


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
        assert 0.5 < off.std() < 0.65  # independent ones: .41
    for threshold in (0.95, 0.999, 1 - away):
        pair = cosine.astype(np.float32) >= np.float32(threshold)
        least = projection.limit(threshold) - projection.slack(below) - projection.slack(under)
        assert pair.sum() > 5000 or threshold > 0.999
        assert (product >= least)[pair].all()
