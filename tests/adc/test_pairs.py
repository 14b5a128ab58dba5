"""The adaptive threshold and its pairs: against brute force, plain faiss, and by hand."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import faiss
import numpy as np
import pytest
from samples import candidates, clustered, labels, make, with_copies

from snipdedup import config
from snipdedup.adc import pairs, threshold, two_sided
from snipdedup.adc.threshold import calibrate, default_margin, scores, true_duplicates
from snipdedup.errors import UsageError
from snipdedup.features.cosine import unit_rows
from snipdedup.features.shards import open_features
from snipdedup.index import search
from snipdedup.index.search import Classes, LoadedIndex


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
        assert (scores(D, own, rule) <= margin).tolist() == [expected], (rule, margin)
    between = scores(D, np.zeros(1, np.float32), "symmetric") <= 0.3  # of codes: D alone counts
    assert between.tolist() == [[True, False, False, False]]
    exact = scores(np.zeros((1, 1), np.float32), np.zeros(1, np.float32), "ratio")
    assert (exact <= 1).all()  # a row that equals its code


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

    def margin(rule, size, precision=0.91, cosine=0.95, encoded=False):
        return default_margin(rule, size, precision=precision, threshold=cosine, encoded=encoded)

    assert margin("difference", 8) == at[8][1]
    assert margin("difference", 64, 0.99) == at[32][2]
    assert margin("difference", 16, 0.81, 0.975) == pytest.approx(at[16][0] / 2)
    ratios = threshold.ROWS["ratio"]
    assert ratios[4][1] < margin("ratio", 6) < ratios[8][1]
    assert margin("ratio", 8, cosine=1.0) == 1
    encoded = margin("symmetric", 4, encoded=True)
    assert encoded == threshold.DESCRIPTORS["symmetric"][4][1]


def test_truth_is_that_of_brute_force(real_index):
    features = real_index[1]
    sample = np.arange(0, features.rows, 7)
    x = unit_rows(features.read(0, features.rows))
    cosine = x[sample] @ x.T
    cosine[np.arange(len(sample)), sample] = -1
    best = cosine.max(axis=1)
    truth = true_duplicates(features, sample, 0.95, 2)
    clear = np.abs(best - 0.95) > 1e-5
    np.testing.assert_array_equal(truth[clear], best[clear] >= 0.95)


@pytest.mark.parametrize("features_there", [True, False])
def test_300_copies_are_joined_with_k_8(small_index, features_there):
    index, features = small_index
    there = features if features_there else None
    rule, found, flags = candidates(index, there, k=8, margin=1e-4, nprobe=2)
    copies = np.flatnonzero((features.read(0, features.rows) == features.read(5, 6)).all(axis=1))
    assert len(copies) == 301
    assert len(np.unique(labels(found, features.rows)[copies])) == 1
    assert flags[copies].all()
    assert rule.name == ("difference" if features_there else "symmetric")
    assert set(np.flatnonzero(flags)) <= set(found.ravel())


def test_a_group_of_many_codes_is_found_whole_with_small_k(tmp_path):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((1500, 16)).astype(np.float32)
    x[200:500] = x[3] + 0.15 * rng.standard_normal((300, 16))
    features = open_features(x)
    index = make(features, tmp_path / "x", nlist=2, m=8)
    assert len(Classes.of(index.lists()).lists.ids) > 1300
    few, many = (candidates(index, features, k=k, margin=0.02, nprobe=2).pairs for k in (2, 1024))
    np.testing.assert_array_equal(few, many)
    assert np.bincount(few.ravel()).max() > 32  # far more than k


def test_pairs_and_flags_are_those_of_a_plain_loop(small_index):
    index, features = small_index
    margin = 0.05
    found = candidates(index, features, margin=margin, nprobe=4, k=1024).pairs
    plain = faiss.read_index(str(index.folder / "quantizer.faiss"))
    x = unit_rows(features.read(0, features.rows))
    q = plain.sa_decode(plain.sa_encode(x))
    expected, unsure = set(), set()
    for a in range(features.rows):
        d = np.square(x[a] - q).sum(1) - np.square(x[a] - q[a]).sum()
        for b in np.flatnonzero(d <= margin + 1e-5):
            if a != b:
                (expected if d[b] <= margin - 1e-5 else unsure).add((min(a, b), max(a, b)))
    got = set(map(tuple, found.T.tolist()))
    assert expected <= got <= expected | unsure


@pytest.mark.parametrize("rule", ["difference", "two_sided"])
def test_the_same_pairs_for_any_threads_and_blocks(real_index, monkeypatch, rule):
    index, features = real_index
    one = candidates(index, features, calibration_rows=500, rule=rule)
    for module in (pairs, search, two_sided):
        monkeypatch.setattr(module, "QUERY_ROWS", 1024)
    monkeypatch.setattr(two_sided, "SOLVE_BYTES", 1 << 20)
    two = candidates(index, features, calibration_rows=500, threads=2, rule=rule)
    assert one.rule == two.rule
    np.testing.assert_array_equal(one.flags, two.flags)
    np.testing.assert_array_equal(one.pairs, two.pairs)
    if rule == "difference":
        alone = [candidates(index, None, threads=t).pairs for t in (1, 2)]
        np.testing.assert_array_equal(alone[0], alone[1])


@pytest.mark.parametrize("rule", ["difference", "two_sided"])
def test_the_calibrated_margin_reaches_the_precision_on_other_rows(real_index, rule):
    index, features = real_index
    found = candidates(index, features, calibration_rows=3000, precision=0.91, rule=rule)
    calibration = found.rule.calibration
    assert calibration["source"] == "sample"
    assert calibration["precision"] >= 0.91
    rng = np.random.default_rng(0)  # as the sample is drawn
    sampled = rng.choice(features.rows, 3000, replace=False, shuffle=False)
    others = np.setdiff1d(np.arange(features.rows), sampled)
    truth = true_duplicates(features, others, 0.95, 2)
    flags = found.flags[others]
    assert 0.86 < truth[flags].mean() < 0.96
    assert abs(flags[truth].mean() - calibration["recall"]) < 0.1
    assert int(found.flags[sampled].sum()) == calibration["flagged"]


def test_without_duplicates_the_default_margin_is_used(tmp_path):
    features = open_features(clustered(400, 16))
    index = make(features, tmp_path / "x")
    found = candidates(index, features, threshold=0.9999999)
    assert found.rule.calibration == {"source": "default"}


@pytest.mark.parametrize("rule", ["difference", "two_sided"])
def test_bad_rows_ask_nothing_and_are_never_found(tmp_path, rule):
    x = with_copies(1500, 30)
    x[1200], x[1300] = 0, np.nan
    features = open_features(x)
    index = make(features, tmp_path / "x", bad_rows="keep")
    _, found, flags = candidates(index, features, margin=10.0, nprobe=16, k=200, rule=rule)
    assert len(found.T) > 30
    assert not np.isin(found, [1200, 1300]).any()
    assert not flags[[1200, 1300]].any()


def test_sampled_bad_rows_score_nothing_even_where_every_other_row_is_shared(tmp_path):
    x = np.repeat(clustered(300, 16), 2, axis=0)
    x = np.concatenate([x, [np.zeros(16)], [np.full(16, np.nan)]]).astype(np.float32)
    features = open_features(x)
    loaded = LoadedIndex(make(features, tmp_path / "x", bad_rows="keep"), features, 16)
    assert loaded.class_of[600:].tolist() == [-1, -1]
    assert loaded.shared.tolist() == [True] * 600 + [False] * 2
    sample = np.array([0, 31, 599, 600, 601])
    for rule, exact in (("difference", 0), ("ratio", 1)):
        best = threshold.best_scores(loaded, sample, rule, 1)
        assert best.tolist() == [exact] * 3 + [np.inf] * 2
    views = two_sided.record_views(loaded, 4, tmp_path, 1)
    best = two_sided.best_view_scores(views, sample, 1)
    assert best.tolist() == [0] * 3 + [np.inf] * 2


def test_a_ratio_needs_features():
    with pytest.raises(UsageError, match="--rule ratio needs FEATURES"):
        config.Dedup(index="index", rule="ratio")


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
    assert at["two_sided", 0.91]["recall"] >= at["both ways", 0.91]["recall"]
    truth = true_duplicates(open_features(shard), np.arange(len(np.load(shard))), 0.95, 2)
    share = written["duplicates"] / written["judged"]
    assert share == pytest.approx(truth.mean(), abs=0.03)


def test_the_benchmark_measures_faiss_beside_it(data, tmp_path, capsys, monkeypatch):
    scripts = Path(__file__).parents[2] / "scripts"
    monkeypatch.syspath_prepend(scripts)
    shard = data / "keyframes" / "img_emb" / "img_emb_0000.npy"
    words = ["--features", shard, "--code_bytes", 8, "--nlist", 16, "--sample", 500]
    words += ["--rules", "difference", "--repeats", 1, "--json", tmp_path / "x.json"]
    runpy.run_path(str(scripts / "bench_adc.py"))["main"]([str(word) for word in words])
    assert "| 8 | difference |" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "x.json").read_text())["results"]
    assert result["faiss_cpu"] > 0
    assert 0 < result["encoder_cpu"] < result["cpu"]
    assert 0 < result["precision"] <= 1


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
