"""Measures against plain numpy: ranks, precision; codes against faiss alone."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from snipdedup.encoder.network import opq_rotation
from snipdedup.evaluation import measures
from snipdedup.features.cosine import unit_rows
from snipdedup.index.quantizer import train_quantiser


def rows_of(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(20, dim))
    return (centres[rng.integers(0, 20, rows)] + 0.5 * rng.normal(size=(rows, dim))).astype("f4")


def test_recall_counts_what_is_shared():
    truth, found = np.array([[2, 3, 4], [5, 6, -1]]), np.array([[3, 2, 9], [9, 5, -1]])
    assert measures.recall(found, truth, 3) == pytest.approx(3 / 5)
    assert measures.recall(found, truth, 1) == 0


def test_the_own_row_is_left_out_wherever_it_stands():
    I = np.array([[7, 1, 2], [3, 8, 4], [5, 6, 0]])
    found = measures.drop_own(I, np.array([7, 8, 9]))
    assert found.tolist() == [[1, 2], [3, 4], [5, 6]]


def test_codes_find_what_plain_faiss_finds():
    x = unit_rows(rows_of(3000, 16))
    quantiser = train_quantiser(x, nlist=8, m=4, nbits=8, seed=0, threads=1)
    codes = measures.IndexedRows(quantiser)
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
    every = codes.nearest_of_all(x[100:150], np.arange(100, 150), 5, 2)
    plain.nprobe = 8
    expected = measures.drop_own(plain.search(x[100:150], 6)[1], np.arange(100, 150))
    assert (expected == every).mean() > 0.98  # rows of one code tie


def test_partner_ranks_count_ties_half_and_copies_as_one():
    similarity = np.array([[0.5, 0.9, 0.5], [0.1, 0.2, 0.3], [0.4, 0.4, 0.4]], np.float32)
    alone = np.arange(3)
    assert measures.partner_ranks(similarity, np.array([0, 2, 1]), alone).tolist() == [1.5, 0, 1]
    copies = np.array([0, 1, 0])  # the first and the last column are one picture
    assert measures.partner_ranks(similarity, np.array([0, 0, 1]), copies).tolist() == [1, 0, 1]


def test_average_precision_is_the_one_worked_by_hand():
    truth = np.array([True, False, True, False])
    assert measures.average_precision(np.array([4, 3, 2, 1]), truth) == pytest.approx(
        (1 + 2 / 3) / 2
    )
    assert measures.average_precision(np.zeros(4), truth) == pytest.approx(
        0.5
    )  # one score: one step


def test_opq_turns_without_stretching():
    x = unit_rows(rows_of(600, 16))
    rotation = opq_rotation(x, 4, 3, 6)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(16), atol=1e-4)


def test_samples_are_distinct_and_ascending():
    picked = measures.sample_rows(100, 30, np.random.default_rng(0))
    assert len(set(picked.tolist())) == 30
    assert (np.diff(picked) > 0).all()
    assert measures.sample_rows(10, 30, np.random.default_rng(0)).tolist() == list(range(10))
