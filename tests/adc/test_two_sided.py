"""The two-sided rule: against what the rows themselves say."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
from samples import candidates, labels, make

from snipdedup import native
from snipdedup.adc import two_sided
from snipdedup.features.cosine import unit_rows
from snipdedup.features.shards import open_features
from snipdedup.index.folder import Index
from snipdedup.index.search import LoadedIndex

ROWS, LISTS = 300, 4


@pytest.fixture(scope="module")
def rows():
    x = unit_rows(np.random.default_rng(0).normal(size=(ROWS, 8)).astype(np.float32))
    x[7] = x[3]
    x[20:30] = x[10:20] + np.float32(0.02)
    return x * np.linspace(0.5, 2, ROWS, dtype=np.float32)[:, None]  # norms must cancel out


@pytest.fixture(scope="module")
def index(rows, tmp_path_factory):
    return make(open_features(rows), tmp_path_factory.mktemp("two_sided") / "index", nlist=LISTS)


def views_of(index: Index, rows: np.ndarray, folder, k: int, nprobe: int) -> two_sided.Views:
    return two_sided.record_views(LoadedIndex(index, open_features(rows), nprobe), k, folder, 1)


def plain(index: Index, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit rows, their codes decoded by plain faiss, and the centroids."""
    held = faiss.read_index(str(index.folder / "quantizer.faiss"))
    x = unit_rows(rows)
    q = held.sa_decode(held.sa_encode(x))
    return x.astype(float), q.astype(float), held.quantizer.reconstruct_n(0, LISTS).astype(float)


def test_views_are_projections_of_the_rows(index, rows, tmp_path):
    views = views_of(index, rows, tmp_path, 12, 2)
    x, q, centroids = plain(index, rows)
    vectors = np.concatenate([q[views.loaded.classes.lists.rows(slice(None))], centroids])
    assert views.ids.shape == views.e.shape == (ROWS, 15)
    assert (views.ids[:, 0] >= 0).all()
    assert (views.ids[:, 1:] != views.ids[:, :1]).all()
    for a, b in [(0, 1), (10, 20), (200, 299)]:
        common, at_a, at_b = np.intersect1d(views.ids[a], views.ids[b], return_indices=True)
        for z, i, j in zip(common, at_a, at_b, strict=True):
            if z >= 0:
                along = (x[a] - x[b]) @ vectors[z]
                assert views.e[a, i] - views.e[b, j] == pytest.approx(along, abs=1e-5)


def test_the_mean_of_two_differences_is_that_of_the_rows(index, rows, tmp_path):
    views = views_of(index, rows, tmp_path, ROWS, LISTS)
    shared = views.loaded.shared
    assert np.flatnonzero(shared).tolist() == [3, 7]
    x, q, _ = plain(index, rows)
    expected = np.einsum("ijd,ijd->ij", x[:, None] - x, q[:, None] - q)
    np.fill_diagonal(expected, np.inf)
    everyone = np.arange(ROWS)
    found = two_sided.best_view_scores(views, everyone, 1, common=0.0)
    np.testing.assert_allclose(found[~shared], expected.min(axis=1)[~shared], atol=1e-5)
    few = views_of(index, rows, tmp_path / "few", 4, LISTS)
    fewer = two_sided.best_view_scores(few, everyone, 1, common=0.0)
    assert (fewer >= found - 1e-5).all()  # where one of two names the other, its own counts more
    assert (fewer > found + 1e-5).any()


def test_all_common_codes_together_know_the_distance(index, rows, tmp_path, monkeypatch):
    """Where both rows name everything, nothing of x − y is unknown: r is more than d."""
    monkeypatch.setattr(two_sided, "COMMON", ROWS)
    views = views_of(index, rows, tmp_path, ROWS, LISTS)
    a, b = np.arange(10, 20), np.arange(20, 30)
    names = views.ids[b, 0]
    found = two_sided.common_lengths(views, a, names, np.full(10, np.inf))
    x, _, _ = plain(index, rows)
    r = (views.ids[a] >= 0).sum(axis=1)
    expected = np.square(x[a] - x[b]).sum(axis=1) * np.sqrt(8 / r)
    np.testing.assert_allclose(found, expected, rtol=0.01)


def test_the_score_by_hand(index, rows, tmp_path):
    """One pair, with few common codes, against least squares by numpy."""
    views = views_of(index, rows, tmp_path, 6, 2)
    x, q, centroids = plain(index, rows)
    vectors = np.concatenate([q[views.loaded.classes.lists.rows(slice(None))], centroids])
    checked = 0
    for row in range(0, ROWS, 10):
        pairs = two_sided.passing_pairs(views, np.array([row]), 1e9)
        for column, score in zip(pairs.column, pairs.score, strict=True):
            place = views.ids[row, 1 + column]
            other = int(views.loaded.classes.lists.rows(np.array([place]))[0])
            if views.ids[row, 0] not in views.ids[other, 1:7]:
                continue
            common = np.intersect1d(views.ids[row], views.ids[other])
            Q = vectors[common[common >= 0]]
            v = Q @ (x[row] - x[other])
            ridge = two_sided.RIDGE * np.square(Q).sum(axis=1).mean()
            length = v @ np.linalg.solve(Q @ Q.T + ridge * np.eye(len(Q)), v)
            mean = (x[row] - x[other]) @ (q[row] - q[other])
            assert score == pytest.approx(mean + length * np.sqrt(8 / len(Q)), abs=2e-4)
            checked += 1
    assert checked > 30


def test_a_margin_cuts_what_is_judged(index, rows, tmp_path):
    views = views_of(index, rows, tmp_path, 6, 2)
    everyone = np.arange(ROWS)
    every, few = (two_sided.passing_pairs(views, everyone, margin) for margin in (1e9, 0.3))
    assert 0 < len(few.at) < len(every.at)
    kept = {(a, c) for a, c, s in zip(*every, strict=True) if s <= 0.3}
    assert kept == {(a, c) for a, c, _ in zip(*few, strict=True)}
    best = np.full(ROWS, np.inf)
    np.minimum.at(best, every.at, every.score)
    shared = views.loaded.shared
    found = two_sided.best_view_scores(views, everyone, 2)
    np.testing.assert_allclose(found[~shared], best[~shared], rtol=1e-6)
    assert (found[shared] == 0).all()


def test_a_crowd_larger_than_k_is_one_group(tmp_path, monkeypatch):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((1500, 16)).astype(np.float32)
    x[200:500] = x[3] + 0.15 * rng.standard_normal((300, 16))
    features = open_features(x)
    index = make(features, tmp_path / "x", nlist=2, m=8)
    monkeypatch.setattr("snipdedup.adc.pairs.default_margin", lambda *_, **__: 0.02)
    _, pairs, flags = candidates(index, features, k=4, margin=0.5, nprobe=2, rule="two_sided")
    assert np.bincount(pairs.ravel()).max() > 32  # far more than k
    crowd = np.append(3, np.arange(200, 500))
    assert flags[crowd].mean() > 0.95
    sizes = np.bincount(labels(pairs, len(x))[crowd])
    assert sizes.max() > 0.95 * len(crowd)


@pytest.fixture
def kernels():
    """Put back the kernels in use."""
    before = native.used()
    yield
    native.use(before)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", native.names())
def test_elimination_solves_as_lapack_does(name):
    native.use(name)
    x, y, at, Q = named(np.random.default_rng(3), rows=70, pairs=700, width=25, dim=32)
    found = native.common_lengths(x, Q, at, y, two_sided.RIDGE, np.full(700, np.inf))
    for row, names, along, length in zip(at, *y, found, strict=True):
        common, i, j = np.intersect1d(x[0][row], names, return_indices=True)
        i, j = i[common >= 0], j[common >= 0]
        v, r = (x[1][row, i] - along[j]).astype(float), max(len(i), 1)
        gram = Q[row, i].astype(float) @ Q[row, i].T
        gram += two_sided.RIDGE * np.trace(gram) / r * np.eye(len(i))
        assert length == pytest.approx(v @ np.linalg.solve(gram, v) * np.sqrt(32 / r), rel=1e-4)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("width", "dim"), [(1, 8), (2, 3), (21, 64), (25, 40), (60, 17)])
def test_all_kernels_give_the_same_lengths(width, dim):
    x, y, at, Q = named(np.random.default_rng(width), rows=40, pairs=900, width=width, dim=dim)
    native.use("numpy")
    whole = native.common_lengths(x, Q, at, y, two_sided.RIDGE, np.full(900, np.inf))
    for limit in (np.inf, np.median(whole)):
        for name in native.names():
            native.use(name)
            found = native.common_lengths(x, Q, at, y, two_sided.RIDGE, np.full(900, limit))
            np.testing.assert_array_equal(found <= limit, whole <= limit)
            np.testing.assert_array_equal(found[found <= limit], whole[whole <= limit])
            assert (found <= whole).all()


def named(rng: np.random.Generator, *, rows: int, pairs: int, width: int, dim: int):
    """Rows x and y with random names, some of them common, and products with what they name."""

    def side(count: int) -> tuple[np.ndarray, np.ndarray]:
        names = rng.permuted(np.tile(np.arange(2 * width), (count, 1)), axis=1)[:, :width]
        names[rng.random(names.shape) < 0.1] = -1
        return names, rng.normal(size=names.shape).astype(np.float32)

    x, y = side(rows), side(pairs)
    y[0][:3] = -1  # nothing in common
    vectors = rng.normal(size=(2 * width, dim)).astype(np.float32)
    Q = np.where(x[0][:, :, None] >= 0, vectors[x[0]], np.float32(0))
    return x, y, np.sort(rng.integers(0, rows, pairs)), Q


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("residual", [True, False])
def test_names_are_decoded_as_faiss_does(index, residual):
    quantiser, lists = index.quantiser, index.lists()
    names = np.random.default_rng(0).integers(-1, len(lists.ids) + LISTS, (200, 7))
    places = np.clip(names, 0, len(lists.ids) - 1)
    expected = quantiser.ivfpq.pq.decode(lists.codes[places.ravel()])
    if residual:
        expected += quantiser.centroids[lists.list_at(places.ravel())]
    expected = expected.reshape(200, 7, -1)
    expected[names < 0] = 0
    beyond = names >= len(lists.ids)
    expected[beyond] = quantiser.centroids[names[beyond] - len(lists.ids)]
    tables = lists.codes, lists.starts, quantiser.centroids, quantiser.words
    for name in native.names():
        native.use(name)
        np.testing.assert_array_equal(native.decode(names, *tables, residual), expected)
