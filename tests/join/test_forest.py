"""The maximum spanning forest: unique, mergeable, and equal to the components at any threshold."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import truth
from hypothesis import given
from hypothesis import strategies as st

from snipdedup.join import forest
from snipdedup.join.forest import (
    Edges,
    ForestBuilder,
    components,
    join_edges,
    link_smaller,
    make_edges,
    spanning_forest,
)

# A few similarities on a few rows, so that ties, cycles and repeats are the rule.
EDGE = st.tuples(st.integers(0, 14), st.integers(0, 14), st.sampled_from([0.25, 0.5, 0.75, 1.0]))
EDGES = st.lists(EDGE.filter(lambda e: e[0] != e[1]), max_size=60).map(
    # one similarity a pair, as cosines have it
    lambda edges: list({(min(a, b), max(a, b)): s for a, b, s in edges}.items())
)


def build(edges):
    """Edges of [((a, b), similarity)]."""
    a, b = (np.array([pair[side] for pair, _ in edges], np.int64) for side in (0, 1))
    return make_edges(a, b, np.array([s for _, s in edges], np.float32))


def listed(edges: Edges):
    return list(zip(edges.a.tolist(), edges.b.tolist(), edges.similarity.tolist(), strict=True))


def labels(edges):
    return dict(zip(*(side.tolist() for side in components(edges)), strict=True))


@given(EDGES)
def test_it_is_the_forest_of_kruskal(edges):
    assert listed(spanning_forest(build(edges))) == truth.kruskal(listed(build(edges)))


@given(EDGES, st.randoms(use_true_random=False))
def test_order_direction_and_repeats_change_nothing(edges, random):
    shuffled = [((b, a), s) if random.random() < 0.5 else ((a, b), s) for (a, b), s in edges]
    shuffled += random.choices(shuffled, k=10) if shuffled else []
    random.shuffle(shuffled)
    assert listed(spanning_forest(build(shuffled))) == listed(spanning_forest(build(edges)))


@given(EDGES, st.sampled_from([0.25, 0.5, 0.6, 0.75, 1.0]))
def test_filtered_it_gives_the_components_of_the_pairs_at_any_threshold(edges, threshold):
    pairs = build(edges).at(threshold)
    assert labels(spanning_forest(build(edges)).at(threshold)) == labels(pairs)


@given(EDGES)
def test_forests_of_halves_and_of_what_crosses_merge_to_the_forest_of_the_whole(edges):
    parts = [[], [], []]
    for edge in edges:
        low, high = (side < 7 for side in edge[0])
        parts[2 if low != high else int(low)].append(edge)
    merged = join_edges([spanning_forest(build(part)) for part in parts])
    assert listed(spanning_forest(merged)) == listed(spanning_forest(build(edges)))


@given(EDGES, st.integers(1, 9), st.integers(0, 5))
def test_a_builder_with_a_tiny_buffer_loses_nothing(edges, step, buffer):
    with mock.patch.object(forest, "BUFFER_EDGES", buffer):
        builder = ForestBuilder()
        for start in range(0, len(edges), step):
            builder.add(build(edges[start : start + step]))
            builder.add(build([]))
    assert listed(builder.forest()) == listed(spanning_forest(build(edges)))
    assert listed(builder.forest()) == listed(spanning_forest(build(edges)))  # asked twice


@given(EDGES)
def test_components_are_those_of_a_union_find(edges):
    expected = truth.components(15, [pair for pair, _ in edges])
    touched = sorted({row for pair, _ in edges for row in pair})
    assert labels(build(edges)) == {row: expected[row] for row in touched}


@given(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40), st.integers(1, 9))
def test_labels_stay_the_smallest_row_however_the_links_arrive(pairs, step):
    label = np.arange(30)
    for start in range(0, len(pairs), step):
        part = pairs[start : start + step]
        ends = [label[np.array([pair[side] for pair in part], int)] for side in (0, 1)]
        link_smaller(label, *ends)
    assert label.tolist() == truth.components(30, pairs).tolist()


@pytest.mark.parametrize("shape", ["path", "path backwards", "star", "comb"])
def test_long_shapes_are_one_component(shape):
    n = 20_000
    a = np.arange(n - 1) if shape != "star" else np.full(n - 1, n - 1)
    b = np.arange(1, n) if shape != "star" else np.arange(n - 1)
    if shape == "comb":  # 0-9999, 1-9998, ... and back: the worst case of pointer jumping
        a, b = np.concatenate([np.arange(n // 2), np.arange(1, n // 2)]), None
        b = np.concatenate([n - 1 - np.arange(n // 2), n - np.arange(1, n // 2)])
    similarity = np.linspace(0.95, 1, len(a), dtype=np.float32)
    edges = make_edges(a, b, similarity[::-1] if shape == "path backwards" else similarity)
    found = spanning_forest(edges)
    assert len(found.a) == n - 1
    row, label = components(found)
    assert len(row) == n
    assert not label.any()


def test_rows_beyond_32_bits_and_no_edges_at_all():
    big = 2**33
    edges = make_edges(np.array([big + 2, 5]), np.array([big, big + 2]), np.array([0.96, 0.97]))
    assert listed(spanning_forest(edges)) == [
        (5, big + 2, pytest.approx(0.97)),
        (big, big + 2, pytest.approx(0.96)),
    ]
    assert components(edges)[1].tolist() == [5, 5, 5]
    empty = spanning_forest(build([]))
    assert [column.dtype for column in empty] == [np.int64, np.int64, np.float32]
    assert [len(column) for column in components(empty)] == [0, 0]
    assert listed(ForestBuilder().forest()) == []


def test_a_threshold_is_compared_as_float32():
    edges = make_edges(np.array([0]), np.array([1]), np.array([0.95], np.float32))
    assert len(edges.at(0.95).a) == 1  # float32(.95) < .95
    assert len(edges.at(np.nextafter(np.float32(0.95), np.float32(1))).a) == 0
