"""Huge groups are decided by codes first: the same decisions as by comparing everything."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import truth

from snipdedup.groups import star
from snipdedup.groups.star import Compare, star_huge, star_large


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


@pytest.mark.parametrize("kind", ["spread", "clumps", "all alike", "chain"])
@pytest.mark.parametrize("block", [64, 2048])
def test_codes_decide_as_all_comparisons_do(kind, block):
    x = rows_of(kind)
    order = np.random.default_rng(1).permutation(len(x))
    compare = Compare(lambda rows: x[rows], 0.95)
    expected = star_large(order, compare, np.zeros(len(x), bool))
    with mock.patch.object(star, "HUGE_BLOCK", block):
        found = star_huge(order, lambda rows: x[rows], 0.95)
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])


def test_a_row_whose_match_the_codes_missed_still_gets_a_representative():
    x = rows_of("clumps")
    order = np.arange(len(x))
    compare = Compare(lambda rows: x[rows], 0.95)
    expected = star_large(order, compare, np.zeros(len(x), bool))

    class Blind(star.CodedGroup):
        def candidates(self, x, y):
            return x[:0], y[:0]

    def blind(rows, gather, threshold):
        return Blind(*star_encode(rows, gather, threshold))

    star_encode = star.encode_group
    with (
        mock.patch.object(star, "encode_group", blind),
        mock.patch.object(star, "HUGE_BLOCK", 4096),
    ):
        found = star_huge(order, lambda rows: x[rows], 0.95)
    assert np.array_equal(found[0], expected[0])
