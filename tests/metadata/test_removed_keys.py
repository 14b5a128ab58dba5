"""`snip filter` by position: shuffled metadata is refused by its keys, at its first wrong row."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import truth
from samples import write_laion

from snipdedup.storage import external_sort

CUTS = (200, 450)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(features and metadata, OUT, its mask); the keys are in column Key."""
    tmp = tmp_path_factory.mktemp("byplace")
    rows = truth.clustered(600, 12, 3, clusters=100, noise=0.5, copies=0.1, dtype=np.float32)
    folder = write_laion(tmp / "set", rows, cuts=CUTS)
    assert truth.snip("dedup", folder, "--out", tmp / "out")[0] == 0
    return folder, tmp / "out", np.load(tmp / "out" / "is_dup.npy")


@pytest.fixture(params=[7, external_sort.HELD])
def parts(request, monkeypatch):
    """Keys in memory at a time."""
    monkeypatch.setattr(external_sort, "HELD", request.param)


def copy_of(made, folder, order):
    """Write the rows of the metadata in another order, into files of the same sizes."""
    paths = sorted((made[0] / "metadata").iterdir())
    table = pa.concat_tables([pq.read_table(path) for path in paths]).take(pa.array(order))
    folder.mkdir()
    start = 0
    for path in paths:
        rows = pq.read_metadata(path).num_rows
        pq.write_table(table.slice(start, rows), folder / path.name, row_group_size=33)
        start += rows
    return folder


def filtered(made, meta, out, *more):
    return truth.snip("filter", meta, "--is_dup", made[1], "--out", out, *more)


def test_the_same_order_passes_and_says_so(made, tmp_path, parts):
    status, said, _ = filtered(made, made[0] / "metadata", tmp_path / "all")
    assert status == 0
    assert f"checked: the Key of {made[2].sum():,} removed rows" in said
    status, said, _ = filtered(made, made[0] / "metadata", tmp_path / "part", "--start", 1)
    assert status == 0
    assert f"checked: the Key of {made[2][CUTS[0] :].sum():,} removed rows" in said


@pytest.mark.parametrize("part", [(), ("--start", 1, "--end", 3)])
def test_two_rows_exchanged_are_refused_by_the_first(made, tmp_path, parts, part):
    """One row that goes and one that stays are enough, and the first of them is named."""
    goes = CUTS[0] + 100 + int(np.argmax(made[2][CUTS[0] + 100 :]))
    stays = CUTS[1] + int(np.argmin(made[2][CUTS[1] :]))
    order = np.arange(600)
    order[[goes, stays]] = order[[stays, goes]]
    meta = copy_of(made, tmp_path / "meta", order)
    status, said, line = filtered(made, meta, tmp_path / "no", *part)
    assert (status, said, line.count("\n")) == (1, "", 1)
    place = f"metadata_{1 if goes < CUTS[1] else 2}.parquet row {goes - CUTS[int(goes >= CUTS[1])]}"
    assert f"{place} has the Key 'k{stays:06d}'" in line
    assert f"removed there 'k{goes:06d}'" in line
    assert "--on Key" in line
    assert not (tmp_path / "no").exists()


def test_shuffled_metadata_is_refused_and_found_by_key(made, tmp_path):
    order = np.random.default_rng(5).permutation(600)
    meta = copy_of(made, tmp_path / "meta", order)
    status, _, line = filtered(made, meta, tmp_path / "no")
    assert status == 1
    first = int(np.flatnonzero(made[2] & (order != np.arange(600)))[0])
    assert f"'k{order[first]:06d}', the row" in line
    assert filtered(made, meta, tmp_path / "yes", "--on", "Key")[0] == 0
    found = pa.concat_tables(map(pq.read_table, sorted((tmp_path / "yes").glob("*.parquet"))))
    assert found["Key"].to_pylist() == [f"k{n:06d}" for n in order if not made[2][n]]


def test_rows_that_stay_may_lie_in_any_order(made, tmp_path):
    """What the mask removes is the same, so nothing is wrong."""
    one, two = np.flatnonzero(~made[2])[:2]
    order = np.arange(600)
    order[[one, two]] = order[[two, one]]
    meta = copy_of(made, tmp_path / "meta", order)
    assert filtered(made, meta, tmp_path / "yes")[0] == 0


def test_without_the_column_only_numbers_of_rows_count(made, tmp_path):
    meta = tmp_path / "meta"
    meta.mkdir()
    for path in (made[0] / "metadata").iterdir():
        pq.write_table(pq.read_table(path).drop_columns(["Key"]).slice(0), meta / path.name)
    status, said, _ = filtered(made, meta, tmp_path / "yes")  # its uid is not what OUT knows
    assert status == 0
    assert "checked" not in said


def test_a_mask_that_the_run_did_not_write_is_not_compared(made, tmp_path):
    meta = copy_of(made, tmp_path / "meta", np.arange(600)[::-1].copy())
    np.save(tmp_path / "is_dup.npy", made[2])
    assert truth.snip("filter", meta, "--is_dup", tmp_path / "is_dup.npy",
                      "--out", tmp_path / "yes")[0] == 0  # fmt: skip


def test_numbers_and_csv_are_compared_as_texts(made, tmp_path):
    folder = tmp_path / "set"
    write_laion(folder, np.load(next((made[0] / "img_emb").glob("*_0.npy"))), cuts=(), columns="n")
    words = ("dedup", folder / "img_emb", "--metadata", folder / "metadata", "--key", "n")
    assert truth.snip(*words, "--out", tmp_path / "out")[0] == 0
    table = pq.read_table(folder / "metadata" / "metadata_0.parquet")
    pa.csv.write_csv(table, tmp_path / "same.csv")
    pa.csv.write_csv(table.slice(1, 199), tmp_path / "less.csv")
    pa.csv.write_csv(table.take(pa.array(np.roll(np.arange(200), 1))), tmp_path / "moved.csv")
    of = ("--is_dup", tmp_path / "out", "--out", tmp_path / "kept")
    assert "--on" in truth.snip("filter", tmp_path / "less.csv", *of)[2]
    status, _, line = truth.snip("filter", tmp_path / "moved.csv", *of)
    assert status == 1
    assert "--on n" in line
    assert "checked: the n" in truth.snip("filter", tmp_path / "same.csv", *of)[1]


def test_rows_that_go_for_a_reference_are_compared_too(made, tmp_path):
    rows = np.load(next((made[0] / "img_emb").glob("*_0.npy")))
    np.save(tmp_path / "reference.npy", rows[:50])
    words = ("dedup", made[0], "--reference", tmp_path / "reference.npy", "--out", tmp_path / "out")
    assert truth.snip(*words)[0] == 0
    goes = np.load(tmp_path / "out" / "is_dup.npy")
    assert goes[:50].all()
    words = ("--is_dup", tmp_path / "out", "--out", tmp_path / "kept")
    said = truth.snip("filter", made[0] / "metadata", *words)[1]
    assert f"checked: the Key of {goes.sum():,} removed rows" in said
