"""Rows past 2^31 and 2^32: numbers, places and files, by sets of which next to nothing exists."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import truth

from snipdedup import dedup
from snipdedup.config import Filter
from snipdedup.deduplication.inputs import Inputs
from snipdedup.deduplication.levels import tabulate
from snipdedup.deduplication.pair_search import PairSearch
from snipdedup.deduplication.result import checked, choose
from snipdedup.features.formats import ArrayShard, NpyShard
from snipdedup.features.shards import Features, open_features, plan_pieces
from snipdedup.groups.keep import rank_by
from snipdedup.join import forest
from snipdedup.join.forest import make_edges
from snipdedup.join.model import fit_model
from snipdedup.join.tasks import JoinSettings, JoinTasks, Partition
from snipdedup.metadata import filter
from snipdedup.storage import external_sort

LAION_5B = 5_850_000_000
SHARD = 1_000_000
FAR = [0, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 32) + 70, LAION_5B - 1]


def imagined(rows, value=1.0, dim=24, dtype=np.float16):
    """A shard of rows that are all alike and take no memory."""
    return ArrayShard(np.broadcast_to(np.full(dim, value, dtype), (rows, dim)), "imagined")


@pytest.fixture(scope="module")
def laion():
    """5,850 shards of a million rows; each row holds the number of its shard."""
    return Features([imagined(SHARD, value, 4, np.float32) for value in range(LAION_5B // SHARD)])


def test_places_and_pieces_of_a_fake_table_of_shards(laion):
    assert laion.rows == LAION_5B
    for row in FAR:
        assert laion.place(row)[1] == row % SHARD
        (piece,) = plan_pieces(laion.offsets, row, row + 1)
        assert piece == (row // SHARD, slice(row % SHARD, row % SHARD + 1), slice(0, 1))
    found = laion.gather(np.array(FAR[::-1]))
    wanted = np.float32([row // SHARD for row in FAR[::-1]])
    assert np.array_equal(found, np.repeat(wanted[:, None], 4, axis=1))
    cut = ((1 << 32) // SHARD + 1) * SHARD  # rows of two shards, past 2^32
    assert laion.read(cut - 2, cut + 2)[:, 0].tolist() == [4294, 4294, 4295, 4295]
    settings = JoinSettings(0.9, 0.999, 0, keep_bad=False, chunk_rows=1 << 15, device="cpu")
    spans = JoinTasks(laion, settings, Path("work")).spans
    assert spans[0] == (0, 1 << 18)
    assert spans[-1][1] == LAION_5B
    assert all(one[1] == other[0] for one, other in pairwise(spans))


def test_a_shard_of_more_than_2_32_rows(tmp_path):
    path, rows = tmp_path / "sparse.npy", (1 << 32) + 1000
    with path.open("wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": (rows, 1)}
        np.lib.format.write_array_header_1_0(file, header)
        begin = file.tell()
        os.truncate(path, begin + 2 * rows)
        file.seek(begin + 2 * ((1 << 32) + 5))
        np.float16([7, 8, 9]).tofile(file)
    shard, at = NpyShard(path), 1 << 32
    assert shard.rows == rows
    assert shard.read(at + 4, at + 9).ravel().tolist() == [0, 7, 8, 9, 0]
    assert shard.take(np.array([5, at + 5, at + 7])).ravel().tolist() == [0, 7, 9]


@pytest.fixture(scope="module")
def far():
    """Real rows in two places of a set of 5e9: before 2^31, and past 2^32; where each begins."""
    x = truth.clustered(4000, 24, 3, clusters=900, noise=0.4, dtype=np.float16)
    starts = [((1 << 31) // (1 << 18) - 1) << 18, ((1 << 32) // (1 << 18) + 2) << 18]
    parts = [
        imagined(starts[0]), ArrayShard(x[:2500], "one"),
        imagined(starts[1] - starts[0] - 2500), ArrayShard(x[2500:], "other"),
        imagined(LAION_5B - starts[1] - 1500),
    ]  # fmt: skip
    row = np.concatenate([np.arange(2500) + starts[0], np.arange(1500) + starts[1]])
    return x, Features(parts), row


def test_codes_and_joins_keep_rows_past_2_32(far, tmp_path):
    x, features, row = far
    settings = JoinSettings(0.9, 0.999, 0, keep_bad=False, chunk_rows=1 << 15, device="cpu")
    tasks = JoinTasks(features, settings, tmp_path)
    fit_model(open_features(x), 0.9, 0.999, 0, 1).save(tasks.model_file)
    tasks.spans = [(int(row[0]), int(row[2499]) + 1), (int(row[2500]), int(row[-1]) + 1)]
    for number in range(2):
        tasks.encode(number)
    encoded = [np.load(folder / "rows.npy") for folder in tasks.folders]
    assert np.unique(np.concatenate(encoded)).tolist() == row.tolist()
    tasks.skip = np.zeros(tasks.spans[1][1], bool)
    every = Partition(0, tasks.model.lists.nlist)
    tasks.join(every)
    found, _ = tasks.load_joined(every)
    brute = dedup(x, threshold=0.9, method="exact").search.forest
    assert found.a.tolist() == row[brute.a].tolist()
    assert found.b.tolist() == row[brute.b].tolist()
    assert (found.a < 1 << 31).any()
    assert (found.b > 1 << 32).any()


@pytest.mark.parametrize("grouping", ["star", "components"])
def test_groups_and_masks_past_2_32(far, grouping):
    x, features, row = far
    near = dedup(x, threshold=0.9, method="exact", grouping=grouping)
    forest = near.search.forest
    found = PairSearch(
        names=[f"part {number}" for number in range(5)],
        offsets=features.offsets,
        threshold=0.9,
        forest=make_edges(row[forest.a], row[forest.b], forest.similarity),
        copies=row[near.search.copies],
        originals=row[near.search.originals],
        bad=np.empty(0, np.int64),
        inputs=Inputs(features),
    )
    rank = rank_by("first", 0, None)
    result = checked(choose(found, 0.9, grouping, "first", rank))
    for name in ("row", "group", "representative"):
        expected = row[getattr(near.members, name)]
        assert getattr(result.members, name).tolist() == expected.tolist()
    assert np.array_equal(result.members.is_dup, near.members.is_dup)
    table = found.groups_table(result.members).to_pydict()
    assert set(table["shard"]) == {"part 1", "part 3"}
    assert max(table["shard_row"]) < 2500
    steps = [0.9, 0.95]
    assert tabulate(found, steps, None, None) == tabulate(near.search, steps, None, None)
    assert len(result.is_dup) == LAION_5B
    assert np.array_equal(result.is_dup[row], near.is_dup)
    assert (result.removed, result.rows) == (near.removed, LAION_5B)
    assert result.removed_rows.row.tolist() == row[near.is_dup].tolist()


def test_all_is_the_same_in_eight_bytes_a_row(tmp_path):
    """As above 2^32 rows, which would take 34 GB: the switch is set to a hundred rows."""
    x = truth.clustered(3000, 16, 6, copies=0.1)
    expected = dedup(x, threshold=0.9)
    with (
        mock.patch.multiple(external_sort, SHORT_ROWS=100, HELD=50),
        mock.patch.multiple(forest, HELD_EDGES=50),
    ):
        found = dedup(x, threshold=0.9, out=tmp_path / "out")
        assert forest.edge_kind(3000).itemsize == 20
    assert found.forest.equals(expected.forest)
    assert pq.read_table(tmp_path / "out" / "groups.parquet").equals(expected.groups)
    assert np.array_equal(np.load(tmp_path / "out" / "is_dup.npy"), expected.is_dup)


@pytest.mark.slow
def test_a_mask_of_more_than_2_32_rows_filters_the_right_ones(tmp_path):
    path, rows = tmp_path / "is_dup.npy", (1 << 32) + 3000
    begin = 1 << 32
    with path.open("wb") as file:
        header = {"descr": "|b1", "fortran_order": False, "shape": (rows,)}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        os.truncate(path, start + rows)
        file.seek(start + begin + 1000)
        np.array([True, False, True]).tofile(file)
    np.save(tmp_path / "totals.npy", np.array([begin, begin + 1000, rows]))
    table = pa.table({"n": np.arange(2000)})
    (tmp_path / "m").mkdir()
    pq.write_table(table, tmp_path / "m" / "part_2.parquet")
    asked = {"metadata": str(tmp_path / "m"), "is_dup": str(path), "start": 2, "end": 3}
    asked |= {"cumulative_sizes": str(tmp_path / "totals.npy"), "out": str(tmp_path / "kept")}
    filter.run(Filter(**asked))
    kept = pq.read_table(next((tmp_path / "kept").rglob("part_2.parquet")))["n"].to_pylist()
    assert kept == [n for n in range(2000) if n not in (0, 2)]
