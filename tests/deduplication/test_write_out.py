"""OUT: the files of the format, exact to type and order, and other thresholds from them alone."""

from __future__ import annotations

import collections
import hashlib
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import truth
from samples import CUTS, write_laion

from snipdedup import dedup
from snipdedup.features.formats import open_shard
from snipdedup.features.hashing import shard_checksum


@pytest.fixture(scope="module")
def rows():
    return truth.clustered(1300, 12, 3, clusters=250, noise=0.5, copies=0.1, dtype=np.float16)


@pytest.fixture(scope="module")
def laion(rows, tmp_path_factory):
    return write_laion(tmp_path_factory.mktemp("laion") / "set", rows)


@pytest.fixture(scope="module")
def out(laion, tmp_path_factory):
    """OUT of the whole folder at .9: the metadata beside the features is implied."""
    folder = tmp_path_factory.mktemp("out") / "OUT"
    before = truth.listing(laion)
    status, said, _ = truth.snip("dedup", laion, "--out", folder, "--threshold", 0.9)
    assert status == 0
    assert "1,300 rows, threshold 0.9" in said
    assert truth.listing(laion) == before
    return folder


@pytest.fixture(scope="module")
def expected(rows):
    """(representative, stays, table, label) by the plain references."""
    table = truth.cosine_table(rows)
    table[(rows[:, None, :] == rows[None, :, :]).all(2)] = 1
    label = truth.components(len(rows), truth.pairs_of(table, 0.9))
    return *truth.star(table, 0.9, range(len(rows))), table, label


def test_the_files_are_these(out):
    names = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert names == [
        "forest.parquet",
        "groups.parquet",
        "histogram.parquet",
        "is_dup.npy",
        "metadata/metadata_0.parquet",
        "metadata/metadata_1.parquet",
        "metadata/metadata_2.parquet",
        "metadata/metadata_3.parquet",
        "snip.json",
    ]


def test_the_mask_is_a_memory_mappable_bool_array(out, expected):
    mask = np.load(out / "is_dup.npy", mmap_mode="r", allow_pickle=False)
    assert (mask.dtype, mask.shape, mask.flags.c_contiguous) == (bool, (1300,), True)
    assert np.array_equal(mask, ~expected[1])
    assert 200 < mask.sum() < 1200


def test_groups_have_every_member_with_its_place_and_key(out, expected):
    representative, stays, table, label = expected
    groups = pq.read_table(out / "groups.parquet")
    size = np.bincount(label, minlength=1300)[label]
    members = sorted((label[row], row) for row in np.flatnonzero(size > 1))
    starts = {"img_emb_0.npy": 0, "img_emb_2.npy": 300, "img_emb_3.npy": 900}
    for found, (group, row) in zip(groups.to_pylist(), members, strict=True):
        assert (found["group"], found["row"]) == (group, row)
        assert found["key"] == f"k{row:06d}"
        assert starts[found["shard"]] + found["shard_row"] == row
        assert 0 <= found["shard_row"] < 600
        assert found["representative"] == representative[row]
        assert found["similarity"] == table[row, representative[row]]
        assert found["is_dup"] == (not stays[row])


def test_the_forest_spans_the_groups(out, expected):
    forest = pq.read_table(out / "forest.parquet")
    assert [(f.name, str(f.type)) for f in forest.schema] == [
        ("a", "int64"),
        ("b", "int64"),
        ("similarity", "float"),
    ]
    a, b, similarity = (forest[name].to_numpy() for name in ("a", "b", "similarity"))
    assert (a < b).all()
    assert np.array_equal(np.lexsort((b, a)), np.arange(len(a)))
    assert np.array_equal(similarity, expected[2][a, b])
    table, label = expected[2:]
    for threshold in (0.9, 0.94, 0.98, 1.0):
        high = similarity >= np.float32(threshold)
        pairs = zip(a[high], b[high], strict=True)
        of_pairs = truth.components(1300, truth.pairs_of(table, threshold))
        assert np.array_equal(truth.components(1300, pairs), of_pairs)
    assert len(a) == 1300 - len(set(label))


@pytest.mark.parametrize("grouping", ["star", "components"])
def test_the_histogram_counts_groups_and_staying_rows(laion, expected, tmp_path, grouping):
    words = ("dedup", laion, "--threshold", 0.9, "--grouping", grouping, "--out", tmp_path / "o")
    assert truth.snip(*words)[0] == 0
    representative, stays, _, label = expected
    if grouping == "components":
        representative, stays = label, label == np.arange(1300)
    sizes = collections.Counter(collections.Counter(label.tolist()).values())
    sizes.pop(1)  # no group
    named = collections.Counter(representative[~stays].tolist())
    dup_counts = collections.Counter(named[row] for row in np.flatnonzero(stays).tolist())
    histogram = pq.read_table(tmp_path / "o" / "histogram.parquet")
    assert [str(field.type) for field in histogram.schema] == ["string", "int64", "int64"]
    assert histogram.to_pydict() == {
        "of": ["group_size"] * len(sizes) + ["dup_count"] * len(dup_counts),
        "value": [*sorted(sizes), *sorted(dup_counts)],
        "count": [sizes[n] for n in sorted(sizes)] + [dup_counts[n] for n in sorted(dup_counts)],
    }


def test_the_histogram_of_rows_without_a_pair(tmp_path):
    truth.save_shards(tmp_path / "set", np.eye(5, dtype=np.float32), [])
    assert truth.snip("dedup", tmp_path / "set", "--out", tmp_path / "o")[0] == 0
    histogram = pq.read_table(tmp_path / "o" / "histogram.parquet").to_pylist()
    assert histogram == [{"of": "dup_count", "value": 0, "count": 5}]


def test_metadata_are_the_rows_that_stay_as_they_were_with_their_counts(out, laion, expected):
    representative, stays = expected[:2]
    counts = np.bincount(representative[~stays], minlength=1300)
    begin = 0
    for part, rows in enumerate((300, 0, 600, 400)):
        name = f"metadata_{part}.parquet"
        found = pq.read_table(out / "metadata" / name)
        before = pq.read_table(laion / "metadata" / name)
        assert before.num_rows == rows
        kept = stays[begin : begin + rows]
        assert found.drop_columns("dup_count").equals(before.filter(pa.array(kept)))
        assert found.schema.names == [*before.schema.names, "dup_count"]
        assert found.schema.field("dup_count").type == pa.int64()
        assert found["dup_count"].to_pylist() == counts[begin : begin + rows][kept].tolist()
        assert found.schema.metadata[b"origin"] == b"a crawl"
        begin += rows
    assert counts.sum() == (~stays).sum()


def test_the_manifest_vouches_for_all(out, laion, expected):
    manifest = json.loads((out / "snip.json").read_text())
    assert manifest["kind"] == "dedup"
    assert manifest["verified"] is True
    assert {"snipdedup", "python", "numpy", "torch", "faiss-cpu", "pyarrow"} <= set(
        manifest["versions"]
    )
    files = [p for p in out.rglob("*") if p.is_file() and p.name != "snip.json"]
    assert set(manifest["outputs"]) == {str(p.relative_to(out)) for p in files}
    for path in files:
        entry = manifest["outputs"][str(path.relative_to(out))]
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert entry["size"] == path.stat().st_size
        assert path.stat().st_mtime_ns <= (out / "snip.json").stat().st_mtime_ns
    for shard, rows in zip(manifest["shards"], (300, 0, 600, 400), strict=True):
        path = laion / "img_emb" / shard["name"]
        assert (shard["rows"], shard["dtype"]) == (rows, "float16")
        assert shard["size"] == path.stat().st_size
        if rows:
            assert int(shard["checksum"], 16) == shard_checksum(open_shard(path))
    stays, label = expected[1], expected[3]
    sizes = np.bincount(label)
    counts = manifest["counts"]
    assert counts["rows"] == 1300
    assert counts["removed"] == (~stays).sum()
    assert counts["kept"] == stays.sum()
    assert counts["groups"] == (sizes > 1).sum()
    assert counts["largest_group"] == sizes.max()
    assert counts["chained"] == counts["bad_rows"] == 0
    settings = manifest["settings"]
    assert (settings["threshold"], settings["grouping"], settings["seed"]) == (0.9, "star", 0)
    assert settings["method"] == "join"
    assert {"fit", "encode", "join", "group", "write"} <= set(manifest["seconds"])


def test_the_summary_is_what_the_manifest_says(laion, tmp_path):
    status, said, _ = truth.snip(
        "dedup", laion, "--out", tmp_path / "o", "--threshold", 0.9, "--grouping", "components"
    )
    counts = json.loads((tmp_path / "o" / "snip.json").read_text())["counts"]
    assert status == 0
    assert f"removed     {counts['removed']:>12,}" in said
    assert f"kept        {counts['kept']:>12,}" in said
    assert counts["chained"] > 0
    assert f"chained     {counts['chained']:>12,}" in said
    groups = pq.read_table(tmp_path / "o" / "groups.parquet")
    low = pa.compute.less(groups["similarity"], np.float32(0.9))
    assert counts["chained"] == pa.compute.sum(low).as_py()


def read(folder):
    return (
        np.load(folder / "is_dup.npy"),
        pq.read_table(folder / "groups.parquet"),
        pq.read_table(folder / "forest.parquet"),
    )


@pytest.mark.parametrize("grouping", ["star", "components"])
@pytest.mark.parametrize("threshold", [0.9, 0.985])
def test_a_re_threshold_is_a_fresh_search(out, laion, tmp_path, threshold, grouping):
    words = ("--threshold", threshold, "--grouping", grouping)
    assert truth.snip("dedup", out, *words, "--out", tmp_path / "again")[0] == 0
    assert truth.snip("dedup", laion, *words, "--out", tmp_path / "fresh")[0] == 0
    again, fresh = read(tmp_path / "again"), read(tmp_path / "fresh")
    assert np.array_equal(again[0], fresh[0])
    assert again[1].equals(fresh[1])
    assert again[2].equals(fresh[2])
    for part in range(4):
        name = f"metadata/metadata_{part}.parquet"
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
    counts = [
        json.loads((tmp_path / name / "snip.json").read_text())["counts"]
        for name in ("again", "fresh")
    ]
    assert counts[0] == counts[1]


def test_a_re_threshold_of_a_re_threshold(out, laion, tmp_path):
    for source, threshold, name in [
        (out, 0.93, "a"),
        (tmp_path / "a", 0.97, "b"),
        (laion, 0.97, "c"),
    ]:
        assert (
            truth.snip("dedup", source, "--threshold", threshold, "--out", tmp_path / name)[0] == 0
        )
    for one, other in zip(read(tmp_path / "b"), read(tmp_path / "c"), strict=True):
        assert one.equals(other) if isinstance(one, pa.Table) else np.array_equal(one, other)
    status, _, said = truth.snip(
        "dedup", tmp_path / "b", "--threshold", 0.95, "--out", tmp_path / "d"
    )
    assert status == 1
    assert "0.97" in said


def test_a_lower_threshold_is_refused_and_nothing_written(out, tmp_path):
    status, _, said = truth.snip("dedup", out, "--threshold", 0.8, "--out", tmp_path / "o")
    assert status == 1
    assert "expected 0.9 or more, found 0.8: search again" in said
    assert not (tmp_path / "o").exists()


def test_out_is_no_place_for_its_own_re_threshold(out):
    before = truth.listing(out)
    for target in (out, out / "more"):
        status, _, said = truth.snip("dedup", out, "--threshold", 0.95, "--out", target)
        assert status == 1
        assert "input folder" in said
    assert truth.listing(out) == before


@pytest.fixture
def own(rows, tmp_path):
    """Features and their OUT that a test may spoil."""
    truth.save_shards(tmp_path / "set", rows, CUTS)
    assert truth.snip("dedup", tmp_path / "set", "--out", tmp_path / "OUT")[0] == 0
    return tmp_path


@pytest.mark.parametrize("change", ["a shard more", "a shard fewer", "other values"])
def test_features_that_are_not_those_searched_are_refused(own, rows, change):
    folder = own / "set"
    if change == "a shard more":
        np.save(folder / "img_emb_9.npy", rows[:50])
    elif change == "a shard fewer":
        (folder / "img_emb_3.npy").unlink()
    else:
        np.save(folder / "img_emb_3.npy", rows[900:][::-1])
    status, _, said = truth.snip("dedup", own / "OUT", "--threshold", 0.97, "--out", own / "o")
    assert status == 1
    assert str(own / "OUT") in said
    assert not (own / "o").exists()


def test_features_that_are_gone_are_named(own):
    shutil.move(own / "set", own / "elsewhere")
    status, _, said = truth.snip("dedup", own / "OUT", "--threshold", 0.97, "--out", own / "o")
    assert status == 1
    assert str(own / "set") in said
    assert not (own / "o").exists()


def test_a_key_column_by_name(laion, tmp_path):
    words = ("dedup", laion, "--threshold", 0.9, "--out", tmp_path / "o")
    assert truth.snip(*words, "--key", "UID")[0] == 0
    groups = pq.read_table(tmp_path / "o" / "groups.parquet")
    assert groups["key"].to_pylist() == [f"u{row}" for row in groups["row"].to_pylist()]
    assert truth.snip(*words, "--key", "n", "--overwrite")[0] == 0
    groups = pq.read_table(tmp_path / "o" / "groups.parquet")
    assert groups["key"].to_pylist() == [str(row) for row in groups["row"].to_pylist()]


def test_without_metadata_there_are_no_keys_and_no_folder(laion, tmp_path):
    out = tmp_path / "o"
    assert truth.snip("dedup", laion / "img_emb", "--out", out)[0] == 0
    assert not (out / "metadata").exists()
    assert set(pq.read_table(out / "groups.parquet")["key"].to_pylist()) == {None}


def test_bad_rows_that_are_kept_stay_unmatched_and_are_listed(rows, tmp_path):
    x = rows.copy()
    bad = [0, 299, 300, 1299]
    x[bad] = np.array([[np.nan], [np.inf], [0], [0]])
    write_laion(tmp_path / "set", x)
    words = ("dedup", tmp_path / "set", "--out", tmp_path / "o")
    status, _, said = truth.snip(*words)
    assert status == 1
    assert "4 of 1,300 rows cannot be compared" in said
    assert "--bad_rows keep" in said
    assert not (tmp_path / "o").exists()
    status, said, _ = truth.snip(*words, "--bad_rows", "keep")
    assert status == 0
    assert "bad rows" in said
    listed = pq.read_table(tmp_path / "o" / "bad_rows.parquet")
    assert listed.to_pydict() == {
        "row": bad,
        "shard": ["img_emb_0.npy", "img_emb_0.npy", "img_emb_2.npy", "img_emb_3.npy"],
        "shard_row": [0, 299, 0, 399],
    }
    assert [str(field.type) for field in listed.schema] == ["int64", "string", "int64"]
    mask = np.load(tmp_path / "o" / "is_dup.npy")
    good = np.setdiff1d(np.arange(1300), bad)
    assert np.array_equal(mask[good], dedup(rows[good]).is_dup)
    assert not mask[bad].any()
    groups = pq.read_table(tmp_path / "o" / "groups.parquet")
    assert not set(bad) & set(groups["row"].to_pylist())
    manifest = json.loads((tmp_path / "o" / "snip.json").read_text())
    assert manifest["counts"]["bad_rows"] == 4
    assert "bad_rows.parquet" in manifest["outputs"]
    again = truth.snip("dedup", tmp_path / "o", "--threshold", 0.96, "--out", tmp_path / "o2")
    assert again[0] == 0
    assert pq.read_table(tmp_path / "o2" / "bad_rows.parquet").equals(listed)


def test_what_a_stopped_run_left_is_gone_when_it_ends(laion, tmp_path, monkeypatch):
    """Not when its memory is freed: by then, files of these names may be a later run's."""

    def stop(path, *given):
        if path.name.startswith(".groups.parquet"):
            raise KeyboardInterrupt
        return replace(path, *given)

    replace, out = type(tmp_path).replace, tmp_path / "out"
    monkeypatch.setattr(type(tmp_path), "replace", stop)
    with pytest.raises(KeyboardInterrupt) as held:
        dedup(laion, out=out, threshold=0.9)
    assert held.value.__traceback__  # with every frame of the run
    assert not list((out / "work").rglob("*.arrows"))
