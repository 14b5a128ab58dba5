"""The benchmark's figures agree with plain references, and its page with its files."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from truth import components, cosine_table, pairs_of, save_shards, star

from snipdedup.features.shards import open_features

SCRIPTS = ROOT / "scripts"
sys.path.append(str(SCRIPTS))
bench_join, bench_recall, make_benchmarks, peers, quality, timing = (
    importlib.import_module(name)
    for name in ("bench_join", "bench_recall", "make_benchmarks", "peers", "quality", "timing")
)
PEERS = ("brute", "faiss-pq16-nprobe4", "semdedup")
THRESHOLD = 0.95


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """2,000 rows with noisy copies, heavy rows, and copies bit for bit."""
    folder = tmp_path_factory.mktemp("synthetic")
    flags = ["--rows", "2000", "--dim", "64", "--heavy_copies", "40"]
    subprocess.run(
        [sys.executable, SCRIPTS / "synthetic.py", folder, *flags], check=True, capture_output=True
    )
    return folder / "img_emb"


@pytest.fixture(scope="module")
def measured(synthetic, tmp_path_factory):
    """What a run of the script wrote, and the folder with ours' output."""
    folder = tmp_path_factory.mktemp("bench")
    flags = ["--out", folder / "tiny_run.json", "--work", folder / "work", "--repeats", "1"]
    done = subprocess.run(
        [
            sys.executable, SCRIPTS / "bench_join.py", "--features", synthetic, *flags,
            "--peers", *PEERS,
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    body = json.loads((folder / "tiny_run.json").read_text())
    return body, folder / "work" / "ours", done.stdout


@pytest.fixture(scope="module")
def table(synthetic):
    """All cosines; rows equal bit for bit have exactly 1."""
    x = np.load(synthetic / "img_emb_0000.npy")
    table = cosine_table(x)
    table[(x.view(np.uint16)[:, None] == x.view(np.uint16)[None]).all(axis=2)] = 1
    return table


def test_a_run_holds_settings_times_and_machine(measured, synthetic):
    body, work, said = measured
    assert body["name"] == "tiny run"
    assert body["data"] == {"rows": 2000, "dim": 64, "dtype": "float16", "shards": 1}
    assert set(body["results"]) == {"floor", "ours", *PEERS}
    assert body["settings"]["threshold"] == THRESHOLD
    assert body["machine"]["versions"].keys() >= {"python", "numpy", "torch", "faiss-cpu"}
    for name, result in body["results"].items():
        assert result["seconds"] > 0, name
        assert result["all_seconds"] == [result["seconds"]]
        assert result["settings"], name
        assert result["stages"], name
        assert f"| {name} |" in said or f"| **{name}** |" in said
    ours = body["results"]["ours"]
    assert {"fit", "encode", "join", "group", "write"} <= ours["stages"].keys()
    assert ours["settings"]["method"] == "join"
    assert 0 < body["results"]["floor"]["cpu_seconds"] < ours["cpu_seconds"]
    method = ours["method"]
    assert f"Ours: kernel {method['kernel']}, 1.00 visits a row, {method['candidates']:,}" in said
    assert "among its pairs: 1.0000." in said
    assert "CPU seconds: ours" in said
    assert 2**25 < ours["peak_anonymous_bytes"] < 2**33 or not sys.platform.startswith("linux")
    brute = body["results"]["brute"]
    assert brute["extrapolated"]
    text = json.dumps(body)
    assert str(synthetic) not in text
    assert str(work) not in text


def test_brute_force_counts_each_pair_once(measured):
    """All 2,000 rows are queries here: half of the comparisons would do."""
    brute = measured[0]["results"]["brute"]
    assert brute["settings"]["queries"] == 2000
    corrected = brute["process_seconds"] - brute["stages"]["compare"] / 2
    assert brute["seconds"] == pytest.approx(corrected, abs=0.1)


def test_faiss_pays_for_its_search_not_for_the_judging(measured):
    result = measured[0]["results"]["faiss-pq16-nprobe4"]
    assert result["settings"]["nlist"] == 64
    assert result["seconds"] <= result["process_seconds"] - result["stages"]["candidates"]
    assert {"project", "train", "add", "search"} <= result["stages"].keys()


def test_quality_of_ours_agrees_with_brute_force(measured, table):
    body, work, _ = measured
    pairs = pairs_of(table, THRESHOLD)
    removed = np.load(work / "is_dup.npy")
    forest = pq.read_table(work / "forest.parquet")
    found = components(2000, zip(forest["a"].to_pylist(), forest["b"].to_pylist(), strict=True))
    true = components(2000, pairs)
    first = np.argmax(table == 1, axis=1)
    stays = star(table, THRESHOLD, range(2000))[1]
    apart = [(a, b) for a, b in pairs if first[a] == a and first[b] == b]
    assert body["truth"] == {
        "full": True,
        "judged": len(set(first)),
        "distinct": len(set(first)),
        "pairs": len(apart),
        "judged_with_match": len({row for pair in pairs for row in pair} & set(first)),
        "beyond_one": 2000 - len(set(true)),
        "removed_by_star": int((~stays).sum()),
    }
    near = (table >= np.float32(THRESHOLD)) & ~np.eye(2000, dtype=bool)
    beside = [row for row in np.flatnonzero(~removed) if near[row, :row][~removed[:row]].any()]
    expected = {
        "removed": int(removed.sum()),
        "beyond_one": 2000 - len(set(found)),
        "false_pairs": 0,
        "proved": 1,
        "component_recall": (2000 - len(set(found))) / (2000 - len(set(true))),
        "pair_recall": np.mean([found[a] == found[b] for a, b in apart]),
        "overlap": removed[~stays].mean(),
        "precision": near[removed].any(axis=1).mean(),
        "covered": near[removed][:, ~removed].any(axis=1).mean(),
        "beside": len(beside),
    }
    quality_ = body["results"]["ours"]["quality"]
    assert {name: quality_[name] for name in expected} == pytest.approx(expected)
    assert quality_["component_recall"] > 0.99


def test_peers_find_most(measured):
    for name in PEERS[1:]:
        result = measured[0]["results"][name]["quality"]
        assert 0.5 < result["row_recall"] <= 1, name
        assert result["precision"] == 1, name


@pytest.fixture(scope="module")
def features(synthetic):
    return open_features(synthetic)


def test_a_sample_knows_each_pair_of_its_rows_once(features, table, monkeypatch):
    monkeypatch.setattr(quality, "BLOCK", 300)
    monkeypatch.setattr(quality, "QUERY_TILE", 70)
    for sample, most in ((400, 0), (400, 10**6)):
        truth = quality.find_truth(features, THRESHOLD, sample, most, seed=3)
        first = np.argmax(table == 1, axis=1)
        np.testing.assert_array_equal(truth.first, first)
        assert truth.full == (most > 0)
        assert truth.full or len(truth.judged) == sample
        judged = set(truth.judged.tolist())
        expected = {
            (a, b)
            for a, b in pairs_of(table, THRESHOLD)
            if first[a] == a and first[b] == b and (a in judged or b in judged)
        }
        found = list(zip(truth.a.tolist(), truth.b.tolist(), strict=True))
        assert len(found) == len(expected)
        assert {(min(p), max(p)) for p in found} == expected


def at(*degrees):
    """Rows at angles of a plane; 18 degrees are just a pair at .95."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_figures_of_a_case_worked_by_hand(tmp_path):
    # a chain 0-1-2, a copy of 0, a pair 4-5 and a row alone
    features = open_features(save_shards(tmp_path, at(0, 15, 30, 0, 90, 100, 180), [3]))
    truth = quality.find_truth(features, THRESHOLD, 10, 10**6, seed=0)
    np.testing.assert_array_equal(truth.first, [0, 1, 2, 0, 4, 5, 6])
    assert sorted(zip(truth.a, truth.b, strict=True)) == [(0, 1), (1, 2), (4, 5)]
    np.testing.assert_array_equal(truth.components(), [0, 0, 0, 0, 4, 4, 6])
    np.testing.assert_array_equal(np.flatnonzero(truth.star()), [1, 3, 5])
    # found: 1-2, 0-3 and a false pair; removed: rows 2 and 3, 6 wrongly
    a, b, removed = np.array([1, 0, 5]), np.array([2, 3, 6]), np.isin(range(7), [2, 3, 6])
    assert quality.judge(truth, features, (a, b, removed), THRESHOLD) == {
        "removed": 3,
        "beyond_one": 2,
        "false_pairs": 1,
        "proved": pytest.approx(2 / 3),
        "component_recall": 2 / 4,
        "pair_recall": pytest.approx(1 / 3),
        "pair_recall_by_row": pytest.approx((0 + 1 / 2 + 1 + 0 + 0) / 5),
        "row_recall": pytest.approx(2 / 5),
        "overlap": pytest.approx(1 / 3),
        "precision": pytest.approx(2 / 3),
        "covered": pytest.approx(2 / 3),
        "beside": 2,  # 1 beside 0, and 5 beside 4
    }
    alone = quality.judge(truth, features, (a, b, None), THRESHOLD)
    assert (alone["removed"], alone["precision"]) == (2, 1)


def test_copies_that_stay_are_beside_a_match(tmp_path):
    features = open_features(save_shards(tmp_path, at(0, 0, 0, 10, 90), []))
    truth = quality.find_truth(features, THRESHOLD, 10, 10**6, seed=0)
    nothing = np.empty(0, np.int64), np.empty(0, np.int64)
    for removed, beside in (((), 3), ((0,), 2), ((0, 1, 2), 0), ((0, 3), 1)):
        mask = np.isin(range(5), removed)
        result = quality.judge(truth, features, (*nothing, mask), THRESHOLD)
        assert result["beside"] == beside, removed


def test_best_earlier_is_the_best_of_the_rows_before():
    rng = np.random.default_rng(0)
    rows = peers.unit(rng.standard_normal((230, 8)))
    best, place = peers.best_earlier(rows, 50)
    cosines = np.where(np.tri(230, k=-1, dtype=bool), rows @ rows.T, -np.inf)
    np.testing.assert_allclose(best, cosines.max(axis=1), rtol=1e-5)
    assert (place[1:] == cosines[1:].argmax(axis=1)).mean() > 0.98
    assert (place[1:] < np.arange(1, 230)).all()


def test_possible_pairs_keep_every_true_neighbour():
    rng = np.random.default_rng(1)
    rows = peers.unit(np.repeat(rng.standard_normal((50, 16)), 4, axis=0)
                      + 0.2 * rng.standard_normal((200, 16)))  # fmt: skip
    I = rng.integers(-1, 200, (200, 40))
    a, b = peers.possible_pairs(rows[:, :12], I, 0.9)
    found = set(zip(a.tolist(), b.tolist(), strict=True))
    assert all(a < b for a, b in found)
    asked = {(min(r, o), max(r, o)) for r in range(200) for o in I[r].tolist() if o >= 0}
    true = set(pairs_of(cosine_table(rows), 0.9))
    assert found >= (asked & true)
    assert found <= asked
    assert len(asked & true) > 50


def test_rows_twice_over_hold_each_row_and_a_near_copy(tmp_path):
    x = np.random.default_rng(2).standard_normal((300, 32)).astype(np.float32)
    source = open_features(save_shards(tmp_path / "source", x, [100]))
    bench_join.write_twice(source, tmp_path / "twice", 0.05, seed=0)
    twice = open_features(tmp_path / "twice")
    rows = twice.read(0, 600).astype(np.float64)
    np.testing.assert_allclose(rows[:300], peers.unit(x), atol=1e-3)
    cosines = (rows[:300] * rows[300:]).sum(axis=1)
    assert cosines.max() < 0.9999
    assert cosines.mean() == pytest.approx(1 / np.sqrt(1 + 0.05**2), abs=1e-3)


def test_a_peer_that_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setattr(bench_join.importlib.util, "find_spec", lambda name: None)
    names, skipped = bench_join.contenders(["semhash", "faiss", "faiss-pq4-nprobe1"])
    assert names == ["floor", "ours", *peers.FAISS_NAMES]
    assert "pip install semhash" in skipped["semhash"]
    assert "skipping semhash" in capsys.readouterr().err


def test_the_time_that_stands_for_the_repeats():
    assert bench_join.middle("ours", [3.0, 1.0, 2.0]) == 2
    assert bench_join.middle("floor", [3.0, 1.0, 2.0]) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_memory_is_summed_over_the_process_and_its_children(tmp_path):
    hold = "import time; x = bytearray(100_000_000); time.sleep(.4)"
    both = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {hold!r}]); {hold}"
    timed = timing.run_timed([sys.executable, "-c", f"{both}; p.wait()"], tmp_path / "log")
    assert 200_000_000 < timed.peak < 300_000_000
    assert 0 < timed.cpu_seconds < 2 * timed.seconds
    assert timed.seconds > 0.4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_what_forked_processes_share_may_count_once(tmp_path):
    held = "import os, time; x = bytearray(100_000_000); c = os.fork(); time.sleep(1.2)"
    command = [sys.executable, "-c", f"{held}; c and os.wait()"]
    assert timing.run_timed(command, tmp_path / "log").peak > 200_000_000
    assert 100_000_000 < timing.run_timed(command, tmp_path / "log", shared_once=True).peak < 150e6


def test_a_process_that_fails_ends_the_run(tmp_path):
    with pytest.raises(SystemExit, match=r"exit status 3\nno such thing"):
        timing.run_timed(
            [sys.executable, "-c", "print('no such thing'); raise SystemExit(3)"], tmp_path / "log"
        )


def test_the_page_is_what_the_files_say():
    written = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert written == make_benchmarks.page(), "run: python scripts/make_benchmarks.py"


def test_the_page_shows_runs_in_order_of_time_and_growth_by_rows(measured, tmp_path, monkeypatch):
    body = measured[0]
    (tmp_path / "a.json").write_text(json.dumps(body))
    for rows in (4000, 1000):
        alone = {**body, "name": f"growth {rows}", "data": {**body["data"], "rows": rows}}
        alone["results"] = {name: body["results"][name] for name in ("floor", "ours")}
        (tmp_path / f"b{rows}.json").write_text(json.dumps(alone))
    page = make_benchmarks.page(tmp_path)
    lines = [line.split("|") for line in page.splitlines() if line.startswith("| ")]
    seconds = [
        float(line[2].strip(" *")) for line in lines if line[1].strip("* ") in body["results"]
    ]
    assert len(seconds) == 5
    assert all(a <= b for a, b in pairwise(seconds))
    assert page.index("growth 1000") < page.index("growth 4000")
    monkeypatch.setattr(make_benchmarks, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(sys, "argv", ["make_benchmarks.py", "--check"])
    assert make_benchmarks.main() == 1


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (1.0, "1.0000"), (0.99999, "0.999990"), (0.5, "0.5000")]
)
def test_what_is_not_quite_all_never_reads_as_all(value, text):
    assert make_benchmarks.ratio_cell(value) == text


def test_code_runs_are_told_from_join_runs_and_averaged_over_seeds():
    make_benchmarks = importlib.import_module("make_benchmarks")
    runs = [
        {"split": "random", "seed": seed, "name": "SNIP", "recall": {"16": value, "uncoded": 0.75}}
        for seed, value in enumerate((0.5, 0.625, 0.75))
    ]
    assert make_benchmarks.code_table({"runs": runs})[:3] == [
        "| split: random (3 seeds) | uncoded | 16 B |",
        "|---|---:|---:|",
        "| SNIP | 0.750 ± 0.000 | 0.625 ± 0.125 |",
    ]


def test_code_splits_share_no_row():
    bench_codes = importlib.import_module("bench_codes")
    features = open_features([np.zeros((n, 4), np.float32) + 1 for n in (40, 30, 20, 10)])
    for split in ("random", "shard"):
        for seed in range(3):
            learn, held = bench_codes.split_rows(features, split, seed)
            assert sorted([*learn, *held]) == list(range(100))
    assert bench_codes.split_rows(features, "shard", 1)[1].tolist() == list(range(40, 70))


def test_planted_pairs_lie_at_their_cosines_and_copies_beside_their_rows():
    x, a, b = bench_recall.planted(500, 24, 100, 0)
    assert len(np.unique(np.append(a, b))) == 200
    cosine = (x[a] * x[b]).sum(1)
    assert np.allclose(cosine[:10], 0.952, atol=1e-5)
    assert np.allclose(cosine[10:], 0.995, atol=1e-5)
    assert bench_recall.planted_run(500, 24, 100, 0)["recall"] == 1
    rows = np.random.default_rng(0).standard_normal((200, 24)).astype("f4")
    copies = bench_recall.with_copies(rows, 3, 0).astype("f4")
    assert len(copies) == 600
    best = np.sort(copies @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T)[:, -1]
    assert np.count_nonzero(best > 0.9995) == 200
    assert 100 < np.count_nonzero(np.isclose(best, 0.985, atol=2e-3)) < 300
    assert best.min() > 0.895
