"""Streamed figures and samples against plain Python over the whole tables."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import truth

from snipdedup.deduplication import read_out
from snipdedup.groups.members import Members, concatenate

ROWS, OFFSETS = 900, np.array([0, 100, 640, 900])
START, GROUPS = 0.9, 12


@pytest.fixture(scope="module")
def table():
    """Cosines of rows with many pairs, some of them exactly 1."""
    return truth.cosine_table(truth.clustered(ROWS, 16, 4, noise=0.3, copies=0.1))


@pytest.fixture(scope="module")
def forest(table, tmp_path_factory):
    """``forest.parquet`` of the rows, by Kruskal."""
    edges = [(a, b, float(table[a, b])) for a, b in truth.pairs_of(table, START)]
    path = tmp_path_factory.mktemp("forest") / "forest.parquet"
    a, b, similarity = zip(*sorted(truth.kruskal(edges)), strict=True)
    pq.write_table(pa.table({"a": a, "b": b, "similarity": pa.array(similarity, "f4")}), path)
    return path


def members_of(table):
    """The star rule's members, ordered by group, then row."""
    representative, stays = truth.star(table, START, range(ROWS))
    group = truth.components(ROWS, truth.pairs_of(table, START))
    size = Counter(group.tolist())
    rows = np.array([row for row in range(ROWS) if size[group[row]] > 1])
    rows = rows[np.lexsort((rows, group[rows]))]
    similarity = np.where(stays[rows], 1, table[rows, representative[rows]]).astype(np.float32)
    return Members(rows, group[rows], representative[rows], similarity, ~stays[rows])


@pytest.fixture(scope="module")
def members(table):
    return members_of(table)


@pytest.fixture(scope="module")
def path(members, tmp_path_factory):
    """``groups.parquet`` with a key for each even row."""
    path = tmp_path_factory.mktemp("groups") / "groups.parquet"
    keys = [f"k{row}" if row % 2 == 0 else None for row in members.row.tolist()]
    columns = {name: getattr(members, name) for name in Members._fields}
    pq.write_table(pa.table({**columns, "key": pa.array(keys, pa.string())}), path)
    return path


@pytest.fixture(params=[7, 100_000])
def batch_rows(request, monkeypatch):
    monkeypatch.setattr(read_out, "BATCH_ROWS", request.param)


def surveyed(path, draw=0, **changed):
    settings = {"threshold": START, "keep": "first", "seed": 0} | changed
    return read_out.survey_groups(path, settings, OFFSETS, draw, GROUPS)


# ---- the slider


@pytest.mark.parametrize(
    ("start", "first", "last", "most"),
    [
        (0.95, ["0.95", "0.9505", "0.951"], ["0.9995", "1"], 101),
        (0.953, ["0.953", "0.9535", "0.954"], ["0.9995", "1"], 95),
        (0.9533, ["0.9533", "0.9535", "0.954"], ["0.9995", "1"], 95),
        (0.761, ["0.761", "0.762", "0.764"], ["0.998", "1"], 121),
        (0.5, ["0.5", "0.505", "0.51"], ["0.995", "1"], 101),
        (-1, ["-1", "-0.98", "-0.96"], ["0.98", "1"], 101),
        (0.0, ["0", "0.01", "0.02"], ["0.99", "1"], 101),
        (1.0, ["1"], ["1"], 1),
    ],
)
def test_stops_are_round_and_reach_from_the_threshold_to_one(start, first, last, most):
    stops = read_out.threshold_stops(start)
    assert stops[: len(first)] == first
    assert stops[-len(last) :] == last
    assert len(stops) == most
    assert sorted(map(float, stops)) == [*map(float, stops)]
    assert len(set(stops)) == len(stops)


def test_every_stop_counts_components(table, forest, batch_rows):
    curve = read_out.read_curve(forest, ROWS, START)
    for place in range(0, len(curve.thresholds), 9):
        threshold = float(curve.thresholds[place])
        label = truth.components(ROWS, truth.pairs_of(table, threshold))
        size = Counter(label.tolist())
        assert curve.removed[place] == ROWS - len(size)
        assert curve.groups[place] == sum(count > 1 for count in size.values())
    assert curve.removed[-1] > 0  # the copies


def test_a_forest_without_edges(tmp_path):
    empty = {"a": pa.array([], "i8"), "b": pa.array([], "i8"), "similarity": pa.array([], "f4")}
    pq.write_table(pa.table(empty), tmp_path / "f.parquet")
    curve = read_out.read_curve(tmp_path / "f.parquet", 5, 0.95)
    assert not curve.removed.any()
    assert not curve.groups.any()


# ---- groups


def test_batches_cut_no_group(path, members, monkeypatch):
    for size in (1, 7, 64, 100_000):
        monkeypatch.setattr(read_out, "BATCH_ROWS", size)
        parts = list(read_out.whole_groups(path))
        seen = [set(part.group.tolist()) for part in parts]
        assert sum(map(len, seen)) == len(set().union(*seen))
        joined = concatenate(*parts)
        for found, expected in zip(joined, members, strict=True):
            assert np.array_equal(found, expected)


def test_figures_are_those_of_the_whole_table(path, members, batch_rows):
    found = surveyed(path)
    gone = [dict(zip(Members._fields, row, strict=True)) for row in zip(*members, strict=True)]
    gone = [row for row in gone if row["is_dup"]]
    assert found.similarities.sum() == len(gone)
    assert found.similarities[-1] == sum(row["similarity"] == 1 for row in gone)
    for place in range(0, len(found.edges) - 1, 5):
        low, high = np.float32(found.edges[[place, place + 1]])
        assert found.similarities[place] == sum(low <= row["similarity"] < high for row in gone)
    counts = Counter(row["representative"] for row in gone)
    best = sorted(counts, key=lambda row: (-counts[row], row))[: read_out.COPIED]
    assert found.copied.tolist() == best
    assert found.copies.tolist() == [counts[row] for row in best]
    shard = np.searchsorted(OFFSETS, range(ROWS), "right") - 1
    foreign = [r for r in gone if shard[r["row"]] != shard[r["representative"]]]
    assert found.foreign.tolist() == [sum(shard[r["row"]] == s for r in foreign) for s in range(3)]
    size = Counter(members.group.tolist())
    largest = sorted(size, key=lambda group: (-size[group], group))[:GROUPS]
    assert [int(group.shown.group[0]) for group in found.largest] == largest
    for group, label in zip(found.largest, largest, strict=True):
        mine = [row for row in gone if row["group"] == label]
        assert (group.size, group.removed) == (size[label], len(mine))
        assert group.lowest == min(row["similarity"] for row in mine)
        assert len(group.shown.row) == min(group.size, read_out.SHOWN_MEMBERS)
        most = max(counts[row["representative"]] for row in mine)
        assert counts[group.shown.row[0]] == most
    staying = int((~members.is_dup).sum())
    assert found.spared.rows == staying - len(size)
    assert found.below.rows == 0


def test_bands_hold_every_removed_row_once(path, members, batch_rows):
    found = surveyed(path)
    assert sum(band.rows for band in found.bands) == members.is_dup.sum()
    cosine = dict(zip(members.row.tolist(), members.similarity.tolist(), strict=True))
    assert [band.low for band in found.bands] == [0.9, 0.902, 0.91, 0.93, 0.96, 1]
    gone = members.similarity[members.is_dup]
    for band, (_, _, most) in zip(found.bands[:-1], read_out.BANDS, strict=True):
        inside = (gone >= np.float32(band.low)) & (gone < np.float32(band.high))
        assert band.rows == inside.sum()
        assert len(band.shown.row) == min(most, band.rows)
        for row, similarity in zip(band.shown.row, band.shown.similarity, strict=True):
            assert cosine[row] == similarity
            assert np.float32(band.low) <= similarity < np.float32(band.high)
        assert (np.diff(band.shown.similarity) >= 0).all()
    assert set(found.bands[-1].shown.similarity.tolist()) == {1}


@pytest.mark.parametrize("keep", ["first", "last", "random"])
def test_spared_rows_stand_beside_the_row_that_components_keep(table, tmp_path, keep, batch_rows):
    import snipdedup

    rows = truth.clustered(ROWS, 16, 4, noise=0.3, copies=0.1)
    settings = {"threshold": START, "keep": keep, "seed": 9}
    star = snipdedup.dedup(rows, **settings)
    keepers = set(np.flatnonzero(~star.at(START, grouping="components").is_dup).tolist())
    groups = star.groups
    pq.write_table(groups, tmp_path / "g.parquet")
    found = surveyed(tmp_path / "g.parquet", keep=keep, seed=9)
    label = dict(zip(groups["row"].to_pylist(), groups["group"].to_pylist(), strict=True))
    staying = set(np.flatnonzero(~star.is_dup).tolist())
    assert found.spared.rows == len(staying - keepers)
    assert len(found.spared.shown.row) == min(read_out.CHAINED, found.spared.rows) > 0
    for row, by in zip(
        found.spared.shown.row.tolist(), found.spared.shown.representative.tolist(), strict=True
    ):
        assert row in staying - keepers
        assert by in keepers
        assert label[row] == label[by]


def test_samples_depend_on_the_seed_only(path, monkeypatch):
    def shown(seed, size):
        monkeypatch.setattr(read_out, "BATCH_ROWS", size)
        return [band.shown.row.tolist() for band in surveyed(path, seed).bands]

    assert shown(0, 100_000) == shown(0, 7) != shown(1, 7)


def test_a_sample_is_fair():
    counts = np.zeros(20)
    for seed in range(600):
        sample = read_out.Sample(5, seed)
        for start in range(0, 20, 6):
            rows = np.arange(start, min(start + 6, 20))
            sample.offer(Members(rows, rows, rows, np.ones(len(rows)), rows >= 0))
        counts[sample.shown.row] += 1
    assert counts.sum() == 3000
    assert abs(counts - 150).max() < 5 * np.sqrt(150 * 0.75)


def test_chained_and_unverified_rows(tmp_path):
    def write(similarity):
        columns = {
            "row": [0, 1, 2, 3], "group": [0] * 4, "representative": [0] * 4,
            "similarity": pa.array(similarity, "f4"), "is_dup": [False, True, True, True],
        }  # fmt: skip
        pq.write_table(pa.table(columns), tmp_path / "g.parquet")
        return surveyed(tmp_path / "g.parquet")

    found = write([1, 0.5, 0.9, 0.95])
    assert (found.below.rows, found.below.shown.row.tolist()) == (1, [1])
    assert [band.rows for band in found.bands] == [1, 0, 0, 1, 0, 0]
    assert found.edges[0] <= 0.5 < found.edges[1]
    assert found.largest[0].lowest == 0.5
    unknown = write([1, None, None, None])
    assert [band.rows for band in unknown.bands] == [3, 0, 0, 0, 0, 0]
    assert unknown.similarities.sum() == unknown.below.rows == 0
    assert np.isnan(unknown.largest[0].lowest)


@pytest.mark.parametrize("threshold", [1.0, 0.99999, 0.9999, 0.999, 0.5, -1.0])
def test_any_threshold(path, members, threshold):
    found = surveyed(path, threshold=threshold)
    assert found.similarities.sum() == members.is_dup.sum()
    assert len(found.edges) == len(found.similarities) < 300_000
    assert (np.diff(found.edges) > 0).all()
    gone = members.similarity[members.is_dup]
    assert sum(band.rows for band in found.bands) == (gone >= np.float32(threshold)).sum()
    assert found.below.rows == (gone < np.float32(threshold)).sum()
    assert found.bands[-1].rows == (gone == 1).sum()


def test_no_groups(tmp_path):
    kinds = {"row": "i8", "group": "i8", "representative": "i8", "similarity": "f4", "is_dup": "?"}
    columns = {name: pa.array(np.empty(0, kind)) for name, kind in kinds.items()}
    pq.write_table(pa.table(columns), tmp_path / "g.parquet")
    found = surveyed(tmp_path / "g.parquet")
    assert found.largest == []
    assert len(found.copied) == found.spared.rows == found.similarities.sum() == 0
    assert [len(band.shown.row) for band in found.bands] == [0] * 6


def test_keys_of_some_rows(path, members, batch_rows):
    wanted = members.row[::7]
    expected = {row: f"k{row}" for row in wanted.tolist() if row % 2 == 0}
    assert read_out.read_keys(path, wanted) == expected
    assert read_out.read_keys(path, np.array([10**9])) == {}
    assert read_out.read_keys(path, np.empty(0, np.int64)) == {}
