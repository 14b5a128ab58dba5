"""Who stays: the star rule and components against plain references, with exact copies."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import pytest
import truth
from hypothesis import given, settings
from hypothesis import strategies as st

from snipdedup.deduplication.run import dedup
from snipdedup.features.cosine import pair_cosine
from snipdedup.groups import pairs, star
from snipdedup.groups.keep import keep_rank
from snipdedup.groups.members import Copies
from snipdedup.groups.star import Compare, group_components, group_star, star_from_pairs
from snipdedup.join.forest import components, make_edges, spanning_forest

KEEPS = st.sampled_from(["first", "last", "random"])
# how groups are compared: many at once, one by one in tiny blocks, and as shipped
WAYS = [
    {"LISTED_GROUP": 10**6, "LISTED_PAIRS": 7},
    {"LISTED_GROUP": 0, "TABLE_BLOCK": 3, "CODED_BLOCK": 5},
    {"TABLE_GROUP": 2, "LISTED_GROUP": 2, "CODED_BLOCK": 40},
    {},
]


@contextmanager
def compared(way):
    """Compare groups in one of the ways."""
    with ExitStack() as stack:
        for name, value in way.items():
            owner = pairs if name.startswith("LISTED") else star
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


@st.composite
def rows_with_pairs(draw, copies=True):
    """A few rows in 3 to 8 dimensions, so crowded that many are pairs."""
    return truth.clustered(
        draw(st.integers(1, 45)),
        draw(st.integers(3, 8)),
        draw(st.integers(0, 2**31)),
        clusters=draw(st.integers(1, 8)),
        noise=draw(st.sampled_from([0.1, 0.4, 1.0])),
        copies=draw(st.sampled_from([0, 0.4])) if copies else 0,
        dtype=draw(st.sampled_from([np.float16, np.float32, np.float64])),
    )


def keep_order(rows, keep, seed):
    if keep == "random":
        return np.argsort(keep_rank(np.arange(rows), keep, seed))
    return np.arange(rows) if keep == "first" else np.arange(rows)[::-1]


def table_of(x):
    """All cosines; rows equal bit for bit have exactly 1."""
    table = truth.cosine_table(x)
    same = (x[:, None, :] == x[None, :, :]).all(2)
    table[same] = 1
    return table


@pytest.mark.parametrize("way", range(len(WAYS)))
@settings(max_examples=60)
@given(
    x=rows_with_pairs(), keep=KEEPS, threshold=st.sampled_from([0.8, 0.95]), seed=st.integers(0, 9)
)
def test_star_is_the_rule_of_the_terms(way, x, keep, threshold, seed):
    with compared(WAYS[way]):
        found = dedup(x, method="exact", threshold=threshold, keep=keep, seed=seed, threads=1)
    table = table_of(x)
    representative, stays = truth.star(table, threshold, keep_order(len(x), keep, seed))
    assert found.is_dup.tolist() == (~stays).tolist()
    members = found.members
    assert members.representative.tolist() == representative[members.row].tolist()
    assert members.similarity.tolist() == table[members.row, members.representative].tolist()
    label = truth.components(len(x), truth.pairs_of(table, threshold))
    assert members.group.tolist() == label[members.row].tolist()
    sizes = np.bincount(label, minlength=len(x))
    assert sorted(members.row) == np.flatnonzero(sizes[label] > 1).tolist()
    assert np.array_equal(np.lexsort((members.row, members.group)), np.arange(len(members.row)))


@settings(max_examples=40)
@given(x=rows_with_pairs(), keep=KEEPS, threshold=st.sampled_from([0.8, 0.95]))
def test_star_proves_every_row_that_goes_and_leaves_no_pair(x, keep, threshold):
    found = dedup(x, method="exact", threshold=threshold, keep=keep, threads=1)
    members, limit = found.members, np.float32(threshold)
    assert (pair_cosine(x[members.row], x[members.representative]) >= limit).all()
    assert not found.is_dup[members.representative].any()
    group = dict(zip(members.row.tolist(), members.group.tolist(), strict=True))
    assert all(
        group[a] == group[b] for a, b in zip(members.row, members.representative, strict=True)
    )
    staying = members.row[~members.is_dup]
    assert np.array_equal(members.representative[~members.is_dup], staying)
    table = table_of(x)[np.ix_(staying, staying)]
    assert not truth.pairs_of(table, threshold)
    rows, counts = np.unique(members.representative[members.is_dup], return_counts=True)
    assert counts.sum() == found.removed == found.is_dup.sum()
    assert not found.is_dup[rows].any()
    assert (counts > 0).all()


@settings(max_examples=60)
@given(
    x=rows_with_pairs(), keep=KEEPS, threshold=st.sampled_from([0.8, 0.95]), seed=st.integers(0, 9)
)
def test_of_a_component_one_row_stays_the_first_in_keep_order(x, keep, threshold, seed):
    found = dedup(
        x,
        method="exact",
        grouping="components",
        threshold=threshold,
        keep=keep,
        seed=seed,
        threads=1,
    )
    table = table_of(x)
    label = truth.components(len(x), truth.pairs_of(table, threshold))
    stays, keeper = np.zeros(len(x), bool), {}
    for row in keep_order(len(x), keep, seed):
        if label[row] not in keeper:
            keeper[label[row]] = row
            stays[row] = True
    members = found.members
    assert found.is_dup.tolist() == (~stays).tolist()
    assert members.representative.tolist() == [keeper[label[row]] for row in members.row]
    assert members.similarity.tolist() == table[members.row, members.representative].tolist()
    below = table[np.arange(len(x)), [keeper[group] for group in label]] < np.float32(threshold)
    assert found.chained == below.sum()


def test_all_ways_to_compare_a_group_agree_on_a_larger_one():
    x = truth.clustered(700, 6, 3, clusters=3, noise=0.5, copies=0.1)
    table = table_of(x)
    representative, stays = truth.star(table, 0.9, np.arange(len(x))[::-1])
    assert 30 < stays.sum() < 650
    for way in WAYS:
        with compared(way):
            found = dedup(x, method="exact", threshold=0.9, keep="last", threads=1)
        assert found.is_dup.tolist() == (~stays).tolist()
        assert found.members.representative.tolist() == representative[found.members.row].tolist()


def test_among_equally_near_staying_rows_the_smaller_represents():
    # 0 and 2 lie on either side of 1, at the same cosine, and are no pair
    x = np.array([[1, 1, 0], [1, 0, 0], [1, -1, 0], [1, 0, 0]], np.float32)
    for way in WAYS:
        with compared(way):
            found = dedup(x, method="exact", threshold=0.7)
        assert found.is_dup.tolist() == [False, True, False, True]
        assert found.members.representative.tolist() == [0, 0, 2, 0]
        assert found.members.group.tolist() == [0, 0, 0, 0]
    x = x[[0, 2, 1]]
    turned = dedup(x[::-1].copy(), method="exact", threshold=0.7, keep="last")
    assert turned.members.representative.tolist() == [1, 1, 2]


@settings(max_examples=40)
@given(x=rows_with_pairs(copies=False), keep=KEEPS, seed=st.integers(0, 3))
def test_star_from_pairs_keeps_the_rows_that_star_keeps(x, keep, seed):
    x = np.unique(x, axis=0)
    pairs = truth.pairs_of(table_of(x), 0.8)
    a, b = (np.array([pair[side] for pair in pairs], np.int64) for side in (0, 1))
    edges = make_edges(a, b, np.ones(len(a)))

    def rank(rows):
        return keep_rank(rows, keep, seed)

    row, group = components(edges)
    found = star_from_pairs(row, group, rank(row), edges)
    compare = Compare(lambda rows: x[rows], 0.8)
    same = group_star(spanning_forest(edges), rank, compare)
    assert found.row.tolist() == same.row.tolist()
    assert found.group.tolist() == same.group.tolist()
    assert found.is_dup.tolist() == same.is_dup.tolist()
    removed = list(zip(found.row[found.is_dup], found.representative[found.is_dup], strict=True))
    stays = set(found.row[~found.is_dup].tolist())
    assert all((min(p), max(p)) in set(pairs) and p[1] in stays for p in removed)
    # the staying match first in keep order
    order = rank(np.arange(len(x)))
    for lost, kept in removed:
        matches = [s for s in stays if (min(s, lost), max(s, lost)) in set(pairs)]
        assert kept == min(matches, key=lambda s: order[s])


def test_random_order_is_a_permutation_that_differs_by_seed():
    rows = np.arange(100_000)
    ranks = [keep_rank(rows, "random", seed) for seed in (0, 1, 2**63 - 1)]
    for rank in ranks:
        assert rank.dtype == np.uint64
        assert len(np.unique(rank)) == len(rows)
        share = np.mean(rank[1:] > rank[:-1])
        assert 0.49 < share < 0.51
    assert abs(np.mean(np.argsort(ranks[0])[:100] < 50_000) - 0.5) < 0.25
    assert not np.array_equal(np.argsort(ranks[0]), np.argsort(ranks[1]))
    some = np.array([77, 5, 99_999])
    assert keep_rank(some, "random", 1).tolist() == ranks[1][some].tolist()  # wherever it is met


def test_keep_orders():
    rows = np.array([3, 2**40, 0])
    assert np.argsort(keep_rank(rows, "first", 0)).tolist() == [2, 0, 1]
    assert np.argsort(keep_rank(rows, "last", 0)).tolist() == [1, 0, 2]


def test_random_keeps_other_rows_by_seed_and_the_same_for_one_seed():
    x = np.repeat(np.eye(50, dtype=np.float32), 4, axis=0)
    masks = [dedup(x, keep="random", seed=seed, method="exact").is_dup for seed in (1, 1, 2)]
    assert all(mask.sum() == 150 for mask in masks)
    assert np.array_equal(masks[0], masks[1])
    assert not np.array_equal(masks[0], masks[2])
    place = np.flatnonzero(~masks[0]) % 4
    assert (np.bincount(place, minlength=4) > 2).all()  # not always the first or last


def test_copies_follow_the_first_of_them_in_keep_order():
    copies, firsts = np.array([4, 7, 9]), np.array([1, 1, 3])
    last = Copies(copies, firsts, lambda rows: keep_rank(rows, "last", 0))
    assert last.original.tolist() == [1, 3]
    assert last.keeper.tolist() == [7, 9]
    edges = make_edges(np.array([1, 0]), np.array([3, 1]), np.array([0.96, 0.99], np.float32))
    folded = last.fold(edges)
    assert list(zip(folded.a, folded.b, strict=True)) == [(7, 9), (0, 7)]
    members = last.unfold(group_components(folded, lambda rows: keep_rank(rows, "last", 0)))
    assert members.row.tolist() == [0, 1, 3, 4, 7, 9]
    assert members.group.tolist() == [0] * 6
    assert members.representative.tolist() == [9] * 6
    assert members.is_dup.tolist() == [True] * 5 + [False]


def test_copies_alone_are_groups():
    none = make_edges(np.empty(0, int), np.empty(0, int), np.empty(0))
    copies = Copies(np.array([5, 6]), np.array([2, 2]), lambda rows: keep_rank(rows, "first", 0))
    members = copies.unfold(group_components(none, lambda rows: keep_rank(rows, "first", 0)))
    assert members.row.tolist() == [2, 5, 6]
    assert members.group.tolist() == members.representative.tolist() == [2, 2, 2]
    assert members.similarity.tolist() == [1, 1, 1]
