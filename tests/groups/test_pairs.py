"""All pairs inside groups: none missing, none twice, as a double loop lists them."""

from __future__ import annotations

import threading
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import truth
from hypothesis import given, settings
from hypothesis import strategies as st

from snipdedup import dedup
from snipdedup.errors import SnipError, UsageError
from snipdedup.features.shards import open_features
from snipdedup.groups import pairs
from snipdedup.groups.pairs import all_pairs, listed_pairs, pairs_within, plan_groups


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_listed_pairs_are_those_within_each_group(sizes):
    a, b = listed_pairs(np.array(sizes))
    starts = np.cumsum(sizes) - sizes
    expected = [
        (start + i, start + j)
        for start, size in zip(starts, sizes, strict=True)
        for i in range(size)
        for j in range(i + 1, size)
    ]
    assert list(zip(a.tolist(), b.tolist(), strict=True)) == expected


@given(
    sizes=st.lists(st.integers(2, 30), max_size=12),
    listed=st.integers(1, 20),
    most=st.integers(1, 60),
    tile=st.integers(1, 12),
)
def test_the_plan_has_each_pair_of_a_group_once(sizes, listed, most, tile):
    seen = []
    with mock.patch.multiple(pairs, LISTED_GROUP=listed, LISTED_PAIRS=most, TILE=tile):
        plan = list(plan_groups(np.array(sizes, int)))
    ends = np.cumsum(sizes)
    for begin, end, i, j in plan:
        if i < 0:
            inside = [n for n, e in zip(sizes, ends, strict=True) if begin < e <= end]
            assert sum(inside) == end - begin
            a, b = listed_pairs(np.array(inside))
            seen += zip((a + begin).tolist(), (b + begin).tolist(), strict=True)
            continue
        left = range(begin + i, min(begin + i + tile, end))
        right = range(begin + j, min(begin + j + tile, end))
        seen += [(a, b) for a in left for b in right if a < b]
    group = np.repeat(np.arange(len(sizes)), sizes)
    expected = {(a, b) for a in range(len(group)) for b in range(a + 1, len(group))
                if group[a] == group[b]}  # fmt: skip
    assert len(seen) == len(set(seen))
    assert set(seen) == expected


@settings(max_examples=30)
@given(
    rows=st.integers(2, 60),
    seed=st.integers(0, 2**31),
    clusters=st.integers(1, 6),
    tile=st.sampled_from([3, 1024]),
)
def test_all_pairs_are_those_of_all_rows(rows, seed, clusters, tile):
    x = np.unique(truth.clustered(rows, 6, seed, clusters=clusters, noise=0.5), axis=0)
    found, table = dedup(x, method="exact", threshold=0.9), truth.cosine_table(x)
    with mock.patch.multiple(pairs, LISTED_GROUP=tile, TILE=tile):
        parts = list(all_pairs(open_features(x), found.search.forest, 0.9, 1))
        row = np.arange(len(x))
        one = list(pairs_within(open_features(x), row, row * 0, 0.9, 2))
    listed = [(a, b) for part in parts for a, b in zip(part.a, part.b, strict=True)]
    assert len(listed) == len(set(listed))
    assert sorted(listed) == truth.pairs_of(table, 0.9)
    assert all((part.similarity == table[part.a, part.b]).all() for part in parts)
    listed = sorted((a, b) for part in one for a, b in zip(part.a, part.b, strict=True))
    assert listed == truth.pairs_of(table, 0.9)


# the files


@pytest.fixture(scope="module")
def rows():
    return truth.clustered(1200, 12, 3, clusters=120, noise=0.5, copies=0.1)


@pytest.fixture
def folder(rows, tmp_path):
    return truth.save_shards(tmp_path / "f", rows, [500])


def read(path):
    return [tuple(row.values()) for row in pq.read_table(path).to_pylist()]


@pytest.mark.parametrize("method", ["exact", "join"])
def test_pairs_and_copies_are_written(rows, folder, tmp_path, method):
    out = tmp_path / "o"
    words = ("dedup", folder, "--out", out, "--threshold", 0.9, "--pairs", "--method", method)
    assert truth.snip(*words)[0] == 0
    table, first = truth.cosine_table(rows), {}
    copies = [(row, first[key]) for row, key in enumerate(map(bytes, rows))
              if first.setdefault(key, row) != row]  # fmt: skip
    assert read(out / "copies.parquet") == copies
    distinct = set(first.values())
    expected = {pair for pair in truth.pairs_of(table, 0.9) if distinct.issuperset(pair)}
    found = read(out / "pairs.parquet")
    assert len(found) == len(expected) > 1000
    assert {pair[:2] for pair in found} == expected
    assert all(pair[2] == table[pair[:2]] for pair in found)
    again = tmp_path / "again"
    assert truth.snip("dedup", out, "--threshold", 0.95, "--pairs", "--out", again)[0] == 0
    assert {pair[:2] for pair in read(again / "pairs.parquet")} == {
        pair[:2] for pair in found if pair[2] >= np.float32(0.95)
    }
    assert truth.snip("dedup", folder, "--out", tmp_path / "b", *words[4:], "--threads", 1)[0] == 0
    assert (tmp_path / "b" / "pairs.parquet").read_bytes() == (out / "pairs.parquet").read_bytes()


def test_a_refusal_leaves_no_workers_and_no_setting_behind(rows, tmp_path):
    """Though its traceback is held."""
    before = torch.get_num_threads(), threading.active_count()
    with pytest.raises(SnipError, match="at most 3 pairs") as held:
        dedup(rows, out=tmp_path / "o", threshold=0.9, pairs=True, max_pairs=3, threads=2)
    assert held.value.__traceback__
    assert (torch.get_num_threads(), threading.active_count()) == before


def test_too_many_pairs_are_refused_and_the_search_is_kept(rows, folder, tmp_path):
    out = tmp_path / "o"
    words = ("dedup", folder, "--out", out, "--threshold", 0.9, "--pairs")
    assert truth.snip("dedup", folder, "--out", tmp_path / "p", *words[4:])[0] == 0
    count = len(read(tmp_path / "p" / "pairs.parquet"))
    for most in (count - 1, 3):
        status, said, line = truth.snip(*words, "--max_pairs", most)
        assert (status, said) == (1, "")
        assert f"at most {most:,} pairs" in line
        assert not list(out.glob("*.*"))
    assert truth.snip(*words, "--max_pairs", count)[0] == 0
    assert len(read(out / "pairs.parquet")) == count
    assert not (out / "work").exists()
    assert "finished already" in truth.snip(*words)[1]


def test_no_pairs_make_an_empty_table(tmp_path):
    dedup(np.eye(5), out=str(tmp_path / "o"), pairs=True)
    table = pq.read_table(tmp_path / "o" / "pairs.parquet")
    assert [(f.name, str(f.type)) for f in table.schema] == [
        ("a", "int64"), ("b", "int64"), ("similarity", "float"),
    ]  # fmt: skip
    assert table.num_rows == 0


def test_pairs_need_features():
    with pytest.raises(UsageError, match="FEATURES"):
        dedup(None, index="i", pairs=True)
    with pytest.raises(UsageError, match="pairs"):
        dedup(np.eye(3), method="semdedup", pairs=True)


# --keep_fraction


@pytest.mark.parametrize("grouping", ["star", "components"])
def test_keep_fraction_finds_the_lowest_threshold(grouping):
    x = truth.clustered(200, 12, 3, clusters=20, noise=0.5, copies=0.1)
    base = dedup(x, threshold=0.96, method="exact", grouping=grouping)
    kept = {round(0.96 + step / 1000, 3): 0.0 for step in range(41)}
    for threshold in kept:
        kept[threshold] = base.at(threshold).kept / len(x)
    for fraction in (kept[0.96], kept[0.97], (kept[0.97] + kept[0.975]) / 2):
        expected = min(t for t, share in kept.items() if share >= fraction)
        found = dedup(x, threshold=0.96, grouping=grouping, keep_fraction=fraction)
        assert found.threshold == expected
        assert found.kept / len(x) == kept[expected]
        assert found.search.threshold == expected


def test_keep_fraction_works_on_a_finished_run_without_a_search(rows, folder, tmp_path):
    out, second = tmp_path / "o", tmp_path / "p"
    how = ("--threshold", 0.9, "--grouping", "components")
    assert truth.snip("dedup", folder, "--out", out, *how)[0] == 0
    fresh = dedup(rows, threshold=0.9, grouping="components", keep_fraction=0.7)
    with mock.patch("snipdedup.deduplication.run.search_pairs", side_effect=AssertionError):
        words = ("dedup", out, "--keep_fraction", 0.7, "--out", second)
        status, said, _ = truth.snip(*words)
    assert status == 0
    assert f"threshold {fresh.threshold:g}" in said
    assert np.array_equal(np.load(second / "is_dup.npy"), fresh.is_dup)
    similarity = pq.read_table(second / "forest.parquet")["similarity"].to_numpy()
    assert (similarity >= np.float32(fresh.threshold)).all()
    assert truth.snip("dedup", second, "--threshold", 0.99, "--out", tmp_path / "q")[0] == 0
    late = dedup(rows, threshold=0.99, grouping="components")
    assert np.array_equal(np.load(tmp_path / "q" / "is_dup.npy"), late.is_dup)


def test_more_that_stay_already_are_refused_with_their_share(rows, folder, tmp_path):
    base = dedup(rows, threshold=0.9)
    share = f"{base.kept / len(rows):.4%}"
    words = ("dedup", folder, "--out", tmp_path / "o", "--threshold", 0.9)
    status, _, line = truth.snip(*words, "--keep_fraction", 0.1)
    assert status == 1
    assert share in line
    assert not list((tmp_path / "o").glob("*.*"))
    copies = len(rows) - len(np.unique(rows, axis=0))
    with pytest.raises(SnipError, match="no higher"):
        dedup(rows, threshold=0.99, keep_fraction=1 - copies / len(rows) + 0.001)


def test_keep_fraction_tries_1_at_last():
    """Of two rows at a cosine of .9998 one goes at .9995, of two equal ones at any threshold."""
    x = np.eye(8, dtype=np.float32)
    x = np.vstack([x, x[0] + 0.02 * x[1], x[2]])
    kept = {t: dedup(x, threshold=t).kept for t in (0.9505, 0.9995, 1.0)}
    assert list(kept.values()) == [8, 8, 9]
    found = dedup(x, threshold=0.9505, keep_fraction=0.9)
    assert (found.threshold, found.kept) == (1.0, 9)
    with pytest.raises(SnipError, match=r"90.0000% of the rows are kept at threshold 1, and"):
        dedup(x, threshold=0.9505, keep_fraction=0.91)
