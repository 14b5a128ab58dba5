"""The nearest reference row inside a group, against a table of all cosines."""

from __future__ import annotations

from contextlib import nullcontext
from unittest import mock

import numpy as np
import pytest
import truth
from hypothesis import given, settings
from hypothesis import strategies as st

from snipdedup.features.cosine import pair_cosine
from snipdedup.features.shards import open_features
from snipdedup.groups import pairs
from snipdedup.storage import external_sort


def plain_nearest(table, labels, first, threshold):
    """Row by row: [(row, reference row, cosine)] of those that match one of their group."""
    found = []
    for row in range(first, len(labels)):
        inside = np.flatnonzero(labels[:first] == labels[row])
        if len(inside) and table[row, inside].max() >= np.float32(threshold):
            best = inside[table[row, inside].argmax()]
            found.append((row - first, int(best), float(table[row, best])))
    return found


@pytest.mark.parametrize("on_disk", [False, True])
@settings(max_examples=40)
@given(
    rows=st.integers(2, 60),
    groups=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    noise=st.sampled_from([1e-5, 0.1, 0.6]),
    tile=st.sampled_from([1, 5, 1024]),
    share=st.floats(0, 1),
)
def test_each_row_gets_the_nearest_of_its_group(
    tmp_path_factory, on_disk, rows, groups, seed, noise, tile, share
):
    """Whatever is listed, tiled, or waits in files; noise of 1e-5 makes many equal cosines."""
    rng = np.random.default_rng(seed)
    x = truth.clustered(rows, 6, seed, clusters=3, noise=noise, copies=0.2)
    first = 1 + int(share * (rows - 2))
    of = rng.integers(0, groups, rows)
    labels = np.array([np.flatnonzero(of == group)[0] for group in of])
    table = truth.cosine_table(x)
    table[(x[:, None] == x).all(2)] = 1
    few = mock.patch.multiple(external_sort, HELD=3, PARTS=3, READ=5) if on_disk else nullcontext()
    folder = tmp_path_factory.mktemp("f") if on_disk else None
    with (
        few,
        mock.patch.multiple(pairs, LISTED_GROUP=tile, TILE=tile, LISTED_PAIRS=7, READ=9),
    ):
        found = pairs.nearest_within(open_features(x), labels, first, 0.9, 2, folder)
    listed = list(zip(*(column.tolist() for column in found), strict=True))
    assert listed == plain_nearest(table, labels, first, 0.9)


@pytest.mark.parametrize("dim", [3, 768])
def test_near_ties_are_decided_by_the_cosine(dim):
    """Cosines that differ in the last bits only, in one large group."""
    rng = np.random.default_rng(dim)
    x = (rng.standard_normal(dim) + 1e-4 * rng.standard_normal((500, dim))).astype(np.float32)
    found = pairs.nearest_within(open_features(x), np.zeros(500, np.int64), 200, 0.9, 2, None)
    i, j = np.divmod(np.arange(300 * 200), 200)
    exact = pair_cosine(x[200 + i], x[j]).reshape(300, 200)
    assert np.array_equal(found.row, np.arange(300))
    assert np.array_equal(found.reference, exact.argmax(1))
    assert np.array_equal(found.similarity, exact.max(1))
