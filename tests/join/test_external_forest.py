"""The forest of more edges than memory holds is the forest, and so are the components."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import truth
from hypothesis import given, settings
from hypothesis import strategies as st

import snipdedup
from snipdedup.join import forest
from snipdedup.join.forest import (
    Edges,
    ExternalForest,
    UnionFind,
    by_first,
    components,
    edge_kind,
    edges_of,
    make_edges,
    spanning_forest,
)
from snipdedup.storage import external_sort
from snipdedup.storage.external_sort import Sorter

ROWS = 40
PAIRS = st.lists(
    st.tuples(st.integers(0, ROWS - 1), st.integers(0, ROWS - 1)).filter(lambda e: e[0] != e[1]),
    max_size=120,
)
VALUES = np.array([-1, -0.25, 0, 0.5, np.float32(0.95), 1], np.float32)


def some_edges(pairs, seed=0):
    """Edges of pairs, one similarity each; many are equal."""
    a, b = np.array(pairs, np.int64).reshape(-1, 2).T
    rng = np.random.default_rng(seed)
    table = rng.choice(VALUES, (ROWS, ROWS))
    return make_edges(a, b, table[np.minimum(a, b), np.maximum(a, b)])


def random_edges(rows, count, seed, *, values=None):
    rng = np.random.default_rng(seed)
    a = rng.integers(0, rows, count)
    b = (a + 1 + (rng.pareto(0.5, count) % (rows - 1)).astype(np.int64)) % rows
    keep = a != b
    similarity = rng.uniform(0.95, 1, count) if values is None else rng.choice(values, count)
    found = make_edges(a[keep], b[keep], similarity[keep])
    # one similarity a pair, as cosines have it
    first = np.unique(found.a * rows + found.b, return_index=True)[1]
    return found.where(rng.permutation(first))


def listed(edges: Edges):
    return list(zip(*(column.tolist() for column in edges), strict=True))


@contextmanager
def tiny(held, block=4):
    """Only so many edges fit into memory."""
    with (
        mock.patch.multiple(forest, HELD_EDGES=held, BLOCK_EDGES=block),
        mock.patch.multiple(external_sort, PARTS=3, READ=5),
    ):
        yield


def by_files(folder, edges, rows, step, first=0):
    builder = ExternalForest(folder, rows, first)
    for start in range(0, len(edges.a), step):
        builder.add(edges.where(slice(start, start + step)))
    return builder.forest()


@given(PAIRS, st.integers(1, 50), st.integers(2, 30), st.integers(1, ROWS))
@settings(deadline=None, max_examples=30)
def test_rows_from_one_on_have_a_forest_of_their_own(tmp_path_factory, pairs, step, held, first):
    edges = some_edges(pairs)
    with tiny(held), mock.patch.object(forest, "BUFFER_EDGES", 3):
        found = by_files(tmp_path_factory.mktemp("f"), edges, ROWS, step, first)
    below = edges.a < first
    parts = [truth.kruskal(listed(edges.where(part))) for part in (below, ~below)]
    assert listed(found) == [*parts[0], *parts[1]]


@given(PAIRS, st.integers(1, 50), st.integers(2, 30), st.integers(0, 9))
@settings(deadline=None, max_examples=30)
def test_the_forest_by_files_is_that_of_kruskal(tmp_path_factory, pairs, step, held, buffer):
    edges = some_edges(pairs)
    folder = tmp_path_factory.mktemp("f")
    with tiny(held), mock.patch.object(forest, "BUFFER_EDGES", buffer):
        found = by_files(folder, edges, ROWS, step)
    assert listed(found) == truth.kruskal(listed(edges))
    assert {path.name for path in folder.glob("*")} <= {
        "forest.a", "forest.b", "forest.similarity",
    }  # fmt: skip


@pytest.mark.parametrize("values", [None, [0.95], [0.95, 1]])
def test_it_is_the_forest_of_memory_whatever_is_held(tmp_path, values):
    edges = random_edges(3000, 5000, 1, values=values)
    expected = spanning_forest(edges)
    for held in (250, 10_000):
        with tiny(held, 64), mock.patch.object(forest, "BUFFER_EDGES", held):
            found = by_files(tmp_path / "work", edges, 3000, 700)
        for one, other in zip(expected, found, strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
        assert isinstance(found.a, np.memmap) == (held < 10_000)


def test_rows_beyond_32_bits_are_split_and_written_in_full(tmp_path):
    low = random_edges(2000, 3000, 2, values=[0.95, 1])
    apart = 3 << 31  # ends of low rows stay, others go past 2^32
    edges = make_edges(*(np.where(x > 900, x + apart, x) for x in low[:2]), low.similarity)
    expected = spanning_forest(edges)
    kind = edge_kind(apart + 2000)
    with tiny(50):
        file = Sorter(tmp_path / "x", kind, by_first, held=50)
        file.add(external_sort.pack(kind, *edges))
        parts = [edges_of(part) for part in file.ascending()]
    assert max(len(part.a) for part in parts) <= 50
    assert all(one.a.max() < other.a.min() for one, other in itertools.pairwise(parts))
    assert sorted(listed(Edges(*map(np.concatenate, zip(*parts, strict=True))))) == sorted(
        listed(edges)
    )
    order = forest.best_first(edges)
    assert listed(edges.where(order)) == sorted(listed(edges), key=lambda e: (-e[2], *e[:2]))
    assert listed(expected) == truth.kruskal(listed(edges))


def test_what_a_stopped_run_left_is_not_taken_for_edges(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "edges-000").write_bytes(b"\1" * 120)
    (tmp_path / "work" / "forest.a").write_bytes(b"\1" * 120)
    edges = random_edges(300, 500, 3)
    with tiny(20), mock.patch.object(forest, "BUFFER_EDGES", 20):
        found = by_files(tmp_path / "work", edges, 300, 100)
    assert listed(found) == listed(spanning_forest(edges))


def test_a_join_whose_forest_does_not_fit_finds_the_same():
    x = truth.clustered(3000, 16, 6, copies=0.1)
    expected = snipdedup.dedup(x, threshold=0.9)
    assert len(expected.search.forest.a) > 500
    with tiny(40, 16), mock.patch.object(forest, "BUFFER_EDGES", 10):
        found = snipdedup.dedup(x, threshold=0.9)
    assert isinstance(found.search.forest.a, np.memmap)
    assert found.forest.equals(expected.forest)
    assert found.groups.equals(expected.groups)


@given(PAIRS, st.integers(1, 9))
def test_roots_are_the_smallest_rows_joined(pairs, step):
    edges, sets = some_edges(pairs), UnionFind(ROWS)
    for start in range(0, len(edges.a), step):
        part = edges.where(slice(start, start + step))
        sets.unite(part.a, part.b)
        expected = truth.components(ROWS, pairs[: start + step])
        np.testing.assert_array_equal(sets.find(np.arange(ROWS)), expected)
    np.testing.assert_array_equal(sets.labels(), truth.components(ROWS, pairs))


def test_a_million_rows_against_scipy(monkeypatch):
    sparse = pytest.importorskip("scipy.sparse")
    from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

    rows = 1_000_000
    edges = random_edges(rows, 700_000, 4)
    # distinct similarities, so that scipy's forest is the only one too
    order = np.random.default_rng(5).permutation(len(edges.a))
    edges = edges._replace(similarity=(0.5 + order / 2**21).astype(np.float32))
    assert len(np.unique(edges.similarity)) == len(order)
    found = spanning_forest(edges)
    places = (edges.a.astype(np.int32), edges.b.astype(np.int32))  # older scipy takes no others
    graph = sparse.coo_array((2.0 - edges.similarity.astype(np.float64), places), (rows, rows))
    tree = sparse.coo_array(minimum_spanning_tree(graph.tocsr()))
    a, b = np.minimum(tree.row, tree.col), np.maximum(tree.row, tree.col)
    expected = np.lexsort((b, a))
    np.testing.assert_array_equal(found.a, a[expected])
    np.testing.assert_array_equal(found.b, b[expected])
    count, label = connected_components(graph, directed=False)
    smallest = np.full(count, rows)
    np.minimum.at(smallest, label, np.arange(rows))
    row, group = components(found)
    np.testing.assert_array_equal(row, np.unique(np.concatenate([edges.a, edges.b])))
    np.testing.assert_array_equal(group, smallest[label][row])
