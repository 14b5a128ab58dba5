"""What equal URLs alone would catch, worked by hand and by counting."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from snipdedup.config import Dedup
from snipdedup.deduplication.run import run
from snipdedup.deduplication.write_out import count_baselines
from snipdedup.groups.members import Members
from snipdedup.metadata.tables import open_metadata


def members(row, group, is_dup):
    row, group, is_dup = np.array(row), np.array(group), np.array(is_dup, bool)
    return Members(row, group, np.where(is_dup, group, row), np.ones(len(row), np.float32), is_dup)


def test_a_case_worked_by_hand(tmp_path):
    url = ["a", "a", "b", "b", "b", None, None, "a", "c", "c"]
    hash_ = [1, 2, 3, 3, 4, 5, 5, 6, 7, 7]
    pq.write_table(pa.table({"URL": url, "Hash": hash_, "n": hash_}), tmp_path / "m.parquet")
    # group 0: 0 stays, 1 goes (same url, other hash), 7 goes (same url).
    # group 2: 2, 3, 4 all go for 6, which has no url; of the three b one would have stayed.
    # 8 and 9 are in two groups: not the same picture, whatever their url says.
    found = members(
        [0, 1, 7, 2, 3, 4, 6, 5, 8, 9],
        [0, 0, 0, 2, 2, 2, 2, 5, 5, 9],
        [0, 1, 1, 1, 1, 1, 0, 1, 0, 0],
    )
    assert count_baselines(open_metadata(tmp_path), found, tmp_path / "w") == {"Hash": 1, "URL": 4}


def test_no_such_column_no_baseline(tmp_path):
    pq.write_table(pa.table({"key": ["a", "b"]}), tmp_path / "m.parquet")
    assert count_baselines(open_metadata(tmp_path), members([0, 1], [0, 0], [0, 1]), tmp_path) == {}


def test_no_groups(tmp_path):
    pq.write_table(pa.table({"url": ["a", "b"]}), tmp_path / "m.parquet")
    nothing = members([], [], [])
    assert count_baselines(open_metadata(tmp_path), nothing, tmp_path / "w") == {}


@pytest.mark.parametrize("seed", range(3))
def test_many_groups_by_counting(tmp_path, seed):
    rng = np.random.default_rng(seed)
    url = rng.integers(0, 30, 400)
    pq.write_table(pa.table({"url": url}), tmp_path / "m.parquet", row_group_size=70)
    row = rng.permutation(400)[:300]
    group = rng.integers(0, 40, 300)
    gone = rng.random(300) < 0.6
    order = np.lexsort((row, group))
    want = 0
    for g in range(40):
        for u in range(30):
            same = (group == g) & (url[row] == u)
            want += min(gone[same].sum(), max(same.sum() - 1, 0))
    assert want
    found = members(row[order], group[order], gone[order])
    assert count_baselines(open_metadata(tmp_path), found, tmp_path / "w") == {"url": want}


def test_the_summary_says_so(data, tmp_path):
    meta = data / "small" / "chia500" / "metadata.csv"
    lines = meta.read_text("utf-8").splitlines()
    (tmp_path / "m.csv").write_text("\n".join([lines[0].replace("image_id", "url"), *lines[1:]]))
    features = str(data / "small" / "chia500" / "image_embeddings.npy")
    options = Dedup(features=features, metadata=str(tmp_path / "m.csv"), out=str(tmp_path / "out"))
    assert "  equal urls alone would catch 400 of the removed rows\n" in str(run(options))


def test_a_column_without_values_is_no_baseline(tmp_path):
    table = {"url": pa.nulls(3, pa.string()), "hash": [None, "x", "x"]}
    pq.write_table(pa.table(table), tmp_path / "m.parquet")
    found = members([0, 1, 2], [0, 0, 0], [0, 1, 1])
    assert count_baselines(open_metadata(tmp_path), found, tmp_path / "w") == {"hash": 1}
