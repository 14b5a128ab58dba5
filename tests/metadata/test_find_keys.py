"""Rows by their keys: in every kind of metadata, in what is left of it, and what is refused."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from snipdedup.errors import SnipError
from snipdedup.metadata import find_keys
from snipdedup.metadata.find_keys import open_keys
from snipdedup.metadata.gather import RowTexts
from snipdedup.metadata.tables import open_metadata

ROWS = 12


def keys_of(folder, columns, asked=None, is_dup=None, groups=None, cut=5):
    """The keys of metadata in two files, parquet or (texts) CSV."""
    folder.mkdir(exist_ok=True)
    table = pa.table(columns)
    for part, rows in enumerate((table.slice(0, cut), table.slice(cut))):
        pq.write_table(rows, folder / f"m_{part}.parquet", row_group_size=2)
    return open_keys(folder, ROWS, RowTexts(open_metadata(folder), is_dup), asked, groups)


@pytest.mark.parametrize(
    "column",
    ["key", "uid", "sample_id", "hash", "path", "image_path", "filename", "id", "Path", "ID"],
)
def test_each_column_of_keys_is_known(tmp_path, column):
    known = keys_of(tmp_path / "m", {"n": range(ROWS), column: [f"a/{n}.jpg" for n in range(ROWS)]})
    assert known.column == column
    assert known.find("a/3.jpg") == [3]
    assert known.find("a/11.jpg, 7,a/0.jpg") == [11, 7, 0]
    assert known.find(["a/6.jpg", 2, np.int64(4), "row:5"]) == [6, 2, 4, 5]


def test_a_key_of_before_goes_before_a_path_and_a_path_of_no_text_is_none(tmp_path):
    names = [f"p{n}" for n in range(ROWS)]
    both = keys_of(tmp_path / "both", {"path": names, "id": names, "uid": names})
    assert both.column == "uid"
    odd = {"path": [[n] for n in range(ROWS)], "id": pa.array(range(ROWS), pa.int16())}
    assert keys_of(tmp_path / "odd", odd).column == "id"
    assert keys_of(tmp_path / "asked", {"path": names, "mine": names[::-1]}, "mine").find("p0") == [
        ROWS - 1
    ]


def test_kinds_of_values(tmp_path):
    numbers = pa.array(range(100, 100 + ROWS), pa.int64())
    assert keys_of(tmp_path / "int", {"id": numbers}).find("103") == [3]  # no row has this number
    words = pa.array([f"k{n % 6}" for n in range(ROWS)]).dictionary_encode()
    assert keys_of(tmp_path / "dict", {"key": words}).find("k2") == [2, 8]
    large = pa.array([None, *(f"ü{n}" for n in range(1, ROWS))], pa.large_string())
    assert keys_of(tmp_path / "large", {"key": large}).find("ü1") == [1]
    (tmp_path / "csv").mkdir()
    pa.csv.write_csv(
        pa.table({"id": [f"{n:04d}" for n in range(ROWS)]}), tmp_path / "csv" / "m.csv"
    )
    texts = RowTexts(open_metadata(tmp_path / "csv"))
    assert open_keys(tmp_path, ROWS, texts).find("0011") == [11]


def test_a_number_that_is_a_row_and_a_key(tmp_path):
    known = keys_of(tmp_path / "m", {"id": [str(n) for n in range(ROWS)][::-1]})
    assert known.find("3") == [3]
    assert known.find("row:3") == [3]
    assert known.find("key:3") == [8]
    assert known.find(3) == [3]
    padded = keys_of(tmp_path / "padded", {"id": [f"{n:03d}" for n in range(ROWS)][::-1]})
    assert padded.find("003") == [8]
    commas = keys_of(tmp_path / "commas", {"id": ["1,b", *map(str, range(20, 19 + ROWS))]})
    assert commas.find("1,b") == commas.find("key:1,b") == [0]
    assert commas.find("1,30") == [1, 11]


def test_what_is_left_of_the_metadata(tmp_path):
    """Kept rows from OUT/metadata, all members of groups from groups.parquet."""
    is_dup = np.zeros(ROWS, bool)
    is_dup[[0, 4, 5]] = True
    kept = [f"k{n}" for n in np.flatnonzero(~is_dup)]
    groups = tmp_path / "groups.parquet"
    pq.write_table(pa.table({"row": [0, 1, 4, 5], "key": ["k0", "k1", "k4", None]}), groups)
    known = keys_of(tmp_path / "m", {"key": kept}, is_dup=is_dup, groups=groups)
    assert known.find([f"k{n}" for n in range(ROWS) if n != 5]) == [
        n for n in range(ROWS) if n != 5
    ]
    with pytest.raises(SnipError, match=r"no row of .* has the key 'k5'"):
        known.find("k5")
    alone = open_keys(tmp_path, ROWS, RowTexts(None), None, groups)
    assert alone.find("k4,k1") == [4, 1]


def test_refusals(tmp_path, monkeypatch):
    known = keys_of(tmp_path / "m", {"key": [f"photo_{n:04d}" for n in range(ROWS)]})
    with pytest.raises(SnipError, match=r"has the key 'photo_003'; .*: 'photo_000\d', 'photo_00"):
        known.find("photo_003")
    with pytest.raises(SnipError, match=r"has the key 'zzz', or one like it$"):
        known.find("photo_0001,zzz")
    with pytest.raises(SnipError, match=r"no row 12 in .*: rows 0 to 11$"):
        known.find("0,12")
    with pytest.raises(SnipError, match=r"has the key '9{5000}', or one like it$"):
        known.find("9" * 5000)
    with pytest.raises(SnipError, match=r"no row -1 in"):
        known.find(-1)
    with pytest.raises(SnipError, match=r"'row:x': expected a row number after row:"):
        known.find("row:x")
    with pytest.raises(SnipError, match=r"no keys are known of .*; columns of keys are key, uid, "):
        keys_of(tmp_path / "none", {"n": range(ROWS)}).find("x")
    with pytest.raises(SnipError, match=r"column 'mine' is not there"):
        keys_of(tmp_path / "mine", {"n": range(ROWS)}, "mine")
    monkeypatch.setattr(find_keys, "MOST_ROWS", 3)
    same = keys_of(tmp_path / "same", {"key": ["a"] * 3 + ["b"] * (ROWS - 3)})
    assert same.find("a") == [0, 1, 2]
    with pytest.raises(SnipError, match=r"more than 3 rows have the key 'b'; .* such as row:3$"):
        same.find("b")
