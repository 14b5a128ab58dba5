"""Huge groups are decided by codes first: the same decisions as by comparing everything."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import truth

from snipdedup.groups import star
from snipdedup.groups.pairs import Also
from snipdedup.groups.star import Compare, star_large


def rows_of(kind):
    rng = np.random.default_rng(5)
    if kind == "spread":
        return rng.standard_normal((900, 5))
    if kind == "clumps":
        return truth.clustered(1500, 16, 3, clusters=40, noise=0.3).astype(np.float16)
    if kind == "all alike":
        return 1 + 1e-3 * rng.standard_normal((700, 24))
    angles = np.arange(800) * np.arccos(0.951)  # a chain, .951 each to the next
    return np.stack([np.cos(angles / 40), np.sin(angles / 40), np.ones(800)], axis=1)


def decided(x, order, table_group=10**6, block=2048):
    """Representatives and cosines of one group: by tables, or by codes where it is larger."""
    with mock.patch.multiple(star, TABLE_GROUP=table_group, CODED_BLOCK=block):
        out = np.zeros(len(x), bool)
        return star_large(order, Compare(lambda rows: x[rows], 0.95), out, out)


@pytest.mark.parametrize("kind", ["spread", "clumps", "all alike", "chain"])
@pytest.mark.parametrize("block", [64, 2048])
def test_codes_decide_as_all_comparisons_do(kind, block):
    x = rows_of(kind)
    order = np.random.default_rng(1).permutation(len(x))
    expected = decided(x, order)
    found = decided(x, order, table_group=0, block=block)
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])
    if block == 64:
        brute, _ = truth.star(truth.cosine_table(x), 0.95, order)
        assert np.array_equal(found[0], brute[order])


@pytest.mark.parametrize("table_group", [5, 10**6])
def test_texts_must_match_too_in_a_large_group(table_group):
    x, rng = rows_of("all alike")[:300], np.random.default_rng(2)
    words = truth.clustered(300, 6, 4, clusters=5, noise=0.5)
    order = rng.permutation(300)
    both = np.where(truth.cosine_table(words) >= np.float32(0.9), truth.cosine_table(x), -1)
    compare = Compare(lambda rows: x[rows], 0.95, [Also(lambda rows: words[rows], 0.9)])
    with mock.patch.multiple(star, TABLE_GROUP=table_group, TABLE_BLOCK=70):
        found, _ = star_large(order, compare, np.zeros(300, bool), np.zeros(300, bool))
    brute, stays = truth.star(both, 0.95, order)
    assert np.array_equal(found, brute[order])
    assert 10 < stays.sum() < 200


def test_a_row_whose_match_the_codes_missed_still_gets_a_representative():
    x = rows_of("clumps")
    order, none = np.arange(len(x)), np.empty(0, np.int64)
    expected = decided(x, order)
    with mock.patch.object(star.native, "hits", return_value=(none, none)):
        found = decided(x, order, table_group=0, block=4096)
    assert np.array_equal(found[0], expected[0])
