"""Brute force is the truth: it must equal a double loop in float64, whatever the tiles."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import truth
from hypothesis import given, settings
from hypothesis import strategies as st

from snipdedup.features.shards import open_features
from snipdedup.join import brute_force
from snipdedup.join.brute_force import (
    exact_edges,
    load_panel,
    panel_rows,
    tile_pairs,
    tile_plan,
)
from snipdedup.join.forest import ForestBuilder, join_edges, spanning_forest
from snipdedup.parallel import ordered_map


def all_pairs(features, threshold, *, threads):
    """Every pair of a small set, distinct or not, by the tiles of brute force."""
    panel = load_panel(features, np.arange(features.rows))
    plan = tile_plan(features.rows, max(features.rows, 1), 0, 0)
    tiles = ordered_map(lambda tile: tile_pairs(panel, panel, *tile, threshold), plan, threads)
    return join_edges(list(tiles))


def loop(x, threshold):
    """Every pair by a double loop: {(a, b): cosine}, correctly rounded sums."""
    rows = [[float(v) for v in row] for row in x]
    norms = [math.sqrt(math.fsum(v * v for v in row)) for row in rows]
    found = {}
    for a in range(len(rows)):
        for b in range(a + 1, len(rows)):
            dot = math.fsum(v * w for v, w in zip(rows[a], rows[b], strict=True))
            cosine = min(np.float32(dot / (norms[a] * norms[b])), np.float32(1))
            if cosine >= np.float32(threshold):
                found[a, b] = float(cosine)
    return found


def near(threshold, gaps, dim, seed):
    """Rows 2i and 2i + 1 with a cosine of threshold + gaps[i], of any norm; float64."""
    rng = np.random.default_rng(seed)
    x = np.empty((2 * len(gaps), dim))
    for i, gap in enumerate(gaps):
        u, v = np.linalg.qr(rng.standard_normal((dim, 2)))[0].T
        c = float(np.float32(threshold)) + gap
        x[2 * i] = u * 10.0 ** rng.uniform(-3, 3)
        x[2 * i + 1] = (c * u + math.sqrt(1 - c * c) * v) * 10.0 ** rng.uniform(-3, 3)
    return x


def listed(edges):
    pairs = zip(edges.a.tolist(), edges.b.tolist(), strict=True)
    return dict(zip(pairs, edges.similarity.tolist(), strict=True))


@settings(max_examples=40)
@given(
    rows=st.integers(1, 30),
    dim=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    threshold=st.sampled_from([-0.5, 0.3, 0.8, 0.95]),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    tile=st.integers(1, 12),
)
def test_all_pairs_are_those_of_a_double_loop(rows, dim, seed, threshold, dtype, tile):
    x = truth.clustered(rows, dim, seed, dtype=dtype)
    with mock.patch.object(brute_force, "TILE", tile):
        found = all_pairs(open_features(x), threshold, threads=1)
    assert listed(found) == pytest.approx(loop(x, threshold), abs=1e-7)


@pytest.mark.parametrize("threshold", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("dense", [0.0, 1.0])
def test_both_sides_of_the_threshold(threshold, dense):
    gaps = [side * size for size in (1e-7, 3e-7, 1e-6, 1e-5, 2e-5) for side in (-1, 1)] * 8
    x = near(threshold, gaps, 64, 1)
    for dtype in (np.float64, np.float32):
        stored = x.astype(dtype)
        with mock.patch.object(brute_force, "DENSE", dense):  # all at once, and pair by pair
            found = all_pairs(open_features(stored), threshold, threads=2)
        expected = loop(stored, threshold)
        assert set(listed(found)) == set(expected)
        if dtype == np.float64:
            assert {a // 2 for a, _ in expected} >= {i for i, gap in enumerate(gaps) if gap > 0}
            assert len(set(expected) & {(2 * i, 2 * i + 1) for i in range(len(gaps))}) == 40


def test_norms_from_tiny_to_huge():
    x = truth.clustered(40, 5, 0, dtype=np.float64)
    scales = 10.0 ** np.random.default_rng(0).uniform(-250, 250, (40, 1))
    same = listed(all_pairs(open_features(x * scales), 0.9, threads=1))
    assert set(same) == set(loop(x, 0.9))


def test_memory_for_one_tile_gives_the_same_forest(tmp_path):
    x = truth.clustered(500, 16, 2, dtype=np.float16)
    features = open_features(truth.save_shards(tmp_path / "f", x, [0, 37, 37, 300, 500]))
    assert len(features.shards) == 6
    assert min(shard.rows for shard in features.shards) == 0
    expected = spanning_forest(all_pairs(open_features(x), 0.9, threads=1))
    with mock.patch.object(brute_force, "TILE", 32):
        assert panel_rows(features, 1) == 32
        for memory, threads in [(1, 1), (1, 2), (10_000, 2), (10**9, 1)]:
            builder = ForestBuilder()
            edges = exact_edges(features, np.arange(500), 0.9, threads=threads, memory=memory)
            for part in edges:
                builder.add(part)
            assert listed(builder.forest()) == listed(expected)
    assert len(expected.a) > 100


def test_only_the_rows_asked_for_are_compared():
    x = truth.clustered(60, 4, 5)
    rows = np.array([0, 3, 4, 10, 11, 30, 59])
    builder = ForestBuilder()
    for part in exact_edges(open_features(x), rows, 0.5, threads=1, memory=10**6):
        builder.add(part)
    expected = {
        (int(rows[a]), int(rows[b])): cosine for (a, b), cosine in loop(x[rows], 0.5).items()
    }
    kept = truth.kruskal([(a, b, s) for (a, b), s in expected.items()])
    found = listed(builder.forest())
    assert list(found) == [(a, b) for a, b, _ in kept]
    assert expected


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.sampled_from([0.9, 0.93, 0.97, 0.995]))
def test_the_forest_filtered_is_a_fresh_search(seed, threshold):
    features = open_features(truth.clustered(60, 4, seed))
    once = spanning_forest(all_pairs(features, 0.9, threads=1)).at(threshold)
    again = spanning_forest(all_pairs(features, threshold, threads=1))
    assert listed(once) == listed(again)


@settings(max_examples=40)
@given(
    rows=st.integers(1, 40),
    first=st.integers(0, 45),
    tile=st.integers(1, 12),
    panel=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    across=st.booleans(),
)
def test_pairs_among_the_first_rows_are_left_out_and_no_others(
    rows, first, tile, panel, seed, across
):
    x = truth.clustered(rows, 5, seed, noise=0.6)
    features = open_features(x)
    every = {pair: cosine for pair, cosine in loop(x, 0.8).items() if pair[1] >= first}
    size = mock.patch.object(brute_force, "panel_rows", return_value=panel * tile)
    builder = ForestBuilder(first)
    with mock.patch.object(brute_force, "TILE", tile), size:
        for edges in exact_edges(
            features,
            np.arange(rows),
            0.8,
            threads=1,
            memory=1,
            reference_rows=first,
            references_only=across,
        ):  # fmt: skip
            assert (edges.b >= first).all()
            builder.add(edges)
    found = builder.forest()
    for own in (False, True):  # each has a forest of its own
        wanted = {pair for pair in every if (pair[0] >= first) == own and not (own and across)}
        part = listed(found.where((found.a >= first) == own))
        assert set(part) <= wanted
        label = truth.components(rows, wanted)
        assert truth.components(rows, part).tolist() == label.tolist()
        assert len(part) == rows - len(set(label.tolist()))
