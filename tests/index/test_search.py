"""Search and the adaptive threshold: against plain faiss, brute force, and by hand."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import faiss
import numpy as np
import pytest
from samples import candidates, clustered, collected, labels, make, wanted

from snipdedup.adc import threshold, two_sided
from snipdedup.adc.threshold import calibrate, default_margin, passes, true_duplicates
from snipdedup.deduplication import adc_method as chain
from snipdedup.errors import SnipError, UsageError
from snipdedup.features.cosine import unit_rows
from snipdedup.features.shards import Features, open_features
from snipdedup.index import search
from snipdedup.index.export import export_faiss
from snipdedup.index.folder import Index
from snipdedup.index.search import Classes, Searcher, feature_queries


def with_copies(rows: int = 2000, copies: int = 300) -> np.ndarray:
    """Random directions; `copies` rows equal row 5, and each of rows 10 to 59 has a near copy."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((rows, 16)).astype(np.float32)
    x[rng.choice(np.arange(1000, rows), copies, replace=False)] = x[5]
    x[500:550] = x[10:60] + 0.02 * rng.standard_normal((50, 16))
    return x


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Index, Features]:
    features = open_features(with_copies())
    return make(features, tmp_path_factory.mktemp("small") / "x", nlist=4), features


@pytest.fixture(scope="module")
def real(data, tmp_path_factory) -> tuple[Index, Features]:
    names = [str(data / "keyframes" / "img_emb" / f"img_emb_000{n}.npy") for n in (0, 1)]
    features = open_features(names)
    out = tmp_path_factory.mktemp("real") / "x"
    return make(features, out, nlist=64, m=16, threads=2, train_rows=6000), features


def found(searcher: Searcher, index: Index, features: Features, k: int) -> tuple:
    source = feature_queries(index, index.space, features)
    parts = list(searcher.search(source, k, 2))
    return np.concatenate([D for _, D, _ in parts]), np.concatenate([I for _, _, I in parts])


def test_neighbours_are_those_of_plain_faiss_on_the_export(real, tmp_path):
    index, features = real
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


def test_recall_against_brute_force(real):
    index, features = real
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


def test_self_adc_is_the_distance_to_the_row_s_own_code(small):
    index, features = small
    x = unit_rows(features.read(0, 1500))
    plain = faiss.read_index(str(index.folder / "quantizer.faiss"))
    expected = np.square(x - plain.sa_decode(plain.sa_encode(x))).sum(1)
    load = feature_queries(index, index.space, features).load
    np.testing.assert_allclose(load((0, 1500)).own, expected, atol=1e-6)
    np.testing.assert_array_equal(load((700, 1500)).own, load((0, 1500)).own[700:])


def test_the_rules_by_hand():
    # x = 0, codes at .5 (its own), .6 and 1.0 on a line: squared distances .25, .36, 1
    D, own = np.array([[0.25, 0.36, 1.0, np.inf]], np.float32), np.array([0.25], np.float32)
    cases = {
        ("difference", 0.1): [True, False, False, False],
        ("difference", 0.12): [True, True, False, False],
        ("difference", 0.75): [True, True, True, False],
        ("ratio", 1.4): [True, False, False, False],
        ("ratio", 1.5): [True, True, False, False],
    }
    for (rule, margin), expected in cases.items():
        assert passes(D, own, rule, margin).tolist() == [expected], (rule, margin)
    between = passes(D, np.zeros(1, np.float32), "symmetric", 0.3)  # of codes: D alone counts
    assert between.tolist() == [[True, False, False, False]]
    exact = passes(np.zeros((1, 1), np.float32), np.zeros(1, np.float32), "ratio", 1.0)
    assert exact.all()  # a row that equals its code


def test_calibration_takes_the_highest_recall_at_the_wanted_precision():
    best = np.array([0.5, 0.1, 0.2, 0.3, 0.3, 0.4, np.inf], np.float32)
    truth = np.array([1, 1, 1, 0, 1, 0, 1], bool)
    # flagged up to .1: 1/1, .2: 2/2, .3 (two rows tie): 3/4, .4: 3/5, .5: 4/6
    margin, reached = calibrate(best, truth, 0.7)
    assert margin == np.float32(0.3)
    assert (reached["flagged"], reached["precision"], reached["recall"]) == (4, 0.75, 0.6)
    low, high = reached["precision_interval"]  # of 3 of 4, from tables of Clopper and Pearson
    assert (round(low, 3), round(high, 3)) == (0.194, 0.994)
    assert calibrate(best, truth, 0.76)[0] == np.float32(0.2)
    assert calibrate(best, truth, 0.5)[0] == np.float32(0.5)
    margin, reached = calibrate(best, ~truth, 0.9)  # nothing is that precise
    assert not reached["reached"]
    assert margin == np.float32(0.4)
    assert calibrate(np.full(3, np.inf, np.float32), truth[:3], 0.9)[1]["flagged"] == 0


def test_default_margins_follow_size_precision_and_threshold():
    at = threshold.ROWS["difference"]
    assert default_margin("difference", 8, precision=0.91, threshold=0.95) == at[8][1]
    assert default_margin("difference", 64, precision=0.99, threshold=0.95) == at[32][2]
    half = default_margin("difference", 16, precision=0.81, threshold=0.975)
    assert half == pytest.approx(at[16][0] / 2)
    between = default_margin("ratio", 6, precision=0.91, threshold=0.95)
    assert threshold.ROWS["ratio"][4][1] < between < threshold.ROWS["ratio"][8][1]
    assert default_margin("ratio", 8, precision=0.91, threshold=1.0) == 1
    encoded = default_margin("symmetric", 4, precision=0.91, threshold=0.95, encoded=True)
    assert encoded == threshold.DESCRIPTORS["symmetric"][4][1]


def test_truth_is_that_of_brute_force(real, monkeypatch):
    index, features = real
    del index
    sample = np.arange(0, features.rows, 7)
    x = unit_rows(features.read(0, features.rows))
    cosine = x[sample] @ x.T
    cosine[np.arange(len(sample)), sample] = -1
    best = cosine.max(axis=1)
    truth = true_duplicates(features, sample, 0.95, 2)
    clear = np.abs(best - 0.95) > 1e-5
    np.testing.assert_array_equal(truth[clear], best[clear] >= 0.95)
    monkeypatch.setattr(threshold, "TRUTH_ROWS", 100)
    np.testing.assert_array_equal(true_duplicates(features, sample, 0.95, 1), truth)


def test_rows_of_one_code_are_one_entry_and_linked_to_the_smallest(small):
    index = small[0]
    lists = index.lists()
    classes = Classes.of(lists)
    alone = classes.lists
    firsts = {}
    of = lists.list_of(0, len(lists.ids))
    for number, code, row in zip(of, lists.codes, lists.rows(slice(None)), strict=True):
        firsts.setdefault((number, code.tobytes()), []).append(int(row))
    kept = {
        (int(n), c.tobytes()): int(r)
        for n, c, r in zip(
            alone.list_of(0, len(alone.ids)), alone.codes, alone.rows(slice(None)), strict=True
        )
    }
    assert kept == {key: min(rows) for key, rows in firsts.items()}
    linked = {(int(a), int(b)) for block in classes.links() for a, b in zip(*block, strict=True)}
    assert linked == {(min(rows), r) for rows in firsts.values() for r in rows if r != min(rows)}


@pytest.mark.parametrize("features_there", [True, False])
def test_300_copies_are_joined_with_k_8(small, features_there):
    index, features = small
    adc = candidates(index, features if features_there else None, k=8, margin=1e-4, nprobe=2)
    pairs = collected(adc)
    copies = np.flatnonzero((features.read(0, features.rows) == features.read(5, 6)).all(axis=1))
    assert len(copies) == 301
    assert len(np.unique(labels(pairs, features.rows)[copies])) == 1
    assert adc.flags[copies].all()
    assert adc.rule == ("difference" if features_there else "symmetric")
    assert set(np.flatnonzero(adc.flags)) <= set(pairs.ravel())


def test_a_group_of_many_codes_is_found_whole_with_small_k(tmp_path):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((1500, 16)).astype(np.float32)
    x[200:500] = x[3] + 0.15 * rng.standard_normal((300, 16))
    features = open_features(x)
    index = make(features, tmp_path / "x", nlist=2, m=8)
    assert len(Classes.of(index.lists()).lists.ids) > 1300
    few, many = (
        collected(candidates(index, features, k=k, margin=0.02, nprobe=2)) for k in (2, 1024)
    )
    np.testing.assert_array_equal(few, many)
    assert np.bincount(few.ravel()).max() > 32  # far more than k


def test_pairs_and_flags_are_those_of_a_plain_loop(small):
    index, features = small
    margin = 0.05
    adc = candidates(index, features, margin=margin, nprobe=4, k=1024)
    plain = faiss.read_index(str(index.folder / "quantizer.faiss"))
    x = unit_rows(features.read(0, features.rows))
    q = plain.sa_decode(plain.sa_encode(x))
    expected, unsure = set(), set()
    for a in range(features.rows):
        d = np.square(x[a] - q).sum(1) - np.square(x[a] - q[a]).sum()
        for b in np.flatnonzero(d <= margin + 1e-5):
            if a != b:
                (expected if d[b] <= margin - 1e-5 else unsure).add((min(a, b), max(a, b)))
    got = set(map(tuple, collected(adc).T.tolist()))
    assert expected <= got <= expected | unsure


@pytest.mark.parametrize("rule", ["difference", "mutual"])
def test_the_same_pairs_for_any_threads_and_blocks(real, monkeypatch, rule):
    index, features = real
    one = candidates(index, features, calibration_rows=500, rule=rule)
    first = collected(one), one.flags, one.margin
    monkeypatch.setattr(chain, "QUERY_ROWS", 1024)
    monkeypatch.setattr(search, "QUERY_ROWS", 1024)
    monkeypatch.setattr(two_sided, "QUERY_ROWS", 1024)
    monkeypatch.setattr(two_sided, "SOLVE_BYTES", 1 << 20)
    two = candidates(index, features, calibration_rows=500, threads=2, rule=rule)
    second = collected(two), two.flags, two.margin
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    alone = [candidates(index, None, threads=t) for t in (1, 2)]
    np.testing.assert_array_equal(collected(alone[0]), collected(alone[1]))


@pytest.mark.parametrize("rule", ["difference", "mutual"])
def test_the_calibrated_margin_reaches_the_precision_on_other_rows(real, rule):
    index, features = real
    adc = candidates(index, features, calibration_rows=3000, precision=0.91, rule=rule)
    assert adc.calibration["source"] == "sample"
    assert adc.calibration["precision"] >= 0.91
    sampled = threshold.calibration_sample(features.rows, wanted(calibration_rows=3000))
    others = np.setdiff1d(np.arange(features.rows), sampled)
    truth = true_duplicates(features, others, 0.95, 2)
    flags = adc.flags[others]
    assert 0.86 < truth[flags].mean() < 0.96
    assert abs(flags[truth].mean() - adc.calibration["recall"]) < 0.1
    known = adc.flags[sampled]
    assert int(known.sum()) == adc.calibration["flagged"]


def test_without_duplicates_the_default_margin_is_used(tmp_path):
    features = open_features(clustered(400, 16))
    index = make(features, tmp_path / "x")
    adc = candidates(index, features, threshold=0.9999999)
    assert adc.calibration == {"source": "default"}


@pytest.mark.parametrize("rule", ["difference", "mutual"])
def test_bad_rows_ask_nothing_and_are_never_found(tmp_path, rule):
    x = with_copies(1500, 30)
    x[1200], x[1300] = 0, np.nan
    features = open_features(x)
    index = make(features, tmp_path / "x", bad_rows="keep")
    adc = candidates(index, features, margin=10.0, nprobe=16, k=200, rule=rule)
    pairs = collected(adc)
    assert not np.isin(pairs, [1200, 1300]).any()
    assert not adc.flags[[1200, 1300]].any()


def test_features_that_are_not_those_of_the_index_are_refused(small):
    index, features = small
    rows = features.read(0, features.rows)
    with pytest.raises(SnipError, match="holds 2,000 rows of 1 shards, FEATURES are 1,999"):
        candidates(index, open_features(rows[:-1]))
    with pytest.raises(SnipError, match=r"rows 16 wide, FEATURES are 8 wide.*--encoder"):
        candidates(index, open_features(rows[:, :8].copy()))


def test_a_ratio_needs_features(small):
    with pytest.raises(UsageError, match="--rule ratio needs FEATURES"):
        candidates(small[0], None, rule="ratio")


def test_the_calibration_script_says_what_it_measured(data, tmp_path, capsys):
    script = Path(__file__).parents[2] / "scripts" / "calibrate_adc.py"
    shard = data / "keyframes" / "img_emb" / "img_emb_0000.npy"
    words = ["--features", shard, "--code_bytes", 8, "--nlist", 16, "--dim", 32, "--sample", 1500]
    runpy.run_path(str(script))["main"]([*map(str, words), "--json", str(tmp_path / "x.json")])
    assert "| difference |" in capsys.readouterr().out
    written = json.loads((tmp_path / "x.json").read_text())
    at = {(r["rule"], r["wanted"]): r for r in written["results"]}
    assert len(at) == 18
    assert at["difference", 0.91]["recall"] > at["ratio", 0.91]["recall"]  # findings: always
    assert at["both ways", 0.91]["recall"] > at["difference", 0.91]["recall"]
    assert at["mutual", 0.91]["recall"] >= at["both ways", 0.91]["recall"]
    truth = true_duplicates(open_features(shard), np.arange(len(np.load(shard))), 0.95, 2)
    share = written["duplicates"] / written["judged"]
    assert share == pytest.approx(truth.mean(), abs=0.03)


def test_the_calibration_script_judges_other_shards(data, tmp_path, capsys):
    from snipdedup.encoder.network import Encoder, Network

    script = Path(__file__).parents[2] / "scripts" / "calibrate_adc.py"
    x = np.concatenate(
        [np.load(data / "keyframes" / "img_emb" / f"img_emb_000{n}.npy")[:1200] for n in (0, 1)]
    )
    for number, part in enumerate(np.split(x, [1200])):
        (tmp_path / "set").mkdir(exist_ok=True)
        np.save(tmp_path / "set" / f"img_emb_{number}.npy", part)
    Encoder(Network(512, 8, 32)).save(tmp_path / "encoder", {})
    words = ["--features", tmp_path / "set", "--code_bytes", 8, "--nlist", 8, "--train_shards", 1]
    words += ["--encoder", tmp_path / "encoder", "--json", tmp_path / "x.json"]
    runpy.run_path(str(script))["main"]([str(word) for word in words])
    assert "on the other shards" in capsys.readouterr().out
    written = json.loads((tmp_path / "x.json").read_text())
    others = [result["others"] for result in written["results"]]
    assert {other["rows"] for other in others} == {1200}
    truth = true_duplicates(open_features(tmp_path / "set"), np.arange(1200, 2400), 0.95, 2)
    assert {other["duplicates"] for other in others} == {int(truth.sum())}
    assert all(r["rows"] == 1200 for r in written["results"])


def test_an_encoder_that_is_not_the_index_s_own_is_refused(tmp_path):
    from snipdedup.encoder.network import Encoder, Network

    for name in ("own", "other"):
        Encoder(Network(16, 8, 8)).save(tmp_path / name, {})
    features = open_features(clustered(300, 16))
    index = make(features, tmp_path / "x", encoder=str(tmp_path / "own"), nlist=4)
    given = search.query_space(index, features, str(tmp_path / "own"))
    assert given is search.query_space(index, features, None) is index.space
    with pytest.raises(SnipError, match=r"other is not the one that .*x was built with"):
        search.query_space(index, features, str(tmp_path / "other"))
