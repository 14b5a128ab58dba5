"""--also: a pair must match in each of the second features, as brute force with all says."""

from __future__ import annotations

import json
from itertools import pairwise
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import truth
from hypothesis import given, settings
from hypothesis import strategies as st

from snipdedup import dedup, open_result
from snipdedup.commands import split_also
from snipdedup.deduplication.second_features import compare_columns
from snipdedup.errors import SnipError, UsageError
from snipdedup.features.hashing import checksum_text, shard_checksum
from snipdedup.features.shards import open_features
from snipdedup.groups import pairs, star
from snipdedup.metadata.tables import open_metadata
from snipdedup.storage.out_folder import read_manifest, write_manifest

LIMITS = (0.8, 0.85, 0.9)  # of the features, and of two second features


def cosines(x):
    """All cosines; 1 of equal rows, NaN of rows that cannot be compared, equal or not."""
    with np.errstate(invalid="ignore"):
        table = truth.cosine_table(x)
    table[(x[:, None, :] == x[None, :, :]).all(2) & np.isfinite(x).all(1)] = 1
    return table


def brute_table(first, *seconds):
    """Cosines of the first, -2 where the rows do not match in all others."""
    table = cosines(first)
    matches = [cosines(x) >= np.float32(limit) for x, limit in zip(seconds, LIMITS[1:])]  # noqa: B905
    return np.where(np.logical_and.reduce(matches), np.nan_to_num(table, nan=-2), np.float32(-2))


@st.composite
def three_features(draw):
    """Crowded, with copies of their own and of all at once; some rows of the last ones are NaN."""
    rows, seed = draw(st.integers(1, 40)), draw(st.integers(0, 2**31))
    of = [
        truth.clustered(rows, 4 + side, seed + side, clusters=draw(st.integers(1, 3)), noise=0.4,
                        copies=draw(st.sampled_from([0, 0.5])))
        for side in range(3)
    ]  # fmt: skip
    rng = np.random.default_rng(seed)
    again = np.where(rng.random(rows) < 0.3, rng.integers(0, rows, rows), np.arange(rows))
    x, y, z = (side[again] for side in of)
    spoilt = rng.random((2, rows)) < draw(st.sampled_from([0, 0.1]))
    y[spoilt[0]], z[spoilt[1], 0] = np.nan, np.inf
    return x, y, z


@pytest.mark.parametrize("method", ["exact", "join"])
@pytest.mark.parametrize("grouping", ["star", "components"])
@settings(max_examples=25)
@given(
    features=three_features(),
    keep=st.sampled_from(["first", "last"]),
    late=st.sampled_from([0.8, 0.95]),
    tile=st.sampled_from([4, 1024]),
)
def test_a_row_goes_only_if_all_match(method, grouping, features, keep, late, tile):
    x, y, z = features
    also = [(y, LIMITS[1]), (z, LIMITS[2])]
    how = {"threshold": LIMITS[0], "also": also, "method": method, "bad_rows": "keep"}
    small = mock.patch.multiple(pairs, LISTED_GROUP=tile, TILE=tile)
    with small, mock.patch.multiple(star, TABLE_BLOCK=tile, CODED_BLOCK=tile):
        found = dedup(x, keep=keep, grouping=grouping, **how).at(late)
    table = brute_table(x, y, z)
    label = truth.components(len(x), truth.pairs_of(table, late))
    if grouping == "star":
        order = np.arange(len(x))[:: 1 if keep == "first" else -1]
        representative, stays = truth.star(table, late, order)
        assert found.is_dup.tolist() == (~stays).tolist()
        assert found.members.representative.tolist() == (representative[found.members.row].tolist())
    else:
        assert found.removed == len(x) - len(set(label))
    row, named, gone = (found.groups[n].to_numpy() for n in ("row", "representative", "is_dup"))
    assert found.members.group.tolist() == label[row].tolist()
    for number, second in enumerate((y, z), 1):
        known = found.groups[f"also_similarity_{number}"].to_pylist()
        expected = np.where(gone, cosines(second)[row, named], np.nan)
        assert [value is None for value in known] == (~gone).tolist()
        np.testing.assert_allclose([v for v in known if v is not None], expected[gone], atol=1e-6)


@pytest.fixture
def folder(tmp_path):
    """Three features of 300 rows as files: x.npy, y.npy, z.npy."""
    rng = np.random.default_rng(4)
    again = np.where(rng.random(300) < 0.3, rng.integers(0, 300, 300), np.arange(300))
    for side, name in enumerate("xyz"):
        x = truth.clustered(300, 6 + side, side, clusters=9, noise=0.3, copies=0.2)
        np.save(tmp_path / f"{name}.npy", x[again].astype(np.float16 if side else np.float32))
    return tmp_path


def loaded(folder):
    return [np.load(folder / f"{name}.npy") for name in "xyz"]


def test_files_and_the_manifest_and_another_threshold(folder):
    out, again = folder / "out", folder / "again"
    also = ("--also", f"{folder}/y.npy:{LIMITS[1]}", "--also", f"{folder}/z.npy:{LIMITS[2]}")
    words = ("dedup", folder / "x.npy", *also, "--out", out, "--threshold", LIMITS[0])
    assert truth.snip(*words)[0] == 0
    table = brute_table(*loaded(folder))
    stays = truth.star(table, LIMITS[0], range(300))[1]
    assert np.load(out / "is_dup.npy").tolist() == (~stays).tolist()
    assert (
        20
        < (~stays).sum()
        < (~truth.star(cosines(loaded(folder)[0]), LIMITS[0], range(300))[1]).sum()
    )
    manifest = read_manifest(out, "dedup")
    assert [entry["name"] for entry in manifest["also"]] == [f"{folder}/{n}.npy" for n in "yz"]
    assert [entry["threshold"] for entry in manifest["also"]] == list(LIMITS[1:])
    assert [len(entry["shards"][0]["checksum"]) for entry in manifest["also"]] == [16, 16]
    comma = f"{folder}/y.npy:{LIMITS[1]},{folder}/z.npy:{LIMITS[2]}"
    assert "finished already" in truth.snip(*words[:2], "--also", comma, *words[6:])[1]
    status, _, line = truth.snip(*words[:4], *words[6:])
    assert (status, "other also" in line) == (1, True)
    assert truth.snip("dedup", out, "--threshold", 0.9, "--out", again)[0] == 0
    stays = truth.star(table, 0.9, range(300))[1]
    assert np.load(again / "is_dup.npy").tolist() == (~stays).tolist()
    assert open_result(again).is_dup.tolist() == (~stays).tolist()
    status, _, line = truth.snip("dedup", out, *also[:2], "--out", folder / "other")
    assert (status, "--also" in line, "belongs to the search" in line) == (2, True, True)
    assert truth.snip("dedup", out, *also, "--keep", "last", "--out", folder / "last")[0] == 0
    np.save(folder / "z.npy", loaded(folder)[2][::-1])
    status, _, line = truth.snip("dedup", out, "--threshold", 0.95, "--out", folder / "p")
    assert (status, "z.npy differs" in line) == (1, True)


def test_captions_are_second_features_of_another_name(folder):
    x, y, z = loaded(folder)
    one = dedup(x, also=[(y, 0.9), (z, 0.8)], threshold=0.8)
    other = dedup(x, text_features=y, text_threshold=0.9, also=(z, 0.8), threshold=0.8)
    assert one.groups.equals(other.groups)
    assert one.removed > 10


def test_a_manifest_of_before_still_opens(folder):
    """Captions had an entry of their own, and groups.parquet no column of them."""
    out, words = folder / "out", ("--text_features", folder / "y.npy", "--text_threshold", 0.85)
    assert truth.snip("dedup", folder / "x.npy", *words, "--threshold", 0.8, "--out", out)[0] == 0
    manifest = read_manifest(out, "dedup")
    (entry,) = manifest.pop("also")
    manifest["text"] = {name: entry[name] for name in ("request", "shards")}
    for part in ("settings", "request"):
        del manifest[part]["also"]
    groups = pq.read_table(out / "groups.parquet").drop_columns("also_similarity_1")
    pq.write_table(groups, out / "groups.parquet")
    outputs = [out / name for name in manifest.pop("outputs")]
    write_manifest(out, "dedup", manifest, outputs)
    assert truth.snip("audit", out)[0] == 0
    assert truth.snip("dedup", out, "--threshold", 0.9, "--out", folder / "later")[0] == 0
    x, y, _ = loaded(folder)
    stays = truth.star(brute_table(x, y), 0.9, range(300))[1]
    assert np.load(folder / "later" / "is_dup.npy").tolist() == (~stays).tolist()
    again = truth.snip("dedup", folder / "x.npy", *words, "--threshold", 0.8, "--out", out)
    assert "finished already" in again[1]
    status, _, line = truth.snip("dedup", out, "--also", "z.npy:.9", "--out", folder / "no")
    assert (status, "was searched without it" in line) == (2, True)


def test_an_array_is_not_read_again(folder):
    _, y, _ = loaded(folder)
    dedup(str(folder / "x.npy"), also=(y, 0.9), threshold=0.8, out=str(folder / "out"))
    status, _, line = truth.snip("dedup", folder / "out", "--out", folder / "more")
    assert (status, "names no second features" in line) == (1, True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("emb:.76", [("emb", 0.76)]),
        ("a:.9, b:-1", [("a", 0.9), ("b", -1.0)]),
        ("s3://bucket/emb:1", [("s3://bucket/emb", 1.0)]),
        ("http://host:8080/x.npy", [("http://host:8080/x.npy", None)]),
        ("http://host:8080/x_{part:04d}.npy:9e-1", [("http://host:8080/x_{part:04d}.npy", 0.9)]),
        (r"C:\emb:.5", [(r"C:\emb", 0.5)]),
        (r"C:\emb", [(r"C:\emb", None)]),
        (["a,b:.5", ("c", 1)], [("a,b", 0.5), ("c", 1.0)]),
        (("c", np.float32(0.5)), [("c", 0.5)]),
        (("a:.5", "b:.6"), [("a", 0.5), ("b", 0.6)]),
        (None, []),
    ],
)
def test_the_last_colon_before_a_number_counts(text, expected):
    assert split_also(text) == expected


@pytest.mark.parametrize("also", ["emb:1.5", ("emb", -2), ",", [], "host:8080"])
def test_what_names_no_threshold_is_wrong_usage(also):
    with pytest.raises(UsageError, match="--also"):
        dedup(np.eye(3), also=also)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"also": np.eye(3)}, "has no threshold"),
        ({"also": "emb"}, "--also emb has no threshold.*give emb:THRESHOLD"),
        ({"method": "adc"}, "also goes with --method join or exact"),
        ({"method": "semdedup"}, "also goes with"),
        ({"index": "i"}, "also goes with"),
        ({"reference": np.eye(3)}, "--also and --reference do not go together"),
    ],
)
def test_refusals(how, message):
    with pytest.raises(UsageError, match=message):
        dedup(np.eye(3), **{"also": (np.eye(3), 0.9), **how})


def test_bad_rows_are_named_or_match_nothing():
    second = np.ones((4, 2), np.float32)
    second[1] = np.nan
    with pytest.raises(SnipError, match=r"1 of 4 rows.*row 1 \(NaN\)"):
        dedup(np.ones((4, 3)), also=[(np.ones((4, 2)), 0.9), (second, 0.9)])
    with pytest.raises(SnipError, match="array 1 has 5 rows, FEATURES has 4"):
        dedup(np.ones((4, 3)), also=(np.eye(5), 0.9))


def embedded(folder, rows, keys, name="phash", threshold=0.76):
    """A folder as snip embed writes it."""
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    np.save(folder / "img_emb" / "img_emb_0000.npy", rows.astype(np.float16))
    pq.write_table(pa.table({"key": keys}), folder / "metadata" / "metadata_0000.parquet")
    model = {"name": name, "threshold": threshold, "dim": rows.shape[1]}
    write_manifest(folder, "embed", {"settings": {}, "request": {}, "model": model}, [])
    return folder


@pytest.fixture
def photos(folder):
    """The same pictures embedded by two models: clip (x) and phash (y)."""
    x, y, _ = loaded(folder)
    keys = [f"p{row}" for row in range(300)]
    embedded(folder / "clip", x, keys, "clip", 0.9)
    embedded(folder / "phash", y, keys)
    return folder


@pytest.mark.parametrize("inside", ["", "img_emb", "img_emb/img_emb_0000.npy", "img_emb/*.npy"])
def test_the_threshold_is_the_models(photos, inside):
    out = photos / "out"
    status, said, _ = truth.snip("dedup", f"{photos}/phash/{inside}", "--out", out)
    manifest = json.loads((out / "snip.json").read_text())
    assert (status, manifest["settings"]["threshold"], manifest["threshold_from"]) == (
        0, 0.76, "phash"
    )  # fmt: skip
    assert said.startswith("300 rows, threshold 0.76,")
    assert "note: no --threshold was given: this one is usual for phash" in said
    stays = truth.star(cosines(np.load(photos / "y.npy")), 0.76, range(300))[1]
    assert np.load(out / "is_dup.npy").tolist() == (~stays).tolist()
    assert str(dedup(f"{photos}/phash/{inside}")).count("usual for phash") == 1
    status, said, _ = truth.snip("dedup", out, "--keep", "last", "--out", photos / "later")
    assert said.startswith("300 rows, threshold 0.76,")  # as it was, without being asked
    assert "note: no --threshold" not in said


def test_of_unknown_features_it_is_clips(photos):
    said = truth.snip("dedup", photos / "x.npy", "--out", photos / "out")[1]
    assert "note: no --threshold was given: .95 is CLIP's; see docs/threshold.md" in said
    assert said.startswith("300 rows, threshold 0.95,")
    said = truth.snip("dedup", photos / "x.npy", "--threshold", 0.95, "--out", photos / "out")[1]
    assert "finished already" in said
    said = truth.snip("dedup", photos / "phash", "--threshold", 0.9, "--out", photos / "given")[1]
    assert "note: no --threshold" not in said
    assert "note: no --threshold" not in str(dedup(np.eye(9), threshold=0.9))
    (photos / "phash" / "snip.json").write_text('{"kind": "embed", "model": {"threshold": "x"}}')
    with pytest.raises(SnipError, match="damaged: its model has the threshold 'x'"):
        dedup(str(photos / "phash"))


def test_an_embedded_folder_knows_its_threshold(photos):
    x, y, _ = loaded(photos)
    found = dedup(str(photos / "clip"), also=str(photos / "phash"))
    same = dedup(x.astype(np.float16), threshold=0.9, also=(y, 0.76))
    assert found.groups.drop_columns("shard").equals(same.groups.drop_columns("shard"))
    assert found.removed > 10
    out = photos / "out"
    assert truth.snip("dedup", photos / "clip", "--also", photos / "phash", "--out", out)[0] == 0
    saved = read_manifest(out, "dedup")["settings"]["also"]
    assert saved == [f"{photos}/phash:0.76"]
    assert open_result(out).removed == found.removed


@pytest.mark.parametrize("metadata", [None, "given"])
def test_other_keys_are_refused_by_the_first_that_differs(photos, metadata):
    x, y, _ = loaded(photos)
    keys = [f"p{row}" for row in range(300)]
    keys[7:9] = keys[8:6:-1]
    embedded(photos / "moved", y, keys)
    more = {} if metadata is None else {"metadata": str(photos / "clip" / "metadata")}
    features = x if metadata else str(photos / "clip")
    what = r"row 7 has the key 'p7', .*row 7, beside .*moved, has 'p8'; .*failed\.parquet"
    with pytest.raises(SnipError, match=what):
        dedup(features, also=f"{photos}/moved", out=str(photos / "out"), **more)
    assert not (photos / "out").exists()
    embedded(photos / "fewer", y[1:], keys[1:])
    with pytest.raises(SnipError, match=r"fewer has 299 rows, FEATURES has 300.*failed\.parquet"):
        dedup(str(photos / "clip"), also=f"{photos}/fewer:.9")


def test_keys_are_compared_whatever_files_they_are_in(tmp_path):
    rng = np.random.default_rng(3)
    keys = [f"p{row}" if row % 7 else None for row in range(500)]
    others = list(keys)
    others[211], others[499] = "x", None
    for name, values, kind in (("a", keys, pa.string()), ("b", others, pa.large_string())):
        table, cuts = pa.table({"key": pa.array(values, kind)}), np.sort(rng.integers(0, 500, 5))
        (tmp_path / name).mkdir()
        for n, (start, stop) in enumerate(pairwise([0, *cuts.tolist(), 500])):
            pq.write_table(table.slice(start, stop - start), tmp_path / name / f"m_{n}.parquet")
    sides = [(open_metadata(tmp_path / name), "key") for name in "ab"]
    assert list(compare_columns(*sides)) == [(211, "p211", "x"), (499, "p499", None)]
    assert list(compare_columns(sides[0], sides[0])) == []


def test_a_path_and_an_array_are_told_apart(folder):
    out = folder / "mixed"
    also = [(loaded(folder)[1], LIMITS[1]), (str(folder / "z.npy"), LIMITS[2])]
    dedup(folder / "x.npy", also=also, threshold=LIMITS[0], out=out)
    assert [entry["source"] for entry in read_manifest(out, "dedup")["also"]] == [
        None, str(folder / "z.npy")
    ]  # fmt: skip
    status, said, _ = truth.snip("audit", out, "--probe_rows", 0)
    assert (status, said.count("an array in memory cannot be read again")) == (1, 1)
    assert "is not what was searched" not in said
    assert "in array 1" not in said.replace("array 1 cannot be read", "")


def test_each_second_feature_has_its_own_checksum_and_audit_proves_them(folder):
    out = folder / "out"
    also = ("--also", f"{folder}/y.npy:{LIMITS[1]}", "--also", f"{folder}/z.npy:{LIMITS[2]}")
    assert truth.snip("dedup", folder / "x.npy", *also, "--out", out, "--threshold", 0.8)[0] == 0
    known = [entry["shards"][0]["checksum"] for entry in read_manifest(out, "dedup")["also"]]
    shards = [open_features(folder / f"{name}.npy").shards[0] for name in "yz"]
    assert known == [checksum_text(shard_checksum(shard)) for shard in shards]
    removed = int(np.load(out / "is_dup.npy").sum())
    status, said, _ = truth.snip("audit", out)
    assert (status, said.count(f"{removed:,} of {removed:,} removed rows reach")) == (0, 3)
    twice = ("--also", f"{folder}/y.npy:.8,{folder}/y.npy:.85", "--threshold", 0.8)
    assert truth.snip("dedup", folder / "x.npy", *twice, "--out", folder / "twice")[0] == 0
    removed = int(np.load(folder / "twice" / "is_dup.npy").sum())
    said = truth.snip("audit", folder / "twice")[1]
    assert said.count(f"{removed:,} of {removed:,} removed rows reach") == 3


def test_a_pattern_takes_the_parts(folder):
    for name in "xy":
        (folder / name).mkdir()
        for part, rows in enumerate(np.array_split(np.load(folder / f"{name}.npy"), 3)):
            np.save(folder / name / f"p_{part}.npy", rows)
    words = ("dedup", f"{folder}/x/p_{{part}}.npy", "--parts", "0:2", "--threshold", 0.8)
    also = ("--also", f"{folder}/y/p_{{part}}.npy:.85", "--out", folder / "parts")
    assert truth.snip(*words, *also)[0] == 0
    assert truth.snip("audit", folder / "parts")[0] == 0
    stays = truth.star(brute_table(*(x[:200] for x in loaded(folder)[:2])), 0.8, range(200))[1]
    assert np.load(folder / "parts" / "is_dup.npy").tolist() == (~stays).tolist()


def test_large_groups_are_compared_by_blocks_of_rows(folder, monkeypatch):
    """By codes, and by tables where codes rule out little; never all rows of a group at once."""
    x = truth.clustered(600, 8, 3, clusters=1, noise=0.3).astype(np.float32)
    y = truth.clustered(600, 6, 4, clusters=5, noise=0.4).astype(np.float32)
    stays = truth.star(brute_table(x, y), 0.8, range(600))[1]
    monkeypatch.setattr(pairs, "LISTED_GROUP", 4)
    monkeypatch.setattr(star, "TABLE_GROUP", 8)
    monkeypatch.setattr(star, "CODED_BLOCK", 64)
    for crowded in (0.0, 1.0):
        monkeypatch.setattr(star, "CROWDED", crowded)
        found = dedup(x, threshold=0.8, also=[(y, LIMITS[1])])
        assert found.is_dup.tolist() == (~stays).tolist()
    assert 50 < found.removed < 599


def test_key_columns_of_other_names_are_not_compared(folder):
    for name, column in (("x", "key"), ("y", "uid")):
        (folder / name / "img_emb").mkdir(parents=True)
        (folder / name / "metadata").mkdir()
        np.save(folder / name / "img_emb" / "e_0.npy", np.load(folder / f"{name}.npy"))
        keys = [f"{name}{row}" for row in range(300)]
        pq.write_table(pa.table({column: keys}), folder / name / "metadata" / "m_0.parquet")
    out = ("--out", folder / "keys", "--threshold", 0.8)
    assert truth.snip("dedup", folder / "x", "--also", f"{folder}/y:.85", *out)[0] == 0
    short = pa.table({"uid": ["y0"]})
    pq.write_table(short, folder / "y" / "metadata" / "m_0.parquet")
    status, _, line = truth.snip("dedup", folder / "x", "--also", f"{folder}/y:.85", "--out", "o")
    assert (status, "1 rows" in line) == (1, True)
