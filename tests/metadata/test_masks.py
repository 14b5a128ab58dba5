"""A mask lands on the right rows of whatever part of a set is there, or is refused."""

from __future__ import annotations

import json
import shutil
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from snipdedup.config import Filter
from snipdedup.errors import SnipError, UsageError
from snipdedup.metadata import filter, masks
from snipdedup.metadata.masks import Mask
from snipdedup.storage import out_folder

SIZES = [3, 5, 0, 4, 5]  # rows of the files of a small set; uneven on purpose


def small_set(folder, sizes=SIZES, name="m_{:04d}.parquet"):
    """Write files whose column n is the global row."""
    folder.mkdir(parents=True)
    begin = 0
    for number, rows in enumerate(sizes):
        table = pa.table({"n": pa.array(range(begin, begin + rows), pa.int64())})
        pq.write_table(table, folder / name.format(number))
        begin += rows
    return folder


def small_mask(path, rows=17, seed=0):
    """Write a mask; return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_dup = np.random.default_rng(seed).random(rows) < 0.4
    np.save(path, is_dup)
    return is_dup


def manifest(folder, sizes, kind="dedup"):
    """Lay down the part of a manifest that says how many rows each shard has."""
    shards = [{"name": f"e_{i}.npy", "rows": rows} for i, rows in enumerate(sizes)]
    body = {"kind": kind, "format": 1, "shards": shards, "outputs": {"is_dup.npy": {}}}
    (folder / "snip.json").write_text(json.dumps(body))


def rows_in(folder):
    """The global rows in a filtered folder, in order of its files."""
    return [n for p in sorted(folder.glob("*.parquet")) for n in pq.read_table(p)["n"].to_pylist()]


def flat(lists):
    return list(chain.from_iterable(lists))


def filtered(meta, mask, out, **more):
    filter.run(Filter(metadata=str(meta), is_dup=str(mask), out=str(out), **more))
    return rows_in(out)


@pytest.fixture
def a_set(tmp_path):
    """A set, its mask, and the rows of each file that stay."""
    meta = small_set(tmp_path / "meta")
    is_dup = small_mask(tmp_path / "published" / "is_dup.npy")
    ends = np.cumsum(SIZES)
    stay = [
        [n for n in range(end - rows, end) if not is_dup[n]]
        for end, rows in zip(ends, SIZES, strict=True)
    ]
    return meta, tmp_path / "published" / "is_dup.npy", stay, tmp_path


def test_the_whole_set(a_set):
    meta, mask, stay, tmp = a_set
    assert filtered(meta, mask, tmp / "out") == flat(stay)
    assert sorted(p.name for p in (tmp / "out").iterdir()) == [
        *[f"m_{i:04d}.parquet" for i in range(5)],
        "snip.json",
    ]


@pytest.mark.parametrize("start", range(5))
@pytest.mark.parametrize("length", [1, 2, 3])
def test_every_range_with_all_files_there(a_set, start, length):
    meta, mask, stay, tmp = a_set
    end = min(start + length, 5)
    assert filtered(meta, mask, tmp / "out", start=start, end=end) == flat(stay[start:end])


@pytest.mark.parametrize("how", ["manifest", "folder", "totals", "totals_from_0"])
@pytest.mark.parametrize(("start", "end"), [(1, 2), (1, 4), (3, 5), (4, 5), (0, 2)])
def test_a_range_alone_on_disk_where_the_set_is_known(a_set, how, start, end):
    meta, mask, stay, tmp = a_set
    for number, path in enumerate(sorted(meta.iterdir())):
        if not start <= number < end:
            path.unlink()
    more = {}
    if how.startswith("totals"):
        totals = np.cumsum(SIZES) if how == "totals" else np.cumsum([0, *SIZES])
        np.save(tmp / "totals.npy", totals.astype(np.int32))
        more["cumulative_sizes"] = str(tmp / "totals.npy")
    else:
        manifest(mask.parent, SIZES)
    spec = mask.parent if how == "folder" else mask
    found = filtered(meta, spec, tmp / "out", start=start, end=end, **more)
    assert found == flat(stay[start:end])


def test_a_range_alone_on_disk_is_refused_where_its_offset_is_not_known(a_set, snip):
    meta, mask, _, tmp = a_set
    for number in (0, 1, 2):
        (meta / f"m_{number:04d}.parquet").unlink()
    words = ("filter", meta, "--is_dup", mask, "--out", tmp / "out", "--start", 3, "--end", 5)
    said = snip(*words, status=1).stderr
    assert "m_0003.parquet begins is not known: files 0 to 2 are not there" in said
    assert "--cumulative_sizes" in said
    assert not (tmp / "out").exists()


def test_a_range_with_earlier_files_but_not_the_first_is_refused(a_set):
    meta, mask, _, tmp = a_set
    (meta / "m_0000.parquet").unlink()
    with pytest.raises(SnipError, match=r"is file 3|begins is not known"):
        filtered(meta, mask, tmp / "out", start=3, end=4)
    assert not (tmp / "out").exists()


def totals_file(path, totals):
    np.save(path, np.array(totals))
    return {"cumulative_sizes": str(path)}


@pytest.mark.parametrize("leading", [True, False])
def test_a_leading_0_of_totals_is_read_by_the_rows_of_the_files_that_are_there(tmp_path, leading):
    # [0, 3, 8, 12]: files of 3, 5, 4 rows after a leading 0, or of 0, 3, 5, 4 without one
    sizes = [3, 5, 4] if leading else [0, 3, 5, 4]
    meta = small_set(tmp_path / "meta", sizes)
    is_dup = small_mask(tmp_path / "mask.npy", 12)
    begin = sum(sizes[:2])
    expected = [n for n in range(begin, 12) if not is_dup[n]]
    more = totals_file(tmp_path / "totals.npy", [0, 3, 8, 12])
    mask, end = tmp_path / "mask.npy", len(sizes)
    assert filtered(meta, mask, tmp_path / "all", start=2, end=end, **more) == expected
    for number in (0, 1):
        (meta / f"m_{number:04d}.parquet").unlink()
    assert filtered(meta, mask, tmp_path / "some", start=2, end=end, **more) == expected
    assert filtered(meta, mask, tmp_path / "rest", start=2, **more) == expected


def test_a_leading_0_of_totals_that_can_mean_two_places_is_refused(tmp_path):
    meta = small_set(tmp_path / "meta", [0, 4, 4, 4])
    is_dup = small_mask(tmp_path / "mask.npy", 12)
    more = totals_file(tmp_path / "totals.npy", [0, 4, 8, 12])
    for number in (0, 1, 3):
        (meta / f"m_{number:04d}.parquet").rename(tmp_path / f"m_{number:04d}.parquet")
    with pytest.raises(SnipError, match="begin with 0: is that where file 0 begins, or is file 0"):
        filtered(meta, tmp_path / "mask.npy", tmp_path / "out", start=2, end=3, **more)
    assert not (tmp_path / "out").exists()
    totals_file(tmp_path / "totals.npy", [4, 8, 12])  # one meaning only: this is rows 8 to 12
    found = filtered(meta, tmp_path / "mask.npy", tmp_path / "out", start=2, end=3, **more)
    assert found == [n - 4 for n in range(8, 12) if not is_dup[n]]


def test_a_whole_set_is_still_checked_against_totals_with_a_leading_0(tmp_path):
    small_mask(tmp_path / "mask.npy", 12)
    meta = small_set(tmp_path / "meta", [5, 3, 4])
    more = totals_file(tmp_path / "totals.npy", [0, 3, 8, 12])
    with pytest.raises(SnipError, match=r"m_0000\.parquet has 5 rows, file 0 .* has 3"):
        filtered(meta, tmp_path / "mask.npy", tmp_path / "out", **more)
    with pytest.raises(SnipError, match=r"m_0001\.parquet has 3 rows, file 1 .* has 5"):
        filtered(meta, tmp_path / "mask.npy", tmp_path / "out", start=1, **more)


def test_a_start_without_end_goes_to_the_end_of_the_set(a_set):
    meta, mask, stay, tmp = a_set
    assert filtered(meta, mask, tmp / "out", start=3) == flat(stay[3:])
    assert filtered(meta, mask, tmp / "two", end=2) == flat(stay[:2])


def test_wrong_files_for_a_range_are_refused(a_set):
    meta, mask, _, tmp = a_set
    manifest(mask.parent, SIZES)
    with pytest.raises(
        SnipError, match=r"files 3 to 6 are wanted, the set of .*0\.parquet has 0 to 4"
    ):
        filtered(meta, mask, tmp / "out", start=3, end=7)
    with pytest.raises(SnipError, match=r"file 5 is wanted, the set of .*m_0000\.parquet has"):
        filtered(meta, mask, tmp / "out", start=5)
    with pytest.raises(SnipError, match=r"none of .* has the number 3 in its name"):
        filtered(f"{meta}/m_000[01].parquet", mask, tmp / "out", start=3, end=5)
    shutil.copy(meta / "m_0003.parquet", meta / "m_0004.parquet")
    with pytest.raises(SnipError, match=r"m_0004\.parquet has 4 rows, file 4 .* has 5"):
        filtered(meta, mask, tmp / "out", start=4, end=5)
    assert not (tmp / "out").exists()


def test_a_mask_of_another_set_is_refused(a_set):
    meta, mask, _, tmp = a_set
    for rows in (sum(SIZES) - 1, sum(SIZES) + 1):
        small_mask(mask, rows)
        with pytest.raises(SnipError, match=f"has 17 rows in 5 files, the mask .* has {rows}"):
            filtered(meta, mask, tmp / "out")
    small_mask(mask, 11)
    with pytest.raises(SnipError, match=r"rows 8 to 12 of their set, the mask .* has 11"):
        filtered(meta, mask, tmp / "out", start=3, end=4)
    small_mask(mask, 17)
    manifest(mask.parent, [5, 3, 0, 4, 5])
    with pytest.raises(SnipError, match=r"m_0000\.parquet has 3 rows, file 0 .* has 5"):
        filtered(meta, mask, tmp / "out")
    assert not (tmp / "out").exists()


def test_metadata_in_other_files_than_the_features(a_set):
    _, mask, stay, tmp = a_set
    manifest(mask.parent, SIZES)
    meta = small_set(tmp / "other", [10, 7])
    every = flat(stay)
    assert filtered(meta, mask, tmp / "out") == every
    assert filtered(meta, mask, tmp / "two", start=1, end=2) == [n for n in every if n >= 10]


def test_a_folder_of_snip_dedup_must_be_finished(a_set):
    meta, mask, _, tmp = a_set
    with pytest.raises(SnipError, match=r"expected a finished dedup folder with snip\.json"):
        filtered(meta, mask.parent, tmp / "out")


def test_a_manifest_that_is_not_the_masks_is_not_believed(a_set):
    meta, mask, stay, tmp = a_set
    manifest(mask.parent, [1, 1], kind="demo")
    assert filtered(meta, mask, tmp / "out") == flat(stay)
    manifest(mask.parent, [1, 1])
    with pytest.raises(SnipError, match="replaced after the run that wrote it"):
        filtered(meta, mask, tmp / "two")


@pytest.mark.parametrize("shape", [(17, 1), (1, 17)])
def test_a_mask_of_one_column_or_line_is_read_as_upstream_reads_it(a_set, shape):
    meta, mask, stay, tmp = a_set
    np.save(mask, np.load(mask).reshape(shape))
    assert filtered(meta, mask, tmp / "out") == flat(stay)


def test_masks_of_bytes_are_read_if_they_are_0_and_1(a_set):
    meta, mask, stay, tmp = a_set
    is_dup = np.load(mask)
    np.save(mask, is_dup.astype(np.uint8))
    assert filtered(meta, mask, tmp / "out") == flat(stay)
    np.save(mask, is_dup.astype(np.uint8) * 2)
    with pytest.raises(SnipError, match=r"row .* holds 2, expected 0 or 1"):
        filtered(meta, mask, tmp / "two")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((17, 2), bool), "expected a mask, one bool a row"),
        (np.zeros(17, np.int64), "expected a mask, one bool a row"),
        (np.zeros(17, np.float32), "expected a mask, one bool a row"),
        (np.array(True), "expected a mask, one bool a row"),
        (b"", "truncated or not a .npy file"),
        (b"PK\x03\x04", "truncated or not a .npy file"),
        (None, "no such mask"),
    ],
)
def test_what_is_no_mask_is_refused(a_set, content, message):
    meta, mask, _, tmp = a_set
    mask.unlink()
    if isinstance(content, bytes):
        mask.write_bytes(content)
    elif content is not None:
        np.save(mask, content)
    with pytest.raises(SnipError, match=message):
        filtered(meta, mask, tmp / "out")
    assert not (tmp / "out").exists()


def test_a_cut_mask_is_refused(a_set):
    meta, mask, _, tmp = a_set
    mask.write_bytes(mask.read_bytes()[:-3])
    with pytest.raises(SnipError, match=r"is_dup\.npy: truncated"):
        filtered(meta, mask, tmp / "out")


@pytest.mark.parametrize(
    ("totals", "message"),
    [
        ([3, 8, 8, 12, 18], "ends at 18 rows, the mask has 17"),
        ([3, 8, 7, 12, 17], "never fall"),
        ([3, 8, 8.5, 12, 17], "whole numbers"),
        ([[3, 17]], "expected 1-D running totals"),
        ([], "expected 1-D running totals"),
    ],
)
def test_wrong_totals_are_refused(a_set, totals, message):
    meta, mask, _, tmp = a_set
    np.save(tmp / "totals.npy", np.array(totals))
    with pytest.raises(SnipError, match=message):
        filtered(meta, mask, tmp / "out", cumulative_sizes=str(tmp / "totals.npy"))


def test_totals_that_contradict_the_manifest_are_refused(a_set):
    meta, mask, _, tmp = a_set
    manifest(mask.parent, SIZES)
    np.save(tmp / "totals.npy", np.cumsum([5, 3, 0, 4, 5]))
    with pytest.raises(SnipError, match="say different row counts"):
        filtered(meta, mask, tmp / "out", cumulative_sizes=str(tmp / "totals.npy"))


def test_a_finished_folder_says_so_and_is_replaced_only_when_told(a_set, snip):
    meta, mask, stay, tmp = a_set
    words = ("filter", meta, "--is_dup", mask, "--out", tmp / "out")
    assert f"{len(flat(stay)):,} of 17 rows kept in 5 files" in snip(*words).stdout
    before = {p.name: p.stat().st_mtime_ns for p in (tmp / "out").iterdir()}
    assert "finished already" in snip(*words).stdout
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp / "out").iterdir()}
    assert "other files" in snip(*words, "--end", 2, status=1).stderr
    small_mask(mask, seed=5)
    assert "other mask" in snip(*words, status=1).stderr
    snip(*words, "--end", 2, "--overwrite")
    is_dup = np.load(mask)
    assert rows_in(tmp / "out") == [n for n in range(8) if not is_dup[n]]
    assert len(list((tmp / "out").iterdir())) == 3


def test_a_stopped_run_goes_on(a_set, monkeypatch):
    meta, mask, stay, tmp = a_set
    monkeypatch.setattr(out_folder, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        filtered(meta, mask, tmp / "out")
    assert not (tmp / "out" / "snip.json").exists()
    assert rows_in(tmp / "out") == []
    monkeypatch.undo()
    with pytest.raises(SnipError, match="stopped run with other files"):
        filtered(meta, mask, tmp / "out", end=2)
    assert filtered(meta, mask, tmp / "out") == flat(stay)


def test_never_into_the_input(a_set):
    meta, mask, _, _ = a_set
    before = sorted(meta.iterdir())
    for out in (meta, meta / "kept"):
        with pytest.raises(SnipError, match="lies in the input folder"):
            filtered(meta, mask, out)
    assert sorted(meta.iterdir()) == before


def test_never_into_the_mask_or_the_totals(a_set):
    meta, mask, _, tmp = a_set
    manifest(mask.parent, SIZES)
    np.save(tmp / "totals.npy", np.cumsum(SIZES))
    for spec, out in (
        (mask.parent, mask.parent),
        (mask.parent, mask.parent / "kept"),
        (mask, mask),
    ):
        with pytest.raises(SnipError, match="snip never writes there"):
            filtered(meta, spec, out)
    for out in (tmp / "totals.npy", tmp):
        with pytest.raises(SnipError, match="snip never writes there"):
            filtered(meta, mask, out, cumulative_sizes=str(tmp / "totals.npy"))
    assert {path.name for path in mask.parent.iterdir()} == {"is_dup.npy", "snip.json"}


@pytest.mark.parametrize(("start", "end"), [(2, 2), (3, 1), (-1, 2), (None, 0)])
def test_file_numbers_that_make_no_range_are_wrong_usage(start, end):
    with pytest.raises(UsageError, match="--start and --end are file numbers"):
        Filter(metadata="m", is_dup="d", out="o", start=start, end=end)


def test_real_keyframes_by_range_as_by_the_whole(data, tmp_path, snip):
    meta = data / "keyframes" / "metadata"
    sizes = [pq.read_metadata(p).num_rows for p in sorted(meta.iterdir())]
    is_dup = np.random.default_rng(7).random(sum(sizes)) < 0.25
    published = tmp_path / "published"
    published.mkdir()
    np.save(published / "is_dup.npy", is_dup)
    np.save(tmp_path / "totals.npy", np.cumsum(sizes))
    snip("filter", meta, "--is_dup", published / "is_dup.npy", "--out", tmp_path / "all")
    three = ("--start", 3, "--end", 6, "--is_dup", published / "is_dup.npy", "--out")
    alone = tmp_path / "alone"
    alone.mkdir()
    for number in (3, 4, 5):
        shutil.copy(meta / f"metadata_{number:04d}.parquet", alone)
    snip("filter", meta, *three, tmp_path / "a")
    snip("filter", alone, *three, tmp_path / "b", "--cumulative_sizes", tmp_path / "totals.npy")
    snip("filter", alone, *three, tmp_path / "c", status=1)
    assert not (tmp_path / "c").exists()
    manifest(published, sizes)
    snip("filter", alone, *three, tmp_path / "d")
    begin = sum(sizes[:3])
    for number in (3, 4, 5):
        name = f"metadata_{number:04d}.parquet"
        stay = ~is_dup[begin : begin + sizes[number]]
        begin += sizes[number]
        expected = pq.read_table(meta / name).filter(pa.array(stay))
        for folder in ("all", "a", "b", "d"):
            assert pq.read_table(tmp_path / folder / name).equals(expected), (folder, number)


# The pure part: which files are meant.


def place(names, rows, start, end, *, total=None, sizes=None):
    total = sum(rows) if total is None else total
    known = [] if sizes is None else [np.array(sizes)]
    files = list(zip(names, rows, strict=True))
    return masks.place_range(files, Mask(None, np.zeros(total, bool), known), start, end)


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        (["m_0.parquet", "m_1.parquet", "m_10.parquet"], [0, 1, 10]),
        (["metadata_0003.parquet"], [3]),
        (["laion2B_07.parquet", "laion2B_08.parquet"], [7, 8]),
        (
            ["part-00000-5b54c5d5-bbcf.c000.parquet", "part-00001-5b54c5d5-bbcf.c000.parquet"],
            [0, 1],
        ),
        (["train-00003-of-00010.parquet"], [3]),
        (["train-00003-of-00010.parquet", "train-00004-of-00010.parquet"], [3, 4]),
        (["train-00003-of-00010.parquet", "test-00003-of-00010.parquet"], None),
        (["part-00003-5b54c5d5-0b8e-4e54-a1f0-0123456789ab-c000.snappy.parquet"], [3]),
        (["part-00003-tid-4937494-5b54c5d5-0b8e-4e54-a1f0-0123456789ab-12-1-c000.parquet"], [3]),
        (["part-00003.parquet"], [3]),
        (["part-2024-01-07.parquet"], [7]),
        (["00a1f3.parquet", "01b2c4.parquet"], None),
        (["a_0.parquet", "b_1.parquet"], None),
        (["train.parquet", "val.parquet"], None),
        (["metadata.parquet"], None),
    ],
)
def test_numbers_in_names(names, numbers):
    assert masks.file_numbers([f"/some/2024/{name}" for name in names]) == numbers


@pytest.mark.parametrize(
    "name", ["train-{:05d}-of-00010.parquet", "part-{:05d}-5b54c5d5-0b8e-4e54-c000.parquet"]
)
def test_one_file_with_a_name_of_hugging_face_or_spark_is_placed_by_its_own_number(name):
    sizes = list(range(1, 11))
    one = ([name.format(3)], sizes[3:4])
    assert place(*one, 3, 4, total=55, sizes=sizes) == (0, 1, 6)
    with pytest.raises(SnipError, match="has the number 9 in its name"):
        place(*one, 9, 10, total=55, sizes=sizes)


def test_files_without_numbers_count_by_position_if_they_are_the_whole_set():
    names = ["aa", "bb", "cc"]
    assert place(names, [2, 3, 4], 1, 2) == (1, 2, 2)
    with pytest.raises(SnipError, match="bb begins is not known: no name has a number"):
        place(names, [2, 3, 4], 1, 2, total=20)
    assert place(names, [2, 3, 4], 1, 2, total=20, sizes=[2, 3, 4, 11]) == (1, 2, 2)
    assert place(["bb", "cc"], [3, 4], 1, 3, total=20, sizes=[2, 3, 4, 11]) == (0, 2, 2)
    with pytest.raises(SnipError, match="which of 2 files are numbers 1 to 3 is not certain"):
        place(["bb", "cc"], [3, 4], 1, 4, total=20, sizes=[2, 3, 4, 11])


def test_names_counted_from_1_are_not_guessed():
    names = ["m_1", "m_2", "m_3", "m_4"]
    with pytest.raises(SnipError, match="is file 1 m_1 or m_2"):
        place(names, [5, 5, 5, 5], 1, 2)
    with pytest.raises(SnipError, match="has the number 0 in its name"):
        place(names, [5, 5, 5, 5], 0, 2)
    # known row counts decide: only by position do they fit
    assert place(names, [2, 3, 4, 5], 1, 2, sizes=[2, 3, 4, 5]) == (1, 2, 2)


def test_files_from_the_middle_on_are_found_by_name_where_the_set_is_known():
    names = [f"m_{i}" for i in range(2, 6)]
    sizes = [1, 2, 3, 4, 5, 6]
    assert place(names, sizes[2:], 3, 4, total=21, sizes=sizes) == (1, 2, 6)


def test_a_gap_in_the_names_is_refused():
    with pytest.raises(SnipError, match="has the number 1 in its name"):
        place(["m_0", "m_2", "m_3"], [1, 1, 1], 0, 2)
    with pytest.raises(SnipError, match="is file 2 m_2 or m_3"):
        place(["m_0", "m_2", "m_3"], [1, 1, 1], 2, 3)


def test_a_range_far_beyond_the_files_is_refused_at_once(a_set):
    meta, mask, _, tmp = a_set
    with pytest.raises(UsageError, match="file numbers up to 1,000,000, not rows"):
        filtered(meta, mask, tmp / "out", end=10**9)
    with pytest.raises(SnipError, match="has the number 5 in its name"):
        place([f"m_{i}" for i in range(5)], SIZES, 3, 10**12)
    with pytest.raises(SnipError, match="is not certain"):
        place(["a", "b"], [1, 2], 0, 10**12)
