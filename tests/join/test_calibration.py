"""Calibration: of a sample's pairs the wanted share meets, and real pairs where it has too few."""

from __future__ import annotations

import numpy as np
import pytest
from coded import codes_of, visited
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import binom

from snipdedup.join.calibration import (
    ENOUGH,
    Target,
    calibrate_tau,
    count_groups,
    drawn_pairs,
    edge_weights,
)
from snipdedup.join.forest import make_edges
from snipdedup.join.lists import CoarseLists, train_centroids


def pairs_within(codes, reach):
    """All pairs of codes at most ``reach`` apart."""
    products = codes.astype(np.float32) @ codes.T.astype(np.float32)
    norms = products.diagonal()
    return np.nonzero(np.triu(norms[:, None] + norms - 2 * products <= reach**2, 1))


def edges_of(codes, a, b):
    """Pairs as edges; what are distances of codes become similarities between .5 and 1."""
    length = np.linalg.norm(codes[a].astype(float) - codes[b], axis=1)
    return make_edges(a, b, 1 - (length / length.max(initial=1)) ** 4 / 2)


def share_that_meets(codes, centroids, tau, a, b):
    """Of the rows that pairs join with others, the share that meeting pairs join as well."""
    near, home = visited(codes, CoarseLists(centroids, tau, tau))
    meet = near[a, home[b]] | near[b, home[a]]
    return joined(len(codes), a[meet], b[meet]) / joined(len(codes), a, b)


def joined(rows, a, b):
    """Rows less their components."""
    graph = coo_array((np.ones(len(a)), (a, b)), shape=(rows, rows))
    return rows - connected_components(graph, directed=False)[0]


def test_tau_grows_with_the_wanted_recall_and_brings_that_share_together():
    codes = codes_of(3000, 4, spread=8)
    centroids = train_centroids(codes, 30, 0, 1)
    a, b = pairs_within(codes, 60)
    assert len(a) > 10_000
    pairs = edges_of(codes, a, b)
    taus = []
    for recall in (0.7, 0.95, 0.999):
        tau, alone = calibrate_tau(codes, centroids, pairs, Target(0.5, recall, 1.0, 1), 1e4)
        assert share_that_meets(codes, centroids, tau, a, b) >= recall
        for cut in (0.5, 2 / 3, 5 / 6):  # also where the result is cut later
            some = pairs.at(cut)
            assert share_that_meets(codes, centroids, tau, some.a, some.b) >= recall
        near, home = visited(codes, CoarseLists(centroids, alone, alone))
        one_way = near[a, home[b]]
        assert joined(len(codes), a[one_way], b[one_way]) / joined(len(codes), a, b) >= recall
        assert alone > tau or recall < 0.9
        taus.append(tau)
    assert taus == sorted(taus)
    assert taus[0] < taus[2] < 60


def test_a_pair_of_two_rows_stands_for_more_than_an_edge_of_a_large_group():
    chain = np.arange(100)
    forest = make_edges(np.append(chain, 500), np.append(chain + 1, 501), np.ones(101))
    weight = edge_weights(forest, 0.1)
    assert weight.tolist() == [1.0] * 100 + [10.0]  # in the sample: a tenth, and a hundredth
    assert edge_weights(forest, 1.0).tolist() == [1.0] * 101
    assert len(edge_weights(make_edges(chain[:0], chain[:0], np.ones(0)), 0.1)) == 0


def test_groups_are_counted_as_groups_of_two_rows():
    """Eight pairs are eight; a group of 101 sampled rows, at a tenth, is as sure as ten of them."""
    edges = np.arange(16).reshape(8, 2)
    pairs = make_edges(*edges.T, np.ones(8))
    assert count_groups(edge_weights(pairs, 0.1), 0.1) == pytest.approx(8)
    chain = make_edges(np.arange(100), np.arange(100) + 1, np.ones(100))
    assert count_groups(edge_weights(chain, 0.1), 0.1) == pytest.approx(10)


def test_a_sample_is_trusted_with_95_percent_confidence():
    """Were more missed of all than may be, the sample would show it in 95 % of all cases."""
    for seen in range(ENOUGH + 1):
        for size in (50, 1000, 10**6):
            assert binom.cdf(seen, size, (seen + ENOUGH) / size) <= 0.05
    for recall in (0.9, 0.99, 0.999):
        asked = Target(0.95, recall, 1.0, 1)
        for groups in (1, 30, 700, 4000, 9000, 20_000, 10**6):
            missed = round(groups * (1 - asked.share_to_join(groups)), 6)
            assert missed <= groups * (1 - recall) / 2 + 1e-6
            if missed >= 1:
                assert binom.cdf(int(missed), groups, 1 - recall) <= 0.05
            assert asked.is_few(groups) == (missed < ENOUGH)


def test_pairs_are_drawn_by_weight_and_some_are_moved_to_the_threshold():
    edges = np.arange(48).reshape(24, 2)
    similarity = np.resize([0.98, 0.95], 24).astype(np.float32)
    pairs = make_edges(*edges.T, similarity)
    weight = np.resize([3.0, 1.0], 24)  # 48 in all; a fourth of the set is the sample: 12 groups
    drawn, times = drawn_pairs(pairs, weight, 1000, Target(0.95, 0.999, 0.25, 1))
    assert len(drawn.a) == len(times) == 1000
    easy = drawn.similarity == np.float32(0.98)
    assert abs(easy.mean() - 0.75) < 0.01
    assert abs(easy[:500].mean() - 0.75) < 0.01  # of those left open: 6 of 12
    assert np.allclose(times[:500][easy[:500]], (0.05 / 0.02) ** 0.5, rtol=1e-4)
    assert np.allclose(times[:500][~easy[:500]], 1, rtol=1e-4)
    assert (times[500:] == 1).all()
    all_ = drawn_pairs(pairs, weight, 1000, Target(0.95, 0.999, 0.01, 1))[1]
    assert abs(np.mean(all_ > 1.5) - 0.75) < 0.01


def test_full_recall_means_half_the_largest_distance_and_no_more_is_ever_used():
    codes = codes_of(500, 4)
    centroids = train_centroids(codes, 30, 0, 1)
    pairs = edges_of(codes, *pairs_within(codes, 150))
    assert calibrate_tau(codes, centroids, pairs, Target(0.5, 1, 1.0, 1), 150) == (75, 150)
    both, one = calibrate_tau(codes, centroids, pairs, Target(0.5, 0.9999, 1.0, 1), 3)
    assert both <= 1.5
    assert one <= 3


@pytest.mark.parametrize("pairs", [0, 1, 9])
def test_with_too_few_pairs_to_tell_real_ones_still_meet(pairs):
    """Rows that have no pair in the sample; then others, each with one at the full distance."""
    codes = codes_of(3000, 4, spread=20)
    centroids = train_centroids(codes, 30, 0, 1)
    few = edges_of(codes, *(side[:pairs] for side in pairs_within(codes, 100)))
    tau, _ = calibrate_tau(codes, centroids, few, Target(0.5, 0.99, 0.01, 1), 60)
    rng = np.random.default_rng(0)
    x = codes_of(2000, 4, spread=20)  # the same centres
    step = rng.standard_normal(x.shape)
    step *= 60 / np.linalg.norm(step, axis=1, keepdims=True)
    both = np.concatenate([x, np.rint(x + step).clip(-127, 127).astype(np.int8)])
    a = np.arange(len(x))
    assert share_that_meets(both, centroids, tau, a, a + len(x)) >= 0.98
    assert tau <= 30
