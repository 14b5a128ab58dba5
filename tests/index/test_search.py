"""Search of many rows: against plain faiss and brute force."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
from samples import clustered, make

from snipdedup.errors import SnipError
from snipdedup.features.cosine import unit_rows
from snipdedup.features.shards import Features, open_features
from snipdedup.index.folder import Index, export_faiss
from snipdedup.index.search import Classes, LoadedIndex, Searcher, query_encoder


def found(searcher: Searcher, index: Index, features: Features, k: int) -> tuple:
    x = index.encoder.encode(features.read(0, features.rows))
    D, I = searcher.places(x, *searcher.probe(x, 0), k)
    I[I >= 0] = searcher.lists.rows(I[I >= 0])
    return D, I


def test_neighbours_are_those_of_plain_faiss_on_the_export(real_index, tmp_path):
    index, features = real_index
    export_faiss(index, tmp_path / "x.faiss")
    plain = faiss.read_index(str(tmp_path / "x.faiss"))
    plain.nprobe = 5
    x = unit_rows(features.read(0, features.rows))
    D0, I0 = plain.search(x, 10)
    D, I = found(Searcher(index, index.lists(), 5), index, features, 10)
    np.testing.assert_allclose(D, D0, atol=1e-5)
    assert (I == I0).mean() > 0.995  # the others tie
    differ = np.nonzero(I != I0)
    decoded = plain.sa_decode(plain.sa_encode(x))
    for ids in (I, I0):
        at = np.square(x[differ[0]] - decoded[ids[differ]]).sum(1)
        np.testing.assert_allclose(at, D0[differ], atol=1e-5)


def test_recall_against_brute_force(real_index):
    index, features = real_index
    x = unit_rows(features.read(0, features.rows))
    _, I = found(Searcher(index, index.lists(), 64), index, features, 10)
    queries = np.random.default_rng(0).choice(features.rows, 300, replace=False)
    truth = np.argsort(-(x[queries] @ x.T), axis=1)[:, :10]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(I[queries], truth, strict=True)])
    assert recall > 0.55  # plain faiss with IVF512, PQ16 on all shards: .594


def test_what_is_not_there_is_minus_one(tmp_path):
    features = open_features(clustered(5, 8))
    index = make(features, tmp_path / "x", nlist=2, m=2)
    D, I = found(Searcher(index, index.lists(), 9), index, features, 8)
    assert (I[:, 5:] == -1).all()
    assert np.isinf(D[:, 5:]).all()
    np.testing.assert_array_equal(np.sort(I[:, :5], axis=1), np.tile(np.arange(5), (5, 1)))


def test_self_adc_is_the_distance_to_the_row_s_own_code(small_index):
    index, features = small_index
    x = unit_rows(features.read(0, 1500))
    plain = faiss.read_index(str(index.folder / "quantizer.faiss"))
    expected = np.square(x - plain.sa_decode(plain.sa_encode(x))).sum(1)
    queries = LoadedIndex(index, features, 4).queries
    np.testing.assert_allclose(queries((0, 1500)).own, expected, atol=1e-6)
    np.testing.assert_array_equal(queries((700, 1500)).own, queries((0, 1500)).own[700:])


def test_rows_of_one_code_are_one_entry_and_linked_to_the_smallest(small_index):
    index = small_index[0]
    lists = index.lists()
    classes = Classes.of(lists)
    alone = classes.lists
    firsts = {}
    of = lists.list_at(np.arange(len(lists.ids)))
    for number, code, row in zip(of, lists.codes, lists.rows(slice(None)), strict=True):
        firsts.setdefault((number, code.tobytes()), []).append(int(row))
    kept = {
        (int(n), c.tobytes()): int(r)
        for n, c, r in zip(
            alone.list_at(np.arange(len(alone.ids))),
            alone.codes,
            alone.rows(slice(None)),
            strict=True,
        )
    }
    assert kept == {key: min(rows) for key, rows in firsts.items()}
    linked = {(int(a), int(b)) for block in classes.links() for a, b in zip(*block, strict=True)}
    assert linked == {(min(rows), r) for rows in firsts.values() for r in rows if r != min(rows)}


def test_features_that_are_not_those_of_the_index_are_refused(small_index):
    index, features = small_index
    rows = features.read(0, features.rows)
    with pytest.raises(SnipError, match="holds 2,000 rows of 1 shards, FEATURES has 1,999"):
        query_encoder(index, open_features(rows[:-1]), None)
    with pytest.raises(SnipError, match=r"rows 16 wide, FEATURES are 8 wide.*--encoder"):
        query_encoder(index, open_features(rows[:, :8].copy()), None)


def test_an_encoder_that_is_not_the_index_s_own_is_refused(tmp_path):
    from snipdedup.encoder.network import Encoder, Network

    for name in ("own", "other"):
        Encoder(Network(16, 8, 8)).save(tmp_path / name, {})
    features = open_features(clustered(300, 16))
    index = make(features, tmp_path / "x", encoder=str(tmp_path / "own"), nlist=4)
    given = query_encoder(index, features, str(tmp_path / "own"))
    assert given is query_encoder(index, features, None) is index.encoder
    with pytest.raises(SnipError, match=r"other is not the one that .*x was built with"):
        query_encoder(index, features, str(tmp_path / "other"))
