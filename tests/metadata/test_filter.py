"""`snip filter` of features and metadata together, shard for shard; lists of what stays."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from snipdedup.config import Filter
from snipdedup.errors import SnipError, TemporaryError, UsageError, WriteError
from snipdedup.metadata import filter
from snipdedup.storage import out_folder
from snipdedup.storage.out_folder import read_manifest

SIZES = [30, 7, 25, 0, 18]
ROWS = sum(SIZES)


@pytest.fixture
def a_set(tmp_path):
    """Image and text features and metadata in five shards, and a mask; of shard 1 nothing stays."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((ROWS, 6)).astype(np.float16)
    text = rng.standard_normal((ROWS, 4)).astype(np.float32)
    is_dup = rng.random(ROWS) < 0.4
    is_dup[30:37] = True
    for name in ("img_emb", "text_emb", "metadata"):
        (tmp_path / "set" / name).mkdir(parents=True)
    start = 0
    for number, size in enumerate(SIZES):
        part = slice(start, start + size)
        np.save(tmp_path / f"set/img_emb/img_emb_{number}.npy", image[part])
        np.save(tmp_path / f"set/text_emb/text_emb_{number}.npy", text[part])
        table = pa.table({"key": pa.array([f"{n:09d}" for n in range(ROWS)][part], pa.string())})
        pq.write_table(table, tmp_path / f"set/metadata/metadata_{number}.parquet")
        start += size
    np.save(tmp_path / "mask.npy", is_dup)
    return SimpleNamespace(tmp=tmp_path, image=image, text=text, is_dup=is_dup)


def settings(a_set, **more):
    known = {
        "metadata": str(a_set.tmp / "set" / "metadata"),
        "is_dup": str(a_set.tmp / "mask.npy"),
        "out": str(a_set.tmp / "out"),
    }
    return Filter(**{**known, **more})


def read_back(folder):
    """What a folder holds, in the alphabetical order in which other tools read it."""
    arrays = [np.load(path) for path in sorted(folder.glob("*.npy"))]
    return np.concatenate(arrays)


def keys_in(folder):
    tables = map(pq.read_table, sorted(folder.glob("*.parquet")))
    return pa.concat_tables(tables)["key"].to_pylist()


@pytest.mark.parametrize("part", [None, (1, 3), (2, 5)])
def test_features_and_metadata_stay_together(a_set, part):
    folders = f"{a_set.tmp}/set/img_emb,{a_set.tmp}/set/text_emb"
    start, end = part or (None, None)
    filter.run(settings(a_set, embeddings=folders, start=start, end=end))
    begins = np.cumsum([0, *SIZES])
    inside = np.zeros(ROWS, bool)
    inside[begins[start or 0] : begins[end or 5]] = True
    stay = np.flatnonzero(inside & ~a_set.is_dup)
    out = a_set.tmp / "out"
    image, text = read_back(out / "img_emb"), read_back(out / "text_emb")
    assert (image.dtype, text.dtype) == (np.float16, np.float32)
    np.testing.assert_array_equal(image, a_set.image[stay])
    np.testing.assert_array_equal(text, a_set.text[stay])
    assert keys_in(out / "metadata") == [f"{n:09d}" for n in stay]
    left = [n for n in range(*(part or (0, 5))) if n not in (1, 3)]  # neither half is left of these
    assert sorted(p.name for p in (out / "img_emb").iterdir()) == [f"img_emb_{n}.npy" for n in left]
    assert sorted(p.stem for p in (out / "metadata").iterdir()) == [f"metadata_{n}" for n in left]
    rows = [len(np.load(path)) for path in sorted((out / "img_emb").iterdir())]
    assert rows == [pq.read_metadata(p).num_rows for p in sorted((out / "metadata").iterdir())]
    manifest = read_manifest(out, "filter")
    assert len(manifest["files"]) == (end or 5) - (start or 0)
    assert len(manifest["outputs"]) == 3 * len(left)


def test_one_file_of_metadata_beside_many_shards(a_set):
    meta = a_set.tmp / "meta.parquet"
    pq.write_table(pa.table({"key": [f"{n:09d}" for n in range(ROWS)]}), meta)
    folder = str(a_set.tmp / "set" / "img_emb")
    filter.run(settings(a_set, metadata=str(meta), embeddings=folder))
    out = a_set.tmp / "out"
    np.testing.assert_array_equal(read_back(out / "img_emb"), a_set.image[~a_set.is_dup])
    assert len(list((out / "img_emb").iterdir())) == 5
    assert len(keys_in(out / "metadata")) == int((~a_set.is_dup).sum())


def test_features_found_by_key_follow_their_metadata(a_set):
    order = np.random.default_rng(4).permutation(ROWS)
    copy = a_set.tmp / "copy"
    (copy / "img_emb").mkdir(parents=True)
    np.save(copy / "img_emb" / "all.npy", a_set.image[order])
    pq.write_table(pa.table({"key": [f"{n:09d}" for n in order]}), copy / "all.parquet")
    more = {"on": "key", "keys": str(a_set.tmp / "set" / "metadata"), "export": "mask,keys"}
    embeddings = str(copy / "img_emb")
    filter.run(settings(a_set, metadata=str(copy / "all.parquet"), embeddings=embeddings, **more))
    stay = [n for n in order if not a_set.is_dup[n]]
    out = a_set.tmp / "out"
    np.testing.assert_array_equal(read_back(out / "img_emb"), a_set.image[stay])
    assert keys_in(out / "metadata") == [f"{n:09d}" for n in stay]
    mask = np.load(out / "export" / "is_dup.npy")
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(mask, a_set.is_dup[order])
    assert (out / "export" / "keys.txt").read_text().split() == [f"{n:09d}" for n in stay]


def test_lists_of_a_range_are_of_its_rows_only(a_set):
    filter.run(settings(a_set, start=2, end=4, export="keys, mask"))
    out = a_set.tmp / "out"
    want = [f"{n:09d}" for n in range(37, 62) if not a_set.is_dup[n]]
    assert keys_in(out) == want
    assert (out / "export" / "keys.txt").read_text().split() == want
    np.testing.assert_array_equal(np.load(out / "export" / "is_dup.npy"), a_set.is_dup[37:62])


def test_a_refused_list_writes_nothing(a_set):
    meta = a_set.tmp / "meta.parquet"
    pq.write_table(pa.table({"key": ["same"] * ROWS}), meta)
    with pytest.raises(SnipError, match="share their key with a row that is decided otherwise"):
        filter.run(settings(a_set, metadata=str(meta), export="keys"))
    assert not (a_set.tmp / "out").exists()


@pytest.mark.parametrize("error", [TemporaryError, WriteError])
def test_a_passing_fault_costs_no_file_that_is_complete(a_set, monkeypatch, error):
    options = settings(a_set, embeddings=str(a_set.tmp / "set" / "img_emb"))
    with monkeypatch.context() as patch:
        patch.setattr(filter, "write_features", mock.Mock(side_effect=error("run again later")))
        with pytest.raises(error, match="run again later"):
            filter.run(options)
    assert [*(a_set.tmp / "out" / "work").rglob("*.parquet")]
    filter.run(options)
    out = a_set.tmp / "out"
    np.testing.assert_array_equal(read_back(out / "img_emb"), a_set.image[~a_set.is_dup])


@pytest.mark.parametrize("stop", ["write_features", "publish"])
def test_a_stopped_run_goes_on(a_set, monkeypatch, stop):
    options = settings(a_set, embeddings=str(a_set.tmp / "set" / "img_emb"), export="mask")
    place = out_folder if stop == "publish" else filter
    monkeypatch.setattr(place, stop, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        filter.run(options)
    assert not (a_set.tmp / "out" / "snip.json").exists()
    monkeypatch.undo()
    filter.run(options)
    out = a_set.tmp / "out"
    np.testing.assert_array_equal(read_back(out / "img_emb"), a_set.image[~a_set.is_dup])
    assert not (out / "work").exists()
    assert "finished already" in str(filter.run(options))


def test_features_that_do_not_match_are_refused(a_set, snip):
    folder = a_set.tmp / "set" / "img_emb"
    words = ("filter", a_set.tmp / "set" / "metadata", "--is_dup", a_set.tmp / "mask.npy", "--out")
    more = ("--embeddings", folder)
    shutil.copy(folder / "img_emb_1.npy", folder / "img_emb_4.npy")
    said = snip(*words, a_set.tmp / "out", *more, status=1).stderr
    assert "metadata_4.parquet has 18 rows, its features " in said
    np.save(folder / "img_emb_4.npy", a_set.image[-18:])
    said = snip(*words, folder / "out", *more, status=1).stderr
    assert "lies in the input folder" in said
    assert not (a_set.tmp / "out").exists()


def test_names_that_readers_would_pair_otherwise_are_refused():
    files = ["m_02", "m_10"]
    with pytest.raises(SnipError, match="in alphabetical order, in which embedding-reader pairs"):
        filter.refuse_names("img_emb", ["img_emb_2", "img_emb_10"], files)
    filter.refuse_names("img_emb", ["img_emb_02", "img_emb_10"], files)
    with pytest.raises(SnipError, match="two shards have one name"):
        filter.refuse_names("img_emb", ["a", "a"], files)


def test_two_inputs_of_one_folder_name_are_wrong_usage(a_set):
    folder = a_set.tmp / "set" / "img_emb"
    with pytest.raises(UsageError, match="would be written to img_emb/, which something else is"):
        filter.run(settings(a_set, embeddings=f"{folder},{folder}"))
    assert not (a_set.tmp / "out").exists()


def test_real_frames_of_both_kinds(data, tmp_path, snip):
    frames = data / "keyframes"
    parts = sorted((frames / "img_emb").iterdir())
    features = np.concatenate([np.load(path) for path in parts])
    keys = keys_in(frames / "metadata")
    is_dup = np.random.default_rng(9).random(len(keys)) < 0.3
    np.save(tmp_path / "mask.npy", is_dup)
    snip(
        "filter", frames / "metadata", "--is_dup", tmp_path / "mask.npy", "--embeddings", frames,
        "--out", tmp_path / "out",
    )  # fmt: skip
    np.testing.assert_array_equal(read_back(tmp_path / "out" / "img_emb"), features[~is_dup])
    want = [key for key, gone in zip(keys, is_dup, strict=True) if not gone]
    assert keys_in(tmp_path / "out" / "metadata") == want
