"""Lists for other tools: checked by the rule of the tool that reads them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from snipdedup.config import Dedup, Filter
from snipdedup.errors import SnipError, UsageError
from snipdedup.metadata import kept_rows
from snipdedup.metadata.tables import open_metadata
from snipdedup.storage import external_sort


def uids_of(count, seed=0):
    """DataComp's uids: 32 hexadecimal digits."""
    rng = np.random.default_rng(seed)
    return [rng.bytes(16).hex() for _ in range(count)]


def write(folder, **columns):
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    for number, start in enumerate(range(0, len(table), 100)):
        pq.write_table(table.slice(start, 100), folder / f"m_{number}.parquet", row_group_size=30)
    return open_metadata(folder)


def by_datacomps_rule(uids):
    """As DataComp makes the lists that its resharder reads."""
    pairs = [(int(uid[:16], 16), int(uid[16:32], 16)) for uid in uids]
    wanted = np.array(pairs, np.dtype("u8,u8"))
    wanted.sort()
    return wanted


def written(kind, metadata, is_dup, folder, key=None):
    columns = kept_rows.list_columns([kind], metadata, key)
    (path,) = kept_rows.write_lists(columns, metadata, np.asarray(is_dup), folder, folder / "work")
    assert not any((folder / "work").rglob("*-*"))
    return path


@pytest.mark.parametrize("part_rows", [25, 10**6])
def test_uids_that_stay_as_datacomp_wants_them(tmp_path, monkeypatch, part_rows):
    monkeypatch.setattr(external_sort, "HELD", part_rows)
    uids = uids_of(350)
    uids[5], uids[6] = "0" * 32, "f" * 32
    uids[7] = uids[8][:16] + uids[7][16:]  # decided by the second half
    uids[9] = uids[9].upper()
    is_dup = np.random.default_rng(1).random(350) < 0.4
    is_dup[[5, 6, 7, 8, 9]] = False
    path = written("datacomp", write(tmp_path / "m", UID=uids), is_dup, tmp_path)
    found = np.load(path)
    assert found.dtype == np.dtype("u8,u8")
    want = by_datacomps_rule([u for u, gone in zip(uids, is_dup, strict=True) if not gone])
    np.testing.assert_array_equal(found, want)
    # as the resharder looks them up
    for number in (0, 5, 6, 7, 8, 9, 20):
        one = by_datacomps_rule([uids[number]])[0]
        place = np.searchsorted(found, one)
        assert (place < len(found) and found[place] == one) == (not is_dup[number])


def test_no_uid_stays(tmp_path):
    path = written("datacomp", write(tmp_path / "m", uid=uids_of(3)), np.ones(3, bool), tmp_path)
    assert np.load(path).shape == (0,)
    assert np.load(path).dtype == np.dtype("u8,u8")


@pytest.mark.parametrize("wrong", ["abc", "g" * 32, "0" * 31, "0" * 33, None, ""])
def test_what_is_no_uid_is_refused_by_its_row(tmp_path, wrong):
    uids = uids_of(150)
    uids[120] = wrong
    metadata = write(tmp_path / "m", uid=pa.array(uids))
    with pytest.raises(SnipError, match=r"m_1\.parquet row 20: uid .*, expected 32 hexadecimal"):
        written("datacomp", metadata, np.zeros(150, bool), tmp_path)
    assert not (tmp_path / "datacomp.npy").exists()


def test_keys_of_the_rows_that_stay_one_a_line(tmp_path):
    keys = [f"{n:05d}" if n % 3 else f"käse {n}" for n in range(250)]
    is_dup = np.random.default_rng(2).random(250) < 0.5
    path = written("keys", write(tmp_path / "m", KEY=keys), is_dup, tmp_path)
    lines = path.read_text("utf-8").split("\n")
    assert lines == [k for k, gone in zip(keys, is_dup, strict=True) if not gone] + [""]


@pytest.mark.parametrize("kind", ["keys", "datacomp"])
@pytest.mark.parametrize("part_rows", [25, 10**6])
def test_a_name_that_both_stays_and_goes_is_refused(tmp_path, monkeypatch, kind, part_rows):
    monkeypatch.setattr(external_sort, "HELD", part_rows)
    uids = uids_of(200)
    uids[130] = uids[40]
    metadata, is_dup = write(tmp_path / "m", uid=uids), np.zeros(200, bool)
    written(kind, metadata, is_dup, tmp_path)  # both stay: no doubt
    (tmp_path / "datacomp.npy").unlink(missing_ok=True)
    (tmp_path / "keys.txt").unlink(missing_ok=True)
    is_dup[130] = True
    with pytest.raises(SnipError) as caught:
        written(kind, metadata, is_dup, tmp_path)
    said = str(caught.value)
    assert f"2 rows share their uid with a row that is decided otherwise: '{uids[40]}'" in said
    assert "is kept in" in said
    assert "m_0.parquet row 40 and removed in" in said
    assert "m_1.parquet row 30;" in said
    assert not list(tmp_path.glob("*.*"))


def test_keys_that_cannot_be_lines_are_refused(tmp_path):
    metadata = write(tmp_path / "m", key=["a", "b\nc", "d", None])
    with pytest.raises(SnipError, match=r"key 'b.*nc' has a line break"):
        written("keys", metadata, [False, False, False, True], tmp_path)
    with pytest.raises(SnipError, match=r"m_0\.parquet row 3: no key, so no list by it"):
        written("keys", metadata, [False, True, False, False], tmp_path)
    assert not (tmp_path / "keys.txt").exists()


def test_columns_that_lack_are_named(tmp_path):
    metadata = write(tmp_path / "m", url=["a"])
    with pytest.raises(SnipError, match=r"no column is called uid; name one with .*columns: url"):
        kept_rows.list_columns(["datacomp"], metadata, None)
    with pytest.raises(SnipError, match="no column is called key or uid or sample_id or hash;"):
        kept_rows.list_columns(["keys"], metadata, None)
    assert kept_rows.list_columns(["keys"], metadata, "URL") == {"keys": "url"}
    with pytest.raises(UsageError, match="give --metadata too"):
        kept_rows.list_columns(["keys"], None, None)
    assert kept_rows.list_columns(["mask"], None, None) == {}


@pytest.mark.parametrize("what", [Dedup, Filter])
def test_an_unknown_list_is_wrong_usage(what):
    more = {"features": "f"} if what is Dedup else {"metadata": "m", "is_dup": "d"}
    with pytest.raises(UsageError, match="--export must be one or more of datacomp, keys, mask"):
        what(out="o", export="parquet", **more)


def test_data_in_datacomps_layout_goes_through_dedup(tmp_path, snip):
    rng = np.random.default_rng(3)
    names, uids, every = [rng.bytes(16).hex() for _ in range(3)], [], []
    rows = rng.standard_normal((60, 24)).astype(np.float16)
    for number, name in enumerate(sorted(names)):
        part = rows[20 * number : 20 * number + 30] if number < 2 else rows[40:]
        mine = uids_of(len(part), number)
        (tmp_path / "d").mkdir(exist_ok=True)
        np.savez(tmp_path / "d" / f"{name}.npz", b32_img=part, l14_img=part[:, ::-1].copy())
        pq.write_table(pa.table({"uid": mine, "url": mine}), tmp_path / "d" / f"{name}.parquet")
        uids += mine
        every.append(part)
    features = np.concatenate(every)
    first = [int(np.flatnonzero((features == row).all(axis=1))[0]) for row in features]
    stay = [n for n, row in enumerate(first) if n == row]
    assert 0 < len(stay) < len(features)
    snip(
        "dedup", tmp_path / "d/*.npz", "--array", "l14_img", "--metadata", tmp_path / "d/*.parquet",
        "--export", "datacomp,keys", "--out", tmp_path / "out",
    )  # fmt: skip
    found = np.load(tmp_path / "out" / "export" / "datacomp.npy")
    np.testing.assert_array_equal(found, by_datacomps_rule([uids[n] for n in stay]))
    lines = (tmp_path / "out" / "export" / "keys.txt").read_text().split()
    assert lines == [uids[n] for n in stay]
