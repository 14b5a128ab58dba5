"""Quantisers: blocks that fix bits, k-means, codebooks, and files that are not what they claim."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
from samples import clustered

from snipdedup.errors import SnipError
from snipdedup.features.cosine import unit_rows
from snipdedup.features.shards import open_features
from snipdedup.index.kmeans import draw_sample, kmeans
from snipdedup.index.quantizer import (
    default_m,
    default_nlist,
    read_quantiser,
    train_quantiser,
    write_quantiser,
)
from snipdedup.parallel import library_threads


@pytest.mark.parametrize(
    ("rows", "points", "nlist"),
    [(1, 1, 1), (9, 9, 1), (100, 100, 2), (58_977, 58_977, 1024), (1_000_000, 262_144, 4096),
     (2_100_000_000, 4_194_304, 65_536), (10**6, 39 * 128, 128), (10**6, 39 * 128 - 1, 64)],
)  # fmt: skip
def test_default_nlist(rows, points, nlist):
    assert default_nlist(rows, points) == nlist


def test_default_m_divides_the_width():
    assert [default_m(dim) for dim in (128, 512, 3, 100, 17, 1)] == [16, 16, 3, 10, 1, 1]


def test_kmeans_is_as_good_as_faiss_and_the_same_on_any_threads():
    x = clustered(5000, 16)
    ours = kmeans(x, 32, iterations=8, seed=3, threads=1)
    np.testing.assert_array_equal(ours, kmeans(x, 32, iterations=8, seed=3, threads=2))
    assert not np.array_equal(ours, kmeans(x, 32, iterations=8, seed=4, threads=2))
    theirs = faiss.Kmeans(16, 32, niter=8, seed=3)
    theirs.train(x)
    coarse = faiss.IndexFlatL2(16)
    coarse.add(ours)
    assert coarse.search(x, 1)[0].sum() < 1.1 * theirs.obj[-1]


def test_kmeans_leaves_no_list_empty_where_rows_suffice():
    x = np.repeat(clustered(64, 4), 50, axis=0)
    centroids = kmeans(x, 48, iterations=8, seed=0, threads=1)
    assert np.isfinite(centroids).all()


def test_spherical_centroids_are_unit_means_and_none_is_empty():
    x = unit_rows(np.repeat(clustered(64, 4), 50, axis=0))
    ours = kmeans(x, 48, iterations=20, seed=0, threads=1, spherical=True)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)
    few = kmeans(unit_rows(clustered(500, 8)), 5, iterations=20, seed=0, threads=2, spherical=True)
    rows = unit_rows(clustered(500, 8))
    nearest = (rows @ few.T).argmax(1)
    means = np.stack([rows[nearest == list_].mean(0) for list_ in range(5)])
    assert (unit_rows(means) * few).sum(1).min() > 0.99


def test_the_sample_holds_distinct_good_rows_only():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 8)).astype(np.float16)
    x[200:400] = x[7]
    x[450] = 0
    x[451, 3] = np.nan
    sample = draw_sample(open_features(x), lambda b: b.astype(np.float32), 10_000, 0)
    expected = np.concatenate([x[:200], x[400:450], x[452:]]).astype(np.float32)
    np.testing.assert_array_equal(sample, expected)
    small = draw_sample(open_features(x), lambda b: b.astype(np.float32), 50, 1)
    assert small.shape == (50, 8)
    assert len(np.unique(small, axis=0)) == 50


def test_no_good_row_to_train_on():
    with pytest.raises(SnipError, match="no row to train"):
        draw_sample(open_features(np.zeros((5, 4), np.float32)), lambda b: b, 10, 0)


@pytest.mark.parametrize("nbits", [4, 5, 8])
def test_codes_are_what_faiss_itself_would_write(tmp_path, nbits):
    x = clustered(2000, 16)
    quantiser = train_quantiser(x, nlist=8, m=4, nbits=nbits, seed=0, threads=2)
    write_quantiser(tmp_path / "q.faiss", quantiser)
    plain = faiss.read_index(str(tmp_path / "q.faiss"))
    assert plain.ntotal == 0
    assert plain.is_trained
    again = read_quantiser(tmp_path / "q.faiss")
    lists = again.assign(x, 1)[1][:, 0]
    codes = again.encode(x, lists)
    np.testing.assert_array_equal(codes, plain.sa_encode(x)[:, plain.coarse_code_size() :])
    decoded = again.decode(lists, codes)
    np.testing.assert_allclose(decoded, plain.sa_decode(plain.sa_encode(x)), atol=1e-6)
    assert (
        np.square(x - decoded).sum(1).mean()
        < 0.8 * np.square(x - again.centroids[lists]).sum(1).mean()
    )


def test_fewer_rows_than_codewords_are_coded_exactly():
    x = clustered(9, 8)
    quantiser = train_quantiser(x, nlist=1, m=2, nbits=8, seed=0, threads=1)
    lists = np.zeros(9, np.int64)
    np.testing.assert_allclose(quantiser.decode(lists, quantiser.encode(x, lists)), x, atol=1e-5)


def faiss_file(path, kind: str) -> None:
    x = clustered(1200, 16)
    index = {
        "flat": lambda: faiss.IndexFlatL2(16),
        "opq": lambda: faiss.index_factory(16, "RR16,IVF4,PQ4x4"),
        "ip": lambda: faiss.index_factory(16, "IVF4,PQ4x4", faiss.METRIC_INNER_PRODUCT),
        "ivf": lambda: faiss.index_factory(16, "IVF4,Flat"),
        "wide": lambda: faiss.index_factory(16, "IVF4,PQ1x9"),
        "untrained": lambda: faiss.index_factory(16, "IVF4,PQ4x4"),
    }[kind]()
    if kind == "wide":
        index.quantizer.add(x[:4])
        index.is_trained = True
    elif kind != "untrained":
        with library_threads(1):
            index.train(x)
        index.add(x)
    faiss.write_index(index, str(path))


@pytest.mark.parametrize(
    ("kind", "says"),
    [("flat", "IndexFlat"), ("opq", "IndexPreTransform"), ("ip", "another metric"),
     ("ivf", "IndexIVFFlat"), ("wide", "9 bits"), ("untrained", "untrained")],
)  # fmt: skip
def test_other_faiss_files_are_refused(tmp_path, kind, says):
    faiss_file(tmp_path / "x.faiss", kind)
    with pytest.raises(SnipError, match=rf"x\.faiss: expected .*IndexIVFPQ.*found .*{says}"):
        read_quantiser(tmp_path / "x.faiss")


@pytest.mark.parametrize("content", [b"", b"garbage", b"IwPQ" + bytes(200)])
def test_files_that_are_no_index_are_refused(tmp_path, content):
    (tmp_path / "x.faiss").write_bytes(content)
    with pytest.raises(SnipError, match=r"x\.faiss"):
        read_quantiser(tmp_path / "x.faiss")
    with pytest.raises(SnipError, match="no such file"):
        read_quantiser(tmp_path / "absent.faiss")


def test_many_lists_are_found_by_a_graph_that_nearly_always_agrees(monkeypatch, tmp_path):
    x = clustered(2000, 16)
    exact = train_quantiser(x, nlist=64, m=4, nbits=4, seed=0, threads=1)
    monkeypatch.setattr("snipdedup.index.kmeans.GRAPH_LISTS", 64)
    one, two = (
        train_quantiser(x, nlist=64, m=4, nbits=4, seed=0, threads=threads) for threads in (1, 2)
    )
    assert isinstance(one.coarse, faiss.IndexHNSWFlat)
    assert not isinstance(exact.coarse, faiss.IndexHNSWFlat)
    for name in ("centroids", "nlist", "m"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    D, I = one.assign(x, 8)
    for a, b in zip((D, I), two.assign(x, 8), strict=True):
        np.testing.assert_array_equal(a, b)
    squares = np.square(x[:, None, :] - one.centroids[None]).sum(2)
    np.testing.assert_allclose(D, np.take_along_axis(squares, I, 1), atol=1e-4)
    assert (I[:, 0] == squares.argmin(1)).mean() > 0.99
    assert one.assign(x[:5], 60)[1].min() >= 0  # more lists than a narrow search would find
    path = tmp_path / "quantizer.faiss"
    write_quantiser(path, one)
    again = read_quantiser(path)
    assert isinstance(again.coarse, faiss.IndexHNSWFlat)
    np.testing.assert_array_equal(again.assign(x, 8)[1], I)
