"""Proposed pairs are proved by the cosine that decides: both sides of the threshold."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import truth
from hypothesis import given, settings
from hypothesis import strategies as st

from snipdedup.features.shards import open_features, plan_blocks
from snipdedup.join import verify
from snipdedup.join.forest import join_edges, spanning_forest
from snipdedup.join.verify import verify_pairs, verify_places


def proved(x, a, b, threshold, threads=1):
    parts = verify_pairs(open_features(x), np.array(a), np.array(b), threshold, threads)
    return join_edges(list(parts))


def forest_of(x, rows, i, j, threshold, references=0):
    """What is verified of places i and j in ``rows``, a block of pairs after the other."""
    return join_edges(
        [
            verify_places(open_features(x), rows, i[low:high], j[low:high], threshold, references)
            for low, high in plan_blocks(len(i), verify.GATHER_PAIRS)
        ]
    )


def pair_set(edges):
    return set(zip(edges.a.tolist(), edges.b.tolist(), strict=True))


@pytest.mark.parametrize("threshold", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("scale", [1, 1e-3, 1e4])
def test_both_sides_of_the_threshold(threshold, scale):
    """Disjoint pairs, so that each one matters for the forest."""
    rng = np.random.default_rng(1)
    gaps = np.repeat([1e-7, 3e-7, 1e-6, 1e-5, 1e-4], 80) * np.tile([1, -1], 200)
    u = np.linalg.qr(rng.standard_normal((400, 40, 2)))[0]
    c = np.float64(np.float32(threshold)) + gaps
    x = np.empty((800, 40))
    x[0::2] = scale * u[:, :, 0]
    x[1::2] = scale * (c[:, None] * u[:, :, 0] + np.sqrt(1 - c * c)[:, None] * u[:, :, 1])
    order = rng.permutation(400)
    found = proved(x, 2 * order + 1, 2 * order, threshold)
    assert pair_set(found) == {(2 * i, 2 * i + 1) for i in np.flatnonzero(gaps > 0)}
    single = x.astype(np.float32)
    found = proved(single, 2 * order + 1, 2 * order, threshold, threads=2)
    table = truth.cosine_table(single)
    limit = np.float32(threshold)
    assert pair_set(found) == {
        (2 * i, 2 * i + 1) for i in range(400) if table[2 * i, 2 * i + 1] >= limit
    }
    assert found.similarity.tolist() == table[found.a, found.b].tolist()


@settings(max_examples=40)
@given(
    rows=st.integers(2, 60),
    seed=st.integers(0, 2**31),
    block=st.sampled_from([1, 7, 10_000]),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    references=st.sampled_from([0, 1, 20, 100]),
)
def test_every_pair_or_forests_that_group_alike(rows, seed, block, dtype, references):
    rng = np.random.default_rng(seed)
    x = truth.clustered(rows, 6, seed, copies=0.1, dtype=dtype)
    a, b = np.triu_indices(rows, 1)
    chosen = rng.random(len(a)) < 0.7
    a, b = a[chosen], b[chosen]
    turned = rng.random(len(a)) < 0.5
    a, b = np.where(turned, b, a), np.where(turned, a, b)
    table = truth.cosine_table(x)
    same = (x[:, None, :] == x[None, :, :]).all(2)
    table[same] = 1
    low, high = np.minimum(a, b), np.maximum(a, b)
    true = table[low, high] >= np.float32(0.9)
    expected = set(zip(low[true].tolist(), high[true].tolist(), strict=True))
    order = rng.permutation(rows)
    place = np.argsort(order)
    with mock.patch.object(verify, "GATHER_PAIRS", block):
        every = proved(x, a, b, 0.9)
        some = forest_of(x, order, place[a], place[b], 0.9, references)
    assert pair_set(every) == expected
    assert every.similarity.tolist() == table[every.a, every.b].tolist()
    assert pair_set(some) <= expected
    assert some.similarity.tolist() == table[some.a, some.b].tolist()
    one, other = (spanning_forest(edges, references) for edges in (every, some))
    assert one.a.tolist() == other.a.tolist()
    assert one.b.tolist() == other.b.tolist()
    assert other.similarity.tolist() == one.similarity.tolist()


def test_no_pairs_at_all():
    found = proved(np.eye(3), np.empty(0, np.int64), np.empty(0, np.int64), 0.9)
    assert [column.dtype for column in found] == [np.int64, np.int64, np.float32]
    assert len(found.a) == 0
