"""Tiles: crowded ones give the same forest as the pairs that the others list."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
import truth
from hypothesis import given, settings
from hypothesis import strategies as st

from snipdedup.deduplication.run import dedup
from snipdedup.features.shards import open_features
from snipdedup.join import tiles
from snipdedup.join.forest import ForestBuilder
from snipdedup.join.projection import fit_projection
from snipdedup.join.tiles import table_forest
from snipdedup.join.verify import verify_pairs


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**31),
    m=st.integers(1, 14),
    n=st.integers(1, 14),
    shared=st.integers(0, 14),
    share=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    values=st.sampled_from([3, 10**6]),
)
def test_the_forest_of_a_table_is_a_maximum_one(seed, m, n, shared, share, values):
    """Rows and columns may be the same nodes, as in a tile on the diagonal."""
    rng = np.random.default_rng(seed)
    left, right = np.arange(m), np.arange(n) + max(0, m - shared)
    nodes = int(max(left.max(), right.max())) + 1
    table = (rng.integers(1, values, (m, n)) * (rng.random((m, n)) < share)).astype(np.float32)
    table[left[:, None] <= right] *= left[:, None].max() < right.min() if not shared else 1
    table[left[:, None] == right] = 0
    edges = [
        (int(min(left[i], right[j])), int(max(left[i], right[j])), float(table[i, j]))
        for i, j in zip(*np.nonzero(table), strict=True)
    ]
    best = {}
    for a, b, weight in edges:
        best[a, b] = max(weight, best.get((a, b), 0))
    expected = truth.kruskal([(a, b, weight) for (a, b), weight in best.items()])
    whole = table.copy()
    i, j = table_forest(table, left, right, nodes)
    assert sorted(whole[i, j].tolist()) == sorted(weight for _, _, weight in expected)
    assert len(set(truth.components(nodes, zip(left[i], right[j], strict=True)))) == nodes - len(i)


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("dim", [3, 40])
def test_crowded_or_not_the_forest_is_the_same(threshold, dim):
    rng = np.random.default_rng(dim)
    x = (rng.standard_normal(dim) + 0.25 * rng.standard_normal((1500, dim))).astype(np.float32)
    brute = dedup(x, method="exact", threshold=threshold).search.forest
    for crowded in (0.0, 2.0):  # always, never
        with (
            mock.patch.object(tiles, "CROWDED", crowded),
            mock.patch.object(tiles, "ROW_TILE", 128),
            mock.patch.object(tiles, "COLUMN_TILE", 256),
        ):
            found = dedup(x, threshold=threshold).search.forest
        assert len(found.a) == len(brute.a) > 1000
        # the products of a crowded tile may take one of two pairs that are nearly as near
        apart = np.abs(np.sort(found.similarity) - np.sort(brute.similarity))
        assert apart.max() < 2e-4
        assert apart.mean() < 1e-6


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    dim=st.sampled_from([3, 17, 64, 768]),
    length=st.sampled_from([0.0, 1e-4, 0.05, 0.2, 3.0]),
    kind=st.sampled_from(["alike", "few", "one large"]),
)
def test_quick_cosines_are_wrong_by_no_more_than_they_say(seed, dim, length, kind):
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((90, dim))
    if kind == "few":
        noise *= rng.random((90, dim)) < 2 / dim
    elif kind == "one large":
        noise[:, 0] *= 50
    rows = rng.standard_normal(dim) + length * noise
    unit = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    x, y = torch.from_numpy(unit[:40]), torch.from_numpy(unit[40:])
    exact = truth.cosine_table(unit)[:40, 40:]
    table = np.full((40, 50), np.nan, np.float32)
    error = tiles.centred_cosines(x, y, table)
    if np.isinf(error):
        assert np.isnan(table).all()
        assert length > 0.01
    else:
        assert error <= tiles.MOST_ERROR
        assert np.abs(table - exact).max() <= error
    plain = tiles.plain_cosines(x, y, table)
    assert np.abs(table - exact).max() <= plain <= tiles.PROPOSAL_ERROR


def test_pairs_that_quick_cosines_leave_in_doubt_are_decided_exactly():
    """Rows whose cosines lie a hair to either side of the threshold, all in one tile."""
    rng = np.random.default_rng(4)
    x = np.concatenate([np.eye(64)[:1], np.zeros((300, 64))])
    side = rng.standard_normal((300, 63))
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    cosine = 0.99 + rng.choice([-1e-4, -1e-6, 1e-6, 1e-4], 300)
    x[1:, 0], x[1:, 1:] = cosine, np.sqrt(1 - cosine**2)[:, None] * side
    brute = dedup(x, method="exact", threshold=0.99).search.forest
    with mock.patch.object(tiles, "CROWDED", 0.0):
        found = dedup(x, threshold=0.99).search.forest
    assert set(zip(found.a, found.b, strict=True)) == set(zip(brute.a, brute.b, strict=True))


@pytest.mark.parametrize("crowded", [0.0, 2.0])
@pytest.mark.parametrize("first", [0, 1, 130, 256, 700, 1500])
@pytest.mark.parametrize("across", [False, True])
def test_first_rows_are_not_compared_with_one_another(first, crowded, across):
    """Those of the others have a forest of their own, and with ``across`` are not looked for."""
    rng = np.random.default_rng(first)
    x = (rng.standard_normal(12) + 0.25 * rng.standard_normal((1500, 12))).astype(np.float32)
    features, projection = open_features(x), fit_projection(x, 128, 0)
    members = tiles.CodedRows(np.arange(1500), projection.encode(x)[0], np.zeros(1500))
    builder, seen = ForestBuilder(first), 0
    with (
        mock.patch.object(tiles, "CROWDED", crowded),
        mock.patch.object(tiles, "ROW_TILE", 128),
        mock.patch.object(tiles, "COLUMN_TILE", 256),
    ):
        for start in range(0, 1500, 256):
            rest = members.where(slice(start, 1500))
            found = tiles.compare_tiles(
                features, rest, min(256, 1500 - start),
                limit=projection.limit(0.9), threshold=0.9, reference_rows=first,
                references_only=across,
            )  # fmt: skip
            seen += len(found.a)
            builder.add(found.edges)
            for edges in verify_pairs(features, found.a, found.b, 0.9, 1, reference_rows=first):
                builder.add(edges)
    table = truth.cosine_table(x)
    pairs = truth.pairs_of(table, 0.9)
    forest = builder.forest()
    assert (forest.b >= first).all()
    for own in (False, True):
        part = forest.where((forest.a >= first) == own)
        wanted = [(a, b) for a, b in pairs if b >= first and (a >= first) == own]
        one = truth.components(1500, [] if own and across else wanted)
        assert np.array_equal(truth.components(1500, zip(part.a, part.b, strict=True)), one)
        assert len(set(one)) == 1500 - len(part.a)
