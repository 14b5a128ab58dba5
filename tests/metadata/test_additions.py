"""Columns that are added: each value as plain Python works it out from the removed rows."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from snipdedup.config import Dedup
from snipdedup.deduplication.run import dedup, run
from snipdedup.errors import SnipError, UsageError
from snipdedup.metadata import additions, gather
from snipdedup.metadata.additions import DupCounts, MergedCaptions, RemovedPairs, Weights
from snipdedup.metadata.tables import open_metadata


def random_set(folder, rows=500, seed=0):
    """Metadata in three files, and removed rows with what stands for them."""
    rng = np.random.default_rng(seed)
    gone = np.sort(rng.choice(rows, rows // 2, replace=False))
    stay = np.setdiff1d(np.arange(rows), gone)[: rows // 6]
    removed = RemovedPairs(gone, rng.choice(stay, len(gone)))
    texts = [None, ""] + [f"caption {n}" for n in range(12)]
    captions = [texts[n] for n in rng.integers(0, len(texts), rows)]
    table = pa.table({"TEXT": captions, "n": np.arange(rows)})
    folder.mkdir()
    for number, (start, stop) in enumerate(((0, 190), (190, 200), (200, rows))):
        path = folder / f"m_{number}.parquet"
        pq.write_table(table.slice(start, stop - start), path, row_group_size=64)
    return open_metadata(folder), removed, captions


def values(column, rows, step=37):
    """All values of a column, asked for as a writer does."""
    parts = [column.between(start, min(start + step, rows)) for start in range(0, rows, step)]
    return pa.chunked_array(parts).to_pylist()


@pytest.mark.parametrize("most", [1, 3, 100])
@pytest.mark.parametrize("part", [20, 1 << 18])
def test_merged_captions_are_the_distinct_ones_of_the_removed_rows(
    tmp_path, monkeypatch, most, part
):
    monkeypatch.setattr(additions, "PART_CAPTIONS", part)
    monkeypatch.setattr(gather, "FLUSH_ROWS", 50)
    metadata, removed, captions = random_set(tmp_path / "m")
    want = [[] for _ in captions]
    for row, representative in zip(*removed, strict=True):
        said, own = captions[row], captions[representative]
        if said and said != own and said not in want[representative]:
            want[representative].append(said)
    column = MergedCaptions(metadata, "TEXT", removed, most, tmp_path / "w")
    assert values(column, len(captions)) == [found[:most] for found in want]
    assert not (tmp_path / "w").exists()
    assert max(map(len, want)) > 3


def test_captions_of_a_set_without_removed_rows(tmp_path):
    metadata, _, captions = random_set(tmp_path / "m")
    nothing = RemovedPairs(np.empty(0, np.int64), np.empty(0, np.int64))
    column = MergedCaptions(metadata, "TEXT", nothing, 3, tmp_path / "w")
    assert values(column, len(captions)) == [[]] * len(captions)
    assert values(DupCounts(nothing), 5) == [0] * 5
    assert values(Weights(nothing), 5) == [1.0] * 5


def test_counts_and_weights_worked_by_hand():
    removed = RemovedPairs(np.array([1, 4, 5, 6]), np.array([2, 2, 7, 2]))
    assert values(DupCounts(removed), 8, 3) == [0, 0, 3, 0, 0, 0, 0, 1]
    assert values(Weights(removed), 8, 3) == [1, 0.25, 0.25, 1, 0.25, 0.5, 0.25, 0.5]


def test_representatives_that_go_themselves_and_rows_of_a_reference():
    # 5 goes for 3, 3 for 2, 2 for 0; 7 and 8 go for reference row 4, 9 for 7
    removed = RemovedPairs(np.array([2, 3, 5, 7, 8, 9]), np.array([0, 2, 3, ~4, ~4, 7]))
    assert removed.followed().representative.tolist() == [0, 0, 0, ~4, ~4, ~4]
    assert values(DupCounts(removed), 10) == [1, 0, 1, 1, 0, 0, 0, 1, 0, 0]
    share = values(Weights(removed.followed()), 10)
    assert share == [0.25, 1, 0.25, 0.25, 1, 0.25, 1, 0.25, 0.25, 0.25]
    nothing = RemovedPairs(np.empty(0, np.int64), np.empty(0, np.int64))
    assert nothing.followed().row.tolist() == []


@pytest.fixture
def photos(data, tmp_path):
    """100 real photos, five times each with another caption: features and metadata."""
    source = data / "small" / "chia500"
    return source / "image_embeddings.npy", source / "metadata.csv", tmp_path / "out"


def test_real_photos_keep_their_five_captions(photos):
    features, meta, out = photos
    known = {"features": str(features), "metadata": str(meta)}
    said = str(run(Dedup(**known, out=str(out), merge_captions=10)))
    assert "removed              400" in said
    assert "kept                 100" in said
    before = open_metadata(meta)
    every = {}
    for _, _, batch in before.read(["image_id", "caption"]):
        for row in batch.to_pylist():
            every.setdefault(row["image_id"], []).append(row["caption"])
    rows = pq.read_table(out / "metadata" / "metadata.parquet").to_pylist()
    assert [row["image_id"] for row in rows] == list(every)
    for row in rows:
        found = [row["caption"], *row["merged_captions"]]
        assert len(set(found)) == len(found)
        assert set(found) == set(every[row["image_id"]])
        assert row["dup_count"] == 4
    assert sum(len(row["merged_captions"]) == 4 for row in rows) >= 95
    run(Dedup(**known, out=str(out.parent / "two"), merge_captions=2))
    rows = pq.read_table(out.parent / "two" / "metadata" / "metadata.parquet").to_pylist()
    assert {len(row["merged_captions"]) for row in rows} == {2}


def test_weights_leave_all_rows_and_share_one_among_copies(photos):
    features, meta, out = photos
    run(Dedup(features=str(features), metadata=str(meta), weights=True, out=str(out)))
    table = pq.read_table(out / "metadata" / "metadata.parquet")
    assert len(table) == 500
    assert np.load(out / "is_dup.npy").sum() == 400
    assert table["weight"].to_pylist() == [0.2] * 500
    assert sorted(table["dup_count"].to_pylist()) == [0] * 400 + [4] * 100
    assert table.schema.names[-2:] == ["dup_count", "weight"]


def test_weights_of_real_frames_add_up_to_the_rows_that_stay(data, tmp_path):
    frames = data / "keyframes"
    features = np.load(frames / "img_emb" / "img_emb_0001.npy")
    meta = frames / "metadata" / "metadata_0001.parquet"
    result = dedup(features, metadata=str(meta), weights=True, out=str(tmp_path / "out"))
    table = pq.read_table(tmp_path / "out" / "metadata" / meta.name)
    weight, row = table["weight"].to_numpy(), result.groups["row"].to_numpy()
    representative = result.groups["representative"].to_numpy()
    of = np.arange(len(features))
    of[row] = representative
    shares = np.bincount(of)
    np.testing.assert_array_equal(weight, 1 / shares[of])
    assert weight.sum() == pytest.approx(result.kept)
    assert result.removed > 100


def test_refusals_come_before_the_search(photos, snip, tmp_path):
    features, meta, out = photos
    words = ("dedup", features, "--out", out, "--merge_captions", 3)
    assert "give --metadata too" in snip(*words, status=2).stderr
    assert (
        "give --metadata too" in snip("dedup", features, "--out", out, "--weights", status=2).stderr
    )
    said = snip(*words, "--metadata", meta, "--caption", "alt", status=1).stderr
    assert "column 'alt' is not there; its columns: image_id" in said
    pq.write_table(pa.table({"url": ["u"] * 500}), tmp_path / "m.parquet")
    said = snip(*words, "--metadata", tmp_path / "m.parquet", status=1).stderr
    assert "no column is called caption or text; name one with --caption; its columns: url" in said
    pq.write_table(
        pa.table({"caption": ["c"] * 500, "merged_captions": [1] * 500}), tmp_path / "m.parquet"
    )
    said = snip(*words, "--metadata", tmp_path / "m.parquet", status=1).stderr
    assert "has a column merged_captions already" in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"weights": True, "merge_captions": 2}, "nothing is to merge"),
        ({"caption": "text"}, "give that too"),
        ({"merge_captions": 0}, "must lie between 1 and"),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    with pytest.raises(UsageError, match=message):
        Dedup(features="f", **flags)


def test_captions_that_are_no_texts_are_refused(tmp_path):
    _, removed, _ = random_set(tmp_path / "m")
    pq.write_table(pa.table({"caption": [{"x": 1}] * 500}), tmp_path / "c.parquet")
    metadata = open_metadata(tmp_path / "c.parquet")
    column = MergedCaptions(metadata, "caption", removed, 3, tmp_path / "w")
    with pytest.raises(SnipError, match=r"c\.parquet: column 'caption' is struct"):
        column.between(0, 500)
    assert not (tmp_path / "w").exists()


def test_rows_that_go_for_a_reference_share_its_weight_and_lose_no_other_caption(tmp_path):
    rows = np.random.default_rng(0).standard_normal((6, 16)).astype(np.float32)
    np.save(tmp_path / "old.npy", rows[:1])
    new = rows[[1, 0, 2, 0, 2, 3]]  # rows 1 and 3 are the reference's, row 4 is row 2
    np.save(tmp_path / "new.npy", new)
    pq.write_table(pa.table({"caption": list("abcdef")}), tmp_path / "meta.parquet")
    known = {"metadata": str(tmp_path / "meta.parquet"), "reference": str(tmp_path / "old.npy")}
    features = str(tmp_path / "new.npy")
    dedup(features, out=str(tmp_path / "weighed"), weights=True, **known)
    table = pq.read_table(tmp_path / "weighed" / "metadata" / "meta.parquet")
    assert table["weight"].to_pylist() == [1, 1 / 3, 0.5, 1 / 3, 0.5, 1]
    assert table["dup_count"].to_pylist() == [0, 0, 1, 0, 0, 0]
    dedup(features, out=str(tmp_path / "merged"), merge_captions=3, **known)
    table = pq.read_table(tmp_path / "merged" / "metadata" / "meta.parquet")
    assert table["caption"].to_pylist() == ["a", "c", "f"]
    assert table["merged_captions"].to_pylist() == [[], ["e"], []]
