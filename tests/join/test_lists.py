"""Coarse lists: with the safe τ every pair meets, and a row's lists depend on the row alone."""

from __future__ import annotations

import numpy as np
import pytest
from coded import WIDTH, codes_of, squared, visited
from hypothesis import given, settings
from hypothesis import strategies as st

from snipdedup.join.lists import CoarseLists, assign_lists, home_lists, train_centroids


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), nlist=st.integers(2, 20), tau=st.sampled_from([0.0, 5.0, 37.5]))
def test_a_row_visits_the_lists_of_the_rule(seed, nlist, tau):
    codes = codes_of(200, seed)
    lists = CoarseLists(train_centroids(codes, nlist, seed, 1), tau, tau)
    visits = assign_lists(codes, lists)
    expected, home = visited(codes, lists)
    found = np.zeros_like(expected)
    found[visits.row, visits.list_] = True
    boundary = np.abs(expected.astype(int) - found.astype(int)).sum()
    assert boundary <= 1  # float32 on the very edge
    assert len(visits.row) == found.sum()  # no visit twice
    assert visits.home.sum() == len(codes)
    at_home = visits.list_[visits.home][np.argsort(visits.row[visits.home])]
    gaps = squared(codes, lists.centroids)
    rows = np.arange(len(codes))
    assert np.array_equal(gaps[rows, at_home], gaps[rows, home])


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), nlist=st.integers(2, 25), spread=st.sampled_from([5, 20, 60]))
def test_with_half_the_distance_of_a_pair_every_pair_meets(seed, nlist, spread):
    """Of each pair one row visits the list in which the other lives."""
    codes = codes_of(150, seed, spread)
    distance = np.sqrt(squared(codes, codes))
    reach = np.quantile(distance, 0.3)
    lists = CoarseLists(train_centroids(codes, nlist, seed, 1), reach / 2, reach)
    visits = assign_lists(codes, lists)
    inside = np.zeros((len(codes), nlist), bool)
    inside[visits.row, visits.list_] = True
    home = np.empty(len(codes), int)
    home[visits.row[visits.home]] = visits.list_[visits.home]
    meets = inside[:, home]  # x is in the list of y
    a, b = np.nonzero(np.triu(distance <= reach, 1))
    assert len(a) > 100
    assert (meets[a, b] | meets[b, a]).all()


@pytest.mark.parametrize("nlist", [3, 20])
def test_a_row_may_visit_alone(nlist):
    """With the whole distance a row finds the lists of all that are near and stay at home."""
    codes = codes_of(150, 5, 20)
    distance = np.sqrt(squared(codes, codes))
    reach = np.quantile(distance, 0.3)
    lists = CoarseLists(train_centroids(codes, nlist, 5, 1), reach / 2, reach)
    far = np.where(np.arange(150) < 100, 0, reach).astype(np.float32)
    visits = assign_lists(codes, lists, far)
    inside = np.zeros((150, nlist), bool)
    inside[visits.row, visits.list_] = True
    assert (inside[:100].sum(1) == 1).all()
    home = visits.list_[visits.home][np.argsort(visits.row[visits.home])]
    a, b = np.nonzero(distance[100:] <= reach)
    assert inside[100 + a, home[b]].all()


def test_the_lists_of_a_row_do_not_depend_on_the_block():
    codes = codes_of(9000, 1)
    lists = CoarseLists(train_centroids(codes[:1000], 40, 0, 1), 30.0, 30.0)
    whole = assign_lists(codes, lists)
    order = np.lexsort((whole.list_, whole.row))
    expected = [column[order].tolist() for column in (whole.row, whole.list_, whole.home)]
    for cuts in ([1], [4096], [5000, 5001, 8999]):
        parts = [assign_lists(part, lists) for part in np.split(codes, cuts)]
        starts = [0, *cuts]
        row = np.concatenate([p.row + start for p, start in zip(parts, starts, strict=True)])
        list_, home = (np.concatenate([getattr(p, n) for p in parts]) for n in ("list_", "home"))
        order = np.lexsort((list_, row))
        assert [column[order].tolist() for column in (row, list_, home)] == expected


def test_one_list_holds_all():
    codes = codes_of(10, 0)
    visits = assign_lists(codes, CoarseLists(codes[:1], 0.0, 0.0))
    assert visits.row.tolist() == list(range(10))
    assert not visits.list_.any()
    assert visits.home.all()


def test_centroids_that_coincide_lose_no_row():
    codes = np.repeat(codes_of(2, 0), 50, axis=0)
    lists = CoarseLists(np.repeat(codes[:1], 4, axis=0), 3.0, 3.0)
    visits = assign_lists(codes, lists)
    assert visits.home.sum() == len(codes)
    assert np.unique(visits.row).tolist() == list(range(100))


def test_training_finds_the_clusters_and_repeats_itself():
    codes = codes_of(3000, 3, spread=4, clusters=8)
    centroids = train_centroids(codes, 60, 1, 1)
    assert centroids.dtype == np.int8
    assert centroids.shape == (60, WIDTH)
    assert np.array_equal(centroids, train_centroids(codes, 60, 1, 1))
    assert not np.array_equal(centroids, train_centroids(codes, 60, 2, 1))
    home, best = home_lists(codes, centroids, 1)
    own = np.einsum("ij,ij->i", codes.astype(np.int64), codes.astype(np.int64))
    truth = squared(codes, centroids)
    assert np.array_equal(truth.argmin(1), home)
    assert np.array_equal(best + own, truth.min(1))
    assert np.sqrt(np.mean(best + own)) < 60


def test_as_many_lists_as_codes_and_equal_codes():
    codes = codes_of(12, 0)
    assert train_centroids(codes, 12, 0, 1).shape == (12, WIDTH)
    equal = np.repeat(codes[:1], 50, axis=0)
    assert np.array_equal(np.unique(train_centroids(equal, 5, 0, 1), axis=0), codes[:1])
    zeros = np.zeros((50, WIDTH), np.int8)
    assert not train_centroids(zeros, 5, 0, 1).any()
