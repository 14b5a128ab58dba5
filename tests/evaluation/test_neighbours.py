"""Measures against plain numpy: exact neighbours, ranks, precision; codes against faiss alone."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from snipdedup.evaluation import neighbours
from snipdedup.features.cosine import unit_rows, unit_rows64
from snipdedup.features.shards import open_features
from snipdedup.index.quantizer import train_quantiser


def rows_of(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(20, dim))
    return (centres[rng.integers(0, 20, rows)] + 0.5 * rng.normal(size=(rows, dim))).astype("f4")


def brute(rows: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    x = unit_rows64(rows)
    cosine = (x[queries] @ x.T).astype(np.float32)
    cosine[np.arange(len(queries)), queries] = -np.inf
    return np.argsort(-cosine, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("threads", [1, 3])
def test_true_neighbours_are_those_of_numpy_whatever_the_blocks(monkeypatch, threads):
    monkeypatch.setattr(neighbours, "BLOCK_ROWS", 97)
    rows = rows_of(700, 12)
    rows[5] = rows[600]  # a tie: the smaller row first
    rows[6] = rows[600]
    queries = np.array([0, 3, 5, 600, 699])
    found = neighbours.true_neighbours(open_features(rows), queries, 20, threads)
    np.testing.assert_array_equal(found.I, brute(rows, queries, 20))
    assert found.I[3, :2].tolist() == [5, 6]


def test_a_small_set_has_fewer_neighbours():
    rows = rows_of(4, 3)
    found = neighbours.true_neighbours(open_features(rows), np.array([1]), 10, 1)
    assert sorted(found.I[0, :3].tolist()) == [0, 2, 3]
    assert (found.I[0, 3:] == -1).all()
    assert neighbours.recall(found, found, 10) == 1


def test_recall_counts_what_is_shared():
    queries = np.array([0, 1])
    truth = neighbours.Neighbours(queries, np.array([[2, 3, 4], [5, 6, -1]]))
    found = neighbours.Neighbours(queries, np.array([[3, 2, 9], [9, 5, -1]]))
    assert neighbours.recall(found, truth, 3) == pytest.approx(3 / 5)
    assert neighbours.recall(found, truth, 1) == 0


def test_the_own_row_is_left_out_wherever_it_stands():
    I = np.array([[7, 1, 2], [3, 8, 4], [5, 6, 0]])
    found = neighbours.others(I, np.array([7, 8, 9]))
    assert found.tolist() == [[1, 2], [3, 4], [5, 6]]


def test_codes_find_what_plain_faiss_finds():
    x = unit_rows(rows_of(3000, 16))
    quantiser = train_quantiser(x, nlist=8, m=4, nbits=8, seed=0, threads=1)
    codes = neighbours.Codes(quantiser)
    for part in np.array_split(x, 4):
        codes.add(part)
    D, I = codes.search(x[:50], 5, 3)
    plain = faiss.clone_index(quantiser.ivfpq)
    plain.nprobe = 3
    np.testing.assert_array_equal(plain.search(x[:50], 5)[1], I)
    at = {int(i): float(d) for i, d in zip(I[0], D[0], strict=True)}
    stored = plain.reconstruct_batch(I[0]) if plain.make_direct_map() is None else None
    for row, q in zip(I[0], stored, strict=True):
        assert at[int(row)] == pytest.approx(float(((x[0] - q) ** 2).sum()), abs=1e-4)
    every = codes.every(x[100:150], np.arange(100, 150), 5, 2)
    plain.nprobe = 8
    expected = neighbours.others(plain.search(x[100:150], 6)[1], np.arange(100, 150))
    assert (expected == every.I).mean() > 0.98  # rows of one code tie
    own = codes.own_errors(x[:50])
    q = plain.reconstruct_batch(np.arange(50))
    np.testing.assert_allclose(own, ((x[:50] - q) ** 2).sum(axis=1), atol=1e-5)


def test_partner_ranks_count_ties_half_and_copies_as_one():
    similarity = np.array([[0.5, 0.9, 0.5], [0.1, 0.2, 0.3], [0.4, 0.4, 0.4]], np.float32)
    alone = np.arange(3)
    assert neighbours.partner_ranks(similarity, np.array([0, 2, 1]), alone).tolist() == [1.5, 0, 1]
    copies = np.array([0, 1, 0])  # the first and the last column are one picture
    assert neighbours.partner_ranks(similarity, np.array([0, 0, 1]), copies).tolist() == [1, 0, 1]


def test_average_precision_is_the_one_worked_by_hand():
    truth = np.array([True, False, True, False])
    assert neighbours.average_precision(np.array([4, 3, 2, 1]), truth) == pytest.approx(
        (1 + 2 / 3) / 2
    )
    assert neighbours.average_precision(np.zeros(4), truth) == pytest.approx(
        0.5
    )  # one score: one step


def test_opq_turns_without_stretching():
    x = unit_rows(rows_of(600, 16))
    rotation = neighbours.opq(x, 4, 3)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(16), atol=1e-4)


def test_samples_are_distinct_and_ascending():
    picked = neighbours.sample_rows(100, 30, np.random.default_rng(0))
    assert len(set(picked.tolist())) == 30
    assert (np.diff(picked) > 0).all()
    assert neighbours.sample_rows(10, 30, np.random.default_rng(0)).tolist() == list(range(10))
