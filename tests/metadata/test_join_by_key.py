"""Decisions by key equal those of a dictionary, however the rows are split over files."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from snipdedup.metadata.join_by_key import (
    AMBIGUOUS,
    CONTRADICTED,
    KEPT,
    REMOVED,
    UNMATCHED,
    KeyColumns,
    KeyJoin,
)
from snipdedup.metadata.masks import Mask
from snipdedup.metadata.tables import open_metadata
from snipdedup.storage import external_sort


def write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=50)
    return open_metadata(path)


def joined_by(known, is_dup, theirs, rows, mine, removing, work, groups=None):
    """Join ``rows`` by columns ``mine`` with the decided rows ``known`` by ``theirs``."""
    # the user has decided on each state: no share of rows is too many
    policies = {state: "remove" if state in removing else "keep" for state in range(5)}
    columns = KeyColumns(*theirs), KeyColumns(*mine)
    join = KeyJoin(rows, known, groups, *columns, policies)
    return join.run(Mask(None, is_dup), work).tolist(), join


def by_dictionary(theirs, is_dup, mine):
    """The state of each row, worked out in plain Python."""
    seen = defaultdict(list)
    for key, goes in zip(theirs, is_dup.tolist(), strict=True):
        seen[key].append(goes)
    states = []
    for key in mine:
        found = seen.get(key, []) if key else []
        states.append(
            UNMATCHED if not found else REMOVED if all(found) else AMBIGUOUS if any(found) else KEPT
        )
    return np.array(states)


@pytest.mark.parametrize("part_rows", [40, 10**6])
@pytest.mark.parametrize("removing", [[REMOVED], [REMOVED, AMBIGUOUS], [REMOVED, UNMATCHED]])
def test_a_join_equals_a_dictionary(tmp_path, monkeypatch, part_rows, removing):
    monkeypatch.setattr(external_sort, "HELD", part_rows)
    rng = np.random.default_rng(5)
    theirs = [None if i % 50 == 0 else f"u{i}" for i in rng.integers(0, 400, 700)]
    mine = [("" if i % 70 == 0 else f"u{i}") for i in rng.integers(0, 500, 600)]
    is_dup = rng.random(700) < 0.4
    known = write(tmp_path / "known.parquet", url=pa.array(theirs), n=np.arange(700))
    rows = write(tmp_path / "rows.parquet", m=np.arange(600), URL=mine)
    work = tmp_path / "work"
    removed, joined = joined_by(known, is_dup, [["url"]], rows, [["URL"]], removing, work)
    state = by_dictionary(theirs, is_dup, mine)
    assert removed == np.isin(state, removing).tolist()
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
    columns = [["url", "text"]], rows, [["url", "TEXT"]]
    removed, joined = joined_by(known, is_dup, *columns, [REMOVED], tmp_path / "work")
    assert removed == [True, False, True, False]
    assert joined.counts.tolist() == [1, 2, 0, 1, 0]


def test_a_row_whose_content_is_another_is_contradicted(tmp_path):
    known = write(
        tmp_path / "a.parquet", key=["1", "2", "3", "4", "4"], url=["x", "y", None, "w", "z"]
    )
    rows = write(tmp_path / "b.parquet", key=["1", "2", "3", "4"], url=["x", "Y", "q", "z"])
    columns = (["key"], "url"), rows, (["key"], "url")
    removed, joined = joined_by(known, np.ones(5, bool), *columns, [REMOVED], tmp_path / "work")
    # row 1 has another url; of key 3 the url is not known; of key 4 it could be either row's
    assert removed == [True, False, True, True]
    assert joined.counts[CONTRADICTED] == 1
    assert joined.examples[CONTRADICTED] == [1]


def test_an_out_without_its_metadata_decides_by_what_stays_and_the_keys_of_what_goes(tmp_path):
    kept = write(tmp_path / "meta.parquet", uid=["a", "c", "d"])
    groups = {"key": ["a", "b", "c", "e"], "is_dup": [False, True, False, True]}
    pq.write_table(pa.table(groups), tmp_path / "groups.parquet")
    rows = write(tmp_path / "b.parquet", uid=["e", "d", "c", "b", "a", "z"])
    columns = [["uid"]], rows, [["uid"]]
    is_dup = np.array([0, 1, 0, 1, 0], bool)
    groups = tmp_path / "groups.parquet"
    removed, joined = joined_by(kept, is_dup, *columns, [REMOVED], tmp_path / "work", groups)
    assert removed == [True, False, False, True, False, False]
    assert joined.counts.tolist() == [3, 2, 0, 1, 0]


def test_no_rows_at_all(tmp_path):
    known = write(tmp_path / "a.parquet", url=["u"])
    rows = write(tmp_path / "b.parquet", url=pa.array([], pa.string()))
    columns = [["url"]], rows, [["url"]]
    removed, joined = joined_by(known, np.ones(1, bool), *columns, [REMOVED], tmp_path / "work")
    assert removed == []
    assert joined.counts.sum() == 0
