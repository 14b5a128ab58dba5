"""The chain as it is called: OUT claimed, bad input refused before anything is written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import truth
from samples import write_laion

from snipdedup import dedup
from snipdedup.deduplication import run
from snipdedup.errors import SnipError, UsageError
from snipdedup.join import tasks
from snipdedup.storage import out_folder
from snipdedup.storage.out_folder import MANIFEST, read_manifest


@pytest.fixture(scope="module")
def rows():
    return truth.clustered(600, 12, 3, clusters=100, noise=0.5, copies=0.1, dtype=np.float32)


@pytest.fixture
def laion(rows, tmp_path):
    return write_laion(tmp_path / "set", rows, cuts=(200, 450))


def refused(*words, status=1):
    """Run snip, which must refuse; return its one line."""
    code, said, line = truth.snip(*words)
    assert (code, said) == (status, ""), (code, said, line)
    assert line.startswith("snip: ")
    assert line.count("\n") == 1
    return line


# the library


def test_arrays_lists_and_paths_are_one(rows, laion):
    whole = dedup(rows)
    assert whole.removed > 100
    pattern = str(laion / "img_emb" / "img_emb_{part}.npy")
    for source, how in [
        (list(np.split(rows, [7, 450])), {}),
        (laion / "img_emb", {}),
        (str(laion), {}),
        (str(laion / "img_emb" / "*.npy"), {}),
        ([laion / "img_emb" / f"img_emb_{part}.npy" for part in range(3)], {}),
        ([rows[:200], str(laion / "img_emb" / "img_emb_1.npy"), rows[450:]], {}),
        (pattern, {"parts": "0:3"}),
        (np.asfortranarray(rows).copy(order="C"), {"threads": 1}),
    ]:
        found = dedup(source, **how)
        assert np.array_equal(found.is_dup, whole.is_dup)
        assert found.forest.equals(whole.forest)
        assert found.members.row.tolist() == whole.members.row.tolist()
    assert dedup(pattern, parts="1:2").rows == 250


def test_without_out_nothing_is_written(rows, laion, tmp_path, tmp_path_factory, monkeypatch):
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.chdir(tmp_path)
    before = truth.listing(tmp_path)
    dedup(laion)
    assert truth.listing(tmp_path) == before
    assert list(temporary.iterdir()) == []


def test_with_out_the_library_writes_what_the_command_writes(rows, laion, tmp_path):
    result = dedup(laion, out=str(tmp_path / "a"))
    assert truth.snip("dedup", laion, "--out", tmp_path / "b")[0] == 0
    for path in (tmp_path / "b").rglob("*.[np]*"):
        assert (tmp_path / "a" / path.relative_to(tmp_path / "b")).read_bytes() == path.read_bytes()
    assert np.array_equal(result.is_dup, np.load(tmp_path / "a" / "is_dup.npy"))
    again = dedup(laion, out=str(tmp_path / "a"))  # finished: read back
    assert np.array_equal(again.is_dup, result.is_dup)
    assert again.forest.equals(result.forest)
    assert again.at(0.97).removed == result.at(0.97).removed


def test_rows_in_memory_are_not_changed(rows):
    before = rows.copy()
    dedup(rows)
    assert np.array_equal(rows, before)
    before.flags.writeable = False
    dedup(before)


# claims


def test_a_finished_run_says_so_and_touches_nothing(laion, tmp_path):
    words = ("dedup", laion, "--out", tmp_path / "o", "--threshold", 0.9)
    assert truth.snip(*words)[0] == 0
    before = truth.listing(tmp_path)
    for how in ([], ["--threads", 1], ["--chunk_rows", 77], ["--max_memory", "1GB"]):
        status, said, _ = truth.snip(*words, *how)
        assert status == 0
        assert "finished already" in said
    assert truth.listing(tmp_path) == before


@pytest.mark.parametrize(
    "other",
    [
        ("--threshold", 0.91),
        ("--grouping", "components"),
        ("--method", "exact"),
        ("--key", "uid"),
    ],
)
def test_other_settings_are_refused_by_name(laion, tmp_path, other):
    words = ("dedup", laion, "--out", tmp_path / "o")
    assert truth.snip(*words)[0] == 0
    before = truth.listing(tmp_path)
    line = refused(*words, *other)
    assert other[0].lstrip("-") in line
    assert "--overwrite" in line
    assert truth.listing(tmp_path) == before
    assert truth.snip(*words, *other, "--overwrite")[0] == 0
    settings = json.loads((tmp_path / "o" / "snip.json").read_text())["settings"]
    assert settings[other[0].lstrip("-")] == other[1]


def change(laion, what):
    """Give the input the same shape and names, and other contents."""
    if what == "features":
        path = laion / "img_emb" / "img_emb_1.npy"
        np.save(path, np.load(path)[::-1])
    elif what == "one file more":
        np.save(laion / "img_emb" / "img_emb_3.npy", np.ones((5, 12), np.float32))
        shutil.rmtree(laion / "metadata")
    else:
        path = laion / "metadata" / "metadata_1.parquet"
        table = pq.read_table(path)
        pq.write_table(table.take(pa.array(np.arange(table.num_rows)[::-1])), path)


@pytest.mark.parametrize(
    ("what", "state"),
    [(what, state) for what in ("features", "one file more") for state in ("finished", "stopped")]
    + [("metadata", "finished")],
)
def test_another_input_is_refused(laion, tmp_path, what, state):
    words = ("dedup", laion, "--out", tmp_path / "o")
    if state == "finished":
        assert truth.snip(*words)[0] == 0
    else:
        with mock.patch.object(out_folder, "write_manifest", side_effect=KeyboardInterrupt):
            assert truth.snip(*words)[0] == 130
    before = truth.listing(tmp_path / "o")
    change(laion, what)
    line = refused(*words)
    assert state in line
    after = truth.listing(tmp_path / "o")
    for found in (before, after):
        found.pop("work/run.lock", None)  # taken, and given back, by the run that was refused
    assert after == before


def test_another_array_of_the_same_shape_is_refused(rows, tmp_path):
    dedup(rows, out=str(tmp_path / "o"))
    again = dedup(rows.copy(), out=str(tmp_path / "o"))  # the same values are the same input
    assert again.removed == dedup(rows).removed
    with pytest.raises(SnipError, match="features"):
        dedup(rows[::-1].copy(), out=str(tmp_path / "o"))


def test_a_folder_that_snip_did_not_write_is_left_alone(laion, tmp_path):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "snip.json").write_text('{"kind": "encoder", "format": 1, "outputs": {}}')
    before = truth.listing(tmp_path)
    for target in ("o", "file", "e"):
        for more in ([], ["--overwrite"]):
            line = refused("dedup", laion, "--out", tmp_path / target, *more)
            assert str(tmp_path / target) in line
    assert truth.listing(tmp_path) == before


def test_an_out_that_cannot_be_written_is_named(laion, tmp_path):
    (tmp_path / "file").write_text("x")
    line = refused("dedup", laion, "--out", tmp_path / "file" / "o")
    assert "cannot write" in line
    assert str(tmp_path / "file" / "o") in line


@pytest.mark.parametrize(
    "inside", ["", "img_emb", "img_emb/o", "metadata/o", "img_emb/../img_emb/o"]
)
def test_an_input_folder_is_never_written_to(laion, inside):
    before = truth.listing(laion)
    refused("dedup", laion, "--out", laion / inside)
    assert truth.listing(laion) == before


def test_a_link_into_the_input_folder_is_seen_through(laion, tmp_path):
    (tmp_path / "link").symlink_to(laion / "img_emb")
    before = truth.listing(laion)
    assert "input folder" in refused("dedup", laion, "--out", tmp_path / "link" / "o")
    assert truth.listing(laion) == before


def test_overwrite_leaves_nothing_of_the_earlier_run(rows, laion, tmp_path):
    out, x = tmp_path / "o", rows.copy()
    x[5] = 0
    (tmp_path / "bad").mkdir()
    np.save(tmp_path / "bad" / "x.npy", x)
    status, _, said = truth.snip("dedup", tmp_path / "bad", "--bad_rows", "keep", "--out", out)
    assert status == 0, said
    assert (out / "bad_rows.parquet").exists()
    assert truth.snip("dedup", laion, "--out", out, "--overwrite")[0] == 0
    assert not (out / "bad_rows.parquet").exists()
    assert (out / "metadata").exists()
    assert truth.snip("dedup", laion / "img_emb", "--out", out, "--overwrite")[0] == 0
    names = sorted(path.name for path in out.iterdir() if path.name != "metadata")
    tables = ["forest.parquet", "groups.parquet", "histogram.parquet"]
    assert names == [*tables, "is_dup.npy", "snip.json"]
    assert not list(out.glob("metadata/*"))


def test_overwrite_leaves_nothing_of_a_stopped_run(laion, tmp_path):
    """Stopped while writing: until all is whole, nothing lies in OUT itself."""
    out = tmp_path / "o"
    with mock.patch.object(out_folder, "write_manifest", side_effect=KeyboardInterrupt):
        assert truth.snip("dedup", laion, "--out", out)[0] == 130
    assert list(out.glob("work/*/metadata/*.parquet"))
    assert not (out / "metadata").exists()
    words = ("dedup", laion / "img_emb", "--threshold", 0.9, "--out", out)
    assert "stopped" in refused(*words)
    assert truth.snip(*words, "--overwrite")[0] == 0
    assert not list(out.glob("metadata/*"))


def test_a_bad_input_over_a_finished_run_does_not_lock_the_folder(rows, laion, tmp_path):
    out = tmp_path / "o"
    assert truth.snip("dedup", laion, "--out", out)[0] == 0
    (tmp_path / "bad").mkdir()
    np.save(tmp_path / "bad" / "x.npy", np.full((3, 4), np.nan))
    assert "NaN" in refused("dedup", tmp_path / "bad", "--out", out, "--overwrite")
    assert truth.snip("dedup", laion, "--out", out)[0] == 0


# input that is refused


def test_nothing_is_written_when_rows_are_refused(rows, tmp_path):
    x = rows.copy()
    x[77, 3] = np.nan
    folder = truth.save_shards(tmp_path / "f", x, [50])
    for method in ("join", "exact"):
        line = refused("dedup", folder, "--out", tmp_path / "deep" / "o", "--method", method)
        assert f"{folder / 'img_emb_1.npy'} row 27 (NaN)" in line
        assert "1 of 600 rows" in line
        assert not (tmp_path / "deep" / "o").exists()


def test_an_empty_folder_that_was_there_stays(rows, tmp_path):
    (tmp_path / "x").mkdir()
    np.save(tmp_path / "x" / "x.npy", np.zeros((4, 4)))
    (tmp_path / "o").mkdir()
    refused("dedup", tmp_path / "x", "--out", tmp_path / "o")
    assert not list((tmp_path / "o").iterdir()) if (tmp_path / "o").exists() else True


def damaged(folder, what):
    """Write features whose damage is found while rows are read only."""
    folder.mkdir()
    x = np.ones((50, 4), np.float32)
    if what == "null row":
        lists = [*x.tolist(), None, *x.tolist()]
    elif what == "null value":
        lists = [*x.tolist(), [1.0, None, 2.0, 3.0]]
    elif what == "short row":
        lists = [*x.tolist(), [1.0, 2.0]]
    else:
        np.savez_compressed(folder / "a.npz", x=np.random.default_rng(0).random((5000, 4)))
        data = bytearray((folder / "a.npz").read_bytes())
        data[len(data) // 2] ^= 0xFF
        (folder / "a.npz").write_bytes(data)
        return
    pq.write_table(
        pa.table({"emb": pa.array(lists, pa.list_(pa.float32()))}), folder / "a.parquet",
        row_group_size=20,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("what", "method"),
    [("null row", "join"), ("null value", "exact"), ("short row", "join"), ("broken zip", "exact")],
)
def test_damage_found_while_reading_leaves_nothing_behind(tmp_path, what, method):
    damaged(tmp_path / "f", what)
    line = refused("dedup", tmp_path / "f", "--out", tmp_path / "o", "--method", method)
    assert str(tmp_path / "f" / "a.") in line
    assert "row 50" in line or what == "broken zip"
    assert not (tmp_path / "o").exists()


def test_metadata_of_other_length_is_refused_with_both_files(laion, tmp_path):
    path = laion / "metadata" / "metadata_1.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    line = refused("dedup", laion, "--out", tmp_path / "o")
    assert f"{path} has 249 rows" in line
    assert f"{laion / 'img_emb' / 'img_emb_1.npy'} have 250" in line
    assert not (tmp_path / "o").exists()
    path.unlink()
    line = refused("dedup", laion, "--out", tmp_path / "o")
    assert "350 rows" in line
    assert "600 rows" in line
    assert not (tmp_path / "o").exists()


def test_a_key_that_is_not_there_is_refused(laion, tmp_path):
    line = refused("dedup", laion, "--out", tmp_path / "o", "--key", "sha")
    assert "'sha' is not there" in line
    assert "n, Key, uid, tags" in line
    line = refused("dedup", laion / "img_emb", "--out", tmp_path / "o", "--key", "uid", status=2)
    assert "--metadata" in line
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--thresold", 0.9], "did you mean --threshold"),
        (["--threshold", 1.5], "--threshold must lie between"),
        (["--method", "jion"], "must be one of join"),
    ],
)
def test_wrong_usage_exits_2_before_any_work(laion, tmp_path, words, said):
    before = truth.listing(tmp_path)
    assert said in refused("dedup", laion, "--out", tmp_path / "o", *words, status=2)
    assert truth.listing(tmp_path) == before


def test_out_is_needed_and_features_too(laion, tmp_path):
    assert "--out" in refused("dedup", laion, status=2)
    assert "FEATURES" in refused("dedup", "--out", tmp_path / "o", status=2)


@pytest.mark.parametrize("method", ["join", "exact"])
def test_a_device_that_is_not_there_is_refused(laion, tmp_path, method):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    words = ("--device", "cuda", "--method", method)
    assert "cuda" in refused("dedup", laion, "--out", tmp_path / "o", *words).lower()
    assert not (tmp_path / "o").exists()


def test_a_missing_input_is_named(tmp_path):
    for spec in ("nowhere", "nowhere/*.npy", "nowhere/x.npy"):
        assert "nowhere" in refused("dedup", tmp_path / spec, "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_an_unfinished_out_is_no_input(laion, tmp_path):
    with mock.patch.object(out_folder, "write_manifest", side_effect=KeyboardInterrupt):
        assert truth.snip("dedup", laion, "--out", tmp_path / "o")[0] == 130
    refused("dedup", tmp_path / "o", "--threshold", 0.97, "--out", tmp_path / "o2")
    assert not (tmp_path / "o2").exists()


# the result depends on rows, settings and seed only


@pytest.mark.parametrize(
    ("keep", "grouping"), [("first", "star"), ("random", "star"), ("last", "components")]
)
def test_shards_chunks_threads_and_a_second_run_change_nothing(rows, tmp_path, keep, grouping):
    how = {"keep": keep, "grouping": grouping, "seed": 3}
    whole = dedup(rows, threads=1, **how)
    twelve = truth.save_shards(tmp_path / "f", rows, list(range(50, 600, 50)))
    for source, more in [
        (rows, {"threads": 2}),
        (rows, {"chunk_rows": 10, "threads": 2}),
        (twelve, {"threads": 1}),
        (twelve, {"threads": 2, "chunk_rows": 10**6}),
        (twelve, {"max_memory": "1MB", "method": "exact"}),
    ]:
        again = dedup(source, **how, **more)
        assert np.array_equal(again.is_dup, whole.is_dup)
        assert np.array_equal(again.members.representative, whole.members.representative)


def test_a_rethreshold_keeps_what_is_not_said(laion, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    assert truth.snip("dedup", laion / "img_emb", "--out", first, "--grouping", "components",
                "--keep", "last")[0] == 0  # fmt: skip
    assert truth.snip("dedup", first, "--out", again, "--threshold", 0.97)[0] == 0
    settings = json.loads((again / "snip.json").read_text())["settings"]
    assert (settings["grouping"], settings["keep"]) == ("components", "last")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("reference", "other.npy"), ("recall", 0.9), ("text_threshold", 0.8), ("parts", "0:2"),
        ("method", "exact"), ("clusters", 5),
    ],
)  # fmt: skip
def test_a_rethreshold_refuses_what_belongs_to_the_search(searched, flag, value):
    words = ("dedup", searched, "--threshold", 0.97, "--out", searched.parent / "no")
    line = refused(*words, f"--{flag}", value, status=2)
    assert "search" in line
    assert flag == "method" or f"--{flag} {value} belongs to the search" in line
    assert not (searched.parent / "no").exists()


@pytest.fixture(scope="module")
def searched(rows, tmp_path_factory):
    """A finished run with some settings of its own."""
    folder = tmp_path_factory.mktemp("searched")
    np.save(folder / "x.npy", rows[100:])
    np.save(folder / "reference.npy", rows[:100])
    words = ("--reference", folder / "reference.npy", "--recall", 0.99, "--out", folder / "out")
    assert truth.snip("dedup", folder / "x.npy", *words)[0] == 0
    return folder / "out"


def test_a_rethreshold_may_repeat_what_the_search_was_told(searched, tmp_path, monkeypatch):
    monkeypatch.chdir(searched.parent)
    again = ("dedup", "out", "--threshold", 0.97, "--out")
    assert truth.snip(*again, tmp_path / "plain")[0] == 0
    said = ("--recall", 0.99, "--reference", "reference.npy", "--method", "join")
    assert truth.snip(*again, tmp_path / "said", *said)[0] == 0
    masks = [np.load(tmp_path / name / "is_dup.npy") for name in ("plain", "said")]
    assert np.array_equal(*masks)
    refused(*again, tmp_path / "no", "--reference", "x.npy", status=2)
    assert not (tmp_path / "no").exists()


def test_a_rethreshold_refuses_arrays_for_the_search(searched, rows, tmp_path):
    for name in ("reference", "text_features"):
        with pytest.raises(UsageError, match=f"--{name} belongs to the search"):
            dedup(str(searched), out=str(tmp_path / "no"), **{name: rows[100:]})
    assert not (tmp_path / "no").exists()


def test_overwrite_with_bad_input_leaves_the_old_result(laion, tmp_path):
    out, bad = tmp_path / "out", tmp_path / "bad.npy"
    assert truth.snip("dedup", laion / "img_emb", "--out", out)[0] == 0
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    np.save(bad, np.full((4, 8), np.nan, np.float32))
    assert truth.snip("dedup", bad, "--out", out, "--overwrite")[0] == 1
    after = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    assert before == after


@pytest.mark.parametrize(
    "words", [("--method", "exact", "--encoder", "e"), ("--method", "join", "--index", "i")]
)
def test_flags_that_would_be_ignored_are_refused(laion, tmp_path, words):
    status, *_ = truth.snip("dedup", laion / "img_emb", "--out", tmp_path / "out", *words)
    assert status == 2
    assert not (tmp_path / "out").exists()


def test_a_new_date_on_the_same_bytes_is_the_same_input(laion, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    words = ("dedup", laion / "img_emb", "--out", out)
    assert truth.snip(*words)[0] == 0
    shard = next((laion / "img_emb").iterdir())
    os.utime(shard, (1, 1))
    assert "finished already" in truth.snip(*words)[1]
    assert truth.snip("dedup", out, "--threshold", 0.97, "--out", again)[0] == 0
    rows = np.load(shard)
    np.save(shard, rows[::-1])
    assert truth.snip(*words)[0] == 1
    assert truth.snip("dedup", out, "--threshold", 0.98, "--out", tmp_path / "third")[0] == 1


def test_metadata_that_cannot_be_written_is_refused_before_the_search(laion, tmp_path):
    for path in (laion / "metadata").iterdir():
        table = pq.read_table(path)
        pq.write_table(table.append_column("dup_count", pa.array([0] * len(table))), path)
    status, _, said = truth.snip("dedup", laion, "--out", tmp_path / "out")
    assert status == 1
    assert "dup_count" in said
    assert not (tmp_path / "out").exists()


# a search that is done


@pytest.fixture
def searches(monkeypatch):
    """Counts the tasks of joins that are done anew."""
    done, join_partition = [], tasks.join_partition

    def counted(*given, **named):
        done.append(1)
        return join_partition(*given, **named)

    monkeypatch.setattr(tasks, "join_partition", counted)
    return done


def stop_while_writing(*words):
    with mock.patch.object(out_folder, "write_manifest", side_effect=KeyboardInterrupt):
        assert truth.snip(*words)[0] == 130


@pytest.mark.parametrize(
    "other",
    [
        ("--export", "keys,mask", "--key", "uid", "--weights"),
        ("--keep", "max:n", "--merge_captions", 2, "--caption", "uid", "--pairs"),
        ("--grouping", "components", "--keep_fraction", 0.6),
    ],
)
def test_a_stopped_run_goes_on_with_another_decision(laion, tmp_path, searches, other):
    words = ("dedup", laion, "--threshold", 0.9, "--out")
    assert truth.snip(*words, tmp_path / "plain", *other)[0] == 0
    stop_while_writing(*words, tmp_path / "o")
    searches.clear()
    status, _, line = truth.snip(*words, tmp_path / "o", *other)
    assert status == 0, line
    assert searches == []
    assert same_files(tmp_path / "o", tmp_path / "plain")
    assert "finished run with other" in refused(*words, tmp_path / "o")


@pytest.mark.parametrize("other", [("--threshold", 0.91), ("--seed", 1), ("--recall", 0.9)])
def test_a_stopped_run_of_another_search_is_refused(laion, tmp_path, other):
    words = ("dedup", laion, "--out", tmp_path / "o")
    stop_while_writing(*words)
    assert f"stopped run with other {other[0].strip('-')}" in refused(*words, *other)


REFERENCE = np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32)


@pytest.mark.parametrize(
    "how",
    [
        ("--method", "exact"),
        ("--method", "exact", "--reference", "reference.npy"),
        ("--method", "semdedup", "--clusters", 9),
        ("--method", "adc"),
        ("--index", "index"),
    ],
    ids=lambda how: " ".join(map(str, how)),
)
def test_what_other_methods_found_is_kept_too(laion, rows, tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    np.save("reference.npy", np.concatenate([rows[30:40], REFERENCE]))
    source = [laion, "--metadata", laion / "metadata"]
    if "index" in how:
        assert truth.snip("index", laion, "--m", 4, "--nlist", 4, "--out", "index")[0] == 0
        source = source[1:]
        how = (*how, "--method", "adc")
    words = ("dedup", *source, *how, "--threshold", 0.9, "--out")
    assert truth.snip(*words, "plain", "--key", "uid")[0] == 0
    with mock.patch.object(run, "write_files", side_effect=KeyboardInterrupt):
        assert truth.snip(*words, "o")[0] == 130
    with mock.patch.object(run, "search_pairs", side_effect=AssertionError):
        status, _, line = truth.snip(*words, "o", "--key", "uid")
    assert status == 0, line
    assert same_files(tmp_path / "o", tmp_path / "plain")


def same_files(one, other):
    """Tell whether two folders hold the same, but for manifests."""
    found = [
        {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
        for out in (one, other)
    ]
    for files in found:
        del files[Path(MANIFEST)]
    return found[0] == found[1]


def test_a_search_outlives_a_late_refusal(laion, tmp_path, searches):
    """The key of a later row group is no text; the rerun decides at once, by another one."""
    path = laion / "metadata" / "metadata_2.parquet"
    table = pq.read_table(path)
    hashes = pa.array([b"a"] * 100 + [b"\xff"] * (len(table) - 100), pa.binary())
    whole = table.append_column("hash", hashes)
    pq.write_table(whole, path, row_group_size=100)
    for number in range(2):
        first = laion / "metadata" / f"metadata_{number}.parquet"
        table = pq.read_table(first)
        same = pa.array([b"a"] * len(table), pa.binary())
        pq.write_table(table.append_column("hash", same), first)
    words = ("dedup", laion, "--threshold", 0.9, "--out", tmp_path / "o")
    assert "metadata_2.parquet: column 'hash'" in refused(*words, "--key", "hash")
    assert searches
    searches.clear()
    status, _, line = truth.snip(*words, "--key", "uid")
    assert status == 0, line
    assert searches == []


def test_a_search_outlives_metadata_that_changes(laion, tmp_path, searches, monkeypatch):
    changed, write_files = laion / "metadata" / "metadata_0.parquet", run.write_files

    def write(*given):
        written = write_files(*given)
        pq.write_table(pq.read_table(changed), changed, compression="none")
        return written

    words = ("dedup", laion, "--threshold", 0.9, "--out", tmp_path / "o")
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_files", write)
        assert "changed while it was read" in refused(*words)
    searches.clear()
    assert truth.snip(*words)[0] == 0
    assert searches == []


def test_the_earlier_result_stands_until_the_new_one_is_whole(laion, tmp_path):
    out = tmp_path / "o"
    assert truth.snip("dedup", laion, "--out", out)[0] == 0
    (out / "report.html").write_text("<html>")
    before = truth.listing(out)
    stop_while_writing("dedup", laion, "--threshold", 0.9, "--out", out, "--overwrite")
    after = {k: v for k, v in truth.listing(out).items() if not k.startswith("work")}
    assert after == before
    words = ("dedup", laion, "--threshold", 0.9, "--out", out, "--overwrite")
    assert truth.snip(*words)[0] == 0
    assert not (out / "report.html").exists()
    assert not (out / "work").exists()
    assert read_manifest(out, "dedup")["settings"]["threshold"] == 0.9


REFUSED = {"--max_memory 2": "this run needs", "--device cuda": "torch sees no CUDA device"}


@pytest.mark.parametrize("flags", REFUSED)
@pytest.mark.parametrize("how", ["join", "semdedup", "beside"])
def test_a_refused_run_leaves_nothing_and_what_was_there_stands(tmp_path, monkeypatch, flags, how):
    """``beside``: rows that come first, by a run whose model is kept."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    np.save(tmp_path / "e.npy", truth.clustered(300, 16, 0))
    np.save(tmp_path / "r.npy", truth.clustered(300, 16, 1))
    words = ["dedup", tmp_path / "e.npy", "--out", tmp_path / "out"]
    if how == "beside":
        first = ("dedup", tmp_path / "r.npy", "--out", tmp_path / "r", "--keep_work")
        assert truth.snip(*first)[0] == 0
        words += ["--reference", tmp_path / "r"]
    else:
        words += ["--method", how]
    status, _, said = truth.snip(*words, *flags.split())
    assert status == 1
    assert REFUSED[flags] in said
    assert not (tmp_path / "out").exists()
    assert truth.snip(*words)[0] == 0
    before = truth.listing(tmp_path / "out")
    assert truth.snip(*words, *flags.split(), "--overwrite")[0] == 1
    assert truth.listing(tmp_path / "out") == before


def test_a_stopped_run_survives_a_refusal(tmp_path, monkeypatch):
    np.save(tmp_path / "e.npy", truth.clustered(300, 16, 0))
    words = ["dedup", tmp_path / "e.npy", "--out", tmp_path / "out"]

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("snipdedup.deduplication.run.decide_job", stop)
        assert truth.snip(*words)[0] == 130
    before = truth.listing(tmp_path / "out" / "work")
    for name in ("run.lock", "request.json"):  # written again
        before.pop(name)
    assert len(before) > 2
    assert truth.snip(*words, "--max_memory", 2)[0] == 1
    assert before.items() <= truth.listing(tmp_path / "out" / "work").items()
    assert truth.snip(*words)[0] == 0
