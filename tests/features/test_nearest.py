"""Exact nearest neighbours are those of a table of all float64 cosines, whatever the blocks."""

from __future__ import annotations

import numpy as np
import pytest
import truth

from snipdedup.features import nearest as room
from snipdedup.features.nearest import nearest, nearest_vectors
from snipdedup.features.shards import open_features


def by_table(x, queries, k, out=()):
    """Rows by (cosine descending, row) from a table; the query and some rows left out."""
    with np.errstate(invalid="ignore"):
        table = truth.cosine_table(x)[queries]
    table[:, list(out)] = -2
    table[np.arange(len(queries)), queries] = -2
    I = np.argsort(-table, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(table, I, axis=1), I


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("k", [1, 20])
def test_neighbours_are_those_of_the_table(monkeypatch, threads, k):
    monkeypatch.setattr(room, "BLOCK_ROWS", 97)
    monkeypatch.setattr(room, "VERIFY_PAIRS", 50)
    x = truth.clustered(700, 12, 2, noise=0.8)
    x[5] = x[6] = x[600]  # ties: the smaller row first
    x[40], x[41] = np.nan, 0
    skip = np.zeros(700, bool)
    skip[50:200:3] = True
    queries = np.setdiff1d([0, 3, 5, 6, 56, *range(300, 700, 7), 600, 699], [40, 41])
    features = open_features([x[:77], x[77:]])
    D, I = nearest(x[queries], features, k, threads, own=queries, skip=skip)
    cosine, rows = by_table(x, queries, k, [40, 41, *np.flatnonzero(skip)])
    np.testing.assert_array_equal(I, rows)
    np.testing.assert_allclose(D, cosine, atol=1e-7)
    at = np.searchsorted(queries, 600)
    assert I[at, :2].tolist() == [5, 6][:k]
    assert D[at, 0] == 1


def test_a_lone_row_has_no_neighbour():
    x = np.eye(4, dtype=np.float32)
    skip = np.array([1, 0, 1, 1], bool)
    D, I = nearest(x[[1, 3]], open_features(x), 2, 1, own=np.array([1, 3]), skip=skip)
    assert I.tolist() == [[-1, -1], [1, -1]]
    assert D.tolist() == [[-np.inf, -np.inf], [0, -np.inf]]


def test_queries_of_another_set_and_another_type_find_their_own_row_too():
    x = truth.clustered(100, 8, 1, dtype=np.float16)
    D, I = nearest(x[:10].astype(np.float64), open_features(x), 1, 1)
    np.testing.assert_array_equal(D, 1)
    assert (x[I[:, 0]] == x[:10]).all()


def test_vectors_of_any_length_by_distance():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 6)).astype(np.float32)
    y = x * rng.uniform(0.5, 2, (300, 1)).astype(np.float32)
    D, I = nearest_vectors(x[:9], lambda span: y[slice(*span)], 300, 5, 2)
    table = ((x[:9, None].astype(float) - y) ** 2).sum(axis=2)
    np.testing.assert_array_equal(I, np.argsort(table, axis=1)[:, :5])
    np.testing.assert_allclose(D, np.sort(table, axis=1)[:, :5], atol=1e-4)
