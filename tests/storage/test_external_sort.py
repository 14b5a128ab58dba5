"""Records by a key: nothing lost, keys ascend, as added within a key, whatever memory holds."""

from __future__ import annotations

from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snipdedup.errors import SnipError
from snipdedup.storage import external_sort
from snipdedup.storage.external_sort import Columns, Sorter, Spread, distinct, row_kind

KIND = np.dtype([("key", "<u8"), ("place", "<u4")])
LARGEST = (1 << 64) - 1


def records_of(keys):
    records = np.empty(len(keys), KIND)
    records["key"], records["place"] = np.array(keys, np.uint64), np.arange(len(keys))
    return records


def by_key(records):
    return records["key"]


@given(
    keys=st.lists(st.one_of(st.integers(0, 9), st.integers(0, LARGEST)), max_size=300),
    step=st.integers(1, 60),
    held=st.integers(1, 100),
    parts=st.integers(2, 9),
    known=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_records_come_back_by_their_keys(tmp_path_factory, keys, step, held, parts, known):
    folder = tmp_path_factory.mktemp("s")
    spread = Spread(len(keys), min(keys), max(keys)) if known and keys else None
    with mock.patch.multiple(external_sort, PARTS=parts, READ=7):
        sorter = Sorter(folder / "x", KIND, by_key, held=held, spread=spread)
        for start in range(0, len(keys), step):
            sorter.add(records_of(keys)[start : start + step])
        found = list(sorter.ascending())
    last = -1
    for part in found:
        alike = len(set(part["key"].tolist())) == 1
        assert len(part) <= held or alike or len(found) == 1
        assert not len(part) or int(part["key"].min()) > last
        last = int(part["key"].max(initial=0)) if len(part) else last
        order = np.argsort(part["key"], kind="stable")
        same = np.diff(part["key"][order]) == 0
        assert (np.diff(part["place"][order].astype(int))[same] > 0).all()
    assert sorted(np.concatenate(found).tolist()) == sorted(records_of(keys).tolist())
    assert not list(folder.glob("*"))


def test_files_of_a_stopped_run_are_not_taken_for_records(tmp_path):
    for number in range(8):
        (tmp_path / f"x-{number:03d}").write_bytes(b"\1" * 120)
        (tmp_path / f"x-000-{number:03d}").write_bytes(b"\1" * 120)
    sorter = Sorter(tmp_path / "x", KIND, by_key, held=10)
    sorter.add(records_of(range(100)))
    assert np.concatenate(list(sorter.ascending()))["key"].tolist() == list(range(100))


def test_a_file_that_is_cut_meanwhile_is_named(tmp_path):
    sorter = Sorter(tmp_path / "x", KIND, by_key, held=10)
    sorter.add(records_of(range(100)))
    path = tmp_path / "x-000"
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(SnipError, match="x-000: cut short while the run went on"):
        list(sorter.ascending())


@given(sizes=st.lists(st.integers(0, 40), max_size=9), held=st.integers(0, 60))
@settings(deadline=None, max_examples=40)
def test_columns_are_what_was_added(tmp_path_factory, sizes, held):
    folder = tmp_path_factory.mktemp("c")
    columns = Columns(folder / "x", {"row": "<i8", "near": "<f4", "goes": "?"}, held=held)
    ends = np.cumsum([0, *sizes])
    for low, high in pairwise(ends):
        row = np.arange(low, high)
        columns.add(row, row / 2, row % 3 == 0)
    row, near, goes = columns.arrays()
    assert [array.dtype.str for array in (row, near, goes)] == ["<i8", "<f4", "|b1"]
    assert row.tolist() == list(range(ends[-1]))
    assert np.array_equal(near, (row / 2).astype(np.float32))
    assert np.array_equal(goes, row % 3 == 0)
    assert isinstance(row, np.memmap) == (ends[-1] > held)


def test_rows_take_four_bytes_as_long_as_they_fit():
    for rows, wanted in ((1, 4), (1 << 32, 4), ((1 << 32) + 1, 8)):
        kind = np.dtype(row_kind(rows))
        assert kind.itemsize == wanted
        assert int(np.array([rows - 1], kind)[0]) == rows - 1


@given(st.lists(st.integers(-5, 5)))
def test_values_are_returned_once(values):
    assert distinct(np.array(values, np.int64)).tolist() == sorted(set(values))
