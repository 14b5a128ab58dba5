"""Tiles: crowded ones give the same forest as the pairs that the others list."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import truth
from hypothesis import given, settings
from hypothesis import strategies as st

from snipdedup.deduplication.run import dedup
from snipdedup.features.shards import open_features
from snipdedup.join import tiles
from snipdedup.join.forest import ForestBuilder
from snipdedup.join.projection import fit_projection
from snipdedup.join.tiles import NO_PAIR, Limits, table_forest


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
    table[table == 0] = NO_PAIR
    whole = table.copy()
    i, j = table_forest(table, left, right, nodes)
    assert sorted(whole[i, j].tolist()) == sorted(weight for _, _, weight in expected)
    assert len(set(truth.components(nodes, zip(left[i], right[j], strict=True)))) == nodes - len(i)


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("dim", [3, 40])
def test_crowded_or_not_the_forest_is_the_same(threshold, dim):
    rng = np.random.default_rng(dim)
    x = (rng.standard_normal(dim) + 0.25 * rng.standard_normal((900, dim))).astype(np.float32)
    brute = dedup(x, method="exact", threshold=threshold).search.forest
    for crowded in (0.0, 2.0):  # always, never
        with (
            mock.patch.object(tiles, "CROWDED", crowded),
            mock.patch.object(tiles, "ROW_TILE", 128),
            mock.patch.object(tiles, "COLUMN_TILE", 256),
        ):
            found = dedup(x, threshold=threshold).search.forest
        assert len(found.a) == len(brute.a) > 600
        # which of two equal cosines is taken may differ, but no forest is heavier
        assert np.array_equal(np.sort(found.similarity), np.sort(brute.similarity))


def test_pairs_at_the_threshold_are_decided_exactly_in_a_crowd():
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
@pytest.mark.parametrize(
    ("first", "across", "wide"),
    [
        (0, False, True),
        (1, False, False),
        (1, True, True),
        (65, False, True),
        (128, True, False),
        (350, False, False),
        (350, True, True),
        (700, False, True),
        (700, True, False),
    ],
)
def test_first_rows_are_not_compared_with_one_another(first, crowded, across, wide):
    """Those of the others have a forest of their own, and with ``across`` are not looked for."""
    rng = np.random.default_rng(first)
    x = (rng.standard_normal(12) + 0.25 * rng.standard_normal((700, 12))).astype(np.float32)
    features, builder, seen = open_features(x), ForestBuilder(first), 0
    sides = [fit_projection(x, width, 0) for width in (64, 128)]
    codes = [part for projection in sides for part in projection.encode(x)]
    records = np.zeros(700, tiles.code_record((64, 128 * wide)))
    for name, column in zip(records.dtype.names[: 2 + 2 * wide], codes, strict=False):
        records[name] = column
    stored = tiles.CodeStore([records[at : at + 300] for at in (0, 300, 600)], 300)
    members = tiles.Members(np.arange(700), np.arange(700))
    with (
        mock.patch.object(tiles, "CROWDED", crowded),
        mock.patch.object(tiles, "ROW_TILE", 64),
        mock.patch.object(tiles, "COLUMN_TILE", 128),
        mock.patch.object(tiles, "GATHER_PAIRS", 3000),
    ):
        for start in range(0, 700, 128):
            rest = members.where(slice(start, 700))
            found, candidates = tiles.compare_tiles(
                features, stored, rest, min(128, 700 - start),
                limits=Limits(*(side.limit(0.9) for side in sides)), threshold=0.9,
                reference_rows=first, references_only=across,
            )  # fmt: skip
            seen += candidates
            for edges in found:
                builder.add(edges)
    table = truth.cosine_table(x)
    pairs = truth.pairs_of(table, 0.9)
    forest = builder.forest()
    assert (forest.b >= first).all()
    for own in (False, True):
        part = forest.where((forest.a >= first) == own)
        wanted = [(a, b) for a, b in pairs if b >= first and (a >= first) == own]
        one = truth.components(700, [] if own and across else wanted)
        assert np.array_equal(truth.components(700, zip(part.a, part.b, strict=True)), one)
        assert len(set(one)) == 700 - len(part.a)
        assert part.similarity.tolist() == table[part.a, part.b].tolist()
    some = [(a, b) for a, b in pairs if b >= first and not (across and a >= first)]
    assert len(some) <= seen
