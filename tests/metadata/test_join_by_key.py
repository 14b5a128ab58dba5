"""Decisions by key equal those of a dictionary, however the rows are split over files."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from snipdedup.metadata import join_by_key, spill
from snipdedup.metadata.join_by_key import AMBIGUOUS, CONTRADICTED, GOES, STAYS, UNMATCHED
from snipdedup.metadata.tables import open_metadata


def write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=50)
    return open_metadata(path)


def by_dictionary(theirs, is_dup, mine):
    """The state of each row, worked out in plain Python."""
    seen = defaultdict(list)
    for key, goes in zip(theirs, is_dup.tolist(), strict=True):
        seen[key].append(goes)
    states = []
    for key in mine:
        found = seen.get(key, []) if key else []
        states.append(
            UNMATCHED if not found else GOES if all(found) else AMBIGUOUS if any(found) else STAYS
        )
    return np.array(states)


@pytest.mark.parametrize("part_rows", [40, 10**6])
@pytest.mark.parametrize("removing", [[GOES], [GOES, AMBIGUOUS], [GOES, UNMATCHED]])
def test_a_join_equals_a_dictionary(tmp_path, monkeypatch, part_rows, removing):
    monkeypatch.setattr(spill, "PART_ROWS", part_rows)
    rng = np.random.default_rng(5)
    theirs = [None if i % 50 == 0 else f"u{i}" for i in rng.integers(0, 400, 700)]
    mine = [("" if i % 70 == 0 else f"u{i}") for i in rng.integers(0, 500, 600)]
    is_dup = rng.random(700) < 0.4
    known = write(tmp_path / "known.parquet", url=pa.array(theirs), n=np.arange(700))
    rows = write(tmp_path / "rows.parquet", m=np.arange(600), URL=mine)
    joined = join_by_key.join_decisions(
        join_by_key.decided_rows(known, is_dup, ["url"], None),
        700, rows, ["URL"], None, removing, tmp_path / "work",
    )  # fmt: skip
    state = by_dictionary(theirs, is_dup, mine)
    np.testing.assert_array_equal(joined.is_dup, np.isin(state, removing))
    np.testing.assert_array_equal(joined.counts, np.bincount(state, minlength=5))
    for number in range(5):
        assert joined.examples[number] == np.flatnonzero(state == number)[:3].tolist()
    shared = [key for key in mine if key and mine.count(key) > 1]
    assert joined.repeated == len(shared)
    assert len(set(np.bincount(state))) > 2  # every state but one occurs


def test_several_columns_are_one_key_in_any_order_of_the_files(tmp_path):
    known = write(tmp_path / "a.parquet", url=["u", "u", "v"], text=["a", "b", "a"])
    rows = write(tmp_path / "b.parquet", TEXT=["b", "a", "a", "c"], url=["u", "u", "v", "u"])
    is_dup = np.array([False, True, True])
    joined = join_by_key.join_decisions(
        join_by_key.decided_rows(known, is_dup, ["url", "text"], None),
        3, rows, ["url", "TEXT"], None, [GOES], tmp_path / "work",
    )  # fmt: skip
    assert joined.is_dup.tolist() == [True, False, True, False]
    assert joined.counts.tolist() == [1, 2, 0, 1, 0]


def test_a_row_whose_witness_says_otherwise_is_contradicted(tmp_path):
    known = write(
        tmp_path / "a.parquet", key=["1", "2", "3", "4", "4"], url=["x", "y", None, "w", "z"]
    )
    rows = write(tmp_path / "b.parquet", key=["1", "2", "3", "4"], url=["x", "Y", "q", "z"])
    joined = join_by_key.join_decisions(
        join_by_key.decided_rows(known, np.ones(5, bool), ["key"], "url"),
        5, rows, ["key"], "url", [GOES], tmp_path / "work",
    )  # fmt: skip
    # row 1 has another url; of key 3 the url is not known; of key 4 it could be either row's
    assert joined.is_dup.tolist() == [True, False, True, True]
    assert joined.counts[CONTRADICTED] == 1
    assert joined.examples[CONTRADICTED] == [1]


def test_an_out_without_its_metadata_decides_by_what_stays_and_the_keys_of_what_goes(tmp_path):
    staying = write(tmp_path / "meta.parquet", uid=["a", "c", "d"])
    groups = {"key": ["a", "b", "c", "e"], "is_dup": [False, True, False, True]}
    pq.write_table(pa.table(groups), tmp_path / "groups.parquet")
    rows = write(tmp_path / "b.parquet", uid=["e", "d", "c", "b", "a", "z"])
    joined = join_by_key.join_decisions(
        join_by_key.published_rows(staying, "uid", tmp_path / "groups.parquet"),
        5, rows, ["uid"], None, [GOES], tmp_path / "work",
    )  # fmt: skip
    assert joined.is_dup.tolist() == [True, False, False, True, False, False]
    assert joined.counts.tolist() == [3, 2, 0, 1, 0]


def test_no_rows_at_all(tmp_path):
    known = write(tmp_path / "a.parquet", url=["u"])
    rows = write(tmp_path / "b.parquet", url=pa.array([], pa.string()))
    joined = join_by_key.join_decisions(
        join_by_key.decided_rows(known, np.ones(1, bool), ["url"], None),
        1, rows, ["url"], None, [GOES], tmp_path / "work",
    )  # fmt: skip
    assert joined.is_dup.tolist() == []
    assert joined.counts.sum() == 0
