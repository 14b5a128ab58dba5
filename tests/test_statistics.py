"""Intervals of shares: closed forms, exact binomial sums, coverage."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest

from snipdedup import statistics
from snipdedup.statistics import incomplete_beta, proportion_interval


def at_most(k, n, p):
    """P(X <= k) of a binomial, in exact arithmetic."""
    p = Fraction(p)
    return float(sum(comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1)))


@pytest.mark.parametrize("n", [1, 3, 10, 200, 100_000])
def test_none_or_all_has_a_closed_form(n):
    edge = 1 - 0.025 ** (1 / n)
    assert proportion_interval(0, n) == pytest.approx((0, edge), abs=1e-12)
    assert proportion_interval(n, n) == pytest.approx((1 - edge, 1), abs=1e-12)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(5, 10, 0.187086, 0.812914), (1, 20, 0.001265, 0.248733), (8, 10, 0.443905, 0.974789)],
)
def test_published_values(k, n, low, high):
    assert proportion_interval(k, n) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize(("k", "n"), [(1, 2), (3, 7), (17, 200), (190, 200), (2, 900)])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_each_end_leaves_half_of_the_doubt_in_the_binomial_tail(k, n, level):
    low, high = proportion_interval(k, n, level)
    assert at_most(k, n, high) == pytest.approx((1 - level) / 2, rel=1e-7)
    assert 1 - at_most(k - 1, n, low) == pytest.approx((1 - level) / 2, rel=1e-7)


@pytest.mark.parametrize(("x", "a", "b"), [(0.3, 2, 5), (0.7, 2, 5), (0.02, 40, 300), (0.5, 9, 9)])
def test_incomplete_beta_is_the_binomial_tail(x, a, b):
    assert incomplete_beta(x, a, b) == pytest.approx(1 - at_most(a - 1, a + b - 1, x), abs=1e-13)


def test_large_samples_agree_with_the_normal_law():
    k, n = 3_000_000, 10_000_000
    low, high = proportion_interval(k, n)
    half = 1.959964 * (0.3 * 0.7 / n) ** 0.5
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=2e-7)


def test_of_nothing_nothing_is_known():
    assert proportion_interval(0, 0) == (0, 1)


@pytest.mark.parametrize(("k", "n", "level"), [(-1, 3, 0.9), (4, 3, 0.9), (1, 3, 0), (1, 3, 1)])
def test_refusals(k, n, level):
    with pytest.raises(ValueError, match="expected 0 <= k <= n"):
        proportion_interval(k, n, level)


def test_recall_counts_what_is_shared():
    truth, found = np.array([[2, 3, 4], [5, 6, -1]]), np.array([[3, 2, 9], [9, 5, -1]])
    assert statistics.recall(found, truth, 3) == pytest.approx(3 / 5)
    assert statistics.recall(found, truth, 1) == 0


def test_partner_ranks_count_ties_half_and_copies_as_one():
    similarity = np.array([[0.5, 0.9, 0.5], [0.1, 0.2, 0.3], [0.4, 0.4, 0.4]], np.float32)
    alone = np.arange(3)
    assert statistics.partner_ranks(similarity, np.array([0, 2, 1]), alone).tolist() == [1.5, 0, 1]
    copies = np.array([0, 1, 0])  # the first and the last column are one picture
    assert statistics.partner_ranks(similarity, np.array([0, 0, 1]), copies).tolist() == [1, 0, 1]


def test_average_precision_is_the_one_worked_by_hand():
    truth = np.array([True, False, True, False])
    assert statistics.average_precision(np.array([4, 3, 2, 1]), truth) == pytest.approx(
        (1 + 2 / 3) / 2
    )
    assert statistics.average_precision(np.zeros(4), truth) == pytest.approx(
        0.5
    )  # one score: one step


def test_samples_are_distinct_and_ascending():
    for total, wanted in ((10, 3), (0, 5), (10**12, 50)):
        found = statistics.sample_rows(total, wanted, np.random.default_rng(0))
        assert len(found) == min(total, wanted)
        assert (np.diff(found) > 0).all()
        assert all(0 <= one < total for one in found)
    picked = statistics.sample_rows(100, 30, np.random.default_rng(0))
    assert len(set(picked.tolist())) == 30
    assert (np.diff(picked) > 0).all()
    assert statistics.sample_rows(10, 30, np.random.default_rng(0)).tolist() == list(range(10))
