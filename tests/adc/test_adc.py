"""Method adc through the command line: flags, pairs that are proved, and pairs that cannot be."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import truth

from snipdedup.deduplication.methods import unique_edges
from snipdedup.join.forest import make_edges

ROWS = 5130


@pytest.fixture(scope="module")
def frames(data, tmp_path_factory):
    """One shard of real features."""
    folder = tmp_path_factory.mktemp("frames") / "img_emb"
    folder.mkdir()
    shutil.copyfile(data / "keyframes" / "img_emb" / "img_emb_0001.npy", folder / "img_emb_0.npy")
    return folder


@pytest.fixture(scope="module")
def index(frames, tmp_path_factory):
    out = tmp_path_factory.mktemp("index") / "index"
    status, _, said = truth.snip("index", frames, "--out", out)
    assert status == 0, said
    return out


@pytest.fixture(scope="module")
def table(frames):
    return truth.cosine_table(np.load(frames / "img_emb_0.npy"))


def read(out):
    manifest = json.loads((out / "snip.json").read_text())
    groups = pq.read_table(out / "groups.parquet")
    return np.load(out / "is_dup.npy"), np.load(out / "flags.npy"), groups, manifest


@pytest.fixture(scope="module")
def proved(frames, index, tmp_path_factory):
    out = tmp_path_factory.mktemp("proved") / "OUT"
    status, _, said = truth.snip("dedup", frames, "--index", index, "--out", out)
    assert status == 0, said
    return out


@pytest.fixture(scope="module")
def unproved(index, tmp_path_factory):
    out = tmp_path_factory.mktemp("unproved") / "OUT"
    status, said, line = truth.snip("dedup", "--index", index, "--out", out, "--method", "adc")
    assert status == 0, line
    assert "unverified" in said
    return out


def test_with_features_every_removed_row_is_proved(proved, table):
    is_dup, flags, groups, manifest = read(proved)
    assert manifest["verified"] is True
    assert manifest["settings"]["method"] == "adc"
    row, stays = groups["row"].to_numpy(), groups["representative"].to_numpy()
    assert not is_dup[stays].any()
    assert (table[row, stays] >= np.float32(0.95)).all()
    # `table` does not know of copies, which have exactly 1
    assert np.allclose(groups["similarity"].to_numpy(), table[row, stays], rtol=0, atol=1e-6)
    forest = pq.read_table(proved / "forest.parquet")
    a, b = forest["a"].to_numpy(), forest["b"].to_numpy()
    assert (table[a, b] >= np.float32(0.95)).all()
    assert flags.dtype == bool
    assert flags.shape == is_dup.shape == (ROWS,)
    assert manifest["method"]["flagged"] == flags.sum()


def test_flags_are_right_as_often_as_calibrated(proved, table):
    """One shard holds few duplicates, so precision costs recall: half of the flags are lost."""
    is_dup, flags, _, manifest = read(proved)
    _, stays = truth.star(table, 0.95, range(ROWS))
    assert (is_dup & ~stays).sum() > 0.5 * (~stays).sum() > 150
    pairs = np.triu(table >= np.float32(0.95), 1)
    duplicated = pairs.any(0) | pairs.any(1)
    precision = (flags & duplicated).sum() / flags.sum()
    assert precision > 0.87  # .91 on a sample
    assert (flags & duplicated).sum() > 0.45 * duplicated.sum()
    assert abs(precision - manifest["method"]["calibration"]["precision"]) < 0.05


def test_without_features_pairs_stay_unproved_and_say_so(unproved, index):
    is_dup, flags, groups, manifest = read(unproved)
    assert manifest["verified"] is False
    assert manifest["thresholds"] == []
    assert groups["similarity"].null_count == is_dup.sum() > 0
    members = groups.to_pylist()
    assert all((m["similarity"] is None) == m["is_dup"] for m in members)
    assert all(m["representative"] == m["row"] or m["is_dup"] for m in members)
    assert not is_dup[[m["representative"] for m in members]].any()
    group = {m["row"]: m["group"] for m in members}
    assert all(group[m["representative"]] == m["group"] for m in members)
    assert {m["shard"] for m in members} == {"img_emb_0.npy"}
    assert all(m["shard_row"] == m["row"] for m in members)
    assert flags.shape == (ROWS,)
    assert [shard["rows"] for shard in manifest["shards"]] == [ROWS]


def test_an_unproved_run_that_is_finished_says_so(unproved, index):
    before = truth.listing(unproved)
    status, said, line = truth.snip("dedup", "--index", index, "--out", unproved, "--method", "adc")
    assert status == 0, line
    assert "finished already" in said
    assert truth.listing(unproved) == before


def test_unproved_pairs_cannot_be_thresholded_again(unproved, tmp_path):
    words = ("dedup", unproved, "--threshold", 0.97, "--out", tmp_path / "o")
    status, _, said = truth.snip(*words)
    assert status == 1
    assert str(unproved) in said
    assert not (tmp_path / "o").exists()


def test_proved_pairs_can(proved, tmp_path, table):
    status, _, said = truth.snip("dedup", proved, "--threshold", 0.97, "--out", tmp_path / "o")
    assert status == 0, said
    groups = pq.read_table(tmp_path / "o" / "groups.parquet")
    row, stays = groups["row"].to_numpy(), groups["representative"].to_numpy()
    assert (table[row, stays] >= np.float32(0.97)).all()
    assert 0 < np.load(tmp_path / "o" / "is_dup.npy").sum() < read(proved)[0].sum()


def test_an_index_is_built_on_the_way(frames, tmp_path, table):
    words = ("dedup", frames, "--method", "adc", "--out", tmp_path / "o")
    status, _, said = truth.snip(*words)
    assert status == 0, said
    is_dup, _, groups, _ = read(tmp_path / "o")
    row, stays = groups["row"].to_numpy(), groups["representative"].to_numpy()
    assert (table[row, stays] >= np.float32(0.95)).all()
    assert is_dup.sum() > 150
    assert not (tmp_path / "o" / "work").exists()


def test_an_index_of_other_rows_is_refused(frames, index, tmp_path):
    x = np.load(frames / "img_emb_0.npy")
    for name, other in [("fewer", x[:-1]), ("narrower", x[:, :256].copy())]:
        folder = truth.save_shards(tmp_path / name, other, [])
        words = ("dedup", folder, "--index", index, "--out", tmp_path / "o")
        status, _, said = truth.snip(*words)
        assert status == 1
        assert str(index) in said
        assert not (tmp_path / "o").exists()


def test_nothing_is_written_into_the_index(frames, index):
    before = truth.listing(index)
    for out in (index, index / "o"):
        assert truth.snip("dedup", frames, "--index", index, "--out", out)[0] == 1
        assert truth.snip("dedup", "--index", index, "--out", out)[0] == 1
    assert truth.listing(index) == before


def test_an_index_that_is_not_there_is_named(frames, tmp_path):
    words = ("--index", tmp_path / "nowhere", "--out", tmp_path / "o")
    for features in ([frames], []):
        status, _, said = truth.snip("dedup", *features, *words)
        assert status == 1
        assert "nowhere" in said
        assert not (tmp_path / "o").exists()


def test_an_encoder_that_is_not_there_is_named(frames, tmp_path):
    words = ("--method", "adc", "--encoder", tmp_path / "nowhere", "--out", tmp_path / "o")
    status, _, said = truth.snip("dedup", frames, *words)
    assert status == 1
    assert "nowhere" in said
    assert not (tmp_path / "o").exists()


def test_threads_change_nothing(frames, index, proved, tmp_path):
    words = ("dedup", frames, "--index", index, "--out", tmp_path / "o", "--threads", 1)
    assert truth.snip(*words, "--chunk_rows", 100)[0] == 0
    for one, other in zip(read(tmp_path / "o")[:2], read(proved)[:2], strict=True):
        assert np.array_equal(one, other)


def test_pairs_come_once():
    edges = make_edges(np.array([3, 1, 2, 1, 1]), np.array([1, 3, 5, 2, 3]), np.zeros(5))
    found = unique_edges(edges)
    assert list(zip(found.a.tolist(), found.b.tolist(), strict=True)) == [(1, 2), (1, 3), (2, 5)]


def test_metadata_must_match_the_rows_of_the_index(index, tmp_path):
    pq.write_table(pa.table({"key": ["a", "b"]}), tmp_path / "m.parquet")
    words = ("--index", index, "--metadata", tmp_path / "m.parquet", "--out", tmp_path / "o")
    status, _, said = truth.snip("dedup", *words)
    assert status == 1
    assert "2 rows" in said
    assert not (tmp_path / "o").exists()


def test_a_rule_that_needs_features_is_refused_before_any_work(index, tmp_path):
    words = ("--index", index, "--rule", "ratio", "--out", tmp_path / "o")
    assert truth.snip("dedup", *words)[0] == 2
    assert not (tmp_path / "o").exists()
